"""Attention of a video's tokens to each other and to a context: all of them, or tile by tile.

    attention          q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D]; its meaning is in reference.py
    attention_lse      the same, and log(sum(exp(scores))) [B, H, N] in fp32: what `merge` needs to put together what
                       was computed over separate keys (a ring of devices, a cache and what is new)
    sparse_attention   each tile of queries attends to the tiles of keys that `Blocks` lists (sparsity.py)

`triton` is kernels/attention.py and kernels/sparse_attention.py, `flash` the flash-attn package; `sdpa` is what PyTorch
has, and what the reference calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import reference as ops
from fastvid.ops.sparsity import Blocks, token_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLAB = 2**26  # scores that the eager references hold at a time


# In eager PyTorch


def reference_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of what its softmax divides by, in fp32 (in fp64 for fp64)."""
    _check(q, k, v)
    return _by_slabs(q, k, v, softmax_scale, None)


def reference_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None) -> Tensor:
    """Dense attention with a mask made from the blocks; zero where nothing is attended to."""
    return reference_sparse_lse(q, k, v, blocks, softmax_scale=softmax_scale)[0]


def reference_sparse_lse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of what its softmax divides by: -inf where nothing is attended to."""
    _check(q, k, v, blocks)
    return _by_slabs(q, k, v, softmax_scale, token_mask(blocks))


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys as that to both: out [B, N, H, D], lse [B, H, N] of each -> of the union."""
    lse = torch.logaddexp(lse_a, lse_b)
    total = 0
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(part == -torch.inf, 0.0, torch.exp(part - lse))  # not exp(-inf + inf), without any keys
        total = total + out.to(weight.dtype) * weight.transpose(1, 2)[..., None]
    return total.to(out_a.dtype), lse


# Of packages


def flash(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """flash-attn's kernel for whatever GPU this is. Raises ValueError for other types than fp16 and bf16."""
    from flash_attn import flash_attn_func

    _check(q, k, v)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"flash-attn takes fp16 and bf16, not {q.dtype}")
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale)


# Triton


@torch.library.custom_op("fastvid::attention_triton", mutates_args=())
def triton(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """The Triton kernel."""
    from fastvid.kernels.attention import attention

    out = _empty(q, k, v)
    attention(q, k, v, out, None, softmax_scale)
    return out


@torch.library.custom_op("fastvid::attention_lse_triton", mutates_args=())
def triton_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The Triton kernel, with the logarithm of what its softmax divides by."""
    from fastvid.kernels.attention import attention

    out, lse = _empty_lse(q, k, v)
    attention(q, k, v, out, lse, softmax_scale)
    return out, lse


def triton_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None) -> Tensor:
    """The Triton kernel."""
    _check(q, k, v, blocks)
    return _sparse(q, k, v, *_lists(blocks), softmax_scale=softmax_scale)


def triton_sparse_lse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The Triton kernel, with the logarithm of what its softmax divides by."""
    _check(q, k, v, blocks)
    return _sparse_lse(q, k, v, *_lists(blocks), softmax_scale=softmax_scale)


@torch.library.custom_op("fastvid::sparse_attention_triton", mutates_args=())
def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    rows: Tensor,
    indices: Tensor,
    largest_query: int,
    largest_key: int,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    from fastvid.kernels.sparse_attention import sparse_attention

    out = _empty(q, k, v)
    largest = (largest_query, largest_key)
    sparse_attention(q, k, v, out, query_tiles, key_tiles, rows, indices, largest, None, softmax_scale)
    return out


@torch.library.custom_op("fastvid::sparse_attention_lse_triton", mutates_args=())
def _sparse_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    rows: Tensor,
    indices: Tensor,
    largest_query: int,
    largest_key: int,
    *,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    from fastvid.kernels.sparse_attention import sparse_attention

    out, lse = _empty_lse(q, k, v)
    largest = (largest_query, largest_key)
    sparse_attention(q, k, v, out, query_tiles, key_tiles, rows, indices, largest, lse, softmax_scale)
    return out, lse


Function = Callable[..., Any]
BACKENDS: Mapping[str, Function] = {
    "reference": ops.attention,
    "sdpa": ops.attention,
    "triton": triton,
    "flash": flash,
}
LSE_BACKENDS: Mapping[str, Function] = {"reference": reference_lse, "triton": triton_lse}
SPARSE_BACKENDS: Mapping[str, Function] = {"reference": reference_sparse, "triton": triton_sparse}
SPARSE_LSE_BACKENDS: Mapping[str, Function] = {"reference": reference_sparse_lse, "triton": triton_sparse_lse}


# Parts


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


def _lists(blocks: Blocks) -> tuple[Any, ...]:
    return blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices, *blocks.largest


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None = None) -> None:
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


@triton.register_fake
def _empty(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """The result, not filled in. Raises ValueError for tensors that do not fit."""
    _check(q, k, v)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@triton_lse.register_fake
def _empty_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return _empty(q, k, v), torch.empty((B, H, N), dtype=torch.float32, device=q.device)


@_sparse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *lists: Any, softmax_scale: float | None = None) -> Tensor:
    return _empty(q, k, v)


@_sparse_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *lists: Any, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _empty_lse(q, k, v)
