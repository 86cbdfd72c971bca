"""Checks of a request's step cache against its model and noise levels, before anything is made."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import numpy as np

from fastvid import notices
from fastvid.engine import magcache, windows
from fastvid.engine.step_choice import computed_for, fastest, lever_of, method_of, named
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.requests.levers import Lever
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Timeline

FEW_STEPS = 8  # below this, each step changes too much for the next one to reuse it
log = logging.getLogger(__name__)


def check_cache(
    model: Model, request: Resolved, timeline: Timeline, sigmas: np.ndarray, asked: bool = True
) -> Resolved:
    """The request with its step cache as it will be recorded. asked: by name; else `quality` stands for it, and one
    that cannot be is left out with a warning. Raises InvalidRequest for what no step cache can do."""
    if asked or request.cache is None:
        return _checked(model, request, timeline, sigmas)
    try:
        return _checked(model, request, timeline, sigmas)
    except InvalidRequest as error:
        notices.warn(f"quality={request.quality}: its step cache is left out, as it cannot be here ({error})")
        return replace(request, cache=None)


def _checked(model: Model, request: Resolved, timeline: Timeline, sigmas: np.ndarray) -> Resolved:
    lever = lever_of(request)
    if lever is None:
        return request
    _check_schedule(request)
    levels = windows.levels_of(model, timeline.segments[0], sigmas, request)
    if lever.name == "target":
        _check_target(len(levels), lever.settings["speedup"])
    if lever.name == "magcache":
        request = replace(request, cache=str(_with_file(model, request, lever)))
    method = method_of(model, request, levels)
    assert method is not None
    if method.least() == len(levels):
        notices.warn(
            f"cache={named(request)}: all of {len(levels)} steps run all blocks, so it saves nothing; "
            "lower warmup, raise the threshold, or ask for more steps"
        )
    elif len(levels) < FEW_STEPS:
        notices.warn(
            f"cache={named(request)}: in {len(levels)} steps each changes much, and one that reuses the last shows; "
            f"the nearest that hides it is num_inference_steps={FEW_STEPS}, or leave cache out"
        )
    if request.solver == "redraw":
        notices.warn(
            "cache: solver=redraw draws new noise in each step, and what is reused was made of other noise, so the "
            "video becomes another one; take another solver, or leave cache out"
        )
    log.info("cache: %s", named(request))
    return request


def _check_schedule(request: Resolved) -> None:
    if request.schedule == "staggered":
        raise InvalidRequest(
            "cache: in a staggered schedule other frames are denoised every few steps, so none can be reused; leave "
            "schedule or cache out"
        )


def _check_target(steps: int, speedup: float) -> None:
    most = fastest(steps)
    if speedup > most + 1e-9:
        near = f"the nearest is cache={most:.2f}" if most > 1 else "leave cache out"
        raise InvalidRequest(
            f"cache={speedup:g}: in {steps} steps at least {computed_for(steps, most)} have to run the blocks; {near}"
        )


def _with_file(model: Model, request: Resolved, lever: Lever) -> Lever:
    """MagCache with its file's place and digest, so that a recipe makes the same video or is refused."""
    file = lever.settings.get("file")
    path = magcache.default_path(model, request) if file is None else os.path.abspath(file)
    magcache.check(model, request, path)
    digest, given = magcache.digest_of(path), lever.settings.get("digest")
    if given not in (None, digest):
        raise InvalidRequest(
            f"cache: {path} is not the calibration that this recipe was made with (digest {given}, now {digest}); "
            "give that file, or leave digest out"
        )
    return Lever(lever.name, {**lever.settings, "file": str(path), "digest": digest})
