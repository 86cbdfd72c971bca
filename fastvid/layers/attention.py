"""Attention of a model's tokens, on one rank or shared by many. Only this file calls `ops.attention`.

A model passes the tokens that this rank holds and gets their results. On several ranks (`SequenceParallel`), the ranks
of a Ulysses group exchange tokens for heads (arXiv 2309.14509), and keys and values travel around a ring of such groups
(arXiv 2310.01889). Norms and rotary embeddings have been applied before. Heads are exchanged in groups, so that one
group travels while another is computed.

Shapes: B batch, N tokens of all ranks, n tokens of this rank, M keys, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.distributed.mesh import shares, starts
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.layers.kv_cache import LayerCache
from fastvid.layers.sequence_parallel import HeadExchange, SequenceParallel
from fastvid.layers.tiles import Choose
from fastvid.ops.attention import merge
from fastvid.ops.sparse import Blocks, heads_of, tiles_of


def self_attention(
    ops: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | CausalBlocks | None = None,
    parallel: SequenceParallel | None = None,
    blocks: Blocks | Choose | None = None,
) -> Tensor:
    """Attention of every token to every token: q, k, v [B, n, H, D] -> [B, n, H * D].

    cache: earlier frames' keys and values, which are attended to as well; k and v are added to it. Each rank's cache
    holds its own share. Or the blocks of frames that do not see later ones.
    blocks: which tiles of all N tokens attend to which, or what chooses them from queries and keys. With `parallel`,
    every ring group's tokens must end where a tile ends; what chooses them has to see all of them, so there is no ring.
    """
    if parallel is not None and parallel.view.layout.sequence > 1:
        return _Parallel(ops, parallel, cache, blocks, q.shape[2]).attend((q, k, v)).flatten(2)
    if isinstance(cache, CausalBlocks):
        return cache.attend(ops, q, k, v).flatten(2)
    k, v = (k, v) if cache is None else cache.update(k, v)
    return ops.attention(q, k, v, blocks=_chosen(blocks, q, k)).flatten(2)


def _chosen(blocks: Blocks | Choose | None, q: Tensor, k: Tensor) -> Blocks | None:
    return blocks if blocks is None or isinstance(blocks, Blocks) else blocks(q, k)


def cross_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to a context that all ranks hold: q [B, n, H, D], k and v [B, M, H, D] -> [B, n, H * D]."""
    return ops.attention(q, k, v).flatten(2)


