"""The meaning of every operation, in eager PyTorch: it runs anywhere, with autograd, and every other back end is
compared with it.

Shapes: B batch, N tokens, M tokens of the context, H heads, D head_dim, d = H * D width, K distinct timesteps,
G groups of N // G neighbouring tokens that share a timestep (1: one a sample, T: one a frame, N: one a token).
Statistics (means, variances, softmax) are computed in fp32; the result has the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import attention as attentions
from fastvid.ops import rgb, vae
from fastvid.ops import solver_step as stepping


def patch_embed(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> Tensor:
    """Cut [B, C, T, H, W] into patches and project each: -> [B, N, d] in weight's type, N in (t, h, w) order.

    weight [d, C, pt, ph, pw] is that of a convolution whose stride is its kernel; T, H, W are multiples of the patch.
    known [B, C2, T, H, W]: channels that follow those of the latents (in image-to-video models mask and known latents);
    weight is then [d, C + C2, pt, ph, pw]. Latents and known may be of any type.
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
    """Modulated LayerNorm, projection, and patches back in their places: -> latents [B, C, T, H, W].

    x [B, N, d], shift and scale [K, d], index [B, G] as modulated_layer_norm has them; weight [pt ph pw C, d] and bias
    [pt ph pw C], C fastest; grid (t, h, w) with N = t h w; patch (pt, ph, pw). dtype: of the latents, that of x when
    None; kernels round their fp32 sums to it once.
    """
    y = F.linear(modulated_layer_norm(x, shift, scale, index, eps), weight, bias)
    return _unpatchify(y, grid, patch).to(dtype or x.dtype)


def _unpatchify(x: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Put projected patches back: [B, N, pt * ph * pw * C] (C fastest), N = t * h * w of grid -> [B, C, T, H, W]."""
    B = x.shape[0]
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(B, t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(B, -1, t * pt, h * ph, w * pw)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift with the row of each token: x [B, N, d], shift and scale [K, d], index [B, G]."""
    if shift.shape[0] == 1:
        return F.layer_norm(x.float(), x.shape[-1:], 1 + scale[0], shift[0], eps).to(x.dtype)
    groups = _groups(F.layer_norm(x.float(), x.shape[-1:], eps=eps), index)
    return _add_product(_rows(shift, index), groups, _rows(1 + scale, index)).view(x.shape).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """x + y * gate with the row of each token: x and y [B, N, d], gate [K, d] in fp32, index [B, G] -> [B, N, d]."""
    rows = gate[0] if gate.shape[0] == 1 else _rows(gate, index)
    out = _add_product(_groups(x, index).float(), _groups(y, index).float(), rows)
    return out.view(x.shape).to(x.dtype)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, its modulated layer norm), with s = x + y * gate rounded to the type of x."""
    x = gated_residual(x, y, gate, index)
    return x, modulated_layer_norm(x, shift, scale, index, eps)


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, its layer norm with weight and bias), with s = x + y * gate rounded to the type of x."""
    x = gated_residual(x, y, gate, index)
    return x, layer_norm(x, weight, bias, eps)


def residual_norm(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, its modulated layer norm), with s = x + y rounded to the type of x."""
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
    # One complex product is one pass over memory; the four real ones with strides of two take six times as long.
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
    """Of a fused projection [B, N, 3 * d]: q and k with RMS norm and rotation, and v, each [B, N, H, D].

    Kernels write them as [B, H, N, D] in memory; here, without an order, v is a view of qkv.
    order [N], a permutation in int32 or int64 (see `sparse.tile_order`): position p of all three has token order[p],
    rotated by that token's cos and sin.
    """
    q, k, v = qkv.chunk(3, -1)
    q, k = rms_norm_rope(q, weight_q, cos, sin, eps), rms_norm_rope(k, weight_k, cos, sin, eps)
    v = v.unflatten(-1, q.shape[2:])
    return (q, k, v) if order is None else (q[:, order], k[:, order], v[:, order])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight [n, K]^T + bias [n] -> [..., n]."""
    return F.linear(x, weight, bias)


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU in its tanh form of x [..., K] @ weight [n, K]^T + bias [n] -> [..., n]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _groups(x: Tensor, index: Tensor) -> Tensor:
    """View [B, N, d] as [B, G, N // G, d]."""
    if x.ndim != 3 or index.shape[0] != x.shape[0] or x.shape[1] % index.shape[1]:
        raise ValueError(f"an index [B, G] with G a divisor of N is needed for x [B, N, d], not {_shapes(x, index)}")
    return x.unflatten(1, (index.shape[1], -1))


def _add_product(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """a + x * y in one pass; under autograd in two, whose gradients are cheaper."""
    return a + x * y if torch.is_grad_enabled() else torch.addcmul(a, x, y)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [K, d] -> [B, G, 1, d]."""
    return table[index].unsqueeze(2)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


# Operations that are defined in a file of their own.
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
