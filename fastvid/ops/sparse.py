"""Block-sparse attention patterns: the key tiles that each query tile attends to, on a video's token grid (t, h, w).

A tile is a box of tokens, truncated at the far ends of the grid. `tile_order` sorts tokens tile by tile. Every pattern
is a pure function that returns `Blocks`: sorted lists of tiles, shared by all heads, or for each head of each sample
(`top_k`). `attention(..., blocks=...)` runs them.

    full     all tiles
    window   a box of tiles around each (sliding tile attention)
    radial   fewer tiles with growing temporal distance (radial attention)
    top_k    the tiles with the best scores of pooled queries and keys
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Triple = tuple[int, int, int]
SLAB = 2**24
"""Scores of tiles that `top_k` makes at a time."""
T = TypeVar("T")


@dataclass(frozen=True)
class Blocks:
    """The key tiles that every query tile attends to.

    query_tiles, key_tiles: int32 [tiles + 1], the first token of each tile, and the number of tokens at the end.
    rows: int64 [lists * query tiles + 1]; indices: int32, sorted in a row. Tile q of list l attends to the tiles
        indices[rows[i] : rows[i + 1]] with i = l * query tiles + q.
    There are 1, H (one per head) or B * H lists. largest: tokens of the largest query tile and of the largest key tile.

    Kernels keep what they derive from the lists here (`once`), so that all layers and steps share it.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    rows: Tensor
    indices: Tensor
    largest: tuple[int, int]
    _made: dict[Hashable, _Made] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def lists(self) -> int:
        return (self.rows.numel() - 1) // (self.query_tiles.numel() - 1)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor arguments of a kernel; it also needs `largest`."""
        return [self.query_tiles, self.key_tiles, self.rows, self.indices]

    def to(self, device: torch.device | str) -> Blocks:
        names = ("query_tiles", "key_tiles", "rows", "indices")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), which must depend on these blocks and `key` alone. Made again only if the tensors were written to
        since, and freed with the blocks. A graph that records a call uses what was made before, or records `make`."""
        versions = tuple(0 if x.is_inference() else x._version for x in self.tensors)
        stream = _stream(self.rows)
        recording = stream is not None and torch.cuda.is_current_stream_capturing()
        known = self._made.get(key)
        if known is not None and known.versions == versions:
            if known.event is not None and not recording and stream != known.stream:
                stream.wait_event(known.event)
            return known.value
        value = make()
        if not recording:  # the memory would be the graph's
            event = None if stream is None else stream.record_event()
            self._made[key] = _Made(versions, value, stream, event)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes make their own."""
        return Blocks, (*self.tensors, self.largest)


@dataclass(frozen=True)
class _Made:
    """What `Blocks.once` keeps: the versions of the tensors that it was made from, and on which stream it was made."""

    versions: tuple[int, ...]
    value: Any
    stream: Any
    event: Any


def _stream(x: Tensor) -> Any:
    """The current CUDA stream of a tensor's device; None on a CPU, and for fake tensors where no GPU is used."""
    return torch.cuda.current_stream(x.device) if x.is_cuda and torch.cuda.is_initialized() else None


# Tiles


