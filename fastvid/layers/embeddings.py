"""Positions and timesteps as numbers: rotary tables for a (t, h, w) grid, sinusoids for noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    offset: int | Sequence[int] = 0,
    theta: float = 10000.0,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every token of a (t, h, w) grid, w fastest: two fp32 tensors [N, D // 2].

    Of the D // 2 pairs, D // 6 turn with h, as many with w, and the rest with t (44 / 42 / 42 channels at D = 128).
    offset is the index of the first t, from which the others count on, or the index of every t. Angles are taken in
    fp64: at position 1000 fp32 is 3e-5 off.
    Source: Wan2.1 `wan/modules/model.py`, rope_params and rope_apply.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    t, h, w = grid
    places = (range(offset, offset + t) if isinstance(offset, int) else offset, range(h), range(w))
    assert len(places[0]) == t, (offset, grid)
    angles = [_axis_angles(axis, grid, width, places[axis], theta) for axis, width in enumerate(widths)]
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos().float().to(device), table.sin().float().to(device)


def _axis_angles(axis: int, grid: tuple[int, int, int], width: int, places: Sequence[int], theta: float) -> Tensor:
    """fp64 angles [t, h, w, width // 2] that follow one axis of the grid, along which tokens stand at `places`."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    position = torch.tensor(list(places), dtype=torch.float64, device="cpu")
    shape = [grid[axis] if i == axis else 1 for i in range(3)]
    return torch.outer(position, frequency).view(*shape, -1).expand(*grid, -1)


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[cos(t f_i) | sin(t f_i)], f_i = 10000^(-i / (dim / 2)): timestep [K] on 0..1000 -> fp32 [K, dim].

    In fp32, step by step as diffusers does: the result then is its result, whatever the weights make of the rounding.
    The original takes fp64, from which this is 6e-6 off at t = 1000, and about 1.5e-6 in what the model returns.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
