"""Shape classes: calls of an operation for which the same back end is fastest.

    shape_class("attention", (q, k, v), {}) -> "dense self 2^14x2^14 heads 2^3 d128"

A class holds what a kernel's speed depends on: the form of the call, fixed sizes of a model (widths, channels) as they
are, and sizes of a request (tokens, pixels) by their octave: 2^14 is 16,384 to 32,767. A result for one class says
nothing of another. Arguments are those of the operations in `reference.py`; only shapes are read, so meta tensors do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvid.ops.quantized import Activations, QuantizedTensor
from fastvid.ops.sparse import Blocks


def shape_class(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The class of a call op(*args, **kwargs)."""
    return CLASSES[op](*args, **kwargs)


def dtype_of(op: str, args: Sequence[Any]) -> str:
    """The dtype that a call computes in: "bfloat16" etc."""
    return str(args[1 if op == "patch_embed" else 0].dtype).removeprefix("torch.")


def octave(n: int) -> str:
    """2^floor(log2(n)), as text."""
    return f"2^{n.bit_length() - 1}" if n else "0"


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
) -> str:
    B, N, H, D = q.shape
    M = k.shape[1]
    form = "dense" if blocks is None else "sparse"
    kind = "self" if N == M else "cross"
    lse = " lse" if return_lse else ""
    return f"{form} {kind} {octave(N)}x{octave(M)} heads {octave(B * H)} d{D}{lse}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    n, K = weight.shape
    return f"{K} to {n} rows {octave(x.numel() // max(K, 1))}"


def _linear_quantized(
    x: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> str:
    n, K = weight.shape
    how = (f" rotated {weight.rotation}" if weight.rotation else "") + (" 8-bit" if weight.eight_bit else "")
    many = octave(x.numel() // max(K, 1))
    return f"{weight.format}{how} {K} to {n} rows {many}" + (" gelu" if gelu else "") + (f" to {rows}" if rows else "")


def _quantize_rows(x: Tensor, format: str, rotation: int = 0) -> str:
    return f"{_rows(x)} to {format}" + (f" rotated {rotation}" if rotation else "")


def _quantized_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> str:
    how = "layer" if scale.ndim == 1 else "modulated"
    before = "" if y is None else " added" if gate is None else " gated"
    tables = [one for one in (gate, scale) if one is not None and one.ndim == 2]
    times = " timesteps" if any(len(one) > 1 for one in tables) else ""
    return f"{_rows(x)}{before} {how} to {format}{times}"


def _rows(x: Tensor, *_: Any) -> str:
    d = x.shape[-1]
    return f"d{d} rows {octave(x.numel() // max(d, 1))}"


def _modulated(x: Tensor, rows: Tensor, *_: Any) -> str:
    """rows [K, d]: of one timestep, or of several."""
    return _rows(x) + (" timesteps" if rows.shape[0] > 1 else "")


def _gated(x: Tensor, y: Tensor, gate: Tensor, *_: Any) -> str:
    return _modulated(x, gate)


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, *_: Any) -> str:
    return f"{_rows(x)} head {2 * cos.shape[-1]}"


def _qkv(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, order: Tensor | None = None
) -> str:
    return f"{_rows(qkv)} head {2 * cos.shape[-1]}" + ("" if order is None else " ordered")


def _patches(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> str:
    d, C, *patch = weight.shape
    tokens = latents.numel() // latents.shape[1]
    for size in patch:
        tokens //= size
    return f"{C} to {d} patch {'x'.join(map(str, patch))} rows {octave(tokens)}" + ("" if known is None else " known")


def _head(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, weight: Tensor, *_: Any, **__: Any) -> str:
    return f"{weight.shape[1]} to {weight.shape[0]} rows {octave(x.numel() // x.shape[-1])}" + (
        " timesteps" if shift.shape[0] > 1 else ""
    )


def _step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: Tensor,
    moves: Tensor,
    weights: Tensor,
    history: Sequence[Tensor],
) -> str:
    guided = "" if uncond is None else " guided"
    return f"history {len(history)} values {octave(x.numel())}{guided}"


def _frames(frames: Tensor) -> str:
    last = " channels last" if frames.stride(0) == 1 else ""
    return f"values {octave(frames.numel())}{last}"


def _pixels(x: Tensor) -> str:
    return octave(x.numel() // max(x.shape[1], 1))


def _vae_norm(x: Tensor, gamma: Tensor) -> str:
    return f"c{x.shape[1]} pixels {_pixels(x)}"


def _vae_conv(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> str:
    N, C, *kernel = weight.shape
    return f"{C} to {N} kernel {'x'.join(map(str, kernel))} pixels {_pixels(x)}"


def _vae_past_conv(x: Tensor, past: Tensor | None, weight: Tensor, *_: Any, **__: Any) -> str:
    return _vae_conv(x, weight) + (" start" if past is None else "")


def _vae_norm_conv(
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> str:
    return _vae_past_conv(x, past, weight) + ("" if residual is None else " residual")


def _vae_rgb(x: Tensor, past: Tensor | None, gamma: Tensor, weight: Tensor, *_: Any, **__: Any) -> str:
    return _vae_past_conv(x, past, weight)


CLASSES: Mapping[str, Callable[..., str]] = {
    "attention": _attention,
    "to_rgb": _frames,
    "patch_embed": _patches,
    "head": _head,
    "modulated_layer_norm": _modulated,
    "gated_residual": _gated,
    "gated_residual_norm": _gated,
    "gated_residual_layer_norm": _gated,
    "residual_norm": _gated,  # its third argument, shift, has a row per timestep too
    "layer_norm": _rows,
    "rms_norm": _rows,
    "rms_norm_rope": _rotated,
    "qkv_norm_rope": _qkv,
    "linear": _linear,
    "linear_gelu_tanh": _linear,
    "linear_quantized": _linear_quantized,
    "quantize_rows": _quantize_rows,
    "quantized_norm": _quantized_norm,
    "solver_step": _step,
    "vae_rms_norm": _vae_norm,
    "vae_conv3d": _vae_conv,
    "vae_causal_conv3d": _vae_past_conv,
    "vae_norm_silu_conv3d": _vae_norm_conv,
    "vae_norm_silu_conv3d_rgb": _vae_rgb,
    "vae_upsample_conv2d": _vae_conv,
    "vae_downsample_conv2d": _vae_conv,
    "vae_double_frames": _vae_past_conv,
    "vae_halve_frames": _vae_past_conv,
}
