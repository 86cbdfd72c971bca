"""Attention kernels as torch operators: Triton (kernels/) and CUDA (csrc/), dense and block-sparse.

    operator(q, k, v, lists, largest, scale, with_lse) -> (out, lse)

lists and largest: `Blocks.tensors`, then their steps (`triton_steps`, `exact_steps`, `padded_steps`), and
`Blocks.largest`; both empty for dense attention. lse is empty unless with_lse.
Callers must call `attention.check` first. Nothing falls back and nothing is copied: unsupported inputs raise
ValueError.

attention_triton   any GPU since sm_80, fp32 and 16-bit types, head_dim up to 128
attention_cuda     sm_90a, 16-bit types, head_dim 64 or 128, strides that are multiples of 16 bytes. With lists, a tile
                   whose size is not a multiple of 128 also reads the keys after it, with weight 0, so their values must
                   be finite. Lists require Triton to be installed: `schedule` of the Triton kernel splits them.
attention_pair     the same; two blocks of a cluster share keys and values where they can
attention_eight    the same with 8-bit products, an approximation: q and k become e4m3 or int8, v and the softmax
                   weights e4m3; sums are fp32. csrc/quantize.h defines the scales (one per query, per 128 keys and per
                   128 values, after subtracting the mean of all keys), csrc/attention_eight.h the products. A
                   non-finite query makes its own result NaN, a non-finite key all results of its head, a non-finite
                   value the results that read its block. Each tile of keys is padded to a multiple of 128.

The CUDA operators have not been verified on a GPU yet, so `auto` never selects them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvid.ops.sparse import Blocks

KEYS = 128  # keys per block, which is one step of the CUDA kernels
Call = dict[str, tuple[int, ...] | int]


@torch.library.custom_op("fastvid::attention_triton", mutates_args=())
def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """kernels/attention.py and kernels/sparse_attention.py."""
    out, lse = _outputs(q, with_lse)
    wanted = lse if with_lse else None
    if lists:
        from fastvid.kernels.sparse_attention import Schedule, sparse_attention

        sparse_attention(q, k, v, out, lists[0], Schedule(*lists[4:]), largest[0], wanted, scale)
    else:
        from fastvid.kernels.attention import attention

        attention(q, k, v, out, wanted, scale)
    return out, lse


@torch.library.custom_op("fastvid::attention_cuda", mutates_args=())
def attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """csrc/attention.cu."""
    return _attend("cuda", q, k, v, lists, largest, scale, with_lse)


@torch.library.custom_op("fastvid::attention_pair", mutates_args=())
def attention_pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """csrc/attention_pair.cu where it can, that is dense attention, head_dim 128 and an even number of 128 queries
    (the last of them may be incomplete); else csrc/attention.cu. Both give the same bits."""
    return _attend("cuda_pair", q, k, v, lists, largest, scale, with_lse)


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The arguments of `attention_cuda`, after the back end's name."""
    lists, largest, scale, with_lse = rest
    out, lse = _outputs(q, with_lse)
    _check_tensors(name, q, k, v)
    if out.numel() == 0:
        return out, lse
    from fastvid import _C  # type: ignore[attr-defined]

    blocks = _blocks(lists, largest)
    with torch.cuda.device_of(q):
        stream = torch.cuda.current_stream(q.device)
        call, walked = prepare(q, k, v, blocks, lists[4:])
        call["pairs"] = int(name == "cuda_pair")
        pointers = [_address(x) for x in (q, k, v, out, lse if with_lse else None)]
        places = [_address(x) for x in walked]
        _C.attention(*pointers, _name(q), call, places, _scale(q, scale), q.device.index, stream.cuda_stream)
        for x in (q, k, v, *walked):
            x.record_stream(stream)  # the caller may drop what came from another stream at once
    return out, lse


def quantize_cuda(
    part: str,
    x: Tensor,
    mean: Tensor | None,
    made: tuple[Tensor | None, ...],
    kind: str,
    blocks: Blocks | None = None,
) -> None:
    """csrc/quantize.cu, on the current stream of x's device; see `quantized`."""
    from fastvid import _C  # type: ignore[attr-defined]

    call, tiles = source_of(x, None if part == "queries" else blocks)
    where = x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    _C.quantize(part, *map(_address, (x, mean, *made)), kind, _name(x), call, _address(tiles), *where)


