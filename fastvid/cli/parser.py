"""The parsers of all commands, and the errors for unknown commands and flags.

The verbs' flags are in `fastvid.cli.flags`; this module adds all other flags.
"""

from __future__ import annotations

import argparse
import sys

from fastvid.checks import near_name
from fastvid.cli import flags as cli_flags
from fastvid.cli import tool_parsers
from fastvid.cli.command_parser import EPILOG, Parser, UsageError, add_files
from fastvid.cli.flags import (
    BATCH,
    FLAGS,
    LEVERS,
    RESUME_INPUTS,
    SAMPLING,
    flags_of,
    has_prompt,
    size_in_bytes,
    usage_of,
    words_of,
)
from fastvid.requests.arguments import CHECKPOINT, PROMPT_OF_CLIP, VERBS

OTHERS = {
    "resume": "continue an interrupted request from its --checkpoint",
    "plan": "show what a request would cost, without running it",
    "inspect": "describe a model, without loading it, or a video and its recipe",
    "models": "list the models that are known by name",
    "download": "bring a model from the hub into the local cache, and verify its files",
    "convert": "convert pickles and original Wan files to safetensors in diffusers' layout, and back",
    "calibrate": "measure a model once, for levers that need it (magcache)",
    "tune": "find the fastest right back end of every operation on this machine",
    "doctor": "show this machine's hardware and software, and the back end of every operation",
    "bench": "run benchmarks of operations and models on this machine",
}
COMMANDS = (*VERBS, *OTHERS)

PLAN = """examples:
  fastvid plan "a red circle moving right" --seconds 5
  fastvid plan extend clip.mp4 --seconds 2
  fastvid plan --model wan2.1-t2v-14b --size 832x480 --card "RTX 4090"     (no files, no GPU needed)
  fastvid plan --model wan2.1-t2v-14b --format q4_k_m --device-memory 16GB
  fastvid plan storyboard --shots shots.json --model FOLDER --json"""

SHAPED = ("size", "width", "height", "aspect", "num_frames", "seconds", "fps", "negative_prompt")
"""Arguments of the videos that a model is measured on."""

MODELS = "embedded, a name (`fastvid models`), a folder, a file, or a hub id"


def build() -> dict[str, Parser]:
    """A parser for each command; the main one is under ""."""
    return {
        "": _main(),
        **{verb: _verb(verb) for verb in VERBS},
        "resume": _resume(),
        "plan": _plan("generate"),
        "inspect": tool_parsers.inspect(),
        "models": tool_parsers.models(),
        "download": tool_parsers.download(),
        "convert": tool_parsers.convert(),
        "calibrate": _calibrate(),
        "tune": tool_parsers.tune(),
        "doctor": tool_parsers.doctor(),
        "bench": tool_parsers.bench(),
    }


def _main() -> Parser:
    summaries = {verb: command.summary for verb, command in cli_flags.COMMANDS.items()} | OTHERS
    main = Parser(
        prog="fastvid",
        usage="fastvid COMMAND ...",
        description="Video diffusion: text, pictures and clips in, video out.\n\ncommands:\n"
        + "\n".join(f"  {name:<11} {summary}" for name, summary in summaries.items())
        + "\n\nEach has its own --help.",
        epilog='example:\n  fastvid generate "a red circle moving right on a white background" -o out.mp4\n\n' + EPILOG,
    )
    main.add_argument("--version", action="store_true", help="print the version and exit")
    return main


# ---------------------------------------------------------------- verbs, resume and plan


def _verb(verb: str) -> Parser:
    command = cli_flags.COMMANDS[verb]
    parser = Parser(
        prog=f"fastvid {verb}",
        usage=f"{usage_of(verb)} -o PATH [flags]",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog="\n  ".join(("examples:", *command.examples)) + f"\n\n{EPILOG}",
    )
    _add_words(parser, verb)
    videos, pictures = ".mp4, .mov, .webm, .gif, .npy", ".png, .jpg"
    formats = f"{pictures}, {videos}" if verb == "image" else f"{videos}, {pictures} (one frame)"
    _add_output(parser, f"{formats}, FOLDER/ for PNGs, or - for standard output (MP4)")
    _add_recipe(parser)
    _add_request(parser, verb)
    _add_batch(parser, verb)
    _add_model(parser)
    group = parser.add_argument_group("checkpoints")
    for name in CHECKPOINT:
        FLAGS[name].add_to(group, name)
    parser.add_output_flags(" about the video on standard output")
    return parser


