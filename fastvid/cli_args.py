"""The command line's words: its commands, flags, and what to say when one is not known."""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from typing import Any, NoReturn

from fastvid.errors import InvalidRequest
from fastvid.limits import BUDGETS, SOLVERS, nearest_name

COMMANDS = ("generate", "resume", "inspect", "convert", "doctor")

EPILOG = """exit status:
  0 done, 1 failed, 2 bad usage or request, 130 interrupted (nothing is left under the output's name)

environment:
  FASTVID_MODEL, FASTVID_DEVICE, FASTVID_DTYPE, FASTVID_BACKEND, FASTVID_ATTENTION are defaults for the flags;
  FASTVID_PROMPT_ENDPOINT, FASTVID_PROMPT_MODEL, FASTVID_PROMPT_KEY are for --expand-prompt;
  FASTVID_DEBUG=1 shows the traceback of an error"""

GENERATE = """examples:
  fastvid generate "a red circle moving right on a white background" -o out.mp4
  fastvid generate "a red circle moving right" -o out.webm --aspect 16:9 --budget 480p --seconds 2 --seed 7
  echo "a blue square" | fastvid generate - -o frames/
  fastvid generate --recipe out.mp4 -o again.mp4              (the same video)
  fastvid generate --recipe out.mp4 -o other.mp4 --seed 8     (the same but for the seed)"""


class UsageError(InvalidRequest):
    """The command line cannot be read."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the process; flags are not abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def check_flags(self, words: list[str]) -> None:
        """Name the nearest flag for one that is not known, before argparse misses what it stood for."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            flag = word.split("=", 1)[0]
            if word == "--":
                return
            if flag.startswith("--") and flag not in known:
                self.error(f"unknown flag {flag:.60}; the nearest is {nearest_name(flag, tuple(known))}")


def number(text: str) -> int | float:
    """A number as it is written, 24000/1001 too; the request says whether it may be one."""
    for convert in (int, float, Fraction):
        try:
            value = convert(text)
        except (ValueError, ZeroDivisionError):
            continue
        return float(value) if isinstance(value, Fraction) else value
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number")


def numbers(text: str) -> list[int | float]:
    """Numbers with commas or spaces between them."""
    return [number(part) for part in text.replace(",", " ").split()]


def scale(text: str) -> int | float | list[int | float]:
    """A number, or several."""
    return found[0] if len(found := numbers(text)) == 1 else found


def lora(text: str) -> tuple[str, float] | tuple[str, float, str]:
    """FILE:SCALE, or FILE alone with a scale of 1; behind either :high or :low. A colon may be in the file's name."""
    path, colon, expert = text.rpartition(":")
    if colon and path and expert in ("high", "low"):
        return (*lora(path)[:2], expert)
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def part(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not NAME=PATH, such as vae=wan_2.1_vae.safetensors")
    return name, path


def build() -> dict[str, Parser]:
    """A parser a command, and the main one under ""."""
    main = Parser(
        prog="fastvid",
        usage="fastvid COMMAND ...",
        description="Video diffusion: text in, video out.\n\ncommands:\n"
        "  generate    make a video from a prompt\n"
        "  resume      go on with a request whose process ended, from its --checkpoint\n"
        "  inspect     what a model is, without loading it\n"
        "  convert     turn pickles and original Wan files into what fastvid loads, and back\n"
        "  doctor      what this machine has, and what every operation would run on\n\n"
        "Each has its own --help.",
        epilog='example:\n  fastvid generate "a red circle moving right on a white background" -o out.mp4\n\n' + EPILOG,
    )
    main.add_argument("--version", action="store_true", help="print the version and exit")
    parsers = {
        **{"": main, "generate": _generate(), "resume": _resume()},
        **{"inspect": _inspect(), "convert": _convert(), "doctor": _doctor()},
    }
    assert tuple(parsers)[1:] == COMMANDS
    return parsers


def _generate() -> Parser:
    parser = Parser(
        prog="fastvid generate", description="Make a video from a prompt.", epilog=f"{GENERATE}\n\n{EPILOG}"
    )
    parser.add_argument("prompt", nargs="?", help="what to show; - reads it from standard input")
    _add_output(parser)
    parser.add_argument(
        "--recipe", metavar="FILE", help="make the video in FILE again; what is given beside it is changed"
    )
    _add_request(parser)
    _add_model(parser)
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpoint", metavar="FOLDER", help="what `fastvid resume FOLDER` goes on from, kept up to date"
    )
    _add_checkpoint(group)
    return parser


