"""The reference of every operation, in eager PyTorch. It runs anywhere, supports autograd, and all other back ends are
tested against it.

Shapes: B batch, N tokens, M tokens of the context, H heads, D head_dim, d = H * D width, K distinct timesteps,
G groups of N // G consecutive tokens that share a timestep (1: one per sample, T: one per frame, N: one per token).
Statistics (means, variances, softmax) are computed in fp32; the result has the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import attention as attentions
from fastvid.ops import onednn, quantized, rgb, vae
from fastvid.ops import solver_step as stepping
from fastvid.ops.quantized import Activations, QuantizedTensor


def patch_embed(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> Tensor:
    """Split [B, C, T, H, W] into patches and project each: -> [B, N, d] in weight's dtype, N in (t, h, w) order.

    weight [d, C, pt, ph, pw]: of a convolution whose stride equals its kernel size; T, H, W are multiples of the patch.
    known [B, C2, T, H, W]: channels appended to the latents (in image-to-video models the mask and known latents);
    weight is then [d, C + C2, pt, ph, pw]. Latents and known may have any dtype.
    """
    latents = latents.to(weight.dtype)
    if known is not None:
        latents = torch.cat((latents, known.to(weight.dtype)), dim=1)
    B, C, T, H, W = latents.shape
    d, channels, pt, ph, pw = weight.shape
    if channels != C or T % pt or H % ph or W % pw:
        raise ValueError(f"latents {tuple(latents.shape)} do not divide into {channels} x {pt} x {ph} x {pw} patches")
    grid = latents.reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw)
    patches = grid.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * pt * ph * pw)
    return F.linear(patches, weight.flatten(1), bias)


def head(
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
    """Modulated LayerNorm, projection and unpatchify: -> latents [B, C, T, H, W].

    x [B, N, d], shift and scale [K, d], index [B, G], see modulated_layer_norm; weight [pt ph pw C, d] and bias
    [pt ph pw C], C fastest; grid (t, h, w) with N = t h w; patch (pt, ph, pw). dtype: of the latents, by default
    that of x; kernels round their fp32 sums to it once.
    """
    y = F.linear(modulated_layer_norm(x, shift, scale, index, eps), weight, bias)
    return _unpatchify(y, grid, patch).to(dtype or x.dtype)


def _unpatchify(x: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Rearrange patches [B, N, pt * ph * pw * C] (C fastest, N = t * h * w of grid) to latents [B, C, T, H, W]."""
    B = x.shape[0]
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(B, t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(B, -1, t * pt, h * ph, w * pw)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift: x [B, N, d], shift and scale [K, d], index [B, G]: the row of each token group."""
    if shift.shape[0] == 1:
        return F.layer_norm(x.float(), x.shape[-1:], 1 + scale[0], shift[0], eps).to(x.dtype)
    groups = _groups(F.layer_norm(x.float(), x.shape[-1:], eps=eps), index)
    return _add_product(_rows(shift, index), groups, _rows(1 + scale, index)).view(x.shape).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """x + y * gate: x and y [B, N, d], gate [K, d] in fp32, index [B, G]: the row of each token group -> [B, N, d]."""
    rows = gate[0] if gate.shape[0] == 1 else _rows(gate, index)
    out = _add_product(_groups(x, index).float(), _groups(y, index).float(), rows)
    return out.view(x.shape).to(x.dtype)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, modulated_layer_norm(s)), s = x + y * gate rounded to x's dtype."""
    x = gated_residual(x, y, gate, index)
    return x, modulated_layer_norm(x, shift, scale, index, eps)


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, layer_norm(s)), s = x + y * gate rounded to x's dtype."""
    x = gated_residual(x, y, gate, index)
    return x, layer_norm(x, weight, bias, eps)


