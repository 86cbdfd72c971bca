"""Every argument of every verb, in one table: how it is checked, what help says about it, and its flag.

`Request.make` checks by this table, the command line takes its flags from it, and `documented` puts it into the
signatures and docstrings of the verbs. The types are in `fastvid.requests.options`. To add an argument: a row here, its
type there, and a field of `Request`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fastvid import checks
from fastvid.checks import Check, number, one_of, text, whole
from fastvid.requests import options

DIRECTIONS = ("after", "before", "both")
STRENGTH = {"edit": 0.6, "finalize": 0.6}
"""The share of the steps that are run, where neither the request nor the model's recipe says it."""


@dataclass(frozen=True)
class Argument:
    """A row. flag: as the command line writes it, with a word for its value; empty if it has none. verbs: the help of
    verbs for which the argument means something else."""

    check: Check
    help: str
    flag: str = ""
    verbs: Mapping[str, str] = field(default_factory=dict)

    def help_for(self, verb: str) -> str:
        return self.verbs.get(verb, self.help)


_side = whole(checks.MIN_SIDE, checks.MAX_SIDE, " pixels")
_guidance = number(0.0, 1000.0)
_bridge = dict.fromkeys(("loop", "blend"), "frames of the bridge") | {"extend": "frames to add on each side"}
_bridge_seconds = {verb: words.replace("frames", "seconds") + " (default: 1)" for verb, words in _bridge.items()}
_grows = "larger than the clip: it stands in the middle, and what is around it is made"

ARGUMENTS: Mapping[str, Argument] = {
    "prompt": Argument(text, "what to show"),
    "negative_prompt": Argument(text, "what not to show", "--negative-prompt TEXT"),
    "expand_prompt": Argument(
        checks.flag, "have the prompt written out first; the recipe keeps both", "--expand-prompt"
    ),
    "prompt_endpoint": Argument(
        text, "who writes it: OpenAI's chat protocol (not for the embedded model)", "--prompt-endpoint URL"
    ),
    "prompt_model": Argument(
        text, "the language model's name there; its key is FASTVID_PROMPT_KEY", "--prompt-model NAME"
    ),
    "prompt_key": Argument(text, "its key, which no recipe and no error shows"),
    "original_prompt": Argument(text, "what the prompt was expanded from; only recorded"),
    "shots": Argument(
        checks.shots, "a shot: its prompt and how long it is; repeat it, in their order", "--shot PROMPT:SECONDS"
    ),
    "direction": Argument(
        one_of(DIRECTIONS), f"{', '.join(DIRECTIONS)} the clip (default: {DIRECTIONS[0]})", "--direction WHERE"
    ),
    "width": Argument(_side, "pixels, 64 to 2048 (video: within 1920x1080 or 1080x1920)", "--width N"),
    "height": Argument(_side, "pixels, as --width", "--height N"),
    "size": Argument(
        checks.size,
        "both at once, such as 832x480",
        "--size WxH",
        {"finalize": "both at once (default: the draft's own full size)", "edit": _grows},
    ),
    "aspect": Argument(checks.aspect, "aspect ratio, such as 16:9: the nearest size within --budget", "--aspect W:H"),
    "budget": Argument(
        checks.budget,
        f"{', '.join(checks.BUDGETS)} or a number of pixels (default: the model's own size)",
        "--budget AREA",
    ),
    "num_frames": Argument(whole(1, checks.MAX_FRAMES), "frames, 1 to 131072", "--num-frames N", _bridge),
    "seconds": Argument(
        number(0.0, checks.MAX_FRAMES / checks.MIN_FPS),
        "length in seconds instead of --num-frames: round(seconds x fps)",
        "--seconds S",
        _bridge_seconds,
    ),
    "fps": Argument(
        number(checks.MIN_FPS, checks.MAX_FPS, " frames a second"), "frames a second, 0.1 to 240", "--fps N"
    ),
    "draft": Argument(checks.flag, "half the size and fewer steps, to look at; see fastvid finalize", "--draft"),
    "seed": Argument(
        whole(0, checks.MAX_SEED, " (left out: a random one)"),
        "0 to 2^63-1 (default: a random one, which is shown)",
        "--seed N",
    ),
    "strength": Argument(
        number(0.0, 1.0),
        "0 to 1: how far it goes from the clip",
        "--strength X",
        {
            "edit": f"0 to 1: how far it goes from the clip (default: {STRENGTH['edit']}; embedded: 0.4; 1 around a "
            "clip on a larger frame)",
            "finalize": f"0 to 1: how far it goes from the draft (default: {STRENGTH['finalize']})",
        },
    ),
    "source_prompt": Argument(
        text, "what the clip shows now: keeps motion and layout better (FlowEdit)", "--source-prompt TEXT"
    ),
    "image": Argument(checks.picture, "a picture: the first frame (I2V, TI2V, VACE, embedded)", "--image FILE"),
    "last_image": Argument(
        checks.picture, "a picture: the last frame (FLF2V, I2V-A14B, VACE, embedded)", "--last-image FILE"
    ),
    "keyframes": Argument(
        checks.keyframes,
        "a picture that is frame FRAME, counted from 0 (VACE, embedded); may be repeated",
        "--keyframe FRAME=FILE",
    ),
    "video": Argument(checks.clip, "a control video: depth, pose, or frames to keep (VACE)", "--video FILE"),
    "video_2": Argument(checks.clip, "the clip that a blend leads to"),
    "mask": Argument(
        checks.clip,
        "of that video: white is made, black stays; a picture counts for all frames",
        "--mask FILE",
        {"edit": "white may change, black stays as it is; a picture counts for all frames"},
    ),
    "reference_images": Argument(
        checks.pictures, "a picture of what the video shows (VACE); may be repeated", "--reference-image FILE"
    ),
    "conditioning_scale": Argument(
        checks.scale, "how much these count (default: 1); A,B,... for each control layer", "--conditioning-scale X"
    ),
    "num_inference_steps": Argument(whole(1, checks.MAX_STEPS), "denoising steps, 1 to 1000", "--steps N"),
    "guidance_scale": Argument(_guidance, "weight of the prompt, 0 to 1000; 1: no guidance", "--guidance-scale X"),
    "guidance_scale_2": Argument(
        _guidance,
        "the same at low noise, for models with two experts (default: as --guidance-scale if that is given)",
        "--guidance-scale-2 X",
    ),
    "known_guidance_scale": Argument(
        _guidance,
        "the same in edits and where some frames are known: pictures, clips, what an earlier window has made (default: "
        "as --guidance-scale if that is given)",
        "--known-guidance-scale X",
    ),
    "flow_shift": Argument(number(0.01, 100.0), "shift of the noise levels, 0.01 to 100", "--flow-shift X"),
    "sigmas": Argument(
        checks.sigmas,
        "noise levels instead of --steps and --flow-shift: descending, in (0, 1]",
        "--sigmas A,B,...",
    ),
    "solver": Argument(one_of(checks.SOLVERS), f"one of {', '.join(checks.SOLVERS)}", "--solver NAME"),
    "schedule": Argument(
        one_of(checks.SCHEDULES),
        "{0}, one stretch after another, or {1} (default: {0})".format(*checks.SCHEDULES),
        "--schedule NAME",
    ),
    "latents": Argument(checks.tensor, "initial noise [1, C, T, h, w]; with reference pictures a T more for each"),
    "prompt_embeds": Argument(checks.tensor, "instead of the prompt: [1, L, text_dim], as `Pipeline.embed` returns"),
    "negative_prompt_embeds": Argument(checks.tensor, "the same instead of the negative prompt"),
    "checkpoint": Argument(
        checks.folder, "what `fastvid resume FOLDER` goes on from, kept up to date", "--checkpoint FOLDER"
    ),
    "checkpoint_every": Argument(
        number(0.0, 86400.0, " seconds"),
        "the least seconds from one to the next (default: 1; 0: after every step)",
        "--checkpoint-every S",
    ),
    "keep_checkpoint": Argument(checks.flag, "do not remove it when the video is done", "--keep-checkpoint"),
}
"""In the order in which help shows them."""

