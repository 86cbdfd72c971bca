"""What a step cache does to a request, for plans: how many steps run all blocks, and what it keeps in memory."""

from __future__ import annotations

from typing import cast

import numpy as np

from fastvid.engine import windows
from fastvid.engine.step_choice import method_of, named
from fastvid.engine.step_methods import MagCache, Method, TaylorSeer
from fastvid.models.loaded import Model
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Timeline

IN_FLIGHT = 2  # tensors that a call holds beside what is kept: the tokens before the blocks, or behind the first


def words(model: Model, request: Resolved, timeline: Timeline, sigmas: np.ndarray) -> str:
    """The method, and how many steps of a window run all blocks."""
    method, steps = _method(model, request, timeline, sigmas)
    computed = method.least()
    graphs = "; calls are not replayed as CUDA graphs" if model.placement.graphs else ""
    if isinstance(method, TaylorSeer | MagCache):
        target = isinstance(method, TaylorSeer) and named(request).startswith("target")
        chosen = f" (taylorseer of order {cast(TaylorSeer, method).order})" if target else ""
        return f"{named(request)}{chosen}: {computed} of {steps} steps run the blocks, {steps / computed:.2f} x{graphs}"
    return f"{named(request)}: {computed} to {steps} of {steps} steps run all blocks, as the video needs{graphs}"


def share(model: Model, request: Resolved, timeline: Timeline, sigmas: np.ndarray) -> float:
    """The share of the blocks that runs; 1 where the video decides that."""
    method, steps = _method(model, request, timeline, sigmas)
    return method.least() / steps if isinstance(method, TaylorSeer | MagCache) else 1.0


def tensors(model: Model, request: Resolved, sigmas: np.ndarray, texts: int) -> int:
    """How many tensors of the tokens' size are kept, with those that a call needs beside. texts: prompts of a step."""
    method = method_of(model, request, sigmas)
    return 0 if method is None else len(method.names) * texts + IN_FLIGHT


def _method(model: Model, request: Resolved, timeline: Timeline, sigmas: np.ndarray) -> tuple[Method, int]:
    levels = windows.levels_of(model, timeline.segments[0], sigmas, request)
    method = method_of(model, request, levels)
    assert method is not None
    return method, len(levels)
