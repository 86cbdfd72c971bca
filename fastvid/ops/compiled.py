"""Operations whose passes over memory torch.compile joins: the back end "compiled" of norms, gates, rotation, GELU, the
solver's step and the conversion to bytes. `reference.py` defines them.

Each is a function of rows [R, d] (tokens of all samples), compiled for any R; see compiling.py for what that means.
Values between two passes are not rounded to the dtype of tensors, so results are as near to the exact ones as those of
the reference. Gradients are taken by the reference. Of `head` only the norm is compiled: its product is of a library.
`patch_embed` and `linear` have nothing to join.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import reference, rgb, vae
from fastvid.ops import solver_step as stepping
from fastvid.ops.compiling import run, why_not
from fastvid.ops.upload import upload

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Norms and gates. Rows of modulation: one for all tokens, or one for each group of n tokens.


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """reference.modulated_layer_norm."""
    return by_rows(reference.modulated_layer_norm, _modulated_layer_norm, (x,), (shift, scale), index, eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """reference.gated_residual."""
    return by_rows(reference.gated_residual, _gated_residual, (x, y), (gate,), index)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> Pair:
    """reference.gated_residual_norm."""
    rows = gate, shift, scale
    return by_rows(reference.gated_residual_norm, _gated_residual_norm, (x, y), rows, index, eps)


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Pair:
    """reference.gated_residual_layer_norm."""

    def eager(x: Tensor, y: Tensor, gate: Tensor, index: Tensor, eps: float) -> Pair:
        return reference.gated_residual_layer_norm(x, y, gate, index, weight, bias, eps)

    return by_rows(eager, _gated_residual_layer_norm, (x, y), (gate,), index, eps, more=(weight, bias))


def residual_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Pair:
    """reference.residual_norm."""
    return by_rows(reference.residual_norm, _residual_norm, (x, y), (shift, scale), index, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """reference.layer_norm."""
    if x.dtype not in DTYPES:
        return reference.layer_norm(x, weight, bias, eps)
    given = (x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    out = run(_layer_norm, ("R.", ".", "."), given, (eps,), lambda: reference.layer_norm(given[0], weight, bias, eps))
    return out.view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.rms_norm."""
    if x.dtype not in DTYPES:
        return reference.rms_norm(x, weight, eps)
    given = (x.reshape(-1, x.shape[-1]).contiguous(), weight)
    out = run(_rms_norm, ("R.", "."), given, (eps,), lambda: reference.rms_norm(*given, eps))
    return out.view(x.shape)


def by_rows(
    eager: Callable[..., Any],
    body: Callable[..., Any],
    tokens: Sequence[Tensor],
    rows: Sequence[Tensor],
    index: Tensor,
    *eps: float | str,
    more: Sequence[Tensor] = (),
) -> Any:
    """Runs body(*tokens, *rows, *more, *eps), for one row or, with an index as its last tensor, for several. eps: or
    whatever else is fixed."""
    x = tokens[0]
    if x.dtype not in DTYPES or x.ndim != 3 or index.shape[0] != x.shape[0] or x.shape[1] % index.shape[1]:
        return eager(*tokens, *rows, index, *eps)
    d, each = x.shape[-1], x.shape[1] // index.shape[1]
    shared = rows[0].shape[0] == 1
    shape, letters = ([-1, d], "R.") if shared or each == 1 else ([-1, each, d], "Gn.")
    tables = [row[0] if shared else row.contiguous() for row in rows]
    last = [] if shared else [index.reshape(-1)]
    spec = (
        [letters] * len(tokens) + ["." if shared else "K."] * len(rows) + ["."] * len(more) + [letters[0]] * len(last)
    )
    given = [*(one.reshape(shape).contiguous() for one in tokens), *tables, *more, *last]
    made = run(body, spec, given, eps, lambda: eager(*tokens, *rows, index, *eps))
    if isinstance(made, Tensor):
        return made.view(x.shape)
    return tuple(one.view(*x.shape[:2], one.shape[-1]) for one in made)


def _row(table: Tensor, index: Tensor | None, x: Tensor) -> Tensor:
    """A row for each token of x: table [d], or [K, d] with index [R] for x [R, d] or [G] for x [G, n, d]."""
    if index is None:
        return table
    rows = table[index]
    return rows if x.ndim == 2 else rows[:, None]


def _normed(x: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _shifted(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    return _normed(x, eps) * (1 + _row(scale, index, x)) + _row(shift, index, x)


def _modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *last: Any) -> Tensor:
    *index, eps = last
    return _shifted(x.float(), shift, scale, index[0] if index else None, eps).to(x.dtype)


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor, *index: Tensor) -> Tensor:
    return torch.addcmul(x.float(), y.float(), _row(gate, index[0] if index else None, x)).to(x.dtype)


