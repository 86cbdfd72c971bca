"""The Triton kernels of a transformer's operations, registered as torch operators.

`reference.py` defines the operations and their shapes. This file checks shapes and allocates results:

    both ends     patch_embed, head                       kernels/patch_embed.py, kernels/head.py
    norms         rms_norm, layer_norm, and those with    kernels/row_norms.py
                  modulation and the residual stream
    q, k and v    rms_norm_rope, qkv_norm_rope            kernels/qk_norm_rope.py
    linears       linear, linear_gelu_tanh                kernels/linear_gelu.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import reference

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # supported by the linear layers


# Both ends


@torch.library.custom_op("fastvid::patch_embed_triton", mutates_args=())
def patch_embed_triton(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> Tensor:
    """The Triton kernel; it does not copy the patches."""
    from fastvid.kernels.patch_embed import patch_embed as run

    out = _tokens_of(latents, weight, bias, known)
    run(latents, weight, bias, known, out)
    return out


@torch.library.custom_op("fastvid::head_triton", mutates_args=())
def head_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Triton kernel. Reads the tokens once (twice if every token has its own timestep)."""
    from fastvid.kernels.head import head as run

    out = _latents_of(x, shift, scale, index, weight, bias, grid, patch, eps, dtype)
    t, h, w = grid
    pt, ph, pw = patch
    run(x, shift, scale, index, weight, bias, (t, h, w), (pt, ph, pw), eps, out)
    return out


