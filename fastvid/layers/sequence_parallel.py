"""How the tokens of one call of a model are shared among ranks: cut once at the entry, put together once at the exit.

Every rank holds the same stretch of every latent frame, so what belongs to a frame (its timestep, its slot in a KV
cache) belongs to it on all ranks. The stretch enters the model as a video of its own, one patch high, so that the
model's code knows nothing of it: only attention looks beyond (`layers.attention`), and positions have been turned into
angles before.

Shapes: B batch, C channels, T, H, W of latents; (pt, ph, pw) the patch; (t, h, w) the grid of tokens, N of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.distributed.layout import GROUPS
from fastvid.distributed.mesh import RankView, shares, starts
from fastvid.ops.eager_attention import merge
from fastvid.ops.sparse import Blocks, heads_of, tiles_of


@dataclass(frozen=True)
class Split:
    """The shares of the ranks at `view`.

    sizes: how many tokens of a frame each of the ranks that share them holds, in the order of the tokens; frames: how
    many frames there are along time. So this rank has frames * sizes[view.sequence] tokens. groups: of heads, whose
    exchanges and attention run beside each other.
    """

    view: RankView
    sizes: tuple[int, ...]
    frames: int = 1
    groups: int = GROUPS

    @classmethod
    def of_grid(cls, view: RankView, grid: tuple[int, int, int]) -> Split:
        """A grid (t, h, w) of tokens, as evenly as it goes."""
        t, h, w = grid
        return cls(view, shares(h * w, view.layout.sequence), t)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each rank that shares them."""
        return tuple(self.frames * size for size in self.sizes)

    @property
    def stretch(self) -> slice:
        """This rank's tokens of a frame."""
        begin, end = starts(self.sizes)[self.view.sequence : self.view.sequence + 2]
        return slice(begin, end)

    def of_ring(self, ring: int) -> tuple[int, ...]:
        """Tokens of a frame that each rank of a Ulysses group holds."""
        ulysses = self.view.layout.ulysses
        return self.sizes[ring * ulysses : (ring + 1) * ulysses]

    # ------------------------------------------------------------ entry and exit

    def cut(self, x: Tensor, patch: Sequence[int]) -> Tensor:
        """This rank's part of latents: [B, C, T, H, W] -> [B, C, T, ph, n * pw], n tokens of a frame."""
        _, ph, pw = patch
        x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # [B, C, T, h, ph, w, pw]
        return x.transpose(3, 4).flatten(4, 5)[:, :, :, :, self.stretch].flatten(4)

    def cut_rows(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of what every token has one of: N along a dimension."""
        return x.unflatten(dim, (self.frames, -1)).narrow(dim + 1, self.stretch.start, self._mine).flatten(dim, dim + 1)

    def cut_groups(self, index: Tensor, tokens: int) -> Tensor:
        """Of [B, G], one for each group of tokens: all of it where groups are whole frames, else this rank's part."""
        return self.cut_rows(index, 1) if index.shape[1] == tokens != self.frames else index

    def join(self, x: Tensor, patch: Sequence[int], height: int) -> Tensor:
        """The latents [B, C, T, H, W] that the parts of all ranks make, which are x [B, C, T, ph, n * pw] here."""
        pw = patch[2]
        sizes = [size * pw for size in self.sizes]
        x = self.view.mesh.gather(x, sizes, 4, self.view.sharers)
        return x.unflatten(4, (height // patch[1], -1)).transpose(3, 4).flatten(3, 4)

    @property
    def _mine(self) -> int:
        return self.sizes[self.view.sequence]


class Heads:
    """Tokens for heads and back, within a Ulysses group: this rank's tokens of all heads become all of the group's
    tokens of this rank's heads.

    first, last: which of each rank's heads, for exchanges of some of them at a time.
    """

    def __init__(self, split: Split, first: int, last: int) -> None:
        self.split, self.first, self.last = split, first, last
        view = split.view
        self.ranks = [view.rank(ulysses=u) for u in range(view.layout.ulysses)]
        self.counts = [split.frames * size for size in split.of_ring(view.ring)]

    def send(self, *tensors: Tensor) -> tuple[Any, list[Tensor]]:
        """q, k, v [B, n, H, D] of this rank's tokens -> messages on their way, and where the group's tokens will be:
        [B, N, heads, D] of each, in the order of the ranks.

        A message is a head of one of them, which goes from its place to its place: kernels lay heads out one after the
        other, so nothing is packed or unpacked.
        """
        B, _, H, D = tensors[0].shape
        each, ends = H // len(self.ranks), starts(self.counts)
        heads = range(self.first, self.last)
        laid = [x if x.stride()[2:] == (D, 1) else x.contiguous() for x in (x.transpose(1, 2) for x in tensors)]
        into = tensors[0].new_empty(len(tensors), B, len(heads), sum(self.counts), D)
        places = [(i, b, h) for i in range(len(tensors)) for b in range(B) for h in heads]
        sends = [(rank, laid[i][b, u * each + h]) for u, rank in enumerate(self.ranks) for i, b, h in places]
        receives = [
            (rank, into[i, b, h - self.first, ends[u] : ends[u + 1]])
            for u, rank in enumerate(self.ranks)
            for i, b, h in places
        ]
        return self.split.view.mesh.exchange(sends, receives), [x.transpose(1, 2) for x in into.unbind(0)]

    def send_back(self, x: Tensor) -> tuple[Any, Tensor]:
        """[B, N, heads, D] of the group's tokens -> messages on their way, and where this rank's tokens will be:
        [ranks, n, B, heads, D]."""
        x = x.transpose(0, 1).contiguous()
        n = self.counts[self.split.view.ulysses]
        into = x.new_empty(len(self.ranks), n, *x.shape[1:])
        sends, receives = (list(zip(self.ranks, part, strict=True)) for part in (x.split(self.counts), into.unbind(0)))
        return self.split.view.mesh.exchange(sends, receives), into


class Ring:
    """Attention of a ring group's queries to all keys, whose blocks go around: each rank sees them in the order in
    which they come, its own first, and merges by their log-sum-exp in fp32.

    counts: keys of each block.
    """

    def __init__(self, split: Split, ops: Any, counts: Sequence[int]) -> None:
        self.split, self.ops, self.counts = split, ops, counts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Blocks] | None) -> Tensor:
        """q [B, N, heads, D], k and v [B, M, heads, D] of this rank's block -> [B, N, heads, D]. blocks: for each block
        of keys the tiles of it that are attended to."""
        view, size = self.split.view, len(self.counts)
        if size == 1:
            return self.ops.attention(q, k, v) if blocks is None else self.ops.sparse_attention(q, k, v, blocks[0])
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
        if blocks is None:
            out, lse = self.ops.attention_lse(q, k, v)
        else:
            out, lse = self.ops.sparse_attention_lse(q, k, v, blocks)
        return out.to(lse.dtype), lse


def parts_of(split: Split, blocks: Blocks, heads: int, first: int, last: int) -> list[Blocks]:
    """What this rank's queries attend to in each ring group's keys, with those of its heads that an exchange is of.

    Raises ValueError unless every ring group's tokens end where a tile does.
    """
    view = split.view
    edges = starts([split.frames * sum(split.of_ring(ring)) for ring in range(view.layout.ring)])
    each = heads // view.layout.ulysses
    mine = heads_of(blocks, heads, view.ulysses * each + first, view.ulysses * each + last)
    queries = slice(*edges[view.ring : view.ring + 2])
    return [tiles_of(mine, queries, slice(*edges[ring : ring + 2])) for ring in range(view.layout.ring)]