EXPANSION = ("expand_prompt", "prompt_endpoint", "prompt_model", "prompt_key")
CHECKPOINT = ("checkpoint", "checkpoint_every", "keep_checkpoint")
RUN = (*EXPANSION, *CHECKPOINT)
"""How a request is run: these say nothing about the video, and are in no recipe."""

CLIPS = {
    "extend": ("video",),
    "loop": ("video",),
    "blend": ("video", "video_2"),
    "edit": ("video",),
    "finalize": ("video",),
}
"""The clips that a verb works on: it cannot do without."""

OPTIONS: Mapping[str, Any] = {
    "generate": options.GenerateOptions,
    "image": options.ImageOptions,
    "extend": options.ExtendOptions,
    "loop": options.BridgeOptions,
    "blend": options.BridgeOptions,
    "edit": options.EditOptions,
    "storyboard": options.StoryboardOptions,
    "finalize": options.FinalizeOptions,
}


def _taken(verb: str) -> Iterator[str]:
    shots = ("shots",) if verb == "storyboard" else ()
    taken = {"prompt", *CLIPS.get(verb, ()), *shots, *OPTIONS[verb].__annotations__}
    return (name for name in ARGUMENTS if name in taken)


VERBS: Mapping[str, tuple[str, ...]] = {verb: tuple(_taken(verb)) for verb in OPTIONS}
"""The arguments that each verb takes."""

ALIASES = {
    "cfg": "guidance_scale",
    "control_video": "video",
    "duration": "seconds",
    "frame_rate": "fps",
    "frames": "num_frames",
    "generator": "seed",
    "length": "num_frames",
    "reference_image": "reference_images",
    "resolution": "size",
    "sampler": "solver",
    "scheduler": "solver",
    "shift": "flow_shift",
    "steps": "num_inference_steps",
}
"""What other programs call an argument, where spelling alone would name the wrong one."""


# ---------------------------------------------------------------- what `help` shows

Method = TypeVar("Method", bound=Callable[..., Any])


def type_of(name: str) -> str:
    """The type of an option as it is written in `fastvid.requests.options`."""
    hint = options.AnyOptions.__annotations__.get(name, "")
    return str(getattr(hint, "__forward_arg__", hint))


def documented(method: Method) -> Method:
    """Names a verb's options in its signature and its docstring, where `**options` would hide them."""
    signature, verb = inspect.signature(method), method.__name__
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = OPTIONS.get(verb, options.AnyOptions).__annotations__
    names = [name for name in ARGUMENTS if name in taken and name not in signature.parameters]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=type_of(name))
        for name in names
    ]
    cast(Any, method).__signature__ = signature.replace(parameters=[*own, *more])  # what inspect.signature reads
    rows = [f"    {name}: {_in_python(ARGUMENTS[name].help_for(verb))}" for name in names]
    title = "Options (None: as the model's recipe says):"
    method.__doc__ = "\n".join((inspect.cleandoc(method.__doc__ or ""), "", title, *rows))
    return method


def _in_python(help: str) -> str:
    """Help with arguments where the command line has flags."""
    spelled = {row.flag.split(" ")[0]: name for name, row in ARGUMENTS.items() if row.flag}
    return re.sub(r"--[a-z0-9-]+", lambda found: spelled.get(found[0], found[0]), help)
