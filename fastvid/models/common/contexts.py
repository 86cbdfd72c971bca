"""Contexts of several texts as one, for one call of a transformer with a larger batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHARED = ("scales", "rate")
"""Fields of contexts that have no batch dimension: one request's texts, and requests of one batch, have the same."""


def joined(contexts: Sequence[Any]) -> Any:
    """Contexts of one kind (what `prepare_context` of one transformer returned, each [b, ...]) as one [B, ...], in this
    order. Those of one request differ in text alone. A single one is returned as it is."""
    first = contexts[0]
    if len(contexts) == 1:
        return first
    fields = {name: [getattr(one, name) for one in contexts] for name in first._fields if name not in SHARED}
    return first._replace(**{name: _joined(values) for name, values in fields.items()})


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(tuple(values))
    if isinstance(values[0], tuple):
        return tuple(map(_joined, zip(*values, strict=True)))
    return values[0]
