"""Positions and timesteps as numbers: rotary tables for a (t, h, w) grid, sinusoids for noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_table(
    grid: tuple[int, int, int], head_dim: int, *, offset: int = 0, theta: float = 10000.0, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every token of a (t, h, w) grid, w fastest: two fp32 tensors [N, D // 2].

    Of the D // 2 pairs, D // 6 turn with h, as many with w, and the rest with t (44 / 42 / 42 channels at D = 128).
    offset is the absolute index of the first t. Angles are taken in fp64: at position 1000 fp32 is 3e-5 off.
    Source: Wan2.1 `wan/modules/model.py`, rope_params and rope_apply.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    angles = [_axis_angles(axis, grid, width, offset if axis == 0 else 0, theta) for axis, width in enumerate(widths)]
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos().float().to(device), table.sin().float().to(device)


def _axis_angles(axis: int, grid: tuple[int, int, int], width: int, offset: int, theta: float) -> Tensor:
    """fp64 angles [t, h, w, width // 2] that follow one axis of the grid."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    position = torch.arange(offset, offset + grid[axis], dtype=torch.float64, device="cpu")
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
