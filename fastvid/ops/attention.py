"""Attention of a video's tokens to each other and to a context: all of them, or tile by tile.

    attention          q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D]; its meaning is in reference.py
    attention_lse      the same, and log(sum(exp(scores))) [B, H, N] in fp32: what `merge` needs to put together what
                       was computed over separate keys (a ring of devices, a cache and what is new)
    sparse_attention   each tile of queries attends to the tiles of keys that `Blocks` lists (sparsity.py)

`triton` is kernels/attention.py and kernels/sparse_attention.py, `cuda` attention_cuda.py, `cuda_fp8` and `cuda_int8`
attention_eight.py (approximations), `flash` the flash-attn package; `sdpa` is what PyTorch has, and what the reference
calls for `attention`. The eager references of the others are in eager_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import attention_cuda, attention_eight
from fastvid.ops import reference as ops
from fastvid.ops.eager_attention import check as _check
from fastvid.ops.eager_attention import lse as reference_lse
from fastvid.ops.eager_attention import merge as merge
from fastvid.ops.eager_attention import sparse as reference_sparse
from fastvid.ops.eager_attention import sparse_lse as reference_sparse_lse
from fastvid.ops.sparse import Blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Of packages


def flash(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """flash-attn's kernel for whatever GPU this is. Raises ValueError for other types than fp16 and bf16."""
    from flash_attn import flash_attn_func

    _check(q, k, v)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"flash-attn takes fp16 and bf16, not {q.dtype}")
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale)


def flash_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The same, with the logarithm of what its softmax divides by."""
    from flash_attn import flash_attn_func

    _check(q, k, v)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"flash-attn takes fp16 and bf16, not {q.dtype}")
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=softmax_scale, return_attn_probs=True)
    return out, lse


def sdpa_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The forms of scaled_dot_product_attention that give the logarithm too, by device and type."""
    _check(q, k, v)
    aten, scale = torch.ops.aten, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    elif q.dtype in (torch.float16, torch.bfloat16):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return out.transpose(1, 2), lse[..., : q.shape[2]]  # one of them fills rows up to a multiple of 32


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


def _eight(op: str) -> dict[str, Function]:
    return {f"cuda_{kind}": functions[op] for kind, functions in attention_eight.FUNCTIONS.items()}


BACKENDS: Mapping[str, Function] = {
    "reference": ops.attention,
    "sdpa": ops.attention,
    "triton": triton,
    "cuda": attention_cuda.cuda,
    "flash": flash,
    **_eight("attention"),
}
LSE_BACKENDS: Mapping[str, Function] = {
    "reference": reference_lse,
    "sdpa": sdpa_lse,
    "triton": triton_lse,
    "cuda": attention_cuda.cuda_lse,
    "flash": flash_lse,
    **_eight("attention_lse"),
}
SPARSE_BACKENDS: Mapping[str, Function] = {
    "reference": reference_sparse,
    "triton": triton_sparse,
    "cuda": attention_cuda.cuda_sparse,
    **_eight("sparse_attention"),
}
SPARSE_LSE_BACKENDS: Mapping[str, Function] = {
    "reference": reference_sparse_lse,
    "triton": triton_sparse_lse,
    "cuda": attention_cuda.cuda_sparse_lse,
    **_eight("sparse_attention_lse"),
}


# Parts


def _lists(blocks: Blocks) -> tuple[Any, ...]:
    return blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices, *blocks.largest


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
