"""What the command line says of a request: a flag for every argument of every verb, in one table.

Which verb takes which argument is said in `fastvid.requests.request.VERBS` and `CLIPS`, and nowhere here: a verb's
command has its clips and its prompt as words, and a flag for each of the rest.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from fastvid.checks import BUDGETS, SCHEDULES, SOLVERS
from fastvid.requests.request import CLIPS, DIRECTIONS, STRENGTH, TOLD, VERBS

ONLY_IN_PYTHON = ("latents", "prompt_embeds", "negative_prompt_embeds", "original_prompt")
CHECKPOINT = ("checkpoint", "checkpoint_every", "keep_checkpoint")  # of every verb, and not of its request
RESUMED = ("image", "last_image", "video", "video_2", "mask", "reference_images")  # what `resume` may be given again
PROMPT = ("expand_prompt", "prompt_endpoint", "prompt_model")  # who writes a prompt out: for every verb with a prompt


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


def keyframe(text: str) -> tuple[int | float, str]:
    """FRAME=FILE."""
    frame, equals, path = text.partition("=")
    if not equals or not frame or not path:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not FRAME=FILE, such as 8=middle.png")
    return number(frame), path


def shot(text: str) -> tuple[str, int | float]:
    """PROMPT:SECONDS; a colon may be in the prompt."""
    prompt, colon, seconds = text.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f'{text!r:.60} is not PROMPT:SECONDS, such as "a red circle moving right:2"')
    return prompt, number(seconds)


# ---------------------------------------------------------------- the flags


@dataclass(frozen=True)
class Flag:
    """How an argument is given. name: as it is written; options: of argparse's add_argument; verbs: what is said of it
    in the help of a verb where it means something else."""

    name: str
    help: str
    options: Mapping[str, Any] = field(default_factory=dict)
    verbs: Mapping[str, str] = field(default_factory=dict)


def _number(name: str, metavar: str, text: str, **verbs: str) -> Flag:
    return Flag(name, text, {"type": number, "metavar": metavar}, verbs)


def _text(name: str, metavar: str, text: str, **verbs: str) -> Flag:
    return Flag(name, text, {"metavar": metavar}, verbs)


_ADDED = dict.fromkeys(("loop", "blend"), "frames of the bridge") | {"extend": "frames to add on each side"}
_ADDED_SECONDS = {verb: text.replace("frames", "seconds") + " (default: 1)" for verb, text in _ADDED.items()}
_GROWS = {"edit": "larger than the clip: it stands in the middle, and what is around it is made"}

FLAGS: Mapping[str, Flag] = {
    "negative_prompt": _text("--negative-prompt", "TEXT", "what not to show"),
    "expand_prompt": Flag(
        "--expand-prompt", "have the prompt written out first; the recipe keeps both", {"action": "store_true"}
    ),
    "prompt_endpoint": _text(
        "--prompt-endpoint", "URL", "who writes it: OpenAI's chat protocol (not for the embedded model)"
    ),
    "prompt_model": _text("--prompt-model", "NAME", "the language model's name there; its key is FASTVID_PROMPT_KEY"),
    "shots": Flag(
        "--shot",
        "a shot: its prompt and how long it is; repeat it, in their order",
        {"type": shot, "action": "append", "metavar": "PROMPT:SECONDS"},
    ),
    "shots_file": _text("--shots", "FILE", 'the same from a JSON file: [["a red circle", 2], ...]'),
    "direction": _text("--direction", "WHERE", f"{', '.join(DIRECTIONS)} the clip (default: {DIRECTIONS[0]})"),
    "width": _number("--width", "N", "pixels, 64 to 2048 (video: within 1920x1080 or 1080x1920)"),
    "height": _number("--height", "N", "pixels, as --width"),
    "size": _text(
        "--size",
        "WxH",
        "both at once, such as 832x480",
        finalize="both at once (default: the draft's own full size)",
        **_GROWS,
    ),
    "aspect": _text("--aspect", "W:H", "aspect ratio, such as 16:9: the nearest size within --budget"),
    "budget": _text("--budget", "AREA", f"{', '.join(BUDGETS)} or a number of pixels (default: the model's own size)"),
    "num_frames": _number("--num-frames", "N", "frames, 1 to 131072", **_ADDED),
    "seconds": _number(
        "--seconds", "S", "length in seconds instead of --num-frames: round(seconds x fps)", **_ADDED_SECONDS
    ),
    "fps": _number("--fps", "N", "frames a second, 0.1 to 240"),
    "draft": Flag(
        "--draft", "half the size and fewer steps, to look at; see fastvid finalize", {"action": "store_true"}
    ),
    "seed": _number("--seed", "N", "0 to 2^63-1 (default: a random one, which is shown)"),
    "strength": _number(
        "--strength",
        "X",
        "0 to 1: how far it goes from the clip",
        **{
            "edit": f"0 to 1: how far it goes from the clip (default: {STRENGTH['edit']}; embedded: 0.4; 1 around a "
            "clip on a larger frame)",
            "finalize": f"0 to 1: how far it goes from the draft (default: {STRENGTH['finalize']})",
        },
    ),
    "source_prompt": _text(
        "--source-prompt", "TEXT", "what the clip shows now: keeps motion and layout better (FlowEdit)"
    ),
    "image": _text("--image", "FILE", "a picture: the first frame (I2V, TI2V, VACE, embedded)"),
    "last_image": _text("--last-image", "FILE", "a picture: the last frame (FLF2V, I2V-A14B, VACE, embedded)"),
    "keyframes": Flag(
        "--keyframe",
        "a picture that is frame FRAME, counted from 0 (VACE, embedded); may be repeated",
        {"type": keyframe, "action": "append", "metavar": "FRAME=FILE"},
    ),
    "video": _text("--video", "FILE", "a control video: depth, pose, or frames to keep (VACE)"),
    "mask": _text(
        "--mask",
        "FILE",
        "of that video: white is made, black stays; a picture counts for all frames",
        edit="white may change, black stays as it is; a picture counts for all frames",
    ),
    "reference_images": Flag(
        "--reference-image",
        "a picture of what the video shows (VACE); may be repeated",
        {"action": "append", "metavar": "FILE"},
    ),
    "conditioning_scale": Flag(
        "--conditioning-scale",
        "how much these count (default: 1); A,B,... for each control layer",
        {"type": scale, "metavar": "X"},
    ),
    "num_inference_steps": _number("--steps", "N", "denoising steps, 1 to 1000"),
    "guidance_scale": _number("--guidance-scale", "X", "weight of the prompt, 0 to 1000; 1: no guidance"),
    "guidance_scale_2": _number(
        "--guidance-scale-2",
        "X",
        "the same at low noise, for models with two experts (default: as --guidance-scale if that is given)",
    ),
    "known_guidance_scale": _number(
        "--known-guidance-scale",
        "X",
        "the same in edits and where some frames are known: pictures, clips, what an earlier window has made (default: "
        "as --guidance-scale if that is given)",
    ),
    "flow_shift": _number("--flow-shift", "X", "shift of the noise levels, 0.01 to 100"),
    "sigmas": Flag(
        "--sigmas",
        "noise levels instead of --steps and --flow-shift: descending, in (0, 1]",
        {"type": numbers, "metavar": "A,B,..."},
    ),
    "solver": _text("--solver", "NAME", f"one of {', '.join(SOLVERS)}"),
    "schedule": _text(
        "--schedule", "NAME", f"{SCHEDULES[0]}, one stretch after another, or {SCHEDULES[1]} (default: {SCHEDULES[0]})"
    ),
}
"""Every argument that can be given as a flag, in the order in which help shows them."""

SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift", "sigmas", "solver")
SAMPLING += ("schedule", "known_guidance_scale")


# ---------------------------------------------------------------- the verbs


@dataclass(frozen=True)
class Verb:
    """A verb's command. clips: what its clips are called, in the order of `CLIPS`."""

    summary: str
    examples: tuple[str, ...]
    clips: tuple[str, ...] = ()


