"""What a plan says of a request's levers, and the share of a model call's work that they leave.

To add a lever: a row in `WORDS`, which says what is done less of, and if its calls do less, one in `SHARES`. A lever
that leaves out whole calls changes `engine.windows.count_calls` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastvid.engine.windows import small_steps
from fastvid.models.loaded import Model
from fastvid.requests.levers import OFF
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Timeline


class Asked(NamedTuple):
    """A request as it is planned. sigmas: its noise levels [N] without the final zero."""

    model: Model
    request: Resolved
    timeline: Timeline
    sigmas: np.ndarray


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


WORDS: Mapping[str, Callable[[Asked, Any], str]] = {"progressive": _progressive}
"""lever -> what is done less of, in words, from its value. A lever without a row is shown as it was asked for."""

SHARES: Mapping[str, Callable[[Asked, Any], Share]] = {}
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
