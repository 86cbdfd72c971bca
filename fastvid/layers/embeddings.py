"""Positions and timesteps as numbers: rotary tables of a (t, h, w) grid, sinusoids of timesteps, and which tokens share
a timestep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvid.errors import InvalidRequest
from fastvid.ops.upload import upload


def rotary_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    offset: int | Sequence[int] = 0,
    theta: float = 10000.0,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every token of a (t, h, w) grid, w fastest: two fp32 tensors [N, D // 2].

    Of the D // 2 pairs, D // 6 rotate with h, as many with w, and the rest with t (44 / 42 / 42 channels at D = 128).
    offset: the index of the first t, or the index of every t. Angles are computed in fp64: at position 1000 fp32 is
    3e-5 off.
    Source: Wan2.1 `wan/modules/model.py`, rope_params and rope_apply.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    t, h, w = grid
    places = (range(offset, offset + t) if isinstance(offset, int) else offset, range(h), range(w))
    assert len(places[0]) == t, (offset, grid)
    # One row for each position on an axis, about 1e2; on the device they become one for each token, 1e5 of a long clip.
    turns = [upload(_axis_turns(axis, widths[axis], places[axis], theta), device) for axis in range(3)]
    cos, sin = (torch.cat([turn[i].expand(*grid, -1) for turn in turns], dim=-1).flatten(0, 2) for i in range(2))
    return cos, sin


class RotaryTables:
    """`rotary_table` for heads of one size, with a cache of the last table, which every step of a request asks for.

    Thread-safe: a table and its key are read together, and at worst a table is computed twice. On a GPU a table is
    valid for the stream that it was made in.
    """

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim
        self._last: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def __call__(
        self, grid: tuple[int, int, int], offset: int | Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        key = (tuple(grid), offset if isinstance(offset, int) else tuple(offset), device, stream)
        last = self._last
        if last is None or last[0] != key:
            with torch.inference_mode(False):  # a later call may take gradients
                last = key, rotary_table(grid, self._head_dim, offset=offset, device=device)
            self._last = last
        return last[1]


def _axis_turns(axis: int, width: int, places: Sequence[int], theta: float) -> Tensor:
    """Cosines and sines of one axis, with tokens at the positions `places`: fp32 [2, t, h, w, width // 2] on the CPU,
    where the sizes of the other axes are 1."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    position = torch.tensor(list(places), dtype=torch.float64, device="cpu")
    angles = torch.outer(position, frequency)
    shape = [len(position) if i == axis else 1 for i in range(3)]
    return torch.stack((angles.cos(), angles.sin())).float().view(2, *shape, -1)


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[cos(t f_i) | sin(t f_i)], f_i = 10000^(-i / (dim / 2)): timestep [K] on 0..1000 -> fp32 [K, dim].

    In fp32 and in the order of diffusers, so that results are equal to its own. The original uses fp64, from which this
    differs by 6e-6 at t = 1000, and by about 1.5e-6 in the model's output.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def group_timesteps(timestep: Tensor, batch: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(distinct timesteps [K], the row of each group of tokens [B, G]), with G = 1, t or N.

    timestep: [B], [B, t] or [B, N] for a (t, h, w) grid of N tokens; [B, N] that is equal within frames becomes [B, t].
    Raises InvalidRequest for other shapes.
    """
    t, tokens = grid[0], grid[0] * grid[1] * grid[2]
    if timestep.shape == (batch,):
        return timestep, torch.arange(batch, device=timestep.device)[:, None]
    if timestep.shape not in ((batch, t), (batch, tokens)):
        raise InvalidRequest(
            f"timestep is [{batch}], [{batch}, {t}] (a frame) or [{batch}, {tokens}] (a token) here, "
            f"not {list(timestep.shape)}"
        )
    frames = timestep.unflatten(1, (t, -1))
    if torch.equal(frames, frames[..., :1].expand_as(frames)):
        timestep = frames[..., 0]
    return torch.unique(timestep, return_inverse=True)
