"""What a request works on, read: pictures, clips, control videos; and the size and rate that follow from them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from fastvid import control, given
from fastvid.clips import open_clip
from fastvid.errors import InvalidRequest
from fastvid.limits import MAX_SIDE, MIN_SIDE
from fastvid.requests import CLIPS, Request

PICTURES = ("image", "last_image")


def read(request: Request) -> Request:
    """The request with its pictures as uint8 arrays [H, W, 3] and its clips opened; without a size of its own, in the
    shape of its first clip or picture.

    Raises MediaError for a file that can't be read, InvalidRequest for something that is no picture or clip.
    """
    if request.verb in CLIPS:
        return _with_clips(request)
    found: dict[str, Any] = control.read(request)
    for name in PICTURES:
        if (value := getattr(request, name)) is not None:
            found[name] = given.picture(name, value)
    if request.keyframes:
        found["keyframes"] = {f: given.picture(f"keyframes[{f}]", p) for f, p in request.keyframes.items()}
    shapes = [found[name].shape[-3:-1] for name in ("video", *PICTURES) if name in found]
    shapes += [picture.shape[:2] for picture in found.get("keyframes", {}).values()]
    if shapes and (request.height or request.width or request.aspect or request.budget) is None:
        height, width = shapes[0]
        found["aspect"] = Fraction(width, height)
    return replace(request, **found)


def _with_clips(request: Request) -> Request:
    clips = {name: open_clip(getattr(request, name), name=name) for name in CLIPS[request.verb]}
    first = clips["video"]
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (first.height, first.width)):
        raise InvalidRequest(
            f"video is {first.width}x{first.height}; {request.verb} takes sides of {MIN_SIDE} to {MAX_SIDE} pixels"
        )
    found: dict[str, Any] = dict(clips)
    if "video_2" in clips:
        second = clips["video_2"].resized(first.height, first.width)
        found["video_2"] = second.resampled(first.fps) if first.fps else second
    if request.mask is not None:
        found["mask"] = given.mask("mask", request.mask)
    found |= {"fps": first.fps} if request.fps is None and first.fps else {}
    if request.verb in ("extend", "loop", "blend"):
        found |= {"height": first.height, "width": first.width}
    elif request.verb in ("edit", "finalize"):
        found["num_frames"] = first.num_frames
        if (request.height or request.width or request.aspect or request.budget) is None:
            found |= {"height": first.height, "width": first.width}
    return replace(request, **found)