RED = '"a red circle moving right on a white background"'
COMMANDS: Mapping[str, Verb] = {
    "generate": Verb(
        "make a video from a prompt, and perhaps from pictures",
        (
            f"fastvid generate {RED} -o out.mp4",
            'fastvid generate "a red circle moving right" -o out.webm --aspect 16:9 --budget 480p --seconds 2 --seed 7',
            'fastvid generate "a blue star" -o out.mp4 --image first.png --keyframe 8=middle.png --last-image last.png',
            'echo "a blue square" | fastvid generate - -o frames/',
            "fastvid generate --recipe out.mp4 -o again.mp4              (the same video)",
            "fastvid generate --recipe out.mp4 -o other.mp4 --seed 8     (the same but for the seed)",
        ),
    ),
    "image": Verb(
        "make a picture from a prompt",
        ('fastvid image "a green square on a gray background" -o out.png --size 128x96',),
    ),
    "extend": Verb(
        "make what comes after a clip, or before it",
        (
            "fastvid extend clip.mp4 -o longer.mp4 --seconds 2            (its own prompt, from its recipe)",
            f"fastvid extend clip.mp4 {RED} -o longer.mp4 --direction before",
        ),
        ("CLIP",),
    ),
    "loop": Verb(
        "make a bridge from a clip's end to its start", ("fastvid loop clip.mp4 -o loop.mp4 --seconds 0.5",), ("CLIP",)
    ),
    "blend": Verb(
        "join two clips by a bridge between them",
        ('fastvid blend a.mp4 b.mp4 "a red circle on a white background" -o both.mp4 --seconds 1',),
        ("A", "B"),
    ),
    "edit": Verb(
        "make a clip anew after a prompt, all of it, where a mask is white, or around it",
        (
            f"fastvid edit clip.mp4 {RED} -o edited.mp4 --strength 0.7",
            f"fastvid edit clip.mp4 {RED} -o edited.mp4 --mask mask.png",
            'fastvid edit clip.mp4 "a blue circle ..." -o edited.mp4 --source-prompt "a red circle ..."',
            f"fastvid edit clip.mp4 {RED} -o wider.mp4 --size 96x64      (outpainting)",
        ),
        ("CLIP",),
    ),
    "storyboard": Verb(
        "make a video of several shots, each going on from the one before",
        (
            'fastvid storyboard --shot "a red circle moving right:1.5" --shot "a red circle growing:1" -o out.mp4',
            "fastvid storyboard --shots shots.json -o out.mp4",
        ),
    ),
    "finalize": Verb(
        "make a draft at its full size",
        (
            f"fastvid generate {RED} --draft -o draft.mp4",
            "fastvid finalize draft.mp4 -o out.mp4",
        ),
        ("DRAFT",),
    ),
}
assert set(COMMANDS) == set(VERBS)


