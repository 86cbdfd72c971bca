"""Norms, the residual stream in front of them, and queries and keys made ready for attention.

The meaning is in `reference.py`: modulated_layer_norm, gated_residual, layer_norm, rms_norm and rms_norm_rope, and four
operations that do several of these in one pass over memory. `triton` is kernels/row_norms.py and
kernels/qk_norm_rope.py.

Shapes: B batch, N tokens, H heads, D head_dim, d = H * D width, K distinct timesteps, G groups of N // G neighbouring
tokens that share one. x and y [B, N, d]; gate, shift and scale [K, d] in fp32, index [B, G] in int32 or int64 (the row
of each group); weight and bias [d]; cos and sin [N, D // 2] in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import reference

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def tile_order(
    grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Tokens of a (t, h, w) grid one tile after another: (order, inverse), two permutations int64 [t * h * w].

    Position p in the new order has token order[p]; token n stands at position inverse[n]. Tiles follow one another as
    tokens do, w fastest, and so do the tokens in a tile; those at the far edges are smaller where the grid does not
    divide. Raises ValueError for sizes below 1.
    """
    if len(grid) != 3 or len(tile) != 3 or min(*grid, *tile) < 1:
        raise ValueError(f"grid {grid} and tile {tile} are three sizes (t, h, w) of at least 1 each")
    number = torch.zeros(grid, dtype=torch.int64, device=device)
    for axis, (size, step) in enumerate(zip(grid, tile, strict=True)):
        shape = [size if i == axis else 1 for i in range(3)]
        number = number * -(-size // step) + (torch.arange(size, device=device) // step).view(shape)
    order = number.flatten().argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))


# The Triton kernels, each one operator of torch.