def _resume() -> Parser:
    parser = Parser(
        prog="fastvid resume",
        description="Continue an interrupted request from the folder that --checkpoint named.\n"
        "The video is bit for bit the same as without the interruption.",
        epilog="example:\n"
        '  fastvid generate "a red circle moving right" --seconds 20 --checkpoint job.ckpt -o out.mp4   (interrupted)\n'
        f"  fastvid resume job.ckpt -o out.mp4\n\n{EPILOG}",
    )
    parser.add_argument("folder", help="the checkpoint")
    _add_output(parser, "as for the command that was interrupted")
    for name in CHECKPOINT[1:]:
        FLAGS[name].add_to(parser, name)
    group = parser.add_argument_group("input files that have moved")
    for name in (name for name in RESUME_INPUTS if name != "reference_images"):
        group.add_argument(f"--{name.replace('_', '-')}", metavar="FILE", help="new path of the same file")
    group.add_argument(
        "--reference-image", action="append", dest="reference_images", metavar="FILE", help="new path; may be repeated"
    )
    _add_model(parser)
    parser.add_output_flags(" about the video on standard output")
    return parser


def _plan(verb: str) -> Parser:
    parser = Parser(
        prog="fastvid plan" if verb == "generate" else f"fastvid plan {verb}",
        usage=f"{usage_of(verb, 'fastvid plan')} [flags]   (any verb's words and flags; without one: generate)",
        description="Show what a request would cost, without running it or reading weights.",
        epilog=f"{PLAN}\n\n{EPILOG}",
    )
    _add_words(parser, verb)
    _add_output(parser, "ignored, so that any command can be planned by putting plan in front", required=False)
    _add_recipe(parser)
    group = parser.add_argument_group("the plan")
    group.add_argument(
        "--device-memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="plan for another GPU with this much memory, such as 24GB; without a time unless --card names it",
    )
    group.add_argument(
        "--card", metavar="NAME", help='plan for another GPU by name, such as "RTX 4090", and its published rates'
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        help="plan for a published model in quantized files: q4_k_m, q8_0, fp8_e4m3, ..., or for each part, such as "
        "transformer=q4_k,text_encoder=q8_0 (default: 16 bits)",
    )
    group.add_argument("--measure", action="store_true", help="measure this machine's speed again (about 2 s)")
    _add_request(parser, verb)
    _add_batch(parser, verb)
    _add_model(parser, "; or a published model by name, such as wan2.1-t2v-14b")
    parser.add_output_flags()
    return parser


def _calibrate() -> Parser:
    parser = Parser(
        prog="fastvid calibrate",
        usage='fastvid calibrate --cache ["PROMPT"] [flags]',
        description="Measure a model once, on a few videos of which none is kept, for what leaves out work by it.\n"
        "Without a prompt three of fastvid's own are taken. A result is for one model, solver and shift.",
        epilog="examples:\n  fastvid calibrate --cache\n"
        "  fastvid calibrate --cache --model wan2.1-t2v-1.3b --steps 50\n"
        f'  fastvid generate "a red circle moving right" --cache magcache -o out.mp4\n\n{EPILOG}',
    )
    _add_words(parser, "generate")
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--cache",
        dest="measured",
        action="store_const",
        const="cache",
        help="how the size of what the blocks add changes from step to step, for --cache magcache of a request",
    )
    group.add_argument("-o", "--output", metavar="FILE", help="where the result goes (default: the user's cache)")
    takes, left_out = flags_of("generate"), (*LEVERS, *CHECKPOINT, "seed")
    for title, names in (
        ("the videos (defaults: the model's preset)", [n for n in takes if n not in SAMPLING and n in SHAPED]),
        ("sampling", [n for n in takes if n in SAMPLING and n not in left_out]),
    ):
        group = parser.add_argument_group(title)
        for name in names:
            FLAGS[name].add_to(group, name, "generate")
    _add_model(parser)
    parser.add_output_flags(" about the result")
    return parser


def _add_batch(parser: Parser, verb: str) -> None:
    names = "-o out.mp4 makes out-0001.mp4, ...; or give FOLDER/, or a name with {number} or {seed}"
    group = parser.add_argument_group(f"several videos ({names})")
    parser.set_defaults(prompts=None)
    if has_prompt(verb):
        line = '{"prompt": ..., "negative_prompt": ..., "seed": ...}'
        text = f"a video of every line of a text file, or of a .jsonl file with {line} a line"
        group.add_argument("--prompts", metavar="FILE", help=text)
    each = "; with --prompts, of each" if has_prompt(verb) else ""
    group.add_argument("--seeds", metavar="LIST", help=f"a video with every seed, such as 1-8,12{each}")
    for name in BATCH:
        FLAGS[name].add_to(group, name, verb)


def _add_output(parser: Parser, about: str, required: bool = True) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("-o", "--output", metavar="PATH", help=about)
    group.add_argument("--frames-dir", metavar="FOLDER", help="the same as -o FOLDER/")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="also replace a file that this command reads, or the file that a link leads to",
    )