@patch_embed_triton.register_fake
def _tokens_of(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> Tensor:
    """The uninitialized result. Raises ValueError for shapes that do not fit together."""
    tensors = [tensor for tensor in (latents, weight, known, bias) if tensor is not None]
    fits = latents.ndim == weight.ndim == 5 and (bias is None or bias.shape == weight.shape[:1])
    if fits and known is not None:
        fits = known.ndim == 5 and (known.shape[0], *known.shape[2:]) == (latents.shape[0], *latents.shape[2:])
    if fits:
        channels = latents.shape[1] + (0 if known is None else known.shape[1])
        sizes = zip(latents.shape[2:], weight.shape[2:], strict=True)
        fits = channels == weight.shape[1] and all(n % p == 0 for n, p in sizes)
    if not fits:
        raise ValueError(
            "patch_embed takes latents [B, C, T, H, W], weight [d, C + C2, pt, ph, pw] whose patch divides T, H and W, "
            f"known [B, C2, T, H, W] and bias [d], not {_shapes(*tensors)}"
        )
    B, _, T, H, W = latents.shape
    d, _, pt, ph, pw = weight.shape
    return weight.new_empty((B, (T // pt) * (H // ph) * (W // pw), d))


@head_triton.register_fake
def _latents_of(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The uninitialized result. Raises ValueError for shapes that do not fit together."""
    fits = x.ndim == 3 and len(grid) == len(patch) == 3 and x.shape[1] == grid[0] * grid[1] * grid[2]
    fits = fits and shift.ndim == 2 and shift.shape == scale.shape and shift.shape[1] == x.shape[2]
    fits = fits and len(shift) > 0 and index.ndim == 2 and index.shape[0] == x.shape[0] and index.shape[1] > 0
    fits = fits and x.shape[1] % index.shape[1] == 0
    fits = fits and weight.ndim == 2 and weight.shape[1] == x.shape[2] and bias.shape == weight.shape[:1]
    if not fits or weight.shape[0] % (patch[0] * patch[1] * patch[2]):
        raise ValueError(
            "head takes x [B, N, d], shift and scale [K, d], index [B, G], weight [n pt ph pw, d], bias [n pt ph pw], "
            f"a grid of N tokens and a patch, not {_shapes(x, shift, scale, index, weight, bias)}, {tuple(grid)} "
            f"and {tuple(patch)}"
        )
    (t, h, w), (pt, ph, pw) = grid, patch
    size = (x.shape[0], weight.shape[0] // (pt * ph * pw), t * pt, h * ph, w * pw)
    return x.new_empty(size, dtype=dtype or x.dtype)


# Norms


def _row_norm(x: Tensor, out: Tensor | None, **options: Any) -> None:
    from fastvid.kernels.row_norms import row_norm

    row_norm(x, out, **options)


@torch.library.custom_op("fastvid::modulated_layer_norm_triton", mutates_args=())
def modulated_layer_norm_triton(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    out = _like(x)
    _row_norm(x, out, eps=eps, weight=scale, bias=shift, index=index, modulated=True)
    return out


@torch.library.custom_op("fastvid::gated_residual_triton", mutates_args=())
def gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    total = _like(x)
    _row_norm(x, None, y=y, gate=gate, total=total, index=index)
    return total


@torch.library.custom_op("fastvid::gated_residual_norm_triton", mutates_args=())
def gated_residual_norm_triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> Pair:
    total, out = _like(x), _like(x)
    _row_norm(x, out, eps=eps, weight=scale, bias=shift, y=y, gate=gate, total=total, index=index, modulated=True)
    return total, out


@torch.library.custom_op("fastvid::gated_residual_layer_norm_triton", mutates_args=())
def gated_residual_layer_norm_triton(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Pair:
    total, out = _like(x), _like(x)
    _row_norm(x, out, eps=eps, weight=weight, bias=bias, y=y, gate=gate, total=total, index=index)
    return total, out


@torch.library.custom_op("fastvid::residual_norm_triton", mutates_args=())
def residual_norm_triton(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Pair:
    total, out = _like(x), _like(x)
    _row_norm(x, out, eps=eps, weight=scale, bias=shift, y=y, total=total, index=index, modulated=True)
    return total, out


@torch.library.custom_op("fastvid::layer_norm_triton", mutates_args=())
def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = _like(x)
    _row_norm(_rows(x), _rows(out), eps=eps, weight=weight, bias=bias)
    return out


@torch.library.custom_op("fastvid::rms_norm_triton", mutates_args=())
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _like(x)
    _row_norm(_rows(x), _rows(out), eps=eps, weight=weight)
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


def _like(x: Tensor) -> Tensor:
    """An uninitialized contiguous tensor of x's shape and dtype."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows(x: Tensor) -> Tensor:
    """View [..., d] as [B, N, d]. Raises ValueError if the strides do not allow it."""
    if x.ndim == 0:
        raise ValueError("rows [..., d] are needed, not a single number")
    if x.ndim <= 3:
        return x[(None,) * (3 - x.ndim)]
    try:
        return x.view(-1, *x.shape[-2:])
    except RuntimeError as error:
        raise ValueError(f"{list(x.shape)} with strides {x.stride()} are not rows at even distances") from error


def _heads(x: Tensor, cos: Tensor) -> Tensor:
    """An uninitialized [B, N, H, D] for x [B, N, H * D]."""
    if x.ndim != 3 or cos.ndim != 2 or not cos.shape[1] or x.shape[2] % (2 * cos.shape[1]):
        raise ValueError(f"x [B, N, H * D] and cos [N, D // 2] are needed, not {list(x.shape)} and {list(cos.shape)}")
    head_dim = 2 * cos.shape[1]
    shape = (x.shape[0], x.shape[1], x.shape[2] // head_dim, head_dim)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _three_heads(qkv: Tensor, cos: Tensor) -> Triple:
    """Three uninitialized [B, N, H, D] (memory layout [B, H, N, D]) for qkv [B, N, 3 * H * D]."""
    if qkv.ndim != 3 or cos.ndim != 2 or not cos.shape[1] or qkv.shape[2] % (6 * cos.shape[1]):
        shapes = f"{list(qkv.shape)} and {list(cos.shape)}"
        raise ValueError(f"qkv [B, N, 3 * H * D] and cos [N, D // 2] are needed, not {shapes}")
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


# Linear layers


@torch.library.custom_op("fastvid::linear_triton", mutates_args=())
def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The Triton kernel."""
    return _linear(x, weight, bias, gelu=False)


@torch.library.custom_op("fastvid::linear_gelu_tanh_triton", mutates_args=())
def linear_gelu_tanh_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The Triton kernel with GELU in its epilogue."""
    return _linear(x, weight, bias, gelu=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    from fastvid.kernels.linear_gelu import linear as run

    out = _linear_out(x, weight, bias)
    # reshape copies rows that cannot be viewed as one matrix, such as a slice of a batch.
    rows = out.shape[:-1].numel()
    run(x.reshape(rows, x.shape[-1]), weight, bias, out.view(rows, out.shape[-1]), gelu)
    return out


@linear_triton.register_fake
@linear_gelu_tanh_triton.register_fake
def _linear_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The uninitialized result. Raises ValueError for shapes or dtypes that do not fit together."""
    _check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    fits = x.ndim >= 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and x.dtype in DTYPES
    if not fits or (bias is not None and bias.shape != weight.shape[:1]) or len({t.dtype for t in tensors}) > 1:
        raise ValueError(
            "linear takes x [..., K], weight [n, K] and bias [n] of one type, float32, float16 or bfloat16, not "
            + _shapes(*tensors)
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)


TRITON: Mapping[str, Callable[..., Any]] = {
    "patch_embed": patch_embed_triton,
    "head": head_triton,
    "modulated_layer_norm": modulated_layer_norm_triton,
    "gated_residual": gated_residual_triton,
    "gated_residual_norm": gated_residual_norm_triton,
    "gated_residual_layer_norm": gated_residual_layer_norm_triton,
    "residual_norm": residual_norm_triton,
    "layer_norm": layer_norm_triton,
    "rms_norm": rms_norm_triton,
    "rms_norm_rope": rms_norm_rope_triton,
    "qkv_norm_rope": qkv_norm_rope_triton,
    "linear": linear_triton,
    "linear_gelu_tanh": linear_gelu_tanh_triton,
}
BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    name: {"reference": getattr(reference, name), "triton": function} for name, function in TRITON.items()
}