def residual_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, modulated_layer_norm(s)), s = x + y rounded to x's dtype."""
    x = (x + y).to(x.dtype)
    return x, modulated_layer_norm(x, shift, scale, index, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LN(x) * weight + bias in fp32 over the last dimension; weight and bias [d]."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight [d]."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm over the whole width, then rotate the pairs (2i, 2i+1) of each head.

    x [B, N, H * D], weight [H * D], cos and sin [N, D // 2] in fp32 -> [B, N, H, D].
    """
    y = F.rms_norm(x, x.shape[-1:], weight, eps).float().view(*x.shape[:2], -1, cos.shape[-1], 2)
    if torch.compiler.is_compiling():  # inductor has no complex numbers, and makes one pass of this
        even, odd, cos, sin = y[..., 0], y[..., 1], cos[:, None], sin[:, None]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
    # A complex product is one pass over memory. Four real products with stride 2 take six times as long.
    pairs, turn = torch.view_as_complex(y), torch.complex(cos, sin)[:, None]
    pairs = pairs * turn if y.requires_grad else pairs.mul_(turn)
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


def qkv_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection [B, N, 3 * d] into q and k (with RMS norm and rotation) and v, each [B, N, H, D].

    Kernels write them as [B, H, N, D] in memory; here v is a view of qkv if there is no order.
    order [N]: a permutation, int32 or int64 (see `sparse.tile_order`). Position p of all three then holds token
    order[p], rotated by that token's cos and sin.
    """
    q, k, v = qkv.chunk(3, -1)
    q, k = rms_norm_rope(q, weight_q, cos, sin, eps), rms_norm_rope(k, weight_k, cos, sin, eps)
    v = v.unflatten(-1, q.shape[2:])
    return (q, k, v) if order is None else (q[:, order], k[:, order], v[:, order])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight [n, K]^T + bias [n] -> [..., n]. By oneDNN where that is faster and as exact (onednn.py)."""
    if onednn.applies(x, weight):
        return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu_tanh(x [..., K] @ weight [n, K]^T + bias [n]) -> [..., n]. By oneDNN as `linear` is, and in bf16."""
    if onednn.applies(x, weight) or onednn.fuses(x, weight):
        return onednn.linear(x, weight, bias, onednn.GELU_TANH)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_quantized(
    x: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> Activations:
    """x [..., K] @ weight^T + bias [N] -> [..., N] in x's dtype, with gelu its tanh GELU. weight: [N, K] as its file
    stores it. For products in 8 bits x may be quantized already, and the result be quantized for the next one, in the
    format `rows`: see `quantized.linear`."""
    return quantized.linear(x, weight, bias, gelu, rows)


def quantize_rows(x: Tensor, format: str, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """(codes [..., K], scale fp32 [..., 1]) of x [..., K]: what 8-bit products take. codes: int8, or e4m3 as such.
    rotation: size of the groups along K that are rotated before; 0: none."""
    return quantized.quantize_rows(x, format, rotation)


def quantized_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, codes, scales) of a norm of s: x, x + y, or x + y * gate, rounded to x's dtype. codes and scales: as
    quantize_rows gives them of LN(s) * (1 + scale) + shift with scale and shift [K, d], of LN(s) * scale + shift with
    [d]; rounded to x's dtype before. gate [K, d], index [B, G]: see gated_residual."""
    x, normed = norm_of_sum(x, y, gate, shift, scale, index, eps)
    return x, *quantize_rows(normed, format)


def norm_of_sum(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, its norm) of `quantized_norm`."""
    if y is not None:
        x = (x + y).to(x.dtype) if gate is None else gated_residual(x, y, gate, _given(index))
    if scale.ndim == 1:
        return x, layer_norm(x, scale, shift, eps)
    return x, modulated_layer_norm(x, shift, scale, _given(index), eps)


def _given(index: Tensor | None) -> Tensor:
    if index is None:
        raise ValueError("gate, shift and scale [K, d] need an index [B, G]")
    return index


def _groups(x: Tensor, index: Tensor) -> Tensor:
    """View [B, N, d] as [B, G, N // G, d]."""
    if x.ndim != 3 or index.shape[0] != x.shape[0] or x.shape[1] % index.shape[1]:
        raise ValueError(f"an index [B, G] with G a divisor of N is needed for x [B, N, d], not {_shapes(x, index)}")
    return x.unflatten(1, (index.shape[1], -1))


def _add_product(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """a + x * y in one pass; in two under autograd, where that has cheaper gradients."""
    return a + x * y if torch.is_grad_enabled() else torch.addcmul(a, x, y)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows: table [K, d], index [B, G] -> [B, G, 1, d]."""
    return table[index].unsqueeze(2)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


# Operations defined in other files.
attention = attentions.reference
to_rgb = rgb.reference
solver_step = stepping.solver_step
vae_rms_norm = vae.rms_norm
vae_conv3d = vae.conv3d
vae_causal_conv3d = vae.causal_conv3d
vae_norm_silu_conv3d = vae.norm_silu_conv3d
vae_norm_silu_conv3d_rgb = vae.norm_silu_conv3d_rgb
vae_upsample_conv2d = vae.upsample_conv2d
vae_downsample_conv2d = vae.downsample_conv2d
vae_double_frames = vae.double_frames
vae_halve_frames = vae.halve_frames
