"""Checks of a request that involve several of its arguments: contradictions, missing ones, what a verb takes."""

from __future__ import annotations

from typing import Any

from fastvid import checks
from fastvid.checks import near_name, shown
from fastvid.errors import InvalidRequest
from fastvid.requests.aliases import ALIASES
from fastvid.requests.arguments import ARGUMENTS, CHECKPOINT, CLIPS, DRIVING, PROMPT_OF_CLIP, VERBS
from fastvid.requests.sizes import check_frames, check_size

EXCLUSIVE = (
    ("num_frames", "seconds"),
    ("aspect", "width"),
    ("aspect", "height"),
    ("budget", "width"),
    ("budget", "height"),
    ("sigmas", "flow_shift"),
    ("factor", "fps"),
    ("scale", "width"),
    ("scale", "height"),
    ("scale", "aspect"),
    ("scale", "budget"),
    ("prompt", "prompt_embeds"),
    ("negative_prompt", "negative_prompt_embeds"),
)
"""Pairs of arguments that exclude each other."""


def check_name(verb: str, name: str, value: Any) -> None:
    """Raises InvalidRequest if there is no such argument, or the verb does not take it."""
    if name not in ARGUMENTS:
        near = near_name(name, (*VERBS[verb], *ALIASES))
        hint = f"the nearest is {ALIASES.get(near, near)}" if near else f"{verb} takes {', '.join(VERBS[verb])}"
        raise InvalidRequest(f"there is no argument {shown(name)}; {hint}")
    if value is not None and name not in VERBS[verb]:
        others = ", ".join(other for other, names in VERBS.items() if name in names)
        raise InvalidRequest(f"{name}: {verb} does not take it ({others} does); leave it out")


def split_size(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `size` replaced by width and height."""
    if "size" not in arguments:
        return arguments
    clash = [name for name in ("width", "height", "aspect", "budget") if name in arguments]
    if clash:
        raise InvalidRequest(f"size and {clash[0]} are both given; give one of them")
    width, height = checks.size("size", arguments["size"])
    return {name: value for name, value in arguments.items() if name != "size"} | {"width": width, "height": height}


def check_together(request: Any) -> None:
    """Checks that involve several arguments: contradictions, missing ones, the video's total size."""
    for one, other in EXCLUSIVE:
        if getattr(request, one) is not None and getattr(request, other) is not None:
            raise InvalidRequest(f"{one} and {other} are both given; give one of them")
    _check_run(request)
    if missing := [name for name in CLIPS.get(request.verb, ()) if getattr(request, name) is None]:
        raise InvalidRequest(f"{missing[0]} is missing: {request.verb} works on a clip; give a file or frames")
    if request.verb == "storyboard":
        if request.shots is None:
            raise InvalidRequest('shots is missing: give [("a prompt", seconds), ...]')
        if request.prompt is not None:
            raise InvalidRequest("prompt: a storyboard's prompts are those of its shots; leave it out")
        return
    if request.mask is not None and request.video is None:
        raise InvalidRequest("mask says what of a video stays; give video too, or leave mask out")
    driven = any(getattr(request, name) is not None for name in DRIVING)  # what is missing of these is told later
    optional = request.verb in PROMPT_OF_CLIP or driven
    if request.prompt is None and request.prompt_embeds is None and not optional:
        raise InvalidRequest("prompt is missing: give one string (an empty one is allowed)")
    _check_counts(request)


def _check_run(request: Any) -> None:
    """Options that need another one: checkpoint options without `checkpoint`, expansion options without
    `expand_prompt`."""
    arguments = request.arguments()
    if request.checkpoint is None and (alone := [name for name in CHECKPOINT if name in arguments]):
        raise InvalidRequest(f"{alone[0]} says how checkpoints are written; give checkpoint= too")
    if not request.expand_prompt:
        for name in ("prompt_endpoint", "prompt_model", "prompt_key"):
            if name in arguments:
                raise InvalidRequest(f"{name} is given without expand_prompt; give both or none")


def _check_counts(request: Any) -> None:
    steps, levels = request.num_inference_steps, request.sigmas
    if levels is not None and steps is not None and steps != len(levels):
        raise InvalidRequest(f"num_inference_steps={steps} but sigmas has {len(levels)} values; leave one of them out")
    if request.seconds is not None and (request.fps is not None or request.seconds == 0):
        check_frames(round(request.seconds * (request.fps or 1)), f"seconds={request.seconds:g}")
    if request.num_frames:
        check_pictures(request, request.num_frames)
    if request.num_frames and request.width and request.height:
        check_size(request.width, request.height, request.num_frames)


def check_pictures(request: Any, num_frames: int) -> None:
    """Raises InvalidRequest for a keyframe that the video does not have, and for two pictures on one frame."""
    given = dict.fromkeys(request.keyframes or (), "keyframes")
    if beyond := [frame for frame in given if frame >= num_frames]:
        raise InvalidRequest(
            f"keyframes frame={beyond[0]}: the video has {num_frames} frames, allowed are 0 to {num_frames - 1}; the "
            f"nearest is {num_frames - 1}"
        )
    for name, frame in (("image", 0), ("last_image", num_frames - 1)):
        if getattr(request, name) is None:
            continue
        if frame in given:
            raise InvalidRequest(f"{name} and {given[frame]} both give frame {frame}; leave one of them out")
        given[frame] = name
