"""In which tiles the frames of an upscaled clip are made (`fastvid.engine.tiles`)."""

from __future__ import annotations

import math
from dataclasses import replace

from fastvid import checks, notices
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import CONTROL, Model, way_of
from fastvid.models.preset import Preset
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline

LEAST = 64
"""The shortest side of a tile, in pixels."""


def with_tiles(model: Model, request: Resolved, timeline: Timeline) -> Timeline:
    """The timeline of an upscaled clip with the size of its tiles, where frames are larger than one. Raises
    InvalidRequest."""
    if request.verb != "upscale":
        return timeline
    given = None if request.tile is None else checks.size("tile", request.tile)
    width, height = given or trained_size(model.preset, request.width, request.height)
    if min(width, height) < LEAST:
        near = "x".join(str(max(side, LEAST)) for side in (width, height))
        raise InvalidRequest(f"tile={width}x{height}: a tile has at least {LEAST} pixels a side; the nearest is {near}")
    parts = (_tiled(model, part, height, width) if isinstance(part, Segment) else part for part in timeline.parts)
    made = Timeline(tuple(parts))
    if any(segment.tile is not None for segment in made.segments):
        _check(model, request)
    return made


def without_levers(request: Resolved, timeline: Timeline) -> Resolved:
    """The request without the levers that keep something of a whole frame's tokens, where it is made in tiles."""
    if all(segment.tile is None for segment in timeline.segments):
        return request
    for name in ("cache", "attention"):
        if getattr(request, name) is not None:
            notices.warn(f"{name} is left out: this frame is made in tiles, which have no tokens in common")
    return replace(request, cache=None, attention=None)


def trained_size(preset: Preset, width: int, height: int) -> tuple[int, int]:
    """(width, height) of those that a model was trained at that is most like a frame; of several the largest."""
    sizes = [tuple(map(int, size.split("x"))) for size in preset.sizes] or [(preset.width, preset.height)]
    ratio = math.log(width / height)
    w, h = min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 2), -size[0] * size[1]))
    return w, h


def _tiled(model: Model, segment: Segment, height: int, width: int) -> Segment:
    multiple = model.preset.spatial_multiple
    sides = (segment.model_height, height), (segment.model_width, width)
    tile = [min(whole, max(multiple, -(-side // multiple) * multiple)) for whole, side in sides]
    whole = tile == [segment.model_height, segment.model_width]
    return segment if whole else replace(segment, tile=(tile[0], tile[1]))


def _check(model: Model, request: Resolved) -> None:
    said, name = f"upscale to {request.width}x{request.height} in tiles", model.preset.name
    hint = f"give tile={request.width}x{request.height}, or a smaller size"
    if way_of(model) == CONTROL or model.takes_reference:
        raise InvalidRequest(f"{said}: {name} sees whole frames of its control; {hint}")
    if model.preset.rollout is not None:
        raise InvalidRequest(f"{said}: {name} keeps keys and values of whole frames in its cache; {hint}")
