"""The one place where all tokens meet, and so the one where sequence parallelism enters.

Models hand over the tokens that they hold and get back the same tokens' results. On one rank that is plain attention.
Shared by more (`layers.split`), tokens are exchanged for heads among the ranks of a Ulysses group (arXiv 2309.14509),
and keys and values go around the ring of such groups (arXiv 2310.01889); norms and rotations are done before. The heads
go in groups: while one is attended to, the next one travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvid.distributed.mesh import shares, starts
from fastvid.layers.kv_cache import LayerCache
from fastvid.layers.sequence_parallel import Heads, SequenceParallel
from fastvid.ops.attention import merge
from fastvid.ops.sparse import Blocks, heads_of, tiles_of


def self_attention(
    ops: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | None = None,
    parallel: SequenceParallel | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attention of every token to every token: q, k, v [B, N, H, D] -> [B, N, H * D].

    cache: to those in it too, and these are put into it. parallel: N are this rank's tokens of all of a video's; the cache
    holds its share. blocks: to those alone that they say, of all of the video's tokens; where ranks share them, in
    stretches that end where a tile does.
    """
    if parallel is not None and parallel.view.layout.sequence > 1:
        return _shared(ops, (q, k, v), cache, parallel, blocks).flatten(2)
    k, v = (k, v) if cache is None else cache.update(k, v)
    return ops.attention(q, k, v, blocks=blocks).flatten(2)


def cross_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to a context that all ranks hold: q [B, N, H, D], k and v [B, M, H, D]."""
    return ops.attention(q, k, v).flatten(2)


def _shared(
    ops: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    cache: LayerCache | None,
    parallel: SequenceParallel,
    blocks: Blocks | None,
) -> Tensor:
    """[B, n, H, D] of this rank's tokens -> the same."""
    view, heads = parallel.view, qkv[0].shape[2]
    ulysses = view.layout.ulysses
    each = heads // ulysses
    if heads % ulysses:
        raise ValueError(f"{heads} heads cannot be divided among {ulysses} ranks")
    # A cache's slots hold all of a rank's heads at once.
    groups = shares(each, 1 if cache is not None or ulysses == 1 else min(parallel.groups, each))
    edges = list(zip(starts(groups)[:-1], starts(groups)[1:], strict=True))
    if ulysses == 1:
        tiles = None if blocks is None else parts_of(parallel, blocks, heads, 0, heads)
        return _attend(ops, parallel, *qkv, cache, tiles)
    out = torch.empty_like(qkv[0], memory_format=torch.contiguous_format)
    by_rank = out.unflatten(2, (ulysses, -1))
    coming, back = _send(parallel, edges[0], qkv), []
    for number, (first, last) in enumerate(edges):
        exchange, pending, received = coming
        if number + 1 < len(edges):
            coming = _send(parallel, edges[number + 1], qkv)
        pending.wait()
        tiles = None if blocks is None else parts_of(parallel, blocks, heads, first, last)
        back.append((first, last, *exchange.send_back(_attend(ops, parallel, *received, cache, tiles))))
    for first, last, pending, received in back:
        pending.wait()
        by_rank[:, :, :, first:last] = received.permute(2, 1, 0, 3, 4)
    return out


def _send(
    parallel: SequenceParallel, heads: tuple[int, int], qkv: tuple[Tensor, ...]
) -> tuple[Heads, Any, list[Tensor]]:
    exchange = Heads(parallel, *heads)
    return exchange, *exchange.send(*qkv)


def _attend(
    ops: Any,
    parallel: SequenceParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | None,
    tiles: list[Blocks] | None,
) -> Tensor:
    """Attention of this Ulysses group's tokens to those of all groups of the ring, and to what caches hold."""
    if cache is not None:
        sizes = parallel.ring_sizes(parallel.view.ring)
        k, v = cache.update(*(_by_frames(x, parallel.frames, sizes) for x in (k, v)))
    per_frame = [sum(parallel.ring_sizes(ring)) for ring in range(parallel.view.layout.ring)]
    frames = parallel.frames if cache is None else cache.frames
    return Ring(parallel, ops, [frames * size for size in per_frame]).attend(q, k, v, tiles)


def _by_frames(x: Tensor, frames: int, sizes: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, H, D] that lie rank by rank, frame by frame."""
    if len(sizes) == 1:
        return x
    parts = x.split([frames * size for size in sizes], dim=1)
    return torch.cat([part.unflatten(1, (frames, -1)) for part in parts], dim=2).flatten(1, 2)


class Ring:
    """Attention of a ring group's queries to all keys, whose blocks go around: each rank sees them in the order in
    which they come, its own first, and merges by their log-sum-exp in fp32.

    counts: keys of each block.
    """

    def __init__(self, parallel: SequenceParallel, ops: Any, counts: Sequence[int]) -> None:
        self.parallel, self.ops, self.counts = parallel, ops, counts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Blocks] | None) -> Tensor:
        """q [B, N, heads, D], k and v [B, M, heads, D] of this rank's block -> [B, N, heads, D]. blocks: for each block
        of keys the tiles of it that are attended to."""
        view, size = self.parallel.view, len(self.counts)
        if size == 1:
            return self.ops.attention(q, k, v, blocks=None if blocks is None else blocks[0])
        after, before = (view.rank(ring=(view.ring + step) % size) for step in (1, -1))
        mine, out, lse = torch.stack((k, v)), None, None
        for step in range(size):
            source, coming, pending = (view.ring - step) % size, None, None
            if step + 1 < size:
                coming = mine.new_empty(2, mine.shape[1], self.counts[(source - 1) % size], *mine.shape[3:])
                pending = view.mesh.exchange([(after, mine)], [(before, coming)])
            if q.shape[1] and mine.shape[2]:
                part = self._part(q, *mine, None if blocks is None else blocks[source])
                out, lse = part if out is None else merge(out, lse, *part)
            if pending is not None:
                pending.wait()
                mine = coming
        return q.new_empty(q.shape) if out is None else out.to(q.dtype)

    def _part(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
        out, lse = self.ops.attention(q, k, v, return_lse=True, blocks=blocks)
        return out.to(lse.dtype), lse


def parts_of(parallel: SequenceParallel, blocks: Blocks, heads: int, first: int, last: int) -> list[Blocks]:
    """What this rank's queries attend to in each ring group's keys, with those of its heads that an exchange is of.

    Raises ValueError unless every ring group's tokens end where a tile does.
    """
    view = parallel.view
    edges = starts([parallel.frames * sum(parallel.ring_sizes(ring)) for ring in range(view.layout.ring)])
    each = heads // view.layout.ulysses
    mine = heads_of(blocks, heads, view.ulysses * each + first, view.ulysses * each + last)
    queries = slice(*edges[view.ring : view.ring + 2])
    return [tiles_of(mine, queries, slice(*edges[ring : ring + 2])) for ring in range(view.layout.ring)]
