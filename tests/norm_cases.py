"""Arguments of norms, residuals and rotations, and their formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
Result = tuple[Tensor, ...]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def results(out: Tensor | Sequence[Tensor]) -> Result:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def row_arguments(
    B: int, N: int, G: int, K: int, d: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation on rows: x is a slice of a fused projection, tables are slices of [K, 6, d]."""
    x = (randn(B, N, 3 * d, seed=seed) * 2 + 1).to(dtype).to(device)[..., d : 2 * d]
    y = randn(B, N, d, seed=seed + 1, dtype=dtype, device=device)
    shift, scale, gate = randn(K, 6, d, seed=seed + 2, device=device)[:, 1:4].unbind(1)
    weight, bias = randn(2, d, seed=seed + 3, dtype=dtype, device=device).unbind(0)
    index = torch.randint(K, (B, G), generator=torch.Generator().manual_seed(seed)).to(device)
    return {
        "modulated_layer_norm": (x, shift, scale, index, EPS),
        "gated_residual": (x, y, gate, index),
        "gated_residual_norm": (x, y, gate, shift, scale, index, EPS),
        "gated_residual_layer_norm": (x, y, gate, index, weight, bias, EPS),
        "residual_norm": (x, y, shift, scale, index, EPS),
        "layer_norm": (x, weight, bias, EPS),
        "rms_norm": (x, weight, EPS),
    }


def head_arguments(
    B: int, N: int, H: int, D: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """qkv (a crop of something wider), the weights of q and k, cos and sin."""
    qkv = randn(B, N, 3 * H * D + 16, seed=seed, dtype=dtype, device=device)[..., : 3 * H * D]
    weights = randn(2, H * D, seed=seed + 1, dtype=dtype, device=device).unbind(0)
    angles = randn(N, D // 2, seed=seed + 2, device=device) * 5
    return qkv, *weights, angles.cos(), angles.sin()


# The formulas a second time, in fp64. The residual stream is taken as given, so that its rounding is not an error.


def of_tokens(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    return table.double()[index.repeat_interleave(tokens // index.shape[1], 1)]


def formula(name: str, args: tuple[Any, ...], stream: Tensor) -> Result:
    """The results of an operation; stream: the new residual stream as it was rounded, whose norm is taken."""
    x, named = args[0].double(), dict(zip(NAMES[name], args, strict=True))
    tables = {
        key: of_tokens(named[key], named["index"], x.shape[1]) for key in ("gate", "shift", "scale") if key in named
    }
    out = [x + named["y"].double() * tables.get("gate", 1.0)] if "y" in named else []
    s = stream.double() if out else x
    if name == "gated_residual":
        return tuple(out)
    if name == "rms_norm":
        return (s / (s.square().mean(-1, keepdim=True) + EPS).sqrt() * named["weight"].double(),)
    s = s - s.mean(-1, keepdim=True)
    s = s / (s.square().mean(-1, keepdim=True) + EPS).sqrt()
    if "weight" in named:
        return *out, s * named["weight"].double() + named["bias"].double()
    return *out, s * (1 + tables["scale"]) + tables["shift"]


NAMES = {
    "modulated_layer_norm": ("x", "shift", "scale", "index", "eps"),
    "gated_residual": ("x", "y", "gate", "index"),
    "gated_residual_norm": ("x", "y", "gate", "shift", "scale", "index", "eps"),
    "gated_residual_layer_norm": ("x", "y", "gate", "index", "weight", "bias", "eps"),
    "residual_norm": ("x", "y", "shift", "scale", "index", "eps"),
    "layer_norm": ("x", "weight", "bias", "eps"),
    "rms_norm": ("x", "weight", "eps"),
}


def turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotation of [B, N, H * D] in fp64, by a matrix for every pair."""
    (x,) = formula("rms_norm", (x, weight, EPS), x)
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2).double()
    pairs = x.unflatten(-1, (-1, cos.shape[1], 2))
    return torch.einsum("nire,bnhie->bnhir", turn, pairs).flatten(-2)


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def floor(dtype: torch.dtype) -> float:
    """The error that is fine whatever eager PyTorch has: a unit in the last place; two of fp32, where sums matter."""
    return torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1)
