"""What a plan says of a request's levers, and the share of a model call's work that they leave.

To add a lever: a row in `WORDS`, which says what is done less of, and if its calls do less, one in `SHARES`. A lever
that leaves out whole calls changes `engine.windows.count_calls` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastvid.distributed.mesh import Layout
from fastvid.engine.guidance import GuidanceSteps, Negative, has_own_levels, why_apart
from fastvid.engine.sparsity import Settings
from fastvid.models.loaded import Model
from fastvid.planning import step_cache
from fastvid.requests.levers import OFF, small_steps
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline


class Asked(NamedTuple):
    """A request as it is planned. sigmas: its noise levels [N] without the final zero. window: what the model sees at
    once, at most. layout: how ranks share it."""

    model: Model
    request: Resolved
    timeline: Timeline
    sigmas: np.ndarray
    window: Segment
    layout: Layout


class Share(NamedTuple):
    """What is left of a model call, as a mean over the calls of a request.

    blocks: of the transformer's blocks, the share that runs. attention: of the pairs of tokens that self-attention
    looks at in those, the share that is kept.
    """

    blocks: float = 1.0
    attention: float = 1.0


ALL = Share()


def _progressive(asked: Asked, value: float) -> str:
    half, steps = asked.timeline.segments[0].half, len(asked.sigmas)
    assert half is not None
    return f"{small_steps(asked.request, steps)} of {steps} steps at {half[1]}x{half[0]}"


def _guidance_interval(asked: Asked, value: tuple[float, float]) -> str:
    low, high = value
    guided = sum(step is not Negative.NONE for step in _negatives(asked))
    return f"at noise levels above {low:g} and up to {high:g}, which are {guided} of {len(asked.sigmas)} steps"


def _guidance_every(asked: Asked, value: int) -> str:
    if has_own_levels(asked.model, asked.request):
        return "not used: frames are at noise levels of their own"
    steps = _negatives(asked)
    computed, guided = (sum(step in kinds for step in steps) for kinds in ([Negative.COMPUTED], list(Negative)[1:]))
    return f"the negative prompt is computed in {computed} of {guided} steps with guidance"


def _guidance_batch(asked: Asked, value: bool) -> str:
    if not asked.request.guided(len(asked.model.experts)):
        return "no guidance"
    why = why_apart(asked.model, asked.request, asked.window, asked.layout)
    return f"one prompt after the other: {why}" if why else "both prompts in one call"


def _negatives(asked: Asked) -> list[Negative]:
    """How the steps of a window without known frames get the negative prompt's velocity."""
    scales = asked.request.guidance_scales(len(asked.model.experts))
    return GuidanceSteps(asked.model, asked.request, asked.sigmas).of_steps(scales)


def _sparse(asked: Asked, value: str) -> str:
    one, steps = Settings.of(value), len(asked.sigmas)
    layers = f" and {one.dense_layers} layers" if one.dense_layers else ""
    first = f"the first {one.dense_rows(steps)} of {steps} steps{layers} are dense"
    return f"self-attention to {one.keep:.0%} of the tiles; {first}"


def _sparse_share(asked: Asked, value: str) -> Share:
    one, steps, layers = Settings.of(value), len(asked.sigmas), asked.model.transformer.config.num_layers
    sparse = (1 - one.dense_rows(steps) / steps) * (1 - min(1.0, one.dense_layers / layers))
    return Share(attention=1 - sparse * (1 - one.keep))


WORDS: Mapping[str, Callable[[Asked, Any], str]] = {
    "guidance_interval": _guidance_interval,
    "guidance_every": _guidance_every,
    "guidance_batch": _guidance_batch,
    "progressive": _progressive,
    "attention": _sparse,
    "cache": lambda asked, value: step_cache.words(asked.model, asked.request, asked.timeline, asked.sigmas),
}
"""lever -> what is done less of, in words, from its value. A lever without a row is shown as it was asked for."""

SHARES: Mapping[str, Callable[[Asked, Any], Share]] = {
    "attention": _sparse_share,
    "cache": lambda asked, value: Share(step_cache.share(asked.model, asked.request, asked.timeline, asked.sigmas)),
}
"""lever -> the share of work that it leaves, from its value."""


def words(asked: Asked) -> dict[str, str]:
    """What each lever of a request does less of, in words; empty without levers."""
    return {name: WORDS.get(name, _as_asked)(asked, value) for name, value in _on(asked.request).items()}


def share(asked: Asked) -> Share:
    """The share of a model call's work that all levers of a request leave together."""
    left = Share()
    for name, value in _on(asked.request).items():
        if name in SHARES:
            left = Share(*(a * b for a, b in zip(left, SHARES[name](asked, value), strict=True)))
    return left


def _on(request: Resolved) -> dict[str, Any]:
    """The levers that are on, with their values."""
    values = {name: getattr(request, name) for name in OFF}
    return {name: value for name, value in values.items() if value is not None}


def _as_asked(asked: Asked, value: Any) -> str:
    return str(value)
