"""Attention with 8-bit products on csrc/: `cuda_fp8` and `cuda_int8`, on sm_90 (not verified on a GPU yet).

q and k become e4m3 or int8, v and the weights of the softmax e4m3; sums are fp32, the result is of q's type. It is an
approximation, and so asked for by name alone: `auto` never takes it. csrc/quantize.h has the scales (one a query, one
for 128 keys and one for 128 values, after the mean of all keys is taken off them), csrc/attention_eight.h the products,
eager_attention_eight.py the same in PyTorch. Inputs are those of attention_cuda.py, and finite: a query that is not
makes its result NaN, a key every result of its head, a value those that look at its block.

The lists of `Blocks` are kept to: each tile of keys is stored from a block of 128 on, so tiles of a multiple of 128
tokens cost nothing more, and smaller ones a whole block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops.attention_cuda import DTYPES, call_of
from fastvid.ops.eager_attention import check
from fastvid.ops.sparse import Blocks

KINDS = ("fp8", "int8")
KEYS = 128  # of a block
Lists = tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]


@torch.library.custom_op("fastvid::attention_eight", mutates_args=())
def _dense(
    q: Tensor, k: Tensor, v: Tensor, kind: str, with_lse: bool, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, v, None, kind, with_lse, softmax_scale)


@torch.library.custom_op("fastvid::sparse_attention_eight", mutates_args=())
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
    kind: str,
    with_lse: bool,
    *,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    lists = (query_tiles, key_tiles, rows, indices, (largest_query, largest_key))
    return _launch(q, k, v, lists, kind, with_lse, softmax_scale)


@_dense.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kind: str, with_lse: bool, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return _empty(q, k, v, with_lse)


@_sparse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *lists: Any, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _empty(q, k, v, lists[-1])


def _empty(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) to be filled in; without lse, an empty one."""
    check(q, k, v)
    B, N, H, _ = q.shape
    lse = torch.empty((B, H, N) if with_lse else (0,), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, kind: str, with_lse: bool, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    out, lse = _empty(q, k, v, with_lse)
    given = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
    if q.dtype not in DTYPES:
        raise ValueError(f"attention by cuda_{kind} takes float16 or bfloat16 (nearest: bfloat16), not {given}")
    if q.device.type != "cuda" or k.device != q.device or v.device != q.device:
        raise ValueError(f"attention by cuda_{kind} takes tensors of one CUDA device, not {given}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {x.stride(-1)}; it must have 1")
    if out.numel() == 0:
        return out, lse
    from fastvid import _C

    dtype, device = str(q.dtype).removeprefix("torch."), q.device.index
    with torch.cuda.device_of(q):
        stream = torch.cuda.current_stream(q.device)
        at = stream.cuda_stream

        def quantize(part: str, x: Tensor, mean: Tensor | None, made: tuple[Tensor | None, ...]) -> None:
            call, tiles = source_of(x, None if part == "queries" else lists)
            _C.quantize(part, *map(_address, (x, mean, *made)), kind, dtype, call, _address(tiles), device, at)

        call, walked = prepare(q, k, v, lists)
        for x in (q, k, v, *walked, *(lists[:4] if lists else ())):
            x.record_stream(stream)  # the caller may drop what came from another stream at once
        tensors, scales = quantized(q, k, v, lists, with_lse, quantize)
        addresses = [x.data_ptr() for x in walked]
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        _C.attention_eight(
            [*map(_address, tensors)],
            [*map(_address, scales)],
            tensors[1].shape[2] // KEYS,
            out.data_ptr(),
            _address(lse if with_lse else None),
            kind,
            dtype,
            call,
            addresses,
            scale,
            device,
            at,
        )
    return out, lse


def quantized(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, with_lse: bool, quantize: Callable[..., None]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor]]:
    """q8 [B, H, N, D], k8 [B, H, blocks * 128, D], v8 [B, H, blocks, D, 128], as bytes, and their scales: of queries,
    what is to be added to their scores (with the log-sum-exp alone), of blocks: of keys, and the exponents of values'.

    quantize(part, x, mean, (out, scales, shift)): what makes "queries", "keys" or "values".
    """
    (B, N, H, D), device = q.shape, q.device
    blocks = block_count(k, lists)
    q8 = torch.empty(B, H, N, D, dtype=torch.uint8, device=device)
    k8 = torch.empty(B, H, blocks * KEYS, D, dtype=torch.uint8, device=device)
    v8 = torch.empty(B, H, blocks, D, KEYS, dtype=torch.uint8, device=device)
    scales = torch.empty(B, H, N, dtype=torch.float32, device=device)
    shifts = torch.empty_like(scales) if with_lse else None
    block_scales = torch.empty(B, H, blocks, 2, dtype=torch.float32, device=device)
    mean = k.mean(1, dtype=torch.float32)
    quantize("queries", q, mean if with_lse else None, (q8, scales, shifts))
    quantize("keys", k, mean, (k8, block_scales, None))
    quantize("values", v, None, (v8, block_scales, None))
    return (q8, k8, v8), (scales, shifts, block_scales)