def _gated_residual_norm(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *last: Any) -> Pair:
    *index, eps = last
    total = _gated_residual(x, y, gate, *index)
    return total, _modulated_layer_norm(total, shift, scale, *last)


def _gated_residual_layer_norm(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *last: Any) -> Pair:
    *index, eps = last
    total = _gated_residual(x, y, gate, *index)
    return total, _layer_norm(total, weight, bias, eps)


def _residual_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, *last: Any) -> Pair:
    total = (x.float() + y.float()).to(x.dtype)
    return total, _modulated_layer_norm(total, shift, scale, *last)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (_normed(x.float(), eps) * weight.float() + bias.float()).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_normed(x, weight, eps).to(x.dtype)


def _rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()


# Queries and keys


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """reference.rms_norm_rope."""
    if x.dtype not in DTYPES:
        return reference.rms_norm_rope(x, weight, cos, sin, eps)
    given = (x.reshape(-1, x.shape[-1]).contiguous(), weight, *_rotary(cos, sin, x.shape[0]))
    out = run(_norm_rope, ("R.", ".", "R.", "R."), given, (eps,), lambda: _eager_norm_rope(*given, eps))
    return out.view(*x.shape[:2], *out.shape[1:])


def qkv_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    order: Tensor | None = None,
) -> Triple:
    """reference.qkv_norm_rope."""
    if qkv.dtype not in DTYPES:
        return reference.qkv_norm_rope(qkv, weight_q, weight_k, cos, sin, eps, order)
    rows = qkv.reshape(-1, qkv.shape[-1]).contiguous()
    given = (rows, weight_q, weight_k, *_rotary(cos, sin, qkv.shape[0]))

    def eager() -> Pair:
        q, k, _ = rows.chunk(3, -1)
        return _eager_norm_rope(q, weight_q, *given[3:], eps), _eager_norm_rope(k, weight_k, *given[3:], eps)

    q, k = run(_qk_norm_rope, ("R.", ".", ".", "R.", "R."), given, (eps,), eager)
    q, k = (one.view(*qkv.shape[:2], *one.shape[1:]) for one in (q, k))
    v = qkv.chunk(3, -1)[2].unflatten(-1, q.shape[2:])
    return (q, k, v) if order is None else (q[:, order], k[:, order], v[:, order])


def _rotary(cos: Tensor, sin: Tensor, samples: int) -> Pair:
    """A row of each table for every token of every sample."""
    return (cos, sin) if samples == 1 else (cos.repeat(samples, 1), sin.repeat(samples, 1))


def _eager_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return reference.rms_norm_rope(x[None], weight, cos, sin, eps)[0]


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x [R, H * D], tables [R, D // 2] -> [R, H, D]."""
    pairs = _rms_normed(x, weight, eps).unflatten(-1, (-1, cos.shape[-1], 2))
    first, second = pairs.unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).to(x.dtype)


