"""The residual stream of a transformer, handed from block to block. Shapes: B batch, N tokens, d width, K rows of
modulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Stream:
    """The residual stream between blocks: x [B, N, d], and perhaps y [B, N, d] times gate [K, d], which is still to be
    added: the next block does so in the pass in which it takes the norm.

    A box that is emptied: what calls a module holds on to the arguments until it returns, so tensors would stay.
    """

    def __init__(self, x: Tensor, y: Tensor | None = None, gate: Tensor | None = None) -> None:
        self._parts: list[Any] = [x, y, gate]

    def take(self) -> list[Any]:
        """x, y and gate, which it then no longer holds: they are freed as whoever takes them goes on."""
        parts, self._parts = self._parts, []
        return parts
