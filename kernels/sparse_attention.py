"""Block-sparse spacetime attention: every tile of queries attends to the tiles of keys in its list, and to no other.

    out[b, n, h] = sum_m p[m] v[b, m, h] / sum_m p[m] over the keys m of the tiles that n's tile lists
    lse[b, h, n] = log(sum_m p[m]),  p[m] = exp(scale * q[b, n, h] . k[b, m, h])

Tokens are in tile order: those of a tile follow one another, and tiles may be of different sizes. Without any keys, out
is 0 and lse -inf. q [B, N, H, D], k and v [B, M, H, D] as in attention.py, whose inner step this is.

Tiles that follow one another in a list are one run of tokens. `schedule` cuts every run into blocks of BLOCK_N keys and
what is left over, so that the kernel walks over one flat list of full blocks, which know no masks, and then over one of
parts; time follows the number of keys that are listed. A program takes BLOCK_M queries of one tile and one head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.attention import (
    WITH_TMA,
    Config,
    arguments,
    attend,
    check,
    config_of,
    descriptor,
    load_rows,
    log2_scale,
    padded,
    store_rows,
    takes_tma,
)
from fastvid.kernels.devices import takers

# (architecture, bits of a number, head_dim padded: 64 or less, or 128, queries a program) -> configuration, chosen as
# those of attention.py.
CONFIGS = {
    (80, 16, 64, 128): Config(128, 64, 8, 3),
    (80, 16, 64, 64): Config(64, 64, 4, 3),
    (80, 16, 128, 128): Config(128, 32, 8, 3),
    (80, 16, 128, 64): Config(64, 32, 4, 3),
    (90, 16, 64, 128): Config(128, 128, 8, 2),
    (90, 16, 64, 64): Config(64, 64, 4, 3),
    (90, 16, 128, 128): Config(128, 64, 8, 2),
    (90, 16, 128, 64): Config(64, 64, 4, 2),
    (100, 16, 64, 128): Config(128, 64, 4, 3),
    (100, 16, 64, 64): Config(64, 64, 4, 3),
    (100, 16, 128, 128): Config(128, 64, 8, 3),
    (100, 16, 128, 64): Config(64, 64, 4, 3),
    (80, 32, 64, 64): Config(64, 32, 4, 2),
    (80, 32, 128, 64): Config(64, 32, 8, 2),
    (86, 32, 64, 64): Config(32, 16, 8, 2),
    (86, 32, 128, 64): Config(32, 16, 8, 2),
}


@triton.jit
def sparse_attention_kernel(
    q,
    k,
    v,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    full_rows_ptr,
    full_starts_ptr,
    part_rows_ptr,
    part_starts_ptr,
    part_ends_ptr,
    scale,
    H,
    N,
    tiles,
    lists,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """q, k, v: pointers, or with TMA descriptors of [B, H, tokens, D] in blocks [1, 1, BLOCK, BLOCK_D].

    A tile of queries takes PARTS programs; of a tile that is smaller, the last ones have nothing to do.
    """
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % tiles
    batch = tl.program_id(0) // PARTS // tiles // H
    head = tl.program_id(0) // PARTS // tiles % H
    b, h = batch.to(tl.int64), head.to(tl.int64)
    first = tl.load(tiles_ptr + tile) + part * BLOCK_M
    end = tl.load(tiles_ptr + tile + 1)
    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row = (b * H + h) % lists * tiles + tile  # of the lists: one for all heads, one a head, or one a head and sample

    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if TMA:
        query = q.load([batch, head, first, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        query = load_rows(q + b * stride_qb + h * stride_qh, rows, stride_qn, end, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = tl.load(full_rows_ptr + row)
    stop = tl.where(first < end, tl.load(full_rows_ptr + row + 1), start)
    for i in tl.range(start, stop, warp_specialize=SPECIALIZE):
        place = tl.load(full_starts_ptr + i)
        if TMA:
            keys = k.load([batch, head, place, 0]).reshape(BLOCK_N, BLOCK_D)
            values = v.load([batch, head, place, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            keys = load_rows(k_ptr, place + cols, stride_kn, 0, D, BLOCK_D, False)
            values = load_rows(v_ptr, place + cols, stride_vn, 0, D, BLOCK_D, False)
        acc, total, peak = attend(query, keys, values, None, acc, total, peak, scale, False)
    # By pointers with masks, since what follows a part is no zero but the keys of other tiles.
    start = tl.load(part_rows_ptr + row)
    stop = tl.where(first < end, tl.load(part_rows_ptr + row + 1), start)
    for i in tl.range(start, stop):
        place = tl.load(part_starts_ptr + i)
        last = tl.load(part_ends_ptr + i)
        keys = load_rows(k_ptr, place + cols, stride_kn, last, D, BLOCK_D, True)
        values = load_rows(v_ptr, place + cols, stride_vn, last, D, BLOCK_D, True)
        acc, total, peak = attend(query, keys, values, place + cols < last, acc, total, peak, scale, True)

    out_ptr += (b * N * H + h) * D
    if lse_ptr is not None:
        lse_ptr += (b * H + h) * N
    store_rows(out_ptr, lse_ptr, rows, H * D, end, acc, total, peak, D, BLOCK_D)


class Schedule(NamedTuple):
    """The blocks of keys of every row: full_starts[full_rows[r] : full_rows[r + 1]] are the tokens at which full ones
    start; parts go from part_starts to part_ends. Rows are int64, tokens int32; what no row holds is undefined."""

    full_rows: Tensor
    full_starts: Tensor
    part_rows: Tensor
    part_starts: Tensor
    part_ends: Tensor


def schedule(key_tiles: Tensor, rows: Tensor, indices: Tensor, largest: int, block_n: int) -> Schedule:
    """Cut the runs of tiles in every row into blocks of block_n keys, on the device and without waiting for it.

    A block belongs to the tile in which it ends, a part to the last tile of its run: so all can be counted at once.
    """
    size, most = indices.numel(), largest // block_n + 1
    indices = indices.long()
    starts, ends = key_tiles[indices], key_tiles[indices + 1]
    opens = torch.ones(size + 1, dtype=torch.bool, device=indices.device)  # whether a run starts at an entry
    opens[1:size] = indices[1:] != indices[:-1] + 1
    opens.index_fill_(0, rows, True)
    entries = torch.arange(size, device=indices.device)
    origin = starts[torch.where(opens[:size], entries, 0).cummax(0).values]
    before, after = (starts - origin) // block_n, (ends - origin) // block_n
    full_rows = _sums(after - before)
    places = before[:, None] + torch.arange(most, device=indices.device)
    slots = torch.where(places < after[:, None], full_rows[:-1, None] + places - before[:, None], size * most)
    full_starts = key_tiles.new_empty(size * most + 1)
    full_starts.scatter_(0, slots.flatten(), (origin[:, None] + places * block_n).int().flatten())
    part = opens[1:] & ((ends - origin) % block_n > 0)
    part_rows = _sums(part)
    slots = torch.where(part, part_rows[:-1], size)
    part_starts, part_ends = key_tiles.new_empty(size + 1), key_tiles.new_empty(size + 1)
    part_starts.scatter_(0, slots, (origin + after * block_n).int())
    part_ends.scatter_(0, slots, ends)
    return Schedule(full_rows[rows], full_starts, part_rows[rows], part_starts, part_ends)


def _sums(counts: Tensor) -> Tensor:
    """[n] -> int64 [n + 1]: the sum of all that come before."""
    return torch.cat((counts.new_zeros(1, dtype=torch.long), counts.cumsum(0)))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    query_tiles: Tensor,
    listed: Schedule,
    largest: int,
    lse: Tensor | None = None,
    softmax_scale: float | None = None,
    config: Config | None = None,
    tma: bool | None = None,
) -> None:
    """Write attention of q [B, N, H, D] to k and v [B, M, H, D] into out [B, N, H, D], lse [B, H, N] (fp32) beside it.

    query_tiles: int32 [tiles + 1], the token at which each tile starts, N at the end; the largest has `largest` tokens.
    listed: of lists that `check_lists` takes, cut into steps of `keys_per_step`, or of config.
    config and tma: instead of what is chosen here, for benchmarks and tests.
    Raises ValueError for tensors that the kernel does not take: see `check`.
    """
    check(q, k, v, softmax_scale)
    if out.numel() == 0:
        return
    B, N, H, D = q.shape
    tiles = query_tiles.numel() - 1
    config = config or _config(q, largest)
    tma = takes_tma(q, k, v) if tma is None else tma
    parts = triton.cdiv(largest, config.block_m)
    blocks = (config.block_m, config.block_n, config.block_n)
    inputs = [descriptor(x, block) for x, block in zip((q, k, v), blocks, strict=True)] if tma else (q, k, v)
    with torch.cuda.device_of(q):  # the device guard; nothing for the interpreter's CPU tensors
        sparse_attention_kernel[(B * H * tiles * parts,)](
            *inputs,
            k,
            v,
            out,
            lse,
            query_tiles,
            *listed,
            log2_scale(softmax_scale, D),
            H,
            N,
            tiles,
            (listed.full_rows.numel() - 1) // tiles,
            *(stride for x in (q, k, v) for stride in x.stride()[:3]),
            D=D,
            BLOCK_D=padded(D),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PARTS=parts,
            TMA=tma,
            SPECIALIZE=config.specialize,
            **config.options,
        )


def keys_per_step(q: Tensor, largest: int) -> int:
    """How many keys a step of the kernel takes, for queries such as q in tiles of at most `largest`."""
    return _config(q, largest).block_n


def _config(q: Tensor, largest: int) -> Config:
    return config_of(CONFIGS, q, _block_m(largest) if q.element_size() == 2 else 64)


def check_lists(
    q: Tensor, query_tiles: Tensor, key_tiles: Tensor, rows: Tensor, indices: Tensor, largest: tuple[int, int]
) -> None:
    """Raises ValueError unless lists are of the right types, contiguous, on q's device, and as many as they can be.

    query_tiles and key_tiles: int32 [tiles + 1], the token at which each tile starts, N or M at the end.
    rows: int64 [lists * query tiles + 1]; indices: int32. Tile t of list l attends to the tiles
        indices[rows[i] : rows[i + 1]], i = l * query tiles + t, which ascend. There are 1, H or B * H lists.
    largest: tokens of the largest tile of queries, and of keys.
    """
    tensors = {"query_tiles": query_tiles, "key_tiles": key_tiles, "rows": rows, "indices": indices}
    for name, x in tensors.items():
        dtype = torch.int64 if name == "rows" else torch.int32
        if x.ndim != 1 or x.dtype != dtype or x.device != q.device or not x.is_contiguous():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; contiguous {dtype} [n] is needed")
    B, _, H, _ = q.shape
    tiles = query_tiles.numel() - 1
    if tiles < 1 or key_tiles.numel() < 2 or min(largest) < 1:
        raise ValueError(
            f"there are {tiles} and {key_tiles.numel() - 1} tiles of {largest} tokens; at least 1 is needed"
        )
    if rows.numel() - 1 not in {tiles, H * tiles, B * H * tiles}:
        raise ValueError(
            f"rows has {rows.numel()} entries; it needs one more than the {tiles} tiles of 1, {H} (a head) or "
            f"{B * H} lists (a head and sample) have"
        )


def _block_m(largest: int) -> int:
    """Queries a program: 64 where 128 would leave more than a sixth of them idle that 64 does not."""
    return 64 if 1.2 * triton.cdiv(largest, 64) * 64 <= triton.cdiv(largest, 128) * 128 else 128


def variants() -> list[Variant]:
    """Of Wan's heads in tiles of 256 tokens, then of 64, other widths, types and layouts."""
    return [
        _variant("bf16", 128, 90, 128),
        _variant("bf16", 128, 100, 128),
        _variant("bf16", 128, 80, 128),
        _variant("bf16", 128, 90, 64),
        _variant("bf16", 128, 100, 64),
        _variant("bf16", 128, 80, 64),
        _variant("bf16", 128, 90, 128, tma=False, lse=True),
        _variant("bf16", 64, 90, 128),
        _variant("bf16", 64, 100, 128),
        _variant("bf16", 64, 80, 128),
        _variant("fp32", 128, 80, 64),
        _variant("fp32", 128, 86, 64),
        _variant("fp32", 64, 80, 64),
        _variant("fp32", 64, 86, 64),
    ]


