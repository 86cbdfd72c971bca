"""Attention in eager PyTorch beyond what PyTorch has: with the logarithm of what the softmax divides by, over the tiles
that `Blocks` lists, and the merging of parts. Shapes as in attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvid.ops.sparse import Blocks, token_mask

SLAB = 2**26  # scores that are held at a time


def lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of what its softmax divides by, in fp32 (in fp64 for fp64)."""
    check(q, k, v)
    return _by_slabs(q, k, v, softmax_scale, None)


def sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None) -> Tensor:
    """Dense attention with a mask made from the blocks; zero where nothing is attended to."""
    return sparse_lse(q, k, v, blocks, softmax_scale=softmax_scale)[0]


def sparse_lse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of what its softmax divides by: -inf where nothing is attended to."""
    check(q, k, v, blocks)
    return _by_slabs(q, k, v, softmax_scale, token_mask(blocks))


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys as that to both: out [B, N, H, D], lse [B, H, N] of each -> of the union."""
    lse = torch.logaddexp(lse_a, lse_b)
    total = 0
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(part == -torch.inf, 0.0, torch.exp(part - lse))  # not exp(-inf + inf), without any keys
        total = total + out.to(weight.dtype) * weight.transpose(1, 2)[..., None]
    return total.to(out_a.dtype), lse


def check(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None = None) -> None:
    """Raises ValueError unless q is [B, N, H, D], k and v [B, M, H, D] with M > 0, all of one type, and blocks fit."""
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"attention takes q [B, N, H, D] and k, v [B, M, H, D], not {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v are of one floating type, not {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1] == 0:
        raise ValueError(f"there are no keys to attend to: q, k, v are {shapes}")
    if blocks is not None and blocks.lists not in {1, q.shape[2], q.shape[0] * q.shape[2]}:
        raise ValueError(f"blocks have {blocks.lists} lists; 1, {q.shape[2]} or {q.shape[0] * q.shape[2]} fit {shapes}")


def _by_slabs(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention in fp32 or better, some queries at a time; mask bool [lists, N, M] for list (b * H + h) % lists."""
    B, N, H, D = q.shape
    M = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    keys, values = k.permute(0, 2, 3, 1).to(dtype), v.transpose(1, 2).to(dtype)
    out, lse = q.new_empty(B, H, N, D), q.new_empty(B, H, N, dtype=dtype)
    for start in range(0, N, max(SLAB // (B * H * M), 1)):
        slab = slice(start, start + max(SLAB // (B * H * M), 1))
        scores = q[:, slab].transpose(1, 2).to(dtype) @ keys * scale
        if mask is not None:
            kept = mask[:, slab].repeat(B * H // len(mask), 1, 1).view(scores.shape)
            scores = scores.masked_fill_(~kept, -torch.inf)
        total = lse[:, :, slab] = scores.logsumexp(-1)
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
        out[:, :, slab] = (weights @ values).to(out.dtype)
    return out.transpose(1, 2).contiguous(), lse
