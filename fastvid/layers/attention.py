"""The one place where all tokens meet, and so the one where sequence parallelism enters.

Models hand over the tokens that they hold and get back the same tokens' results. On one rank that is plain attention.
Shared by more (`layers.split`), tokens are exchanged for heads among the ranks of a Ulysses group (arXiv 2309.14509),
and keys and values go around the ring of such groups (arXiv 2310.01889); norms and rotations are done before. The heads
go in groups: while one is attended to, the next one travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvid.distributed.mesh import shares, starts
from fastvid.layers.kv_cache import LayerCache
from fastvid.layers.sequence_parallel import Heads, Ring, Split, parts_of
from fastvid.ops.sparse import Blocks


def self_attention(
    ops: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | None = None,
    split: Split | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attention of every token to every token: q, k, v [B, N, H, D] -> [B, N, H * D].

    cache: to those in it too, and these are put into it. split: N are this rank's tokens of all of a video's; the cache
    holds its share. blocks: to those alone that they say, of all of the video's tokens; where ranks share them, in
    stretches that end where a tile does.
    """
    if split is not None and split.view.layout.sequence > 1:
        return _shared(ops, (q, k, v), cache, split, blocks).flatten(2)
    k, v = (k, v) if cache is None else cache.update(k, v)
    return (ops.attention(q, k, v) if blocks is None else ops.sparse_attention(q, k, v, blocks)).flatten(2)


def cross_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to a context that all ranks hold: q [B, N, H, D], k and v [B, M, H, D]."""
    return ops.attention(q, k, v).flatten(2)


def _shared(
    ops: Any, qkv: tuple[Tensor, Tensor, Tensor], cache: LayerCache | None, split: Split, blocks: Blocks | None
) -> Tensor:
    """[B, n, H, D] of this rank's tokens -> the same."""
    view, heads = split.view, qkv[0].shape[2]
    ulysses = view.layout.ulysses
    each = heads // ulysses
    if heads % ulysses:
        raise ValueError(f"{heads} heads cannot be divided among {ulysses} ranks")
    # A cache's slots hold all of a rank's heads at once.
    groups = shares(each, 1 if cache is not None or ulysses == 1 else min(split.groups, each))
    edges = list(zip(starts(groups)[:-1], starts(groups)[1:], strict=True))
    if ulysses == 1:
        tiles = None if blocks is None else parts_of(split, blocks, heads, 0, heads)
        return _attend(ops, split, *qkv, cache, tiles)
    out = torch.empty_like(qkv[0], memory_format=torch.contiguous_format)
    by_rank = out.unflatten(2, (ulysses, -1))
    coming, back = _send(split, edges[0], qkv), []
    for number, (first, last) in enumerate(edges):
        exchange, pending, received = coming
        if number + 1 < len(edges):
            coming = _send(split, edges[number + 1], qkv)
        pending.wait()
        tiles = None if blocks is None else parts_of(split, blocks, heads, first, last)
        back.append((first, last, *exchange.send_back(_attend(ops, split, *received, cache, tiles))))
    for first, last, pending, received in back:
        pending.wait()
        by_rank[:, :, :, first:last] = received.permute(2, 1, 0, 3, 4)
    return out


def _send(split: Split, heads: tuple[int, int], qkv: tuple[Tensor, ...]) -> tuple[Heads, Any, list[Tensor]]:
    exchange = Heads(split, *heads)
    return exchange, *exchange.send(*qkv)


def _attend(
    ops: Any, split: Split, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, tiles: list[Blocks] | None
) -> Tensor:
    """Attention of this Ulysses group's tokens to those of all groups of the ring, and to what caches hold."""
    if cache is not None:
        sizes = split.of_ring(split.view.ring)
        k, v = cache.update(*(_by_frames(x, split.frames, sizes) for x in (k, v)))
    per_frame = [sum(split.of_ring(ring)) for ring in range(split.view.layout.ring)]
    frames = split.frames if cache is None else cache.frames
    return Ring(split, ops, [frames * size for size in per_frame]).attend(q, k, v, tiles)


def _by_frames(x: Tensor, frames: int, sizes: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, H, D] that lie rank by rank, frame by frame."""
    if len(sizes) == 1:
        return x
    parts = x.split([frames * size for size in sizes], dim=1)
    return torch.cat([part.unflatten(1, (frames, -1)) for part in parts], dim=2).flatten(1, 2)
