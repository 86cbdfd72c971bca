"""The meaning of every operation of the transformers, in eager PyTorch: runs anywhere, autograd included, and is what
the other back ends are measured against.

Shapes: B batch, N tokens, M tokens of the context, H heads, D head_dim, d = H * D width, K distinct timesteps,
G groups of N // G neighbouring tokens that share a timestep (1: one a sample, T: one a frame, N: one a token).
Statistics (means, variances, softmax) are always taken in fp32, the result has the dtype of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """softmax(q k^T * softmax_scale) v over all of k, v; q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D].

    softmax_scale is 1 / sqrt(D) when None.
    """
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"attention takes q [B, N, H, D] and k, v [B, M, H, D], not {_shapes(q, k, v)}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def patch_embed(latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cut [B, C, T, H, W] into patches and project each: -> [B, N, d], N in (t, h, w) order, w fastest.

    weight [d, C, pt, ph, pw] is that of a convolution whose stride is its kernel; T, H, W are multiples of the patch.
    """
    B, C, T, H, W = latents.shape
    d, channels, pt, ph, pw = weight.shape
    if channels != C or T % pt or H % ph or W % pw:
        raise ValueError(f"latents {tuple(latents.shape)} do not divide into {channels} x {pt} x {ph} x {pw} patches")
    grid = latents.reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw)
    patches = grid.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * pt * ph * pw)
    return F.linear(patches, weight.flatten(1), bias)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
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


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def _groups(x: Tensor, index: Tensor) -> Tensor:
    """View [B, N, d] as [B, G, N // G, d]."""
    if x.ndim != 3 or index.shape[0] != x.shape[0] or x.shape[1] % index.shape[1]:
        raise ValueError(f"an index [B, G] with G a divisor of N is needed for x [B, N, d], not {_shapes(x, index)}")
    return x.unflatten(1, (index.shape[1], -1))


def _add_product(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """a + x * y: in one pass, or in the two whose gradients are cheaper."""
    return a + x * y if torch.is_grad_enabled() else torch.addcmul(a, x, y)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [K, d] -> [B, G, 1, d]."""
    return table[index].unsqueeze(2)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