@torch.library.custom_op("fastvid::modulated_layer_norm_triton", mutates_args=())
def modulated_layer_norm_triton(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    from fastvid.kernels.row_norms import row_norm

    out = _like(x)
    row_norm(x, out, eps=eps, weight=scale, bias=shift, index=index, modulated=True)
    return out


@torch.library.custom_op("fastvid::gated_residual_triton", mutates_args=())
def gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    from fastvid.kernels.row_norms import row_norm

    total = _like(x)
    row_norm(x, None, y=y, gate=gate, total=total, index=index)
    return total


@torch.library.custom_op("fastvid::gated_residual_norm_triton", mutates_args=())
def gated_residual_norm_triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> Pair:
    from fastvid.kernels.row_norms import row_norm

    total, out = _like(x), _like(x)
    row_norm(x, out, eps=eps, weight=scale, bias=shift, y=y, gate=gate, total=total, index=index, modulated=True)
    return total, out


@torch.library.custom_op("fastvid::gated_residual_layer_norm_triton", mutates_args=())
def gated_residual_layer_norm_triton(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Pair:
    from fastvid.kernels.row_norms import row_norm

    total, out = _like(x), _like(x)
    row_norm(x, out, eps=eps, weight=weight, bias=bias, y=y, gate=gate, total=total, index=index)
    return total, out


@torch.library.custom_op("fastvid::residual_norm_triton", mutates_args=())
def residual_norm_triton(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Pair:
    from fastvid.kernels.row_norms import row_norm

    total, out = _like(x), _like(x)
    row_norm(x, out, eps=eps, weight=scale, bias=shift, y=y, total=total, index=index, modulated=True)
    return total, out


@torch.library.custom_op("fastvid::layer_norm_triton", mutates_args=())
def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from fastvid.kernels.row_norms import row_norm

    out = _like(x)
    row_norm(_rows(x), _rows(out), eps=eps, weight=weight, bias=bias)
    return out


@torch.library.custom_op("fastvid::rms_norm_triton", mutates_args=())
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from fastvid.kernels.row_norms import row_norm

    out = _like(x)
    row_norm(_rows(x), _rows(out), eps=eps, weight=weight)
    return out


@torch.library.custom_op("fastvid::rms_norm_rope_triton", mutates_args=())
def rms_norm_rope_triton(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    from fastvid.kernels.qk_norm_rope import norm_rope

    out = _heads(x, cos)
    norm_rope(x, weight, cos, sin, eps, out)
    return out


@torch.library.custom_op("fastvid::qkv_norm_rope_triton", mutates_args=())
def qkv_norm_rope_triton(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    order: Tensor | None = None,
) -> Triple:
    from fastvid.kernels import qk_norm_rope as kernels

    out = _three_heads(qkv, cos)
    kernels.qkv_norm_rope(qkv, weight_q, weight_k, cos, sin, eps, order, out)
    return out


Backends = Mapping[str, Callable[..., Any]]
BACKENDS: Mapping[str, Backends] = {
    "modulated_layer_norm": {"reference": reference.modulated_layer_norm, "triton": modulated_layer_norm_triton},
    "gated_residual": {"reference": reference.gated_residual, "triton": gated_residual_triton},
    "gated_residual_norm": {"reference": reference.gated_residual_norm, "triton": gated_residual_norm_triton},
    "gated_residual_layer_norm": {
        "reference": reference.gated_residual_layer_norm,
        "triton": gated_residual_layer_norm_triton,
    },
    "residual_norm": {"reference": reference.residual_norm, "triton": residual_norm_triton},
    "layer_norm": {"reference": reference.layer_norm, "triton": layer_norm_triton},
    "rms_norm": {"reference": reference.rms_norm, "triton": rms_norm_triton},
    "rms_norm_rope": {"reference": reference.rms_norm_rope, "triton": rms_norm_rope_triton},
    "qkv_norm_rope": {"reference": reference.qkv_norm_rope, "triton": qkv_norm_rope_triton},
}


def _like(x: Tensor) -> Tensor:
    """A result as large as x, not filled in."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows(x: Tensor) -> Tensor:
    """[..., d] as [B, N, d], a view. Raises ValueError where strides do not allow it."""
    if x.ndim == 0:
        raise ValueError("rows [..., d] are needed, not a single number")
    if x.ndim <= 3:
        return x[(None,) * (3 - x.ndim)]
    try:
        return x.view(-1, *x.shape[-2:])
    except RuntimeError as error:
        raise ValueError(f"{list(x.shape)} with strides {x.stride()} are not rows at even distances") from error


def _heads(x: Tensor, cos: Tensor) -> Tensor:
    """[B, N, H, D] for x [B, N, H * D], not filled in."""
    if x.ndim != 3 or cos.ndim != 2 or not cos.shape[1] or x.shape[2] % (2 * cos.shape[1]):
        raise ValueError(f"x [B, N, H * D] and cos [N, D // 2] are needed, not {list(x.shape)} and {list(cos.shape)}")
    head_dim = 2 * cos.shape[1]
    shape = (x.shape[0], x.shape[1], x.shape[2] // head_dim, head_dim)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _three_heads(qkv: Tensor, cos: Tensor) -> Triple:
    """Three times [B, N, H, D], laid out [B, H, N, D], for qkv [B, N, 3 * H * D], not filled in."""
    if qkv.ndim != 3 or cos.ndim != 2 or not cos.shape[1] or qkv.shape[2] % (6 * cos.shape[1]):
        given = f"{list(qkv.shape)} and {list(cos.shape)}"
        raise ValueError(f"qkv [B, N, 3 * H * D] and cos [N, D // 2] are needed, not {given}")
    head_dim = 2 * cos.shape[1]
    shape = (qkv.shape[0], qkv.shape[2] // (3 * head_dim), qkv.shape[1], head_dim)
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device).transpose(1, 2) for _ in range(3))
    return q, k, v


@modulated_layer_norm_triton.register_fake
@gated_residual_triton.register_fake
@layer_norm_triton.register_fake
@rms_norm_triton.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


@gated_residual_norm_triton.register_fake
@gated_residual_layer_norm_triton.register_fake
@residual_norm_triton.register_fake
def _fake_pair(x: Tensor, *_: Any) -> Pair:
    return _like(x), _like(x)


@rms_norm_rope_triton.register_fake
def _fake_heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return _heads(x, cos)


@qkv_norm_rope_triton.register_fake
def _fake_three_heads(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    order: Tensor | None = None,
) -> Triple:
    return _three_heads(qkv, cos)
