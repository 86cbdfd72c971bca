"""Runs a batch: videos that differ in prompts and seeds, one after another or several together.

Together, one call of the transformer denoises several videos: faster where a single one does not fill the device. Then
their frames equal those of single requests to within rounding; one after another they are the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from fastvid import notices
from fastvid.engine.events import Event, Plan
from fastvid.errors import InvalidRequest
from fastvid.media.video import Video
from fastvid.models.loaded import Model
from fastvid.pipeline.prepare import files_in, make_requests, prepare
from fastvid.pipeline.running import Collected
from fastvid.requests.request import Request, Resolved

ALONE = ("cache", "attention", "progressive")
"""Levers that decide by what they see of one video, or change its size."""
Numbered = Generator[tuple[int, Event], None, None]


def videos(pipe: Any, verb: str, options: Mapping[str, Any]) -> list[Video]:
    """The videos of a batch, in order."""
    requests = requests_of(pipe, verb, options)
    made = [Collected(files_in(dict(options))) for _ in requests]
    with contextlib.closing(events(pipe, requests, keep_frames=True, keep_latents=True)) as stream:
        for number, event in stream:
            made[number].add(event)
    return [one.video() for one in made]


def requests_of(pipe: Any, verb: str, options: Mapping[str, Any]) -> list[Request]:
    """The requests of a batch, all checked, and their prompts expanded if that is asked for."""
    return make_requests(verb, options, lambda: pipe._variant)


def events(pipe: Any, requests: Sequence[Request], keep_frames: bool, keep_latents: bool) -> Numbered:
    """The events of a batch, each with its video's number. Videos that are made together take turns."""
    wanted = min(requests[0].batch_size or 1, len(requests))
    size = pipe._fitting(requests[0], wanted) if wanted > 1 else 1
    for first in range(0, len(requests), size):
        some = requests[first : first + size]
        if len(some) == 1:
            with contextlib.closing(pipe._run(some[0], keep_frames, keep_latents)) as stream:
                for event in stream:
                    yield first, event
        else:
            with contextlib.closing(pipe._run_together(some, keep_frames, keep_latents)) as stream:
                for number, event in stream:
                    yield first + number, event


# ---------------------------------------------------------------- how many fit


def fitting(model: Model, request: Request, wanted: int) -> int:
    """How many videos of this kind are made together: as many as are wanted and fit into memory; warns of fewer. Raises
    InvalidRequest for requests that cannot be."""
    prepared = prepare(model, request, keep_frames=True)
    _check(prepared.job.request, wanted)
    plan = prepared.plan
    room = (
        plan.bytes_free + model.bytes_held - plan.bytes_device - (plan.bytes_host if model.device.type == "cpu" else 0)
    )
    count = max(1, min(wanted, 1 + room // max(1, bytes_of_one_more(plan))))
    if count < wanted:
        notices.warn(
            f"batch_size={wanted}: only {count} of these videos fit into memory together; so many are made at a time"
        )
    return count


def bytes_of_one_more(plan: Plan) -> int:
    """The most memory that another video beside this one takes."""
    work = plan.bytes_activations + plan.bytes_context + plan.bytes_latents
    return work + plan.bytes_decoder + plan.bytes_frames


def _check(request: Resolved, wanted: int) -> None:
    for name in ALONE:
        if (value := getattr(request, name)) is not None:
            raise InvalidRequest(
                f"batch_size={wanted}: {name}={value} is for one video at a time; leave one of them out"
            )
