"""What one call of a transformer may do less of. Without levers a call computes everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastvid.layers.residual import Stream
from fastvid.layers.tiles import Tiling


class CachedBlocks(Protocol):
    """The blocks of one call, some or all of which a step cache may leave out."""

    def run(self, start: Stream, blocks: Callable[[Stream], Stream], whole: Callable[[Stream], Tensor]) -> Tensor:
        """What the blocks make of the stream [B, N, d]. blocks: runs them, and asks `is_enough` after each of the
        video's own. whole: a stream's value with nothing left to add; the stream keeps what it holds."""

    def is_enough(self, stream: Stream) -> bool:
        """Called after each block with what it has made: whether the blocks behind it are left out."""


class Sparsity(Protocol):
    """Which tiles of keys the queries of one request attend to."""

    def tiling(self, frame: tuple[int, int], device: torch.device) -> Tiling:
        """For frames of (h, w) tokens."""


@dataclass(frozen=True)
class CallLevers:
    """blocks: a step cache for this call, which runs the blocks or reuses what they made in an earlier step. sparsity:
    which tiles of keys each layer's queries attend to. None: not in this call."""

    blocks: CachedBlocks | None = None
    sparsity: Sparsity | None = None


def is_enough(levers: CallLevers | None, stream: Stream) -> bool:
    """Whether a call leaves out the blocks behind the one that has made this stream."""
    return levers is not None and levers.blocks is not None and levers.blocks.is_enough(stream)
