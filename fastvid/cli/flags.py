"""The flags of the verbs' commands, built from the table of arguments (`fastvid.requests.arguments`).

A verb's clips and prompt are positional arguments (words); every other argument is a flag.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fastvid import checks
from fastvid.requests import levers
from fastvid.requests.arguments import ARGUMENTS, CHECKPOINT, CLIPS, DRIVING, PROMPT_OF_CLIP, VERBS, Argument, type_of
from fastvid.requests.forcing import FORCING

RESUME_INPUTS = ("image", "last_image", "video", "video_2", "mask", "reference_images", *DRIVING)
"""The inputs that `resume` takes again."""


def number(text: str) -> int | float:
    """Parses a number, or a fraction such as 24000/1001; the request checks its range."""
    for convert in (int, float, Fraction):
        try:
            value = convert(text)
        except (ValueError, ZeroDivisionError):
            continue
        return float(value) if isinstance(value, Fraction) else value
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number")


def numbers(text: str) -> list[int | float]:
    """Parses numbers separated by commas or spaces."""
    return [number(part) for part in text.replace(",", " ").split()]


def scale(text: str) -> int | float | list[int | float]:
    """Parses one number, or several as a list."""
    return values[0] if len(values := numbers(text)) == 1 else values


def keyframe(text: str) -> tuple[int | float, str]:
    """Parses FRAME=FILE."""
    frame, equals, path = text.partition("=")
    if not equals or not frame or not path:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not FRAME=FILE, such as 8=middle.png")
    return number(frame), path


def shot(text: str) -> tuple[str, int | float]:
    """Parses PROMPT:SECONDS; the prompt may contain colons."""
    prompt, colon, seconds = text.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f'{text!r:.60} is not PROMPT:SECONDS, such as "a red circle moving right:2"')
    return prompt, number(seconds)


def part(text: str) -> tuple[str, str]:
    """Parses NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not NAME=PATH, such as vae=wan_2.1_vae.safetensors")
    return name, path


def size_in_bytes(text: str) -> int:
    """Parses a GPU's memory such as 24GB, 16.5GiB or 80, in units of 2^30 bytes, as GPUs are labeled."""
    value = number(text.upper().removesuffix("B").removesuffix("I").removesuffix("G").strip())
    if not 0 < value < 2**20:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no size of a card's memory such as 24GB")
    return int(value * 2**30)


# ---------------------------------------------------------------- the flags

PARSED: Mapping[str, Mapping[str, Any]] = {
    "shots": {"type": shot, "action": "append"},
    "keyframes": {"type": keyframe, "action": "append"},
    "reference_images": {"action": "append"},
    "conditioning_scale": {"type": scale},
    "sigmas": {"type": numbers},
    "guidance_interval": {"type": numbers},
}
"""Options of `add_argument` for arguments that are not a plain number or string."""


@dataclass(frozen=True)
class Flag:
    """A flag for argparse. name: such as --seed. options: keywords of `add_argument`."""

    name: str
    row: Argument
    options: Mapping[str, Any]

    def add_to(self, group: Any, dest: str, verb: str = "") -> None:
        group.add_argument(self.name, dest=dest, help=self.row.help_for(verb), **self.options)


def _flag(name: str, row: Argument) -> Flag:
    spelling, _, metavar = row.flag.partition(" ")
    if not metavar:
        action = "store_false" if spelling.startswith("--no-") else "store_true"
        return Flag(spelling, row, {"action": action, "default": None})
    is_number = type_of(name) in ("int | None", "float | None")
    options = PARSED.get(name, {"type": number} if is_number else {})
    return Flag(spelling, row, {**options, "metavar": metavar})


_SHOTS_FILE = Argument(checks.text, 'shots from a JSON file: [["a red circle", 2], ...]', "--shots FILE")


def _rows() -> Mapping[str, Argument]:
    rows: dict[str, Argument] = {}
    for name, row in ARGUMENTS.items():
        rows |= {name: row} if row.flag else {}
        rows |= {"shots_file": _SHOTS_FILE} if name == "shots" else {}
    return rows


FLAGS: Mapping[str, Flag] = {name: _flag(name, row) for name, row in _rows().items()}
"""All arguments that have a flag, in the order of the help texts."""

SAMPLING: tuple[str, ...] = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "boundary_ratio",
    "flow_shift",
    "sigmas",
    "solver",
)
SAMPLING += ("schedule", "known_guidance_scale")
SAMPLING += FORCING
BATCH = ("batch_size",)
LEVERS: tuple[str, ...] = ("quality", "preset", *(name for name in levers.OFF if ARGUMENTS[name].flag))


# ---------------------------------------------------------------- the verbs


@dataclass(frozen=True)
class Verb:
    """A verb's command. clips: the metavars of its clips, in the order of `CLIPS`."""

    summary: str
    examples: tuple[str, ...]
    clips: tuple[str, ...] = ()


