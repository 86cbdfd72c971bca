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

    In fp64 as the original does; diffusers' fp32 is up to 3e-5 off at t = 1000, which stays under 1e-6 in the output.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angle = timestep.double()[:, None] * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()
