"""Warm-up: what the first request of a size pays for, before it comes.

That is compiling and tuning kernels, capturing CUDA graphs, the primitives of cuDNN and oneDNN, imports, and memory
that the allocator keeps. A request of that size is run as it would be, but with three noise levels: the first, so that
a model's expert for high noise runs, one between, and the last. Of a long video two windows are made.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from fastvid import checks, notices
from fastvid.engine.events import Step
from fastvid.engine.queue import Ticket
from fastvid.engine.session import Job, Session
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import CHANNELS, Model, way_of
from fastvid.pipeline.prepare import Prepared, planned, prepare
from fastvid.requests.arguments import CHECKPOINT, VERBS
from fastvid.requests.request import default_request

Size: TypeAlias = "str | tuple[int, int] | tuple[int, int, int] | Mapping[str, Any]"
SIZES = 'sizes such as "832x480", (832, 480), (width, height, frames), or a mapping of a verb\'s arguments'
MOST = 1000  # sizes
WINDOWS = 2  # of a long video: the first, and one that goes on from it

log = logging.getLogger(__name__)


def run(
    model: Model, ticket: Ticket, sizes: Size | Sequence[Size] | None, options: Mapping[str, Any]
) -> dict[str, float]:
    """See `Pipeline.warmup`. All sizes are checked and planned before the first is run."""
    with notices.collected():  # the requests that follow give their warnings themselves
        each = [_prepare(model, number, size, options) for number, size in enumerate(_sizes(sizes))]
        seconds: dict[str, float] = {}
        with ticket.admitted():
            for prepared in each:
                began, name = time.perf_counter(), _name(prepared)
                _make(prepared, ticket)
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
                log.info("warmed up for %s in %.2f s", name, seconds[name])
    return seconds


# ---------------------------------------------------------------- sizes


def _sizes(sizes: Any) -> list[dict[str, Any]]:
    """The arguments of each size. None: the model's default size."""
    if sizes is None:
        return [{}]
    one = isinstance(sizes, str | Mapping) or (checks.is_list(sizes) and len(sizes) and _is_number(sizes[0]))
    given = [sizes] if one else checks.items("sizes", sizes, SIZES, MOST)
    return [_arguments(f"sizes[{number}]", size) for number, size in enumerate(given)]


@checks.guarded(SIZES)
def _arguments(name: str, size: Any) -> dict[str, Any]:
    if isinstance(size, str):
        return {"size": size}
    if isinstance(size, Mapping):
        return dict(size)
    values = checks.items(name, size, SIZES, 3, least=2)
    return dict(zip(("width", "height", "num_frames"), values, strict=False))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def _prepare(model: Model, number: int, size: Mapping[str, Any], options: Mapping[str, Any]) -> Prepared:
    given = {**options, **size}
    verb = given.pop("verb", "generate")
    try:
        if wrong := [name for name in CHECKPOINT if given.get(name) is not None]:
            raise InvalidRequest(f"{wrong[0]}: a warm-up makes no video that could be resumed; leave it out")
        request = planned(verb, given.pop("prompt", None), _stand_ins(model, verb, given) | given)
        return prepare(model, request)
    except InvalidRequest as error:
        raise InvalidRequest(f"sizes[{number}] of the warm-up: {error}") from None


def _stand_ins(model: Model, verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a model cannot do without and a size does not say: black pictures and clips."""
    if verb not in VERBS or "image" not in VERBS[verb]:
        return {}
    default = default_request(model.preset)
    black = np.zeros((default.height, default.width, 3), np.uint8)
    if model.face_layers:
        face = np.zeros((1, model.face_side, model.face_side, 3), np.uint8)
        frames = given.get("num_frames") or default.num_frames
        made: dict[str, Any] = {"image": black, "pose_video": np.stack([black] * frames), "face_video": face}
        return made
    if way_of(model) != CHANNELS or model.preset.pictures_optional:
        return {}
    both = model.transformer.config.pos_embed_seq_len
    return {"image": black} | ({"last_image": black} if both else {})


def _name(prepared: Prepared) -> str:
    plan = prepared.plan
    return f"{plan.width}x{plan.height}, {plan.num_frames} frames"


# ---------------------------------------------------------------- running


def _make(prepared: Prepared, ticket: Ticket) -> None:
    """Runs a request without keeping what it makes."""
    job = replace(prepared.job, sigmas=_levels(prepared))
    session = Session(prepared.model, job, ticket, keep_latents=False)
    most = _most_steps(prepared.model, job)
    with contextlib.closing(session.run()) as events:
        for event in events:
            if isinstance(event, Step) and most is not None and event.step > most:
                break


def _levels(prepared: Prepared) -> np.ndarray:
    """Three of a request's noise levels; all where levels depend on each other, as in rollouts."""
    sigmas, request = prepared.job.sigmas, prepared.job.request
    if len(sigmas) <= 3 or prepared.model.preset.rollout or request.schedule == "staggered" or request.ar_step:
        return sigmas
    return sigmas[[0, len(sigmas) // 2, len(sigmas) - 1]]


def _most_steps(model: Model, job: Job) -> int | None:
    """The steps after which all shapes have been seen; None: all steps are needed."""
    request = job.request
    if len(job.timeline.segments) > 1 or model.preset.rollout or request.schedule == "staggered" or request.ar_step:
        return None
    return WINDOWS * len(job.sigmas)
