"""The residual stream between a transformer's blocks. Shapes: B batch, N tokens, d width, K rows of modulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Stream:
    """x [B, N, d], and perhaps y [B, N, d] and gate [K, d], whose product is still to be added: the next block adds it
    in the pass in which it takes the norm.

    `take` empties it. A caller keeps its arguments alive until the call returns, so a tensor passed by itself could not
    be freed before that.
    """

    def __init__(self, x: Tensor, y: Tensor | None = None, gate: Tensor | None = None) -> None:
        self._parts: list[Any] = [x, y, gate]

    def parts(self) -> list[Any]:
        """x, y and gate; the stream still holds them."""
        return list(self._parts)

    def take(self) -> list[Any]:
        """x, y and gate; the stream no longer holds them."""
        parts, self._parts = self._parts, []
        return parts
