"""How ranks share the tokens of one model call: split once at the entry, gathered once at the exit.

Every rank holds the same stretch of every latent frame, so what belongs to a frame (its timestep, its slot in a KV
cache) is the same on all ranks. The stretch enters the model as a video one patch high, so models are single-device
code: only `layers.attention` exchanges anything, and rotary angles are split with the tokens.

Shapes: B batch, C channels, T, H, W of latents; (pt, ph, pw) the patch; (t, h, w) the grid of tokens, N of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastvid.distributed.layout import GROUPS
from fastvid.distributed.mesh import RankView, shares, starts
from fastvid.layers.tiles import Choose, Tiling


@dataclass(frozen=True)
class SequenceParallel:
    """Which tokens each rank holds.

    sizes: tokens of a frame on each of the ranks that share them, in the order of the tokens. frames: frames along
    time, so this rank has frames * sizes[view.sequence] tokens. groups: groups of heads whose exchanges and attention
    overlap. tiling: the order of a frame's tokens, and the tiles that attention looks at; None: as they lie, at all.
    """

    view: RankView
    sizes: tuple[int, ...]
    frames: int = 1
    groups: int = GROUPS
    tiling: Tiling | None = None

    @classmethod
    def of_grid(cls, view: RankView, grid: tuple[int, int, int], tiling: Tiling | None = None) -> SequenceParallel:
        """Shares a grid (t, h, w) of tokens as evenly as possible, or as its tiles allow."""
        (t, h, w), ranks = grid, view.layout.sequence
        return cls(view, tiling.shares(ranks) if tiling else shares(h * w, ranks), t, tiling=tiling)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens on each of the ranks that share them."""
        return tuple(self.frames * size for size in self.sizes)

    @property
    def span(self) -> slice:
        """This rank's stretch of a frame's tokens."""
        begin, end = starts(self.sizes)[self.view.sequence : self.view.sequence + 2]
        return slice(begin, end)

    def ring_sizes(self, ring: int) -> tuple[int, ...]:
        """Tokens of a frame on each rank of a Ulysses group."""
        ulysses = self.view.layout.ulysses
        return self.sizes[ring * ulysses : (ring + 1) * ulysses]

    def blocks(self, layer: int) -> Choose | None:
        """What chooses the tiles that a layer's queries attend to; None: all."""
        return None if self.tiling is None else self.tiling.blocks(layer, self.frames, self.sizes)

    # ------------------------------------------------------------ entry and exit

    def shard(self, x: Tensor, patch: Sequence[int]) -> Tensor:
        """This rank's part of latents: [B, C, T, H, W] -> [B, C, T, ph, n * pw], n tokens a frame."""
        _, ph, pw = patch
        x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # [B, C, T, h, ph, w, pw]
        return self._own(x.transpose(3, 4).flatten(4, 5), 4).flatten(4)

    def shard_rows(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor with N, one entry a token, along a dimension."""
        return self._own(x.unflatten(dim, (self.frames, -1)), dim + 1).flatten(dim, dim + 1)

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's stretch of a frame's tokens, which lie along a dimension."""
        if self.tiling is not None:
            return x.index_select(dim, self.tiling.order[self.span])
        return x.narrow(dim, self.span.start, self.sizes[self.view.sequence])

    def shard_groups(self, index: Tensor, tokens: int) -> Tensor:
        """This rank's part of [B, G], one entry a group of tokens; all of it where groups are whole frames."""
        return self.shard_rows(index, 1) if index.shape[1] == tokens != self.frames else index

    def gather(self, x: Tensor, patch: Sequence[int], height: int) -> Tensor:
        """All ranks' parts x [B, C, T, ph, n * pw] -> latents [B, C, T, H, W]."""
        pw = patch[2]
        sizes = [size * pw for size in self.sizes]
        x = self.view.mesh.gather(x, sizes, 4, self.view.sharers)
        if self.tiling is not None:
            x = x.unflatten(4, (-1, pw)).index_select(4, self.tiling.back).flatten(4)
        return x.unflatten(4, (height // patch[1], -1)).transpose(3, 4).flatten(3, 4)


class HeadExchange:
    """Exchanges tokens for heads, and back, within a Ulysses group: this rank's tokens with all heads become all of the
    group's tokens with this rank's heads.

    first, last: which of each rank's heads take part.
    """

    def __init__(self, parallel: SequenceParallel, first: int, last: int) -> None:
        self.parallel, self.first, self.last = parallel, first, last
        view = parallel.view
        self.ranks = [view.rank(ulysses=u) for u in range(view.layout.ulysses)]
        self.counts = [parallel.frames * size for size in parallel.ring_sizes(view.ring)]

    def send(self, *tensors: Tensor) -> tuple[Any, list[Tensor]]:
        """q, k, v [B, n, H, D] of this rank's tokens -> (pending messages, three [B, N, heads, D] that they will fill,
        in the order of the ranks).

        A message is one head of one tensor. Kernels write heads one after the other, so nothing is packed or unpacked.
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
        """[B, N, heads, D] of the group's tokens -> (pending messages, [ranks, n, B, heads, D] that they will fill)."""
        x = x.transpose(0, 1).contiguous()
        n = self.counts[self.parallel.view.ulysses]
        into = x.new_empty(len(self.ranks), n, *x.shape[1:])
        sends, receives = (list(zip(self.ranks, part, strict=True)) for part in (x.split(self.counts), into.unbind(0)))
        return self.parallel.view.mesh.exchange(sends, receives), into