def has_prompt(verb: str) -> bool:
    """Whether a verb's command has a prompt among its words: not one whose prompts are those of its shots."""
    return "shots" not in VERBS[verb]


def words_of(verb: str) -> dict[str, str]:
    """The arguments that stand as words behind a verb, and what help calls them."""
    clips = dict(zip(CLIPS.get(verb, ()), COMMANDS[verb].clips, strict=True))
    return clips | ({"prompt": "PROMPT"} if has_prompt(verb) else {})


def flags_of(verb: str) -> list[str]:
    """The arguments of a verb that are flags."""
    takes = {*VERBS[verb], *(PROMPT if has_prompt(verb) else ())} - set(words_of(verb))
    takes |= {"size"} if "width" in takes else set()
    takes |= {"shots_file"} if "shots" in takes else set()
    return [name for name in FLAGS if name in takes]


def usage_of(verb: str, command: str = "fastvid") -> str:
    """Such as: fastvid extend CLIP [PROMPT] -o PATH."""
    told = verb in TOLD
    words = [f"[{word}]" if name == "prompt" and told else word for name, word in words_of(verb).items()]
    return " ".join((command, verb, *words, *(["--shot PROMPT:SECONDS ..."] if verb == "storyboard" else [])))


def verbs_with(flag: str) -> list[str]:
    """The verbs that take a flag, by the way it is written."""
    return [verb for verb in VERBS if flag in [FLAGS[name].name for name in flags_of(verb)]]


def with_flags(message: str, verb: str = "generate") -> str:
    """Arguments that a message opens with or offers, as the command line spells them."""
    words = {name: word for name, word in words_of(verb).items() if name != "prompt"}
    others = {name: f"--{name.replace('_', '-')}" for name in CHECKPOINT}
    spelled = {name: flag.name for name, flag in FLAGS.items()} | others | words
    names = "|".join(sorted(spelled, key=len, reverse=True))
    opening = r"(^|\(|is |are |and |but |with |give |leave )"
    return re.sub(rf"{opening}({names})(?=[=:\[ ])", lambda found: found[1] + spelled[found[2]], message)