def _qk_norm_rope(qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Pair:
    q, k, _ = qkv.chunk(3, -1)
    return _norm_rope(q, weight_q, cos, sin, eps), _norm_rope(k, weight_k, cos, sin, eps)


# Around products


def head(
    x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, *rest: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """reference.head; rest: its further arguments, from the weight on."""
    weight, bias, grid, patch, eps, *given = rest
    y = F.linear(modulated_layer_norm(x, shift, scale, index, eps), weight, bias)
    return reference._unpatchify(y, grid, patch).to(next(iter(given), dtype) or x.dtype)


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """reference.linear_gelu_tanh: a library's product, and GELU in its place, which saves a tensor of its size."""
    y = F.linear(x, weight, bias)
    if y.dtype not in DTYPES or y.requires_grad:
        return F.gelu(y, approximate="tanh")
    rows = y.view(-1, y.shape[-1])
    return run(_gelu_in_place, ("R.",), (rows,), (), lambda: F.gelu(rows, approximate="tanh")).view(y.shape)


def _gelu_in_place(x: Tensor) -> Tensor:
    return x.copy_(F.gelu(x, approximate="tanh"))


# The solver's step


def solver_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: Tensor,
    moves: Tensor,
    weights: Tensor,
    history: Sequence[Tensor],
) -> list[Tensor]:
    """solver_step.solver_step; all numbers of the step reach the device as one tensor."""

    def eager() -> list[Tensor]:
        return stepping.solver_step(x, cond, uncond, guidance_scale, sigma, moves, weights, history)

    stepping.check(x, cond, uncond, sigma, moves, weights, history)
    if x.dtype not in DTYPES:
        return eager()
    scale = torch.full_like(sigma, guidance_scale)[None]
    columns = torch.cat((sigma[None], scale, moves[None].to(sigma), weights.flatten(0, 1))).float()
    latents = [one for one in (x, cond, *history, uncond) if one is not None]
    given = [upload(columns, x.device), *(_columns(one) for one in latents)]
    letters = "T" if x.shape[2] > 1 else "."
    spec = [f".{letters}", *[f"C{letters}P"] * len(latents)]
    made = run(_solver_step, spec, given, (len(history), uncond is not None), eager)
    return [one.view(x.shape) for one in made]


def _columns(x: Tensor) -> Tensor:
    """[B, C, T, h, w] -> [B * C, T, h * w]."""
    return x.contiguous().view(x.shape[0] * x.shape[1], x.shape[2], -1)


def _solver_step(columns: Tensor, x: Tensor, cond: Tensor, *last: Any) -> list[Tensor]:
    """columns [3 + O * (2 + history), T]: sigma, guidance scale, moves, weights. last: history, uncond if guided, how
    many are history, whether guided."""
    *tensors, count, guided = last
    history = tensors[:count]
    sigma, scale, moves, *weights = (row[:, None] for row in columns.unbind(0))
    v = cond.float()
    if guided:
        uncond = tensors[count].float()
        v = uncond + scale * (v - uncond)
    x0 = (x.float() - sigma * v).to(x.dtype)
    inputs = (x, x0, *history)
    sums = []
    while weights:
        rows, weights = weights[: len(inputs)], weights[len(inputs) :]
        terms = [torch.where(row == 0, -0.0, row * one.float()) for row, one in zip(rows, inputs, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        sums.append(total.to(x.dtype))
    outputs = [sums[0], x0, *((history[0], sums[1]) if count == 3 else ())]
    kept = [inputs[old] for old in stepping.KEPT[count]]
    return [torch.where(moves != 0, new, old) for new, old in zip(outputs, kept, strict=True)]


# The VAE


def to_rgb(frames: Tensor) -> Tensor:
    """rgb.reference: the same bytes, in one pass. Frames that are neither dense nor channels-last are copied."""
    rgb.check(frames)
    if frames.stride(0) == 1 and frames.permute(1, 2, 3, 0).is_contiguous():
        given, body = frames.permute(1, 2, 3, 0).reshape(-1, 3), _bytes_of_pixels
        out = run(body, ("R.",), (given,), (), lambda: rgb.reference(frames))
    else:
        given, body = frames.contiguous().view(3, -1), _bytes_of_channels
        out = run(body, (".R",), (given,), (), lambda: rgb.reference(frames))
    return out.view(*frames.shape[1:], 3)


def _bytes_of_pixels(x: Tensor) -> Tensor:
    unit = x.float().nan_to_num(nan=-1.0).clamp(-1, 1) * 0.5 + 0.5
    return (unit * 255).round().to(torch.uint8)


def _bytes_of_channels(x: Tensor) -> Tensor:
    return _bytes_of_pixels(x).t().contiguous()


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(vae.rms_norm(x, gamma)) of [B, C, ...], in the memory format of x: channels-last or contiguous."""
    return _vae_norm(x, gamma, True)


def vae_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """vae.rms_norm."""
    return _vae_norm(x, gamma, False)


def _vae_norm(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    def eager(x: Tensor, gamma: Tensor) -> Tensor:
        normed = vae.rms_norm(x, gamma)
        return F.silu(normed) if silu else normed

    C, last, scale = x.shape[1], x.movedim(1, -1), gamma.reshape(-1)
    if x.dtype not in DTYPES or gamma.numel() != C:
        return eager(x, gamma)
    if last.is_contiguous():
        pixels = last.view(-1, C)
        out = run(_norm_of_pixels, ("R.", "."), (pixels, scale), (silu,), lambda: eager(pixels, scale))
        return out.view(last.shape).movedim(-1, 1)
    planes, letters = x.contiguous().view(x.shape[0], C, -1), "G.P" if x.shape[0] > 1 else "..P"
    out = run(_norm_of_planes, (letters, "."), (planes, scale), (silu,), lambda: eager(planes, scale[:, None]))
    return out.view(x.shape)


def _norm_of_pixels(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    return _l2_normed(x, gamma, -1, silu)


def _norm_of_planes(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    return _l2_normed(x, gamma[:, None], 1, silu)


def _l2_normed(x: Tensor, gamma: Tensor, dim: int, silu: bool) -> Tensor:
    y = x.float()
    norm = y.square().sum(dim, keepdim=True).clamp_min(1e-24).sqrt()
    y = y * (x.shape[dim] ** 0.5 / norm) * gamma.float()
    return (F.silu(y) if silu else y).to(x.dtype)


BACKENDS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        modulated_layer_norm,
        gated_residual,
        gated_residual_norm,
        gated_residual_layer_norm,
        residual_norm,
        layer_norm,
        rms_norm,
        rms_norm_rope,
        qkv_norm_rope,
        head,
        linear_gelu_tanh,
        solver_step,
        to_rgb,
        vae_rms_norm,
    )
}
for _function in BACKENDS.values():
    vars(_function)["why_not"] = why_not  # for `dispatch.lacks`
