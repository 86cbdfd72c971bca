"""Which requests can be made progressively: the first steps at half the size (`fastvid.engine.progressive`)."""

from __future__ import annotations

import math
from dataclasses import replace

from fastvid.errors import InvalidRequest
from fastvid.models.loaded import DRIVEN, Model, way_of
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline

LEAST = 3
"""The shortest side of the small stage, in multiples that the model's sides have: 48 pixels for most models."""
VERBS = ("generate", "image", "storyboard", "extend", "loop", "blend")


def in_two_stages(model: Model, request: Resolved, timeline: Timeline, steps: int) -> Timeline:
    """The timeline with the size of the small stage in its segments, if the request is progressive. steps: of a
    window. Raises InvalidRequest where it cannot be."""
    if not request.progressive:
        return timeline
    _check(model, request, steps)
    parts = (replace(p, half=_half(model, p)) if isinstance(p, Segment) else p for p in timeline.parts)
    return Timeline(tuple(parts))


def _check(model: Model, request: Resolved, steps: int) -> None:
    said, preset = f"progressive={request.progressive:g}", model.preset
    if request.verb not in VERBS:
        raise InvalidRequest(
            f"{said}: {request.verb} starts from a clip at full size, whose details the small steps would lose; leave "
            "it out"
        )
    if preset.rollout is not None:
        raise InvalidRequest(
            f"{said}: {preset.name} keeps keys and values of one size in its cache; leave it out, or take a model that "
            "is not causal"
        )
    if way_of(model) == DRIVEN:
        raise InvalidRequest(f"{said}: {preset.name} moves a character in the pixels of a pose; leave it out")
    for name, value, off in (("schedule", request.schedule, "windows"), ("ar_step", request.ar_step, 0)):
        if value and value != off:
            raise InvalidRequest(f"{said}: with {name}={value} frames are at different levels; leave one of them out")
    if request.solver == "redraw":
        raise InvalidRequest(f"{said}: solver=redraw knows few levels, all at one size; leave progressive out")
    if steps < 2:
        raise InvalidRequest(f"{said}: num_inference_steps=1 leaves no step for the other size; the nearest is 2")


def _half(model: Model, segment: Segment) -> tuple[int, int]:
    """(height, width) of the small stage."""
    multiple = model.preset.spatial_multiple
    sides = segment.model_height, segment.model_width
    half = [max(1, math.floor(side / (2 * multiple) + 0.5)) for side in sides]
    if min(half) < LEAST:
        least = 2 * LEAST * multiple
        near = "x".join(str(max(side, least)) for side in (segment.width, segment.height))
        raise InvalidRequest(
            f"progressive: half of {segment.width}x{segment.height} is too small for this model, whose first steps "
            f"need {LEAST * multiple} pixels a side; the nearest size is {near}"
        )
    return half[0] * multiple, half[1] * multiple