@torch.library.custom_op("fastvid::attention_eight", mutates_args=())
def attention_eight(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """csrc/quantize.cu, then csrc/attention_eight.cu. kind: "fp8" or "int8", the type of the q k products."""
    out, lse = _outputs(q, with_lse)
    _check_tensors(f"cuda_{kind}", q, k, v)
    if out.numel() == 0:
        return out, lse
    from fastvid import _C  # type: ignore[attr-defined]

    blocks = _blocks(lists, largest)
    with torch.cuda.device_of(q):
        stream = torch.cuda.current_stream(q.device)
        call, walked = prepare(q, k, v, blocks, lists[4:])
        for x in (q, k, v, *walked, *lists):
            x.record_stream(stream)  # the caller may drop what came from another stream at once
        tensors, scales = quantized(q, k, v, blocks, with_lse, partial(quantize_cuda, kind=kind, blocks=blocks))
        held, factors, places = ([_address(x) for x in of] for of in (tensors, scales, walked))
        written = out.data_ptr(), _address(lse if with_lse else None)
        how = (kind, _name(q), call, places, _scale(q, scale), q.device.index, stream.cuda_stream)
        _C.attention_eight(held, factors, tensors[1].shape[2] // KEYS, *written, *how)
    return out, lse


@attention_triton.register_fake
@attention_cuda.register_fake
@attention_pair.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, with_lse)


@attention_eight.register_fake
def _fake_eight(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, with_lse)


def _outputs(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialized (out, lse)."""
    B, N, H, _ = q.shape
    lse = torch.empty((B, H, N) if with_lse else (0,), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    described = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention by {name} takes float16 or bfloat16 (nearest: bfloat16), not {described}")
    if q.device.type != "cuda" or k.device != q.device or v.device != q.device:
        raise ValueError(f"attention by {name} takes tensors of one CUDA device, not {described}")
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {label} has stride {x.stride(-1)}; it must have 1")


# Arguments of the device code


def prepare(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, steps: Sequence[Tensor]
) -> tuple[Call, list[Tensor]]:
    """The fields of `Call` in csrc/attention_call.h, in order, and the tensors for `Lists` there, in order. steps: of
    the blocks, by `exact_steps` or `padded_steps`."""
    B, N, H, D = q.shape
    call: Call = {
        "batch": B,
        "queries": N,
        "keys": k.shape[1],
        "heads": H,
        "head_dim": D,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "v_strides": v.stride()[:3],
        "tiles": 0,
        "largest": 0,
        "lists": 1,
        "pairs": 0,
    }
    if blocks is None:
        return call, []
    tiles = blocks.query_tiles.numel() - 1
    call |= {"tiles": tiles, "largest": blocks.largest[0], "lists": blocks.lists}
    return call, [blocks.query_tiles, *steps, blocks.indices.new_zeros(1)]  # it counts works


# Steps over the keys of every row of the lists: offsets int64 [rows + 1] and first keys of full blocks, then offsets
# int64 [rows + 1], first keys and ends of partial blocks. Made once for all calls with the same blocks, on the device
# and without waiting for it. All raise ValueError for lists that a kernel does not support; they read no contents.


def exact_steps(q: Tensor, blocks: Blocks) -> list[Tensor]:
    """The runs of tiles in each row, split into blocks of 128 keys and remainders."""
    return _schedule(q, blocks, KEYS)


def triton_steps(q: Tensor, blocks: Blocks) -> list[Tensor]:
    """The same with as many keys per block as the Triton kernel takes in a step."""
    from fastvid.kernels.sparse_attention import keys_per_step

    return _schedule(q, blocks, keys_per_step(q, blocks.largest[0]))


def _schedule(q: Tensor, blocks: Blocks, keys: int) -> list[Tensor]:
    from fastvid.kernels.sparse_attention import check_lists, schedule

    check_lists(q, *blocks.tensors, blocks.largest)
    lists = blocks.key_tiles, blocks.rows, blocks.indices
    return blocks.once(("exact", keys), lambda: [x.contiguous() for x in schedule(*lists, blocks.largest[1], keys)])


def padded_steps(q: Tensor, blocks: Blocks) -> list[Tensor]:
    """Blocks of 128 keys, if each tile is padded to whole blocks."""
    from fastvid.kernels.sparse_attention import check_lists

    check_lists(q, *blocks.tensors, blocks.largest)
    return blocks.once("padded", lambda: _padded(blocks))


def _padded(blocks: Blocks) -> list[Tensor]:
    each, size, indices = _blocks_each(blocks), blocks.indices.numel(), blocks.indices.long()
    counts = blocks.key_tiles.diff()[indices]
    first = indices * each * KEYS
    full_offsets = _sums(counts // KEYS)
    places = torch.arange(each, device=indices.device)
    slots = torch.where(places < (counts // KEYS)[:, None], full_offsets[:-1, None] + places, size * each)
    full_starts = blocks.key_tiles.new_empty(size * each + 1)
    full_starts.scatter_(0, slots.flatten(), (first[:, None] + places * KEYS).int().flatten())
    parts = counts % KEYS > 0
    partial_offsets = _sums(parts)
    slots = torch.where(parts, partial_offsets[:-1], size)
    part_starts, part_ends = (blocks.key_tiles.new_empty(size + 1) for _ in range(2))
    part_starts.scatter_(0, slots, (first + counts // KEYS * KEYS).int())
    part_ends.scatter_(0, slots, (first + counts).int())
    return [full_offsets[blocks.rows], full_starts, partial_offsets[blocks.rows], part_starts, part_ends]


def quantized(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, with_lse: bool, quantize: Callable[..., None]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor]]:
    """q8 [B, H, N, D], k8 [B, H, blocks * 128, D] and v8 [B, H, blocks, D, 128] as bytes, and their scales: a scale per
    query, a shift of each query's scores (None without the log-sum-exp), and per block the scale of its keys and the
    exponent of its values.

    quantize(part, x, mean, (out, scales, shift)): quantizes "queries", "keys" or "values".
    """
    (B, N, H, D), device = q.shape, q.device
    count = block_count(k, blocks)
    q8 = torch.empty(B, H, N, D, dtype=torch.uint8, device=device)
    k8 = torch.empty(B, H, count * KEYS, D, dtype=torch.uint8, device=device)
    v8 = torch.empty(B, H, count, D, KEYS, dtype=torch.uint8, device=device)
    scales = torch.empty(B, H, N, dtype=torch.float32, device=device)
    shifts = torch.empty_like(scales) if with_lse else None
    block_scales = torch.empty(B, H, count, 2, dtype=torch.float32, device=device)
    mean = k.mean(1, dtype=torch.float32)
    quantize("queries", q, mean if with_lse else None, (q8, scales, shifts))
    quantize("keys", k, mean, (k8, block_scales, None))
    quantize("values", v, None, (v8, block_scales, None))
    return (q8, k8, v8), (scales, shifts, block_scales)


def source_of(x: Tensor, blocks: Blocks | None) -> tuple[Call, Tensor | None]:
    """The fields of `Call` in csrc/quantize.h, in order, for q, k or v, and the tiles that split its tokens."""
    B, tokens, H, D = x.shape
    tiles, each = (1, -(-tokens // KEYS)) if blocks is None else (_key_tiles(blocks), _blocks_each(blocks))
    call: Call = {
        "batch": B,
        "tokens": tokens,
        "heads": H,
        "head_dim": D,
        "strides": x.stride()[:3],
        "count": tiles,
        "each": each,
    }
    return call, None if blocks is None else blocks.key_tiles


def block_count(k: Tensor, blocks: Blocks | None) -> int:
    """The total number of blocks of 128 keys."""
    return -(-k.shape[1] // KEYS) if blocks is None else _key_tiles(blocks) * _blocks_each(blocks)


def _key_tiles(blocks: Blocks) -> int:
    return blocks.key_tiles.numel() - 1


def _blocks_each(blocks: Blocks) -> int:
    """Blocks of 128 keys per tile."""
    return -(-blocks.largest[1] // KEYS)


def _blocks(lists: Sequence[Tensor], largest: Sequence[int]) -> Blocks | None:
    if not lists:
        return None
    query_tiles, key_tiles, rows, indices = lists[:4]
    return Blocks(query_tiles, key_tiles, rows, indices, (largest[0], largest[1]))


def _sums(counts: Tensor) -> Tensor:
    """Exclusive prefix sums with the total at the end: [n] -> int64 [n + 1]."""
    return torch.cat((counts.new_zeros(1, dtype=torch.long), counts.cumsum(0)))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