@dataclass(frozen=True)
class _Parallel:
    """Attention of tokens that many ranks share. heads: of the model, on all ranks."""

    ops: Any
    parallel: SequenceParallel
    cache: LayerCache | CausalBlocks | None
    blocks: Blocks | Choose | None
    heads: int

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """[B, n, H, D] of this rank's tokens -> the same, attended to all N."""
        heads, ulysses = self.heads, self.parallel.view.layout.ulysses
        if heads % ulysses:
            raise ValueError(f"{heads} heads cannot be divided among {ulysses} ranks")
        if ulysses == 1:
            return self._attend_ring(*qkv, 0, heads)
        each = heads // ulysses
        # A cache's slots hold all of a rank's heads at once.
        groups = shares(each, 1 if self.cache is not None else min(self.parallel.groups, each))
        spans = zip(starts(groups), groups, strict=False)
        exchanges = [HeadExchange(self.parallel, first, first + size) for first, size in spans]
        out = torch.empty_like(qkv[0], memory_format=torch.contiguous_format)
        by_rank = out.unflatten(2, (ulysses, -1))
        sent, returned = exchanges[0].send(*qkv), []
        for number, exchange in enumerate(exchanges):
            pending, (q, k, v) = sent
            if number + 1 < len(exchanges):
                sent = exchanges[number + 1].send(*qkv)
            pending.wait()
            returned.append(exchange.send_back(self._attend_ring(q, k, v, exchange.first, exchange.last)))
        for exchange, (pending, own) in zip(exchanges, returned, strict=True):
            pending.wait()
            by_rank[:, :, :, exchange.first : exchange.last] = own.permute(2, 1, 0, 3, 4)
        return out

    def _attend_ring(self, q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> Tensor:
        """Attention of this Ulysses group's tokens to those of all groups of the ring, and to what their caches hold,
        for heads first to last of this rank's."""
        parallel, frames = self.parallel, self.parallel.frames
        if self.blocks is not None and not isinstance(self.blocks, Blocks):
            assert parallel.view.layout.ring == 1, "see `planning.layout`"
            return self.ops.attention(q, k, v, blocks=self.blocks(q, k))
        kept = self._ring_blocks(first, last)
        if isinstance(self.cache, CausalBlocks):
            assert parallel.view.layout.ring == 1, "see `planning.layout`"
            sizes = parallel.ring_sizes(0)
            made = self.cache.attend(self.ops, *(_by_frames(x, frames, sizes) for x in (q, k, v)))
            return _by_ranks(made, frames, sizes)
        if self.cache is not None:
            sizes = parallel.ring_sizes(parallel.view.ring)
            k, v = self.cache.update(*(_by_frames(x, frames, sizes) for x in (k, v)))
            frames = self.cache.frames
        if parallel.view.layout.ring == 1:
            return self.ops.attention(q, k, v, blocks=kept[0])
        return self._pass_around(q, k, v, self._ring_counts(frames), kept)

    def _pass_around(
        self, q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int], kept: Sequence[Blocks | None]
    ) -> Tensor:
        """Attention of q to the keys of all ring groups, which travel around the ring. Each rank starts with its own
        keys, and merges results by their log-sum-exp in fp32 in the order in which keys arrive.

        counts: keys of each group; kept: the tiles of each group's keys that q attends to.
        """
        view, size = self.parallel.view, len(counts)
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
                part, part_lse = self.ops.attention(q, *held, return_lse=True, blocks=kept[source])
                part = part.to(part_lse.dtype)
                out, lse = (part, part_lse) if out is None or lse is None else merge(out, lse, part, part_lse)
            if pending is not None:
                pending.wait()
                held = coming
        return q.new_empty(q.shape) if out is None else out.to(q.dtype)

    def _ring_counts(self, frames: int) -> list[int]:
        """Tokens of each ring group in so many frames."""
        parallel = self.parallel
        return [frames * sum(parallel.ring_sizes(group)) for group in range(parallel.view.layout.ring)]

    def _ring_blocks(self, first: int, last: int) -> Sequence[Blocks | None]:
        """Which tiles of each ring group's keys this group's queries attend to, for heads first to last of this rank's.

        Raises ValueError unless every ring group's tokens end where a tile ends.
        """
        view, blocks = self.parallel.view, self.blocks
        if not isinstance(blocks, Blocks):
            return [None] * view.layout.ring
        edges = starts(self._ring_counts(self.parallel.frames))
        offset = view.ulysses * (self.heads // view.layout.ulysses)
        spans = [slice(*edges[group : group + 2]) for group in range(view.layout.ring)]

        def select() -> Sequence[Blocks]:
            own = heads_of(blocks, self.heads, offset + first, offset + last)
            return [tiles_of(own, spans[view.ring], span) for span in spans]

        return blocks.once(("ring", view.ring, *edges, self.heads, offset + first, offset + last), select)


def _by_frames(x: Tensor, frames: int, sizes: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, H, D] that lie rank by rank, frame by frame."""
    if len(sizes) == 1:
        return x
    parts = x.split([frames * size for size in sizes], dim=1)
    return torch.cat([part.unflatten(1, (frames, -1)) for part in parts], dim=2).flatten(1, 2)


def _by_ranks(x: Tensor, frames: int, sizes: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, H, D] that lie frame by frame, as `_by_frames` takes them."""
    return torch.cat([part.flatten(1, 2) for part in x.unflatten(1, (frames, -1)).split(sizes, dim=2)], dim=1)
