"""Block-sparse attention: which tiles of keys every tile of queries attends to, on a video's grid of tokens (t, h, w).

A tile is a box of tokens, smaller at the grid's far ends. `tile_order` sorts a video's tokens tile by tile. Every
pattern is a pure function that returns `Blocks`: sorted lists of tiles, for all heads, or for each head of each sample
(`top_k`). `attention(..., blocks=...)` runs them. No model asks for it yet.

    full     all of them
    window   a box of tiles around each (sliding tile attention)
    radial   fewer and fewer with temporal distance (radial attention)
    causal   chunks of frames: the first ones, the last ones, and the own (what a KV cache of a causal model holds)
    top_k    the best by the scores of pooled queries and keys, from the very tensors that will attend
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Blocks:
    """For every tile of queries the tiles of keys that it attends to.

    query_tiles, key_tiles: int32 [tiles + 1], the token at which each tile starts, and the number of tokens at the end.
    rows: int64 [lists * query tiles + 1]; indices: int32, sorted in a row. Tile q of list l attends to the tiles
        indices[rows[i] : rows[i + 1]] with i = l * query tiles + q.
    There are 1, H (one for each head) or B * H lists. largest: tokens of the largest tile of queries, and of keys.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    rows: Tensor
    indices: Tensor
    largest: tuple[int, int]

    @property
    def lists(self) -> int:
        return (self.rows.numel() - 1) // (self.query_tiles.numel() - 1)

    @property
    def tensors(self) -> list[Tensor]:
        """What a kernel is given of them, beside `largest`."""
        return [self.query_tiles, self.key_tiles, self.rows, self.indices]

    def to(self, device: torch.device | str) -> Blocks:
        names = ("query_tiles", "key_tiles", "rows", "indices")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


# Tiles


