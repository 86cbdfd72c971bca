"""Attention of a model's tokens, on one rank or shared by many. Only this file calls `ops.attention`.

A model passes the tokens that this rank holds and gets their results. On several ranks (`SequenceParallel`), the ranks
of a Ulysses group exchange tokens for heads (arXiv 2309.14509), and keys and values travel around a ring of such groups
(arXiv 2310.01889). Norms and rotary embeddings have been applied before. Heads are exchanged in groups, so that one
group travels while another is computed.

Shapes: B batch, N tokens of all ranks, n tokens of this rank, M keys, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvid.distributed.mesh import shares, starts
from fastvid.layers.kv_cache import LayerCache
from fastvid.layers.sequence_parallel import HeadExchange, SequenceParallel
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
    """Attention of every token to every token: q, k, v [B, n, H, D] -> [B, n, H * D].

    cache: earlier frames' keys and values, which are attended to as well; k and v are added to it. Each rank's cache
    holds its own share.
    blocks: which tiles of all N tokens attend to which. With `parallel`, every ring group's tokens must end where a
    tile ends.
    """
    if parallel is not None and parallel.view.layout.sequence > 1:
        return _parallel_attention(ops, (q, k, v), cache, parallel, blocks).flatten(2)
    k, v = (k, v) if cache is None else cache.update(k, v)
    return ops.attention(q, k, v, blocks=blocks).flatten(2)


def cross_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to a context that all ranks hold: q [B, n, H, D], k and v [B, M, H, D] -> [B, n, H * D]."""
    return ops.attention(q, k, v).flatten(2)


# ---------------------------------------------------------------- Ulysses


def _parallel_attention(
    ops: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    cache: LayerCache | None,
    parallel: SequenceParallel,
    blocks: Blocks | None,
) -> Tensor:
    """[B, n, H, D] of this rank's tokens -> the same, attended to all N."""
    heads, ulysses = qkv[0].shape[2], parallel.view.layout.ulysses
    if heads % ulysses:
        raise ValueError(f"{heads} heads cannot be divided among {ulysses} ranks")
    if ulysses == 1:
        return _attend(ops, parallel, *qkv, cache, _ring_blocks(parallel, blocks, heads, 0, heads))
    each = heads // ulysses
    # A cache's slots hold all of a rank's heads at once.
    groups = shares(each, 1 if cache is not None else min(parallel.groups, each))
    exchanges = [
        HeadExchange(parallel, first, first + size) for first, size in zip(starts(groups), groups, strict=False)
    ]
    out = torch.empty_like(qkv[0], memory_format=torch.contiguous_format)
    by_rank = out.unflatten(2, (ulysses, -1))
    sent, returned = exchanges[0].send(*qkv), []
    for number, exchange in enumerate(exchanges):
        pending, (q, k, v) = sent
        if number + 1 < len(exchanges):
            sent = exchanges[number + 1].send(*qkv)
        pending.wait()
        kept = _ring_blocks(parallel, blocks, heads, exchange.first, exchange.last)
        returned.append(exchange.send_back(_attend(ops, parallel, q, k, v, cache, kept)))
    for exchange, (pending, own) in zip(exchanges, returned, strict=True):
        pending.wait()
        by_rank[:, :, :, exchange.first : exchange.last] = own.permute(2, 1, 0, 3, 4)
    return out


def _attend(
    ops: Any,
    parallel: SequenceParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | None,
    blocks: Sequence[Blocks] | None,
) -> Tensor:
    """Attention of this Ulysses group's tokens to those of all groups of the ring, and to what their caches hold."""
    ring, frames = parallel.view.layout.ring, parallel.frames
    if cache is not None:
        sizes = parallel.ring_sizes(parallel.view.ring)
        k, v = cache.update(*(_by_frames(x, frames, sizes) for x in (k, v)))
        frames = cache.frames
    if ring == 1:
        return ops.attention(q, k, v, blocks=None if blocks is None else blocks[0])
    counts = [frames * sum(parallel.ring_sizes(group)) for group in range(ring)]
    return _ring_attention(ops, parallel, q, k, v, counts, blocks)


def _by_frames(x: Tensor, frames: int, sizes: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, H, D] that lie rank by rank, frame by frame."""
    if len(sizes) == 1:
        return x
    parts = x.split([frames * size for size in sizes], dim=1)
    return torch.cat([part.unflatten(1, (frames, -1)) for part in parts], dim=2).flatten(1, 2)


# ---------------------------------------------------------------- ring


def _ring_attention(
    ops: Any,
    parallel: SequenceParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Sequence[int],
    blocks: Sequence[Blocks] | None,
) -> Tensor:
    """Attention of q to the keys of all ring groups, which travel around the ring. Each rank starts with its own keys,
    and merges results by their log-sum-exp in fp32 in the order in which keys arrive.

    counts: keys of each group; blocks: the tiles of each group's keys that q attends to.
    """
    view, size = parallel.view, len(counts)
    after, before = (view.rank(ring=(view.ring + step) % size) for step in (1, -1))
    held = torch.stack((k, v))
    out: Tensor | None = None
    lse: Tensor | None = None
    for step in range(size):
        source, pending = (view.ring - step) % size, None
        if step + 1 < size:
            coming = held.new_empty(2, held.shape[1], counts[(source - 1) % size], *held.shape[3:])
            pending = view.mesh.exchange([(after, held)], [(before, coming)])
        if q.shape[1] and held.shape[2]:
            kept = None if blocks is None else blocks[source]
            part, part_lse = ops.attention(q, *held, return_lse=True, blocks=kept)
            part = part.to(part_lse.dtype)
            out, lse = (part, part_lse) if out is None or lse is None else merge(out, lse, part, part_lse)
        if pending is not None:
            pending.wait()
            held = coming
    return q.new_empty(q.shape) if out is None else out.to(q.dtype)


def _ring_blocks(
    parallel: SequenceParallel, blocks: Blocks | None, heads: int, first: int, last: int
) -> list[Blocks] | None:
    """Which tiles of each ring group's keys this group's queries attend to, for heads first to last of this rank's.

    Raises ValueError unless every ring group's tokens end where a tile ends.
    """
    if blocks is None:
        return None
    view = parallel.view
    edges = starts([parallel.frames * sum(parallel.ring_sizes(group)) for group in range(view.layout.ring)])
    offset = view.ulysses * (heads // view.layout.ulysses)
    own = heads_of(blocks, heads, offset + first, offset + last)
    queries = slice(*edges[view.ring : view.ring + 2])
    return [tiles_of(own, queries, slice(*edges[group : group + 2])) for group in range(view.layout.ring)]
