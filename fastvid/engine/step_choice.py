"""From `cache=` to the method of a step cache, with its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastvid.engine import magcache
from fastvid.engine.step_methods import EasyCache, FirstBlock, MagCache, Method, TaylorSeer, every, spread
from fastvid.models.loaded import Model
from fastvid.requests.levers import CACHES, Lever, check_cache, parse
from fastvid.requests.request import Resolved

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "first_block": {"threshold": 0.1, "warmup": 4, "longest": 3},
    "taylorseer": {"order": 1, "every": 3, "warmup": 4},
    "easycache": {"threshold": 0.1, "warmup": 4, "longest": 4},
    "magcache": {"threshold": 0.06, "warmup": 4, "longest": 3},
    "target": {"speedup": 1.5},
}
"""What a setting is that is not given."""


def lever_of(request: Resolved) -> Lever | None:
    """The step cache of a request, with all settings; None without one."""
    if request.cache is None:
        return None
    lever = parse("cache", check_cache("cache", request.cache), CACHES)  # a number, in a preset's `qualities`
    return Lever(lever.name, {**DEFAULTS[lever.name], **lever.settings})


def named(request: Resolved) -> str:
    """The step cache of a request with all settings, as text."""
    return str(lever_of(request) or "")


def method_of(model: Model, request: Resolved, levels: np.ndarray) -> Method | None:
    """The method of a request's step cache, for windows of these noise levels [N]; None without one."""
    lever = lever_of(request)
    return None if lever is None else MAKERS[lever.name](model, request, levels, dict(lever.settings))


def _taylorseer(model: Model, request: Resolved, levels: np.ndarray, given: dict[str, Any]) -> Method:
    computed = every(len(levels), given["warmup"], given["every"])
    return TaylorSeer(len(levels), order=given["order"], computed=computed)


def _target(model: Model, request: Resolved, levels: np.ndarray, given: dict[str, Any]) -> Method:
    count, warmup = computed_for(len(levels), given["speedup"]), max(2, round(WARMUP * len(levels)))
    return TaylorSeer(len(levels), order=1, computed=spread(len(levels), count, warmup), near=True)


def _magcache(model: Model, request: Resolved, levels: np.ndarray, given: dict[str, Any]) -> Method:
    given.pop("digest", None)
    ratios = magcache.ratios_of(model, request, levels, given.pop("file", None))
    return MagCache(len(levels), ratios=ratios, **given)


MAKERS: Mapping[str, Callable[[Model, Resolved, np.ndarray, dict[str, Any]], Method]] = {
    "first_block": lambda model, request, levels, given: FirstBlock(len(levels), **given),
    "taylorseer": _taylorseer,
    "easycache": lambda model, request, levels, given: EasyCache(len(levels), **given),
    "magcache": _magcache,
    "target": _target,
}

WARMUP = 0.25
"""The share of a target's steps, from the first on, that all run their blocks: what they settle, later ones follow."""


def fastest(steps: int) -> float:
    """The largest speed-up that is taken for so many steps."""
    return steps / min(steps, max(LEAST, steps // MOST_SPEEDUP))


LEAST, MOST_SPEEDUP = 3, 4


def computed_for(steps: int, speedup: float) -> int:
    """How many of so many steps run all blocks for a speed-up of their time."""
    return max(1, int(steps / speedup + 1e-9))