RED = '"a red circle moving right on a white background"'
COMMANDS: Mapping[str, Verb] = {
    "generate": Verb(
        "make a video from a prompt, optionally with pictures",
        (
            f"fastvid generate {RED} -o out.mp4",
            'fastvid generate "a red circle moving right" -o out.webm --aspect 16:9 --budget 480p --seconds 2 --seed 7',
            'fastvid generate "a blue star" -o out.mp4 --image first.png --keyframe 8=middle.png --last-image last.png',
            'echo "a blue square" | fastvid generate - -o frames/',
            "fastvid generate --recipe out.mp4 -o again.mp4              (the same video)",
            "fastvid generate --recipe out.mp4 -o other.mp4 --seed 8     (another seed)",
        ),
    ),
    "image": Verb(
        "make a picture from a prompt",
        ('fastvid image "a green square on a gray background" -o out.png --size 128x96',),
    ),
    "extend": Verb(
        "continue a clip after its end, before its start, or on both sides",
        (
            "fastvid extend clip.mp4 -o longer.mp4 --seconds 2            (with the prompt in the clip's recipe)",
            f"fastvid extend clip.mp4 {RED} -o longer.mp4 --direction before",
        ),
        ("CLIP",),
    ),
    "loop": Verb(
        "make a clip loop by a bridge from its end to its start",
        ("fastvid loop clip.mp4 -o loop.mp4 --seconds 0.5",),
        ("CLIP",),
    ),
    "blend": Verb(
        "join two clips by a generated bridge",
        ('fastvid blend a.mp4 b.mp4 "a red circle on a white background" -o both.mp4 --seconds 1',),
        ("A", "B"),
    ),
    "edit": Verb(
        "change a clip by a prompt: all of it, where a mask is white, or around it",
        (
            f"fastvid edit clip.mp4 {RED} -o edited.mp4 --strength 0.7",
            f"fastvid edit clip.mp4 {RED} -o edited.mp4 --mask mask.png",
            'fastvid edit clip.mp4 "a blue circle ..." -o edited.mp4 --source-prompt "a red circle ..."',
            f"fastvid edit clip.mp4 {RED} -o wider.mp4 --size 96x64      (outpainting)",
        ),
        ("CLIP",),
    ),
    "storyboard": Verb(
        "make a video of several shots, each continuing the one before",
        (
            'fastvid storyboard --shot "a red circle moving right:1.5" --shot "a red circle growing:1" -o out.mp4',
            "fastvid storyboard --shots shots.json -o out.mp4",
        ),
    ),
    "finalize": Verb(
        "make the final video of a draft, at full size",
        (
            f"fastvid generate {RED} --draft -o draft.mp4",
            "fastvid finalize draft.mp4 -o out.mp4",
        ),
        ("DRAFT",),
    ),
    "interpolate": Verb(
        "make frames between the frames of a clip, for a higher frame rate",
        (
            "fastvid interpolate clip.mp4 -o smooth.mp4 --factor 2        (with the prompt in the clip's recipe)",
            f"fastvid interpolate clip.mp4 {RED} -o smooth.mp4 --fps 32",
        ),
        ("CLIP",),
    ),
    "upscale": Verb(
        "make a clip larger, in tiles where it is larger than what the model was trained on",
        (
            "fastvid upscale clip.mp4 -o large.mp4 --scale 2",
            f"fastvid upscale clip.mp4 {RED} -o large.mp4 --size 192x128 --strength 0.3",
        ),
        ("CLIP",),
    ),
}
assert set(COMMANDS) == set(VERBS)


def has_prompt(verb: str) -> bool:
    """Whether a verb's command takes a prompt as a word; one with shots does not."""
    return "shots" not in VERBS[verb]


def words_of(verb: str) -> dict[str, str]:
    """A verb's positional arguments, with their metavars."""
    clips = dict(zip(CLIPS.get(verb, ()), COMMANDS[verb].clips, strict=True))
    return clips | ({"prompt": "PROMPT"} if has_prompt(verb) else {})


def flags_of(verb: str) -> list[str]:
    """A verb's arguments that are flags."""
    takes = {*VERBS[verb], *(("shots_file",) if "shots" in VERBS[verb] else ())} - {*words_of(verb), *CHECKPOINT}
    return [name for name in FLAGS if name in takes]


def usage_of(verb: str, command: str = "fastvid") -> str:
    """A usage line, such as: fastvid extend CLIP [PROMPT]."""
    optional = verb in PROMPT_OF_CLIP
    words = [f"[{word}]" if name == "prompt" and optional else word for name, word in words_of(verb).items()]
    return " ".join((command, verb, *words, *(["--shot PROMPT:SECONDS ..."] if verb == "storyboard" else [])))


def verbs_with(flag: str) -> list[str]:
    """The verbs that take a flag such as --image."""
    return [verb for verb in VERBS if flag in [FLAGS[name].name for name in flags_of(verb)]]


def with_flags(message: str, verb: str = "generate") -> str:
    """A message with argument names replaced by flags, at its start and where it offers them."""
    words = {name: word for name, word in words_of(verb).items() if name != "prompt"}
    spelled = {name: flag.name for name, flag in FLAGS.items()} | words
    names = "|".join(sorted(spelled, key=len, reverse=True))
    opening = r"(^|\(|is |are |and |but |with |give |leave )"
    return re.sub(rf"{opening}({names})(?=[=:\[ ])", lambda match: match[1] + spelled[match[2]], message)