def block_count(k: Tensor, lists: Lists | None) -> int:
    return -(-k.shape[1] // KEYS) if lists is None else (lists[1].numel() - 1) * _each(lists)


def source_of(x: Tensor, lists: Lists | None) -> tuple[dict[str, tuple[int, ...] | int], Tensor | None]:
    """What `quantize` is told of q, k or v, `Call` in csrc/quantize.h, in its order, and the tiles beside it."""
    B, tokens, H, D = x.shape
    tiles, each = (1, -(-tokens // KEYS)) if lists is None else (lists[1].numel() - 1, _each(lists))
    call = {
        "batch": B,
        "tokens": tokens,
        "heads": H,
        "head_dim": D,
        "strides": x.stride()[:3],
        "count": tiles,
        "each": each,
    }
    return call, None if lists is None else lists[1]


def prepare(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None
) -> tuple[dict[str, tuple[int, ...] | int], list[Tensor]]:
    """The call, and the tensors whose addresses go with it, in the order of `Lists` in csrc/attention_call.h; keys are
    counted as k8 has them. Raises ValueError for lists that the kernel cannot walk; their contents are not read."""
    if lists is None:
        return call_of(q, k, v, None, None, 0), []
    from fastvid.kernels.sparse_attention import check_lists

    query_tiles, key_tiles, rows, indices, largest = lists
    check_lists(q, query_tiles, key_tiles, rows, indices, largest)
    return call_of(q, k, v, query_tiles, rows, largest[0]), [query_tiles, *schedule(key_tiles, rows, indices, largest)]


def schedule(key_tiles: Tensor, rows: Tensor, indices: Tensor, largest: tuple[int, int]) -> list[Tensor]:
    """The blocks that every row of lists walks over, on the device and without waiting for it: int64 [rows + 1] and
    the first key of whole blocks, then int64 [rows + 1], the first and the last key but one of the others."""
    each, size, indices = -(-largest[1] // KEYS), indices.numel(), indices.long()
    counts = key_tiles.diff()[indices]
    first = indices * each * KEYS
    whole = _sums(counts // KEYS)
    places = torch.arange(each, device=indices.device)
    slots = torch.where(places < (counts // KEYS)[:, None], whole[:-1, None] + places, size * each)
    full_starts = key_tiles.new_empty(size * each + 1)
    full_starts.scatter_(0, slots.flatten(), (first[:, None] + places * KEYS).int().flatten())
    parts = counts % KEYS > 0
    cut = _sums(parts)
    slots = torch.where(parts, cut[:-1], size)
    part_starts, part_ends = key_tiles.new_empty(size + 1), key_tiles.new_empty(size + 1)
    part_starts.scatter_(0, slots, (first + counts // KEYS * KEYS).int())
    part_ends.scatter_(0, slots, (first + counts).int())
    return [whole[rows], full_starts, cut[rows], part_starts, part_ends]


def _sums(counts: Tensor) -> Tensor:
    """[n] -> int64 [n + 1]: the sum of all that come before."""
    return torch.cat((counts.new_zeros(1, dtype=torch.long), counts.cumsum(0)))


def _each(lists: Lists) -> int:
    """Blocks that a tile of keys has."""
    return -(-lists[4][1] // KEYS)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _listed(blocks: Blocks) -> tuple[Any, ...]:
    return blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices, *blocks.largest


def _functions(kind: str) -> dict[str, Callable[..., Any]]:
    """Operation -> function, for a kind of product."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
        return _dense(q, k, v, kind, False, softmax_scale=softmax_scale)[0]

    def attention_lse(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
        return _dense(q, k, v, kind, True, softmax_scale=softmax_scale)

    def sparse_attention(
        q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None
    ) -> Tensor:
        check(q, k, v, blocks)
        return _sparse(q, k, v, *_listed(blocks), kind, False, softmax_scale=softmax_scale)[0]

    def sparse_attention_lse(
        q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        check(q, k, v, blocks)
        return _sparse(q, k, v, *_listed(blocks), kind, True, softmax_scale=softmax_scale)

    made = (attention, attention_lse, sparse_attention, sparse_attention_lse)
    for function in made:
        function.needs = "90a"  # which of the architectures of fastvid._C; `backends.lacks` asks
        function.dtypes = DTYPES  # what benchmarks and the sanitizer's cases give it
        function.__qualname__ = f"{function.__name__}.{kind}"
    return {function.__name__: function for function in made}


FUNCTIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = {kind: _functions(kind) for kind in KINDS}
