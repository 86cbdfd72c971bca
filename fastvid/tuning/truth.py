"""What operations mean, in double precision. Most are their reference on doubles; the reference computes statistics of
rows in fp32 whatever it is given, so those operations are written down here once more.

Where an operation rounds in between, by its definition, the value is rounded to the operation's dtype here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import reference, vae
from fastvid.ops.formats_rows import FLOATS, LARGEST, SMALLEST, values
from fastvid.ops.quantized import QuantizedRows, QuantizedTensor, quantize_rows, rotate_whole
from fastvid.tuning.calls import split
from fastvid.tuning.inputs import Given, to_float64

Outputs = tuple[Tensor, ...]


def truth(op: str, given: Given) -> Outputs:
    """The results of a call in double precision. given: arguments in the call's own dtypes."""
    exact = to_float64(given)
    if op == "attention":
        exact["return_lse"] = bool(given.get("return_lse"))
        return outputs(_attention(**exact))
    if op in DEFINITIONS:
        return outputs(DEFINITIONS[op](_dtype_of(given), **exact))
    args, kwargs = split(op, exact)
    return outputs(getattr(reference, op)(*args, **kwargs))


def outputs(out: Any) -> Outputs:
    """Codes of 8-bit floats as fp32. Raises TypeError unless it is a tensor, or several in a tuple or list."""
    if isinstance(out, QuantizedRows):
        out = out.codes, out.scale
    outs = tuple(out) if isinstance(out, tuple | list) else (out,)
    if not all(isinstance(one, Tensor) for one in outs):
        raise TypeError(f"its result is {type(out).__name__}, not a tensor or several")
    return tuple(one.float() if one.dtype in FLOATS.values() else one for one in outs)


def _dtype_of(given: Given) -> torch.dtype:
    return next(given[name].dtype for name in ("x", "qkv", "frames") if name in given)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False, blocks: Any = None
) -> Any:
    if blocks is not None:
        return reference.attention(q, k, v, scale=scale, return_lse=return_lse, blocks=blocks)
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return (out, scores.logsumexp(-1)) if return_lse else out


def _norm(x: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


def _rows(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Rows of a table [K, d] for each token of [B, N, d]."""
    return table[index].repeat_interleave(like.shape[1] // index.shape[1], 1)


def _modulated(dtype: torch.dtype, x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    return _norm(x, eps) * (1 + _rows(scale, index, x)) + _rows(shift, index, x)


def _gated(dtype: torch.dtype, x: Tensor, y: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    return x + y * _rows(gate, index, x)


def _layer_norm(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm(x, eps) * weight + bias


def _gated_norm(dtype: torch.dtype, x: Tensor, y: Tensor, gate: Tensor, index: Tensor, **rest: Any) -> Outputs:
    total = _gated(dtype, x, y, gate, index)
    return total, _modulated(dtype, total.to(dtype).double(), index=index, **rest)


def _gated_layer_norm(dtype: torch.dtype, x: Tensor, y: Tensor, gate: Tensor, index: Tensor, **rest: Any) -> Outputs:
    total = _gated(dtype, x, y, gate, index)
    return total, _layer_norm(dtype, total.to(dtype).double(), **rest)


def _residual_norm(dtype: torch.dtype, x: Tensor, y: Tensor, **rest: Any) -> Outputs:
    return x + y, _modulated(dtype, (x + y).to(dtype).double(), **rest)


def _norm_rope(dtype: torch.dtype, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    pairs = normed.unflatten(-1, (-1, cos.shape[-1], 2))
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _qkv_norm_rope(
    dtype: torch.dtype, qkv: Tensor, weight_q: Tensor, weight_k: Tensor, order: Tensor | None = None, **rest: Any
) -> Outputs:
    q, k, v = qkv.chunk(3, -1)
    made = _norm_rope(dtype, q, weight_q, **rest), _norm_rope(dtype, k, weight_k, **rest)
    whole = (*made, v.unflatten(-1, made[0].shape[2:]))
    return whole if order is None else tuple(one[:, order.long()] for one in whole)


def _head(kind: torch.dtype, /, x: Tensor, weight: Tensor, bias: Tensor, grid: Any, patch: Any, **rest: Any) -> Tensor:
    rest.pop("dtype", None)
    y = _modulated(kind, x, **rest) @ weight.T + bias
    (t, h, w), (pt, ph, pw) = grid, patch
    parts = y.unflatten(1, (t, h, w)).unflatten(-1, (pt, ph, pw, -1))
    return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _bytes(values: Tensor) -> Tensor:
    return ((values.clamp(-1, 1) * 0.5 + 0.5) * 255).round()


def _to_rgb(dtype: torch.dtype, frames: Tensor) -> Tensor:
    return _bytes(frames.to(dtype).float()).permute(1, 2, 3, 0)


def _conv_rgb(dtype: torch.dtype, to_rgb: Any = None, **given: Any) -> Outputs:
    out, kept = vae.norm_silu_conv3d(**given)
    return _bytes(out), kept


def _quantize_rows(dtype: torch.dtype, x: Tensor, format: str, rotation: int = 0) -> Outputs:
    """Codes before they are rounded."""
    x = rotate_whole(x, rotation) if rotation else x
    scale = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST[format]
    return x / scale, scale


def _quantized_norm(
    dtype: torch.dtype,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    format: str,
    index: Tensor | None = None,
    **added: Tensor,
) -> Outputs:
    y, gate = added.get("y"), added.get("gate")
    if y is not None:
        x = x + y if gate is None or index is None else _gated(dtype, x, y, gate, index)
    rounded = x.to(dtype).double()
    if scale.ndim == 1 or index is None:
        normed = _layer_norm(dtype, rounded, scale, shift, eps)
    else:
        normed = _modulated(dtype, rounded, shift, scale, index, eps)
    return x, *_quantize_rows(dtype, normed, format)


def _linear_quantized(
    dtype: torch.dtype,
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> Any:
    """The weight is rounded to the dtype, or with 8-bit products activations to codes, with scales in fp32."""
    if weight.eight_bit:
        codes, scale = quantize_rows(x.to(dtype), weight.format, weight.rotation)
        own = values(weight.format, weight.data["codes"]).double() * weight.data["scale"].double().view(-1, 1)
        y = (codes.double() * scale.double()) @ own.T
    else:
        y = x @ weight.dequantize(dtype).double().T
    y = y if bias is None else y + bias
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if rows is None else _quantize_rows(dtype, y, rows)


DEFINITIONS: Mapping[str, Callable[..., Any]] = {
    "modulated_layer_norm": _modulated,
    "gated_residual": _gated,
    "gated_residual_norm": _gated_norm,
    "gated_residual_layer_norm": _gated_layer_norm,
    "residual_norm": _residual_norm,
    "layer_norm": _layer_norm,
    "rms_norm_rope": _norm_rope,
    "qkv_norm_rope": _qkv_norm_rope,
    "head": _head,
    "linear_quantized": _linear_quantized,
    "quantize_rows": _quantize_rows,
    "quantized_norm": _quantized_norm,
    "to_rgb": _to_rgb,
    "vae_norm_silu_conv3d_rgb": _conv_rgb,
}