def tile_counts(grid: Triple, tile: Triple) -> Triple:
    """The number of tiles along each axis. Raises ValueError for sizes below 1."""
    if len(grid) != 3 or len(tile) != 3 or min(*grid, *tile) < 1:
        raise ValueError(f"grid is {grid} and tile {tile}; both are three numbers (t, h, w) of at least 1")
    t, h, w = (-(-n // size) for n, size in zip(grid, tile, strict=True))
    return t, h, w


def tile_offsets(grid: Triple, tile: Triple) -> Tensor:
    """The first token of each tile in tile order (w fastest), and the number of tokens at the end: int32 [tiles +
    1]."""
    t, h, w = (_lengths(n, size) for n, size in zip(grid, tile, strict=True))
    sizes = t[:, None, None] * h[None, :, None] * w[None, None, :]
    return torch.cat((sizes.new_zeros(1), sizes.flatten().cumsum(0))).int()


def tile_order(grid: Triple, tile: Triple) -> Tensor:
    """The permutation int64 [N] from (t, h, w) order to tile order: x[:, order] sorts tokens by tile, and
    y[:, order.argsort()] restores them."""
    axes = (torch.arange(n) for n in grid)
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    _, height, width = tile_counts(grid, tile)
    number = (t // tile[0] * height + h // tile[1]) * width + w // tile[2]
    return number.flatten().sort(stable=True).indices


# Patterns


def full(grid: Triple, tile: Triple) -> Blocks:
    """Every tile attends to all tiles."""
    return window(grid, tile, tile_counts(grid, tile))


def window(grid: Triple, tile: Triple, size: Triple) -> Blocks:
    """A box of `size` tiles around each tile, shifted inwards at the borders so that every tile sees equally many.

    Sliding tile attention (arXiv 2502.04507). An even size extends one tile further back than ahead.
    """
    counts = tile_counts(grid, tile)
    if min(size) < 1:
        raise ValueError(f"size is {size}; a window has at least one tile along each axis")
    near = [_clamped(n, min(m, n)) for n, m in zip(counts, size, strict=True)]
    return _of_grid(grid, tile, (_box(near[0][t], near[1], near[2]) for t in range(counts[0])))


def radial(grid: Triple, tile: Triple, decay: float = 2.0) -> Blocks:
    """All tiles of the first, the same and the neighboring tile frames; with each doubling of the temporal distance,
    1 / decay as many.

    Radial attention (arXiv 2506.19852). At a distance of 2^r to 2^(r+1) - 1 tile frames, each tile sees the
    ceil(S / decay^r) tiles (of S) that are nearest to its own position. Once S / decay^r is below 1, it sees one tile
    in every ceil(decay^r / S)-th tile frame, so the density keeps falling.
    """
    if not decay >= 1:
        raise ValueError(f"decay is {decay}; it is at least 1, which keeps everything")
    T, height, width = tile_counts(grid, tile)
    rank, places = _ranks(height, width), height * width

    def rows(t: int) -> Tensor:
        kept = torch.zeros(places, T, places, dtype=torch.bool)
        for other in range(T):
            count = _radial_count(abs(t - other), places, decay) if other else places
            kept[:, other] = rank < count
        return kept.flatten(1)

    return _of_grid(grid, tile, map(rows, range(T)))


def top_k(q: Tensor, k: Tensor, tiles: Tensor, largest: int, count: int) -> Blocks:
    """For each query tile, the `count` key tiles with the best scores, always including its own. One list per head of
    each sample.

    q and k [B, N, H, D] in tile order; tiles: int32 [tiles + 1] from `tile_offsets`, on q's device, with at most
    `largest` tokens each. The score is the product of a tile's mean query and a tile's mean key (as in MoBA, arXiv
    2502.13189, and the coarse stage of VSA, arXiv 2505.13389). Scores are made for some query tiles at a time. Does
    not synchronize with the device.
    """
    B, N, H, _ = q.shape
    n = tiles.numel() - 1
    if q.shape != k.shape:
        raise ValueError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; their tiles are the same, so they must be alike"
        )
    if not 1 <= count <= n:
        raise ValueError(f"count is {count}; there are {n} tiles, and each attends to 1 to {n}")
    queries, keys = (_pooled(x, tiles, largest).transpose(1, 2) for x in (q, k))
    slab = max(SLAB // (B * H * n), 1)
    best = [_best(queries, keys, start, min(start + slab, n), count) for start in range(0, n, slab)]
    rows = torch.arange(B * H * n + 1, device=q.device) * count
    return Blocks(tiles, tiles, rows, torch.cat(best, 2).flatten(), (largest, largest))


# Properties


def share(blocks: Blocks) -> float:
    """The share of token pairs that is computed, 0 to 1."""
    queries, keys = (tiles.diff().double() for tiles in (blocks.query_tiles, blocks.key_tiles))
    kept = queries.repeat(blocks.lists).repeat_interleave(blocks.rows.diff()) * keys[blocks.indices.long()]
    return (kept.sum() / (queries.sum() * keys.sum() * blocks.lists)).item()


def tile_mask(blocks: Blocks) -> Tensor:
    """Which tiles attend to which: bool [lists, query tiles, key tiles]."""
    queries, keys = blocks.query_tiles.numel() - 1, blocks.key_tiles.numel() - 1
    mask = torch.zeros(blocks.lists * queries, keys, dtype=torch.bool, device=blocks.rows.device)
    row = torch.arange(len(mask), device=mask.device).repeat_interleave(blocks.rows.diff())
    mask[row, blocks.indices.long()] = True
    return mask.unflatten(0, (-1, queries))


def token_mask(blocks: Blocks) -> Tensor:
    """Which tokens attend to which: bool [lists, N, M]."""
    mask = tile_mask(blocks)
    for dim, tiles in ((1, blocks.query_tiles), (2, blocks.key_tiles)):
        mask = mask.repeat_interleave(tiles.diff().long(), dim)
    return mask


# Selections


def heads_of(blocks: Blocks, heads: int, first: int, last: int) -> Blocks:
    """The lists of heads first to last - 1 out of `heads`, of every sample."""
    if blocks.lists == 1:
        return blocks
    kept = (torch.arange(blocks.lists, device=blocks.rows.device) % heads).unsqueeze(1)
    kept = ((kept >= first) & (kept < last)).expand(-1, blocks.query_tiles.numel() - 1).flatten()
    return _select(blocks, kept, torch.ones(blocks.key_tiles.numel() - 1, dtype=torch.bool, device=kept.device))


def tiles_of(blocks: Blocks, queries: slice, keys: slice) -> Blocks:
    """Restrict blocks to a slice of query tokens and a slice of key tokens; tokens are renumbered from the start of the
    slices. Raises ValueError if a slice does not end at a tile boundary."""
    inside, starts = [], []
    for tiles, tokens in ((blocks.query_tiles, queries), (blocks.key_tiles, keys)):
        for end in (tokens.start, tokens.stop):
            if not bool((tiles == end).any()):
                near = int(tiles[(tiles - end).abs().argmin()])
                raise ValueError(f"token {end} is no end of a tile, where shares have to be cut; the nearest is {near}")
        inside.append((tiles[:-1] >= tokens.start) & (tiles[1:] <= tokens.stop))
        starts.append((tiles[(tiles >= tokens.start) & (tiles <= tokens.stop)] - tokens.start).int())
    selected = _select(blocks, inside[0].repeat(blocks.lists), inside[1])
    return replace(selected, query_tiles=starts[0], key_tiles=starts[1])


def _select(blocks: Blocks, rows: Tensor, keys: Tensor) -> Blocks:
    """Keep only the rows and key tiles that are True. Renumbers the tiles, but does not change their token offsets."""
    lengths = blocks.rows.diff()
    selected = rows.repeat_interleave(lengths) & keys[blocks.indices.long()]
    row = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
    counts = torch.zeros_like(lengths).index_add_(0, row, selected.to(lengths.dtype))[rows]
    number = keys.cumsum(0) - 1
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return replace(blocks, rows=starts, indices=number[blocks.indices.long()][selected].int())


# Helpers of the patterns


def _lengths(size: int, tile: int) -> Tensor:
    """Lengths of the tiles along an axis of `size` tokens; the last may be shorter."""
    starts = torch.arange(0, size, tile)
    return (size - starts).clamp(max=tile)


def _of_grid(grid: Triple, tile: Triple, masks: Iterable[Tensor]) -> Blocks:
    """Build Blocks from a mask [h * w tiles, all tiles] for each tile frame of queries."""
    tiles = tile_offsets(grid, tile)
    counts, indices = [], []
    for mask in masks:
        counts.append(mask.sum(1))
        indices.append(mask.nonzero()[:, 1].int())
    rows = torch.cat((torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)))
    largest = int(tiles.diff().max())
    return Blocks(tiles, tiles, rows, torch.cat(indices), (largest, largest))


def _clamped(n: int, size: int) -> Tensor:
    """bool [n, n]: the window of `size` positions around each of n, clamped to the ends."""
    places = torch.arange(n)
    first = (places - size // 2).clamp(0, n - size)[:, None]
    return (places >= first) & (places < first + size)


def _box(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Combine the masks of the three axes, [T], [h, h] and [w, w]: -> [h * w, T * h * w]."""
    kept = t[None, None, :, None, None] & h[:, None, None, :, None] & w[None, :, None, None, :]
    return kept.flatten(2).flatten(0, 1)


def _ranks(height: int, width: int) -> Tensor:
    """Distance ranks [h * w, h * w]: 0 for a position itself, 1 for its nearest neighbor, etc.; ties in index order."""
    h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    h, w = h.flatten(), w.flatten()
    distance = (h[:, None] - h).square() + (w[:, None] - w).square()
    return distance.sort(dim=1, stable=True).indices.argsort(dim=1)


def _radial_count(distance: int, places: int, decay: float) -> int:
    """How many of the `places` tiles in a tile frame are seen from `distance` tile frames away."""
    share = decay ** -math.floor(math.log2(max(distance, 1)))
    if places * share >= 1:
        return math.ceil(places * share)
    return int(distance % math.ceil(1 / (places * share)) == 0)


def _best(queries: Tensor, keys: Tensor, start: int, stop: int, count: int) -> Tensor:
    """The key tiles of query tiles start to stop - 1: int32 [B, H, stop - start, count], sorted."""
    scores = queries[:, :, start:stop] @ keys.transpose(-1, -2)
    scores.diagonal(start, dim1=-2, dim2=-1).fill_(math.inf)
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values.int()


def _pooled(x: Tensor, tiles: Tensor, largest: int) -> Tensor:
    """Means over the tokens of each tile, in fp32: [B, N, H, D] -> [B, tiles, H, D]."""
    n, N = tiles.numel() - 1, x.shape[1]
    if n * largest == N:  # all tiles have the same size
        return x.unflatten(1, (n, largest)).mean(2, dtype=torch.float32)
    places = tiles[:-1, None] + torch.arange(largest, device=x.device)
    inside = places < tiles[1:, None]
    tokens = x[:, places.clamp(max=N - 1)].masked_fill(~inside[..., None, None], 0)
    return tokens.sum(2, dtype=torch.float32) / tiles.diff()[:, None, None]
