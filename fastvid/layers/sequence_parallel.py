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

from torch import Tensor

from fastvid.distributed.layout import GROUPS
from fastvid.distributed.mesh import RankView, shares, starts


@dataclass(frozen=True)
class SequenceParallel:
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
    def of_grid(cls, view: RankView, grid: tuple[int, int, int]) -> SequenceParallel:
        """A grid (t, h, w) of tokens, as evenly as it goes."""
        t, h, w = grid
        return cls(view, shares(h * w, view.layout.sequence), t)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each rank that shares them."""
        return tuple(self.frames * size for size in self.sizes)

    @property
    def span(self) -> slice:
        """This rank's tokens of a frame."""
        begin, end = starts(self.sizes)[self.view.sequence : self.view.sequence + 2]
        return slice(begin, end)

    def ring_sizes(self, ring: int) -> tuple[int, ...]:
        """Tokens of a frame that each rank of a Ulysses group holds."""
        ulysses = self.view.layout.ulysses
        return self.sizes[ring * ulysses : (ring + 1) * ulysses]

    # ------------------------------------------------------------ entry and exit

    def shard(self, x: Tensor, patch: Sequence[int]) -> Tensor:
        """This rank's part of latents: [B, C, T, H, W] -> [B, C, T, ph, n * pw], n tokens of a frame."""
        _, ph, pw = patch
        x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # [B, C, T, h, ph, w, pw]
        return x.transpose(3, 4).flatten(4, 5)[:, :, :, :, self.span].flatten(4)

    def shard_rows(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of what every token has one of: N along a dimension."""
        return x.unflatten(dim, (self.frames, -1)).narrow(dim + 1, self.span.start, self._mine).flatten(dim, dim + 1)

    def shard_groups(self, index: Tensor, tokens: int) -> Tensor:
        """Of [B, G], one for each group of tokens: all of it where groups are whole frames, else this rank's part."""
        return self.shard_rows(index, 1) if index.shape[1] == tokens != self.frames else index

    def gather(self, x: Tensor, patch: Sequence[int], height: int) -> Tensor:
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

    def __init__(self, parallel: SequenceParallel, first: int, last: int) -> None:
        self.parallel, self.first, self.last = parallel, first, last
        view = parallel.view
        self.ranks = [view.rank(ulysses=u) for u in range(view.layout.ulysses)]
        self.counts = [parallel.frames * size for size in parallel.ring_sizes(view.ring)]

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
        return self.parallel.view.mesh.exchange(sends, receives), [x.transpose(1, 2) for x in into.unbind(0)]

    def send_back(self, x: Tensor) -> tuple[Any, Tensor]:
        """[B, N, heads, D] of the group's tokens -> messages on their way, and where this rank's tokens will be:
        [ranks, n, B, heads, D]."""
        x = x.transpose(0, 1).contiguous()
        n = self.counts[self.parallel.view.ulysses]
        into = x.new_empty(len(self.ranks), n, *x.shape[1:])
        sends, receives = (list(zip(self.ranks, part, strict=True)) for part in (x.split(self.counts), into.unbind(0)))
        return self.parallel.view.mesh.exchange(sends, receives), into