def _add_output(parser: Parser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help=".mp4, .webm, .gif, .npy, .png (one frame), or FOLDER/ for PNGs",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the video on standard output")


def _add_checkpoint(group: Any) -> None:
    group.add_argument(
        "--checkpoint-every",
        type=number,
        metavar="S",
        help="the least seconds from one to the next (default: 1; 0: after every step)",
    )
    group.add_argument(
        "--keep-checkpoint",
        action="store_true",
        default=None,
        help="do not remove it when the video is done",
    )


def _resume() -> Parser:
    parser = Parser(
        prog="fastvid resume",
        description="Go on with a request whose process ended, from the folder that --checkpoint named.\n"
        "The video is the same, to the last bit, as without the interruption.",
        epilog="example:\n"
        '  fastvid generate "a red circle moving right" --seconds 20 --checkpoint job.ckpt -o out.mp4   (interrupted)\n'
        f"  fastvid resume job.ckpt -o out.mp4\n\n{EPILOG}",
    )
    parser.add_argument("folder", help="the checkpoint")
    _add_output(parser)
    _add_checkpoint(parser)
    group = parser.add_argument_group("files that are not where they were")
    for name in ("image", "last-image", "video", "mask"):
        group.add_argument(f"--{name}", metavar="FILE", help="the same file as then")
    group.add_argument("--reference-image", action="append", dest="reference_images", metavar="FILE", help="the same")
    _add_model(parser)
    return parser


def _add_request(parser: Parser) -> None:
    group = parser.add_argument_group(
        "the video (default: as the model's recipe says; embedded: 64x64, 17 frames at 16 fps)"
    )
    add = group.add_argument
    add("--negative-prompt", metavar="TEXT", help="what not to show")
    add("--expand-prompt", action="store_true", help="have the prompt written out first; the recipe keeps both")
    add("--prompt-endpoint", metavar="URL", help="who writes it: OpenAI's chat protocol (not for the embedded model)")
    add("--prompt-model", metavar="NAME", help="the language model's name there; its key is FASTVID_PROMPT_KEY")
    add("--width", type=number, metavar="N", help="pixels, 64 to 2048 (video: within 1920x1080 or 1080x1920)")
    add("--height", type=number, metavar="N", help="pixels, as --width")
    add("--size", metavar="WxH", help="both at once, such as 832x480")
    add("--aspect", metavar="W:H", help="aspect ratio, such as 16:9: the nearest size within --budget")
    add("--budget", metavar="AREA", help=f"{', '.join(BUDGETS)} or a number of pixels (default: the model's own size)")
    add("--num-frames", type=number, metavar="N", help="frames, 1 to 131072")
    add("--seconds", type=number, metavar="S", help="length in seconds instead of --num-frames: round(seconds x fps)")
    add("--fps", type=number, metavar="N", help="frames a second, 0.1 to 240")
    add("--seed", type=number, metavar="N", help="0 to 2^63-1 (default: a random one, which is shown)")
    add("--image", metavar="FILE", help="a picture: the first frame (I2V, TI2V, VACE, embedded)")
    add("--last-image", metavar="FILE", help="a picture: the last frame (FLF2V, I2V-A14B, VACE)")
    add("--video", metavar="FILE", help="a control video: depth, pose, or frames to keep (VACE)")
    add("--mask", metavar="FILE", help="of that video: white is made, black stays; a picture counts for all frames")
    add(
        "--reference-image",
        action="append",
        dest="reference_images",
        metavar="FILE",
        help="a picture of what the video shows (VACE); may be repeated",
    )
    add(
        "--conditioning-scale",
        type=scale,
        metavar="X",
        help="how much these count (default: 1); A,B,... for each control layer",
    )
    group = parser.add_argument_group("sampling (default: as the model's recipe says; embedded: 20 steps)")
    add = group.add_argument
    add("--steps", type=number, dest="num_inference_steps", metavar="N", help="denoising steps, 1 to 1000")
    add("--guidance-scale", type=number, metavar="X", help="weight of the prompt, 0 to 1000; 1: no guidance")
    add(
        "--guidance-scale-2",
        type=number,
        metavar="X",
        help="the same at low noise, for models with two experts (default: as --guidance-scale if that is given)",
    )
    add("--flow-shift", type=number, metavar="X", help="shift of the noise levels, 0.01 to 100")
    add(
        "--sigmas",
        type=numbers,
        metavar="A,B,...",
        help="noise levels instead of --steps and --flow-shift: descending, in (0, 1]",
    )
    add("--solver", metavar="NAME", help=f"one of {', '.join(SOLVERS)}")


def _add_model(parser: Parser) -> None:
    add = parser.add_argument_group("the model and where it runs").add_argument
    add("--model", metavar="MODEL", help="embedded, a folder, a file, or a hub id (default: embedded)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 (default: what suits the device)")
    add("--backend", metavar="NAME", help="of the operations: auto, reference, triton, cuda (default: auto)")
    add("--attention", metavar="NAME", help="auto, reference, sdpa, flash, triton, cuda (default: auto)")
    add(
        "--offload",
        metavar="NAME",
        help="weights in host memory while they are not used: auto, none, text (encoders), blocks (default: auto)",
    )
    _add_files(parser)


def _add_files(parser: Any) -> None:
    parser.add_argument(
        "--part",
        type=part,
        action="append",
        metavar="NAME=PATH",
        help="where a part of the model comes from: vae, text_encoder, image_encoder, tokenizer, transformer_2, or "
        "base (a whole folder, for all that is missing beside a single file); may be repeated",
    )
    parser.add_argument(
        "--lora",
        type=lora,
        action="append",
        metavar="FILE:SCALE",
        help="a LoRA merged into the model, with a scale of 1 if none is given; FILE:SCALE:high or :low for one of two "
        "experts; may be repeated",
    )


def _inspect() -> Parser:
    parser = Parser(
        prog="fastvid inspect",
        description="Show what a model is, from its configurations and file headers, without loading it.",
        epilog=f"example:\n  fastvid inspect embedded\n\n{EPILOG}",
    )
    parser.add_argument("model", help="embedded, a folder, a file, or a hub id")
    _add_files(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _convert() -> Parser:
    parser = Parser(
        prog="fastvid convert",
        description="Turn a model, or one part of it, from one layout into the other, bit for bit.\n\n"
        "Pickles (.pth, .pt, .bin, .ckpt) are opened in a child process that makes nothing but tensors.",
        epilog="examples:\n"
        "  fastvid convert Wan2.1-T2V-1.3B wan-diffusers                (a whole folder)\n"
        "  fastvid convert wan-diffusers wan-original --to original\n"
        "  fastvid convert wan2.1_t2v_1.3B_bf16.safetensors transformer  (ComfyUI's single file)\n"
        "  fastvid convert Wan2.1_VAE.pth vae\n"
        "  fastvid convert self_forcing_dmd.pt self-forcing --base Wan2.1-T2V-1.3B-Diffusers  (a whole folder)\n"
        f"  fastvid convert longlive_lora.pt longlive_lora.safetensors\n\n{EPILOG}",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a model folder in either layout, or a file or folder of one part"
    )
    parser.add_argument("destination", metavar="DST", help="a new folder, or for one part a new .safetensors file")
    parser.add_argument("--to", default="diffusers", metavar="LAYOUT", help="diffusers (default) or original")
    parser.add_argument("--base", metavar="FOLDER", help="a whole model: everything but the transformer in SRC")
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="which weights of a training checkpoint (default: generator_ema, then generator, ...)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print one JSON object about what was written")
    return parser


def _doctor() -> Parser:
    parser = Parser(
        prog="fastvid doctor",
        description="Show what this machine has, and what every operation would run on.",
        epilog=f"example:\n  fastvid doctor --json\n\n{EPILOG}",
    )
    parser.add_argument("--device", metavar="NAME", help="for this device (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def parse(words: list[str]) -> tuple[str, argparse.Namespace]:
    """(command, its flags); the command is "" for fastvid itself. Raises UsageError; --help raises SystemExit."""
    parsers = build()
    command = words[0] if words else ""
    if command and not command.startswith("-") and command not in COMMANDS:
        near = nearest_name(command, COMMANDS)
        raise UsageError(f"unknown command {command[:60]!r}; the nearest is {near} (see fastvid --help)")
    command, words = (command, words[1:]) if command in COMMANDS else ("", words)
    parser = parsers[command]
    parser.check_flags(words)
    flags, rest = parser.parse_known_args(words)
    if rest:
        hint = "; put a prompt of several words in quotes" if command == "generate" else ""
        parser.error(f"unexpected {rest[0][:60]!r}{hint}")
    if command == "" and not flags.version:
        parser.print_help(sys.stderr)
        raise UsageError("no command given (see fastvid --help)")
    return command, flags
