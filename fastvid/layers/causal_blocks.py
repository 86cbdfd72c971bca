"""Attention in which a block of latent frames sees itself and the blocks before it, not those behind.

Each block's queries meet the keys up to its end, so no mask is needed and nothing is computed in vain: with n blocks
(n + 1) / 2n of the products of full attention.

Shapes: B batch, N tokens of all frames, frame by frame, H heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CausalBlocks:
    """frames: latent frames of a call. block: of a block; the last one may be shorter."""

    frames: int
    block: int

    def attend(self, ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] each -> [B, N, H, D]."""
        each = q.shape[1] // self.frames
        stops = [*range(self.block, self.frames, self.block), self.frames]
        starts = [0, *stops[:-1]]
        parts = [
            ops.attention(q[:, start * each : stop * each], k[:, : stop * each], v[:, : stop * each], blocks=None)
            for start, stop in zip(starts, stops, strict=True)
        ]
        return torch.cat(parts, dim=1)
