"""Walks a noise table: the one denoising loop.

Columns are latent frames; a row takes every column of a window from one noise level to the next. All columns equal is
whole-clip sampling; the rows of a table decide everything else. The loop yields after every row, so that progress,
cancelling and streaming need no hook, and hands out latent frames as soon as their level is zero.

Shapes: C channels, T columns of the window, h/w latent height and width; latents [1, C, T, h, w].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvid.sampling import Denoise, Solver


@dataclass(frozen=True)
class Row:
    """One step of a table: the levels [T] (float64) of the window's columns before and after it."""

    sigma: Tensor
    sigma_next: Tensor


@dataclass(frozen=True)
class Walked:
    """One row is done. `ready` are the latents [1, C, n, h, w] that became clean in it, from column `start` on."""

    row: int
    sigma: float
    ready: Tensor | None
    start: int


def whole_clip(sigmas: np.ndarray, columns: int) -> list[Row]:
    """Classic sampling: every column at the same level, down to zero. sigmas [N] without the final zero."""
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    return [Row(s.expand(columns), n.expand(columns)) for s, n in zip(levels[:-1], levels[1:], strict=True)]


def walk(table: Iterable[Row], latents: Tensor, solver: Solver, denoise: Denoise) -> Iterator[Walked]:
    """Denoise latents [1, C, T, h, w] along a table.

    Yields once a row. Columns must become clean from the left; each is handed out once, in order.
    """
    state, done = solver.init(), 0
    for number, row in enumerate(table):
        latents, state = _step(row, latents, solver, denoise, state)
        clean = int((row.sigma_next == 0).long().cumprod(0).sum())
        ready = latents[:, :, done:clean] if clean > done else None
        yield Walked(number, float(row.sigma.max()), ready, done)
        done = max(done, clean)


# The grad mode is set inside the call and never across a yield, where it would leak into the caller's code.
@torch.no_grad()
def _step(row: Row, latents: Tensor, solver: Solver, denoise: Denoise, state: object) -> tuple[Tensor, object]:
    return solver.step(latents, denoise(latents, row.sigma), row.sigma, row.sigma_next, state)