def _add_words(parser: Parser, verb: str) -> None:
    kind = "a clip: a video, a .gif, a .npy, a picture, or a folder of PNGs"
    for name, word in words_of(verb).items():
        default = " (default: the prompt in the clip's recipe)" if verb in PROMPT_OF_CLIP else ""
        text = f"what to show; - reads it from standard input{default}" if name == "prompt" else kind
        parser.add_argument(name, nargs="?", metavar=word, help=text)


def _add_recipe(parser: Parser) -> None:
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="make the video in FILE again; other flags change what they name. A recipe holds no clips or pictures: "
        "give them again",
    )


def _add_request(parser: Parser, verb: str) -> None:
    takes = flags_of(verb)
    preset = "defaults: the model's preset"
    size = "; embedded: 64x64, 17 frames at 16 fps" if {"width", "num_frames"} <= set(takes) else ""
    for title, names in (
        (f"the video ({preset}{size})", [name for name in takes if name not in (*SAMPLING, *LEVERS, *BATCH)]),
        (f"sampling ({preset}; embedded: 20 steps)", [name for name in takes if name in SAMPLING]),
        ("less work (default: none of it)", [name for name in takes if name in LEVERS]),
    ):
        group = parser.add_argument_group(title)
        for name in names:
            FLAGS[name].add_to(group, name, verb)


def _add_model(parser: Parser, also: str = "") -> None:
    add = parser.add_argument_group("the model and where it runs").add_argument
    add(
        "--model",
        metavar="MODEL",
        help=f"{MODELS} (default: embedded){also}",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add(
        "--dtype",
        metavar="NAME",
        help="fp32, bf16, fp16, or as torch names them; auto: bf16 also on a CPU that multiplies it itself (default: "
        "bf16 on a GPU, fp32 on a CPU)",
    )
    add("--vae-dtype", metavar="NAME", help="the VAE's dtype (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--backend", metavar="NAME", help="back end of the operations: auto, reference, triton, cuda (default: auto)")
    add(
        "--attention",
        metavar="NAME",
        help="back end of attention: auto, reference, sdpa, library, cudnn, aten_flash, flash, flash3, flash4, sage, "
        "triton, cuda, cuda_pair, cuda_fp8, cuda_int8 (default: auto); or what self-attention looks at: "
        "sparse, sparse:keep=0.3,dense_steps=0.25",
    )
    add(
        "--offload",
        metavar="NAME",
        help="which weights stay in host memory while unused: auto, none, text (encoders), blocks (default: auto)",
    )
    add(
        "--gpus",
        "--parallel",
        dest="parallel",
        metavar="N",
        help="processes that make each video together, one per GPU: a number, auto (all GPUs), or a layout such as "
        "guidance=2,ulysses=4 (default: 1)",
    )
    add(
        "--link",
        metavar="NAME",
        help="what connects those GPUs, from which a layout is chosen: auto (asks the driver), nvlink, pcie, "
        "infiniband, loopback, or two of them: within a host and between hosts (default: auto)",
    )
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay the transformer's calls as CUDA graphs, captured once per shape (default: auto)",
    )
    add(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        help="use weights on a CPU where they lie in their mapped files (default: files from 64 MiB on local disks)",
    )
    add_files(parser)


def parse(words: list[str]) -> tuple[str, argparse.Namespace]:
    """Parses a command line into (command, its flags); the command is "" for fastvid itself. flags.verb: the verb to
    run or plan.

    Raises UsageError; --help raises SystemExit.
    """
    command = words[0] if words else ""
    if command and not command.startswith("-") and command not in COMMANDS:
        near = near_name(command, COMMANDS)
        hint = f"the nearest is {near}" if near else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {command[:60]!r}; {hint} (see fastvid --help)")
    command, words = (command, words[1:]) if command in COMMANDS else ("", words)
    named = next(iter(words), "") if command == "plan" else command
    verb = named if named in VERBS else "generate"
    words = words[1:] if command == "plan" and named in VERBS else words
    parser = _plan(verb) if command == "plan" else build()[command]
    words, passed_on = _split(words) if command == "bench" else (words, [])
    parser.check_flags(words)
    # Words and flags may be mixed.
    flags, rest = parser.parse_known_intermixed_args(words)
    flags.verb, flags.planned, flags.passed_on = verb, command == "plan", passed_on
    if rest:
        prompted = (command in VERBS or command == "plan") and has_prompt(verb)
        parser.error(f"unexpected {rest[0][:60]!r}{'; put a prompt of several words in quotes' if prompted else ''}")
    if command == "" and not flags.version:
        parser.print_help(sys.stderr)
        raise UsageError("no command given (see fastvid --help)")
    return command, flags


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Splits words at the first --."""
    index = words.index("--") if "--" in words else len(words)
    return words[:index], words[index + 1 :]