def tile_counts(grid: Triple, tile: Triple) -> Triple:
    """Tiles along each axis. Raises ValueError for sizes below 1."""
    if len(grid) != 3 or len(tile) != 3 or min(*grid, *tile) < 1:
        raise ValueError(f"grid is {grid} and tile {tile}; both are three numbers (t, h, w) of at least 1")
    t, h, w = (-(-n // size) for n, size in zip(grid, tile, strict=True))
    return t, h, w


def tile_offsets(grid: Triple, tile: Triple) -> Tensor:
    """int32 [tiles + 1]: where each tile starts among tokens in tile order, w fastest; the last is their number."""
    t, h, w = (_lengths(n, size) for n, size in zip(grid, tile, strict=True))
    sizes = t[:, None, None] * h[None, :, None] * w[None, None, :]
    return torch.cat((sizes.new_zeros(1), sizes.flatten().cumsum(0))).int()


def tile_order(grid: Triple, tile: Triple) -> Tensor:
    """int64 [N]: tokens in tile order, each as its place in (t, h, w) order; x[:, order] sorts tokens, and
    y[:, order.argsort()] puts them back."""
    axes = (torch.arange(n) for n in grid)
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    _, height, width = tile_counts(grid, tile)
    number = (t // tile[0] * height + h // tile[1]) * width + w // tile[2]
    return number.flatten().sort(stable=True).indices


# Patterns


def full(grid: Triple, tile: Triple) -> Blocks:
    """All tiles."""
    return window(grid, tile, tile_counts(grid, tile))


def window(grid: Triple, tile: Triple, size: Triple) -> Blocks:
    """A box of `size` tiles around each, moved inwards at borders so that all tiles see as many of them.

    Sliding tile attention (arXiv 2502.04507). An even size reaches one tile further back than ahead.
    """
    counts = tile_counts(grid, tile)
    if min(size) < 1:
        raise ValueError(f"size is {size}; a window has at least one tile along each axis")
    near = [_clamped(n, min(m, n)) for n, m in zip(counts, size, strict=True)]
    return _of_grid(grid, tile, (_box(near[0][t], near[1], near[2]) for t in range(counts[0])))


def radial(grid: Triple, tile: Triple, decay: float = 2.0) -> Blocks:
    """All tiles of the same and the neighbouring tile frames, and of the first; 1 / decay as many with each doubling of
    the temporal distance.

    Radial attention (arXiv 2506.19852). At a distance of 2^r to 2^(r+1) - 1 tile frames, each tile sees the
    ceil(S / decay^r) of S that are the nearest to its own place; once that is less than a whole tile, it sees a single
    one, in one of so many tile frames that the share goes on falling.
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


def causal(grid: Triple, tile: Triple, chunk: int, window: int, sink: int = 1) -> Blocks:
    """Frames in chunks of `chunk`: each chunk attends to the first `sink` ones and to the last `window`, its own among
    them; never to later ones.

    What a causal model's KV cache with an attention sink holds (Self-Forcing, arXiv 2506.08009; LongLive, arXiv
    2509.22622; sinks: arXiv 2309.17453). chunk is a multiple of the tile's frames.
    """
    T, height, width = tile_counts(grid, tile)
    if chunk < 1 or chunk % tile[0]:
        below = max(chunk // tile[0], 1) * tile[0]
        raise ValueError(f"chunk is {chunk} frames; it must be a multiple of the tile's {tile[0]} (nearest: {below})")
    if window < 1 or sink < 0:
        raise ValueError(f"window is {window} and sink {sink} chunks; at least 1 and 0 are needed")
    chunks = torch.arange(T) * tile[0] // chunk

    def rows(t: int) -> Tensor:
        kept = (chunks <= chunks[t]) & ((chunks < sink) | (chunks > chunks[t] - window))
        return kept.repeat_interleave(height * width).expand(height * width, -1)

    return _of_grid(grid, tile, map(rows, range(T)))


def top_k(q: Tensor, k: Tensor, tiles: Tensor, largest: int, count: int) -> Blocks:
    """The `count` tiles of keys with the best scores for each tile of queries, its own always among them: a list for
    each head of each sample.

    q and k [B, N, H, D] in tile order; tiles, int32 [tiles + 1], as `tile_offsets` gives them on the device of q, with
    at most `largest` tokens each. A score is the product of a tile's mean query and a tile's mean key (as in MoBA,
    arXiv 2502.13189, and the coarse stage of VSA, arXiv 2505.13389). Nothing here waits for the device.
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
    scores = queries @ keys.transpose(-1, -2)
    scores.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    best = scores.topk(count, dim=-1).indices.sort(dim=-1).values
    rows = torch.arange(B * H * n + 1, device=q.device) * count
    return Blocks(tiles, tiles, rows, best.flatten().int(), (largest, largest))


# Properties


def share(blocks: Blocks) -> float:
    """The share of all pairs of tokens that is computed, 0 to 1."""
    queries, keys = (tiles.diff().double() for tiles in (blocks.query_tiles, blocks.key_tiles))
    kept = queries.repeat(blocks.lists).repeat_interleave(blocks.rows.diff()) * keys[blocks.indices.long()]
    return (kept.sum() / (queries.sum() * keys.sum() * blocks.lists)).item()


def tile_mask(blocks: Blocks) -> Tensor:
    """bool [lists, query tiles, key tiles]."""
    queries, keys = blocks.query_tiles.numel() - 1, blocks.key_tiles.numel() - 1
    mask = torch.zeros(blocks.lists * queries, keys, dtype=torch.bool, device=blocks.rows.device)
    row = torch.arange(len(mask), device=mask.device).repeat_interleave(blocks.rows.diff())
    mask[row, blocks.indices.long()] = True
    return mask.unflatten(0, (-1, queries))


def token_mask(blocks: Blocks) -> Tensor:
    """bool [lists, N, M]: which tokens attend to which."""
    mask = tile_mask(blocks)
    for dim, tiles in ((1, blocks.query_tiles), (2, blocks.key_tiles)):
        mask = mask.repeat_interleave(tiles.diff().long(), dim)
    return mask


# Selections


def heads_of(blocks: Blocks, heads: int, first: int, last: int) -> Blocks:
    """The lists of heads first to last, out of `heads`; of each sample, if each has its own."""
    if blocks.lists == 1:
        return blocks
    kept = (torch.arange(blocks.lists, device=blocks.rows.device) % heads).unsqueeze(1)
    kept = ((kept >= first) & (kept < last)).expand(-1, blocks.query_tiles.numel() - 1).flatten()
    return _select(blocks, kept, torch.ones(blocks.key_tiles.numel() - 1, dtype=torch.bool, device=kept.device))


def tiles_of(blocks: Blocks, queries: slice, keys: slice) -> Blocks:
    """The part for some queries and some keys, each a slice of tokens, which are then counted from its start. Raises
    ValueError where an end of a slice lies within a tile."""
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
    """The rows and the tiles of keys that are True. Tiles are renumbered; their offsets stay those of all tokens."""
    lengths = blocks.rows.diff()
    wanted = rows.repeat_interleave(lengths) & keys[blocks.indices.long()]
    row = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
    counts = torch.zeros_like(lengths).index_add_(0, row, wanted.to(lengths.dtype))[rows]
    number = keys.cumsum(0) - 1
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return replace(blocks, rows=starts, indices=number[blocks.indices.long()][wanted].int())


# Helpers of the patterns


def _lengths(size: int, tile: int) -> Tensor:
    """Tokens of each tile along an axis: the tile's, and what is left."""
    starts = torch.arange(0, size, tile)
    return (size - starts).clamp(max=tile)


def _of_grid(grid: Triple, tile: Triple, masks: Iterable[Tensor]) -> Blocks:
    """Blocks from the masks [h * w tiles, all tiles] of every tile frame of queries, one at a time."""
    tiles = tile_offsets(grid, tile)
    counts, indices = [], []
    for mask in masks:
        counts.append(mask.sum(1))
        indices.append(mask.nonzero()[:, 1].int())
    rows = torch.cat((torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)))
    largest = int(tiles.diff().max())
    return Blocks(tiles, tiles, rows, torch.cat(indices), (largest, largest))


def _clamped(n: int, size: int) -> Tensor:
    """bool [n, n]: the `size` neighbours of each of n in a row, itself among them."""
    places = torch.arange(n)
    first = (places - size // 2).clamp(0, n - size)[:, None]
    return (places >= first) & (places < first + size)


def _box(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Masks of the three axes, [T], [h, h] and [w, w], as one: [h * w, T * h * w]."""
    kept = t[None, None, :, None, None] & h[:, None, None, :, None] & w[None, :, None, None, :]
    return kept.flatten(2).flatten(0, 1)


def _ranks(height: int, width: int) -> Tensor:
    """[h * w, h * w]: 0 for a place itself, 1 for its nearest neighbour, and so on; of equally near ones, the first."""
    h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    h, w = h.flatten(), w.flatten()
    distance = (h[:, None] - h).square() + (w[:, None] - w).square()
    return distance.sort(dim=1, stable=True).indices.argsort(dim=1)


def _radial_count(distance: int, places: int, decay: float) -> int:
    """Tiles that are seen of the `places` tiles of a tile frame, `distance` tile frames away."""
    share = decay ** -math.floor(math.log2(max(distance, 1)))
    if places * share >= 1:
        return math.ceil(places * share)
    return int(distance % math.ceil(1 / (places * share)) == 0)


def _pooled(x: Tensor, tiles: Tensor, largest: int) -> Tensor:
    """Means over the tokens of each tile, in fp32: [B, N, H, D] -> [B, tiles, H, D]."""
    n, N = tiles.numel() - 1, x.shape[1]
    if n * largest == N:  # all alike: no token has to be moved
        return x.unflatten(1, (n, largest)).mean(2, dtype=torch.float32)
    places = tiles[:-1, None] + torch.arange(largest, device=x.device)
    inside = places < tiles[1:, None]
    tokens = x[:, places.clamp(max=N - 1)].masked_fill(~inside[..., None, None], 0)
    return tokens.sum(2, dtype=torch.float32) / tiles.diff()[:, None, None]
