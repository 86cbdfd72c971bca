"""Attention on csrc/: `cuda`, for 16-bit types on sm_90 (not verified on a GPU yet, so by name alone).

`attention.py` has the meaning, dense and block-sparse, with the log-sum-exp or without. q, k and v are read where they
lie: head_dim is 64 or 128 and contiguous, and the other strides are multiples of 16 bytes. Nothing is copied, nothing
falls back: what the kernel cannot take raises ValueError. The lists of `Blocks` are cut into blocks of 128 keys by the
Triton kernel's own `schedule`, so Triton has to be installed for them. Where a tile's keys do not fill a block, those
that follow it are read too and get no weight: their values have to be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops.eager_attention import check
from fastvid.ops.sparse import Blocks

DTYPES = (torch.float16, torch.bfloat16)
KEYS = 128  # of a step of the kernel


def call_of(
    q: Tensor, k: Tensor, v: Tensor, query_tiles: Tensor | None, rows: Tensor | None, largest: int
) -> dict[str, tuple[int, ...] | int]:
    """What the device code is told, `Call` in csrc/attention_call.h, in its order. largest: queries of a tile."""
    B, N, H, D = q.shape
    tiles = 0 if query_tiles is None else query_tiles.numel() - 1
    return {
        "batch": B,
        "queries": N,
        "keys": k.shape[1],
        "heads": H,
        "head_dim": D,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "v_strides": v.stride()[:3],
        "tiles": tiles,
        "largest": largest,
        "lists": (rows.numel() - 1) // tiles if rows is not None else 1,
    }


@torch.library.custom_op("fastvid::attention_cuda", mutates_args=())
def cuda(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """The CUDA kernel. Raises ValueError for what it does not take: see the top of this file."""
    return _launch(q, k, v, None, False, softmax_scale)[0]


@torch.library.custom_op("fastvid::attention_lse_cuda", mutates_args=())
def cuda_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The CUDA kernel, with the logarithm of what its softmax divides by: [B, H, N] in fp32."""
    return _launch(q, k, v, None, True, softmax_scale)


def cuda_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None) -> Tensor:
    """The CUDA kernel, over the tiles that are listed."""
    check(q, k, v, blocks)
    return _sparse(q, k, v, *_lists(blocks), softmax_scale=softmax_scale)


def cuda_sparse_lse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same, with the logarithm of what its softmax divides by: -inf where nothing is attended to."""
    check(q, k, v, blocks)
    return _sparse_lse(q, k, v, *_lists(blocks), softmax_scale=softmax_scale)


@torch.library.custom_op("fastvid::sparse_attention_cuda", mutates_args=())
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
    lists = (query_tiles, key_tiles, rows, indices, (largest_query, largest_key))
    return _launch(q, k, v, lists, False, softmax_scale)[0]


@torch.library.custom_op("fastvid::sparse_attention_lse_cuda", mutates_args=())
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
    lists = (query_tiles, key_tiles, rows, indices, (largest_query, largest_key))
    return _launch(q, k, v, lists, True, softmax_scale)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, lists: tuple[Any, ...] | None, with_lse: bool, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse); without lse, an empty one."""
    check(q, k, v)
    given = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
    if q.dtype not in DTYPES:
        raise ValueError(f"attention by cuda takes float16 or bfloat16 (nearest: bfloat16), not {given}")
    if q.device.type != "cuda" or k.device != q.device or v.device != q.device:
        raise ValueError(f"attention by cuda takes tensors of one CUDA device, not {given}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {x.stride(-1)}; it must have 1")
    B, N, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, N) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    from fastvid import _C

    scale = D**-0.5 if softmax_scale is None else softmax_scale
    with torch.cuda.device_of(q):
        stream = torch.cuda.current_stream(q.device)
        call, walked = prepare(q, k, v, lists)
        tensors = (q, k, v, out, lse if with_lse else None)
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        places = [x.data_ptr() for x in walked]
        _C.attention(*pointers, _name(q), call, places, scale, q.device.index, stream.cuda_stream)
        for x in (q, k, v, *walked):
            x.record_stream(stream)  # the caller may drop what came from another stream at once
    return out, lse


def prepare(
    q: Tensor, k: Tensor, v: Tensor, lists: tuple[Any, ...] | None
) -> tuple[dict[str, tuple[int, ...] | int], list[Tensor]]:
    """The call, and the tensors whose addresses go with it, in the order of `Lists` in csrc/attention_call.h.

    lists: query_tiles, key_tiles, rows, indices and the largest tiles of `Blocks`, or None for dense attention.
    Raises ValueError for lists that the kernel cannot walk; their contents are not read.
    """
    if lists is None:
        return call_of(q, k, v, None, None, 0), []
    from fastvid.kernels.sparse_attention import check_lists, schedule

    query_tiles, key_tiles, rows, indices, largest = lists
    check_lists(q, query_tiles, key_tiles, rows, indices, largest)
    cut = schedule(key_tiles, rows, indices, largest[1], KEYS)
    return call_of(q, k, v, query_tiles, rows, largest[0]), [query_tiles, *(x.contiguous() for x in cut)]


def _lists(blocks: Blocks) -> tuple[Any, ...]:
    return blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices, *blocks.largest


@cuda.register_fake
def _empty(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    check(q, k, v)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@cuda_lse.register_fake
def _empty_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return _empty(q, k, v), torch.empty((B, H, N), dtype=torch.float32, device=q.device)


@_sparse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *lists: Any, softmax_scale: float | None = None) -> Tensor:
    return _empty(q, k, v)


@_sparse_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *lists: Any, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _empty_lse(q, k, v)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "attention": cuda,
    "attention_lse": cuda_lse,
    "sparse_attention": cuda_sparse,
    "sparse_attention_lse": cuda_sparse_lse,
}
for _function in FUNCTIONS.values():
    _function.needs = "90a"  # which of the architectures of fastvid._C; `backends.lacks` asks
    _function.dtypes = DTYPES  # what benchmarks and the sanitizer's cases give it
