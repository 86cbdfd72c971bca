"""Block-sparse self-attention of a request: the settings of `attention="sparse:..."`, and what they mean on a grid.

Every tile of tokens attends to the tiles whose mean keys score best with its mean query, chosen for each head in each
call (`sparse.top_k`): that needs no calibration, and follows what moves. The first steps decide the layout of a video
and attention is diffuse in them, so some are dense (`dense_steps`), as in Sparse VideoGen (arXiv 2502.01776) and Radial
Attention (arXiv 2506.19852). The share of tiles that is kept is the same in all other steps and layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.layers.tiles import Tiling
from fastvid.requests import levers

DEFAULTS: Mapping[str, Any] = {"keep": 0.5, "dense_steps": 0.25, "dense_layers": 0}
TOKENS = 128
"""Of a tile, about, where a frame has many: kernels multiply 64 or 128 at a time."""
LEAST = 16
"""Tiles of a frame that are worth choosing among: smaller frames get smaller tiles."""


@dataclass(frozen=True)
class Settings:
    """See `requests.levers.ATTENTIONS`."""

    keep: float
    dense_steps: float
    dense_layers: int

    @classmethod
    def of(cls, text: str) -> Settings:
        """The settings of a lever's text, with defaults filled in."""
        given = levers.parse("attention", text, levers.ATTENTIONS).settings
        return cls(**{name: given.get(name, value) for name, value in DEFAULTS.items()})

    def dense_rows(self, steps: int) -> int:
        """How many of a window's first steps are dense."""
        return math.ceil(self.dense_steps * steps - 1e-9)


def tile_of(frame: tuple[int, int]) -> tuple[int, int]:
    """The tile (h, w) of a frame of (h, w) tokens: near a square of TOKENS, and smaller where a frame would have less
    than LEAST. Tiles divide a frame as evenly as they can."""
    h, w = frame
    count = max(LEAST, math.ceil(h * w / TOKENS))
    rows = min(h, max(1, round(math.sqrt(count * h / w))))
    return math.ceil(h / rows), math.ceil(w / min(w, max(1, round(count / rows))))


@dataclass
class SegmentSparsity:
    """The sparsity of a segment. sigmas: the noise levels [N] of a window."""

    settings: Settings
    sigmas: np.ndarray
    _tilings: dict[tuple[Any, ...], Tiling] = field(default_factory=dict)

    def is_dense(self, sigma: Tensor) -> bool:
        """Whether a table row with these noise levels is among the dense ones."""
        done = int((self.sigmas > float(sigma.max()) + 1e-9).sum())
        return done < self.settings.dense_rows(len(self.sigmas))

    def tiling(self, frame: tuple[int, int], device: torch.device) -> Tiling:
        key, one = (*frame, device), self.settings
        if key not in self._tilings:
            self._tilings[key] = Tiling.of_frame(frame, tile_of(frame), device, one.keep, one.dense_layers)
        return self._tilings[key]