def _variant(dtype: str, head_dim: int, arch: int, block_m: int, tma: bool | None = None, lse: bool = False) -> Variant:
    tma = arch in WITH_TMA if tma is None else tma
    key = (int(dtype[-2:]), max(padded(head_dim), 64), block_m)
    config = CONFIGS[(arch, *key)]
    types, constants, aligned = arguments(dtype, head_dim, config, tma, lse)
    words = ["sparse", dtype, f"{head_dim}x{block_m}", f"sm_{arch}"]
    words += ["pointers"] * (arch in WITH_TMA and not tma) + ["lse"] * lse
    lists: dict[str, Any] = dict.fromkeys(("tiles_ptr", "full_starts_ptr", "part_starts_ptr", "part_ends_ptr"), "*i32")
    lists |= dict.fromkeys(("full_rows_ptr", "part_rows_ptr"), "*i64") | dict.fromkeys(("k_ptr", "v_ptr"), f"*{dtype}")
    sizes = dict.fromkeys(("H", "N", "tiles", "lists"), "i32")
    return Variant(
        " ".join(words),
        sparse_attention_kernel,
        types | lists | sizes,
        constants | {"PARTS": 256 // config.block_m},
        (*aligned, *lists),
        config.options,
        takers(CONFIGS, arch, *key),
    )
