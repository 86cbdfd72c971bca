"""The video compression networks over several ranks: each holds a band of rows and computes that band of every layer.

Before a layer that sees rows above or below its own, neighbours hand each other those rows, and no more, so that the
result is that of one rank. What a layer remembers of earlier frames (its cache) is of its own band, with the rows that
neighbours gave. The middle block looks at whole frames: there queries stay and keys and values are gathered.

Shapes: B batch, C channels, T frames, R rows of a band, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid.distributed.layout import agree
from fastvid.distributed.mesh import Mesh, shares, starts
from fastvid.errors import InvalidRequest
from fastvid.models.common.vae_stream import Cache, Layers, Stream, Window, alone, check_stripes


@dataclass(frozen=True)
class Bands:
    """All ranks of a mesh, from the top of a frame to its bottom. Where there are fewer rows of latents than ranks, the
    last ones hold none, and only receive."""

    mesh: Mesh

    def of(self, rows: int) -> Band:
        """This rank's part of so many rows of latents."""
        return Band(self.mesh, shares(rows, self.mesh.size))


@dataclass(frozen=True)
class Band:
    """This rank's part of a frame: sizes, rows of latents that each rank holds."""

    mesh: Mesh
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of latents, here."""
        return self.sizes[self.mesh.rank]

    def cut(self, x: Tensor, scale: int = 1) -> Tensor:
        """This rank's rows of x [B, C, T, H, W], with `scale` rows for each of the latents'."""
        begin, end = starts(self.sizes)[self.mesh.rank : self.mesh.rank + 2]
        return x[:, :, :, begin * scale : end * scale]

    def join(self, x: Tensor, dim: int, scale: int = 1) -> Tensor:
        """The bands of all ranks, one below the other along a dimension, on all of them."""
        return self.mesh.gather(x, [size * scale for size in self.sizes], dim)

    def agree(self, fine: bool) -> bool:
        """Whether it is fine on all ranks."""
        return bool(agree(self.mesh, int(fine)))

    @property
    def holders(self) -> list[int]:
        return [rank for rank, size in enumerate(self.sizes) if size]

    @property
    def neighbours(self) -> tuple[int | None, int | None]:
        """The ranks that hold the rows above this one's and those below, where there are any."""
        holders = [None, *self.holders, None]
        here = holders.index(self.mesh.rank)
        return holders[here - 1], holders[here + 1]

    def extended(self, x: Tensor, above: int, below: int) -> tuple[Tensor, tuple[int, int]]:
        """x [B, C, T, R, W] with so many rows of its neighbours above and below it, and how many there were."""
        up, down = self.neighbours
        edges = (above if up is not None else 0, below if down is not None else 0)
        if above + below == 0 or (up is None and down is None):
            return x, (0, 0)
        sends = [(up, _packed(x[:, :, :, :below]))] if up is not None else []
        sends += [(down, _packed(x[:, :, :, x.shape[3] - above :]))] if down is not None else []
        parts = [_room(x, edges[0]), x, _room(x, edges[1])]
        receives = [(rank, part) for rank, part in ((up, parts[0]), (down, parts[2])) if rank is not None]
        self.mesh.exchange(sends, receives).wait()
        parts[0], parts[2] = _unpacked(parts[0]), _unpacked(parts[2])
        return torch.cat([part for part in parts if part.shape[3]], dim=3), edges


class BandStream(Stream):
    """A Stream whose rows are a rank's band: what a layer sees beyond them comes from the neighbours."""

    def __init__(self, cache: Cache | None, band: Band, reuse: bool = False) -> None:
        super().__init__(cache, reuse)
        self._band = band

    def begin(self, x: Tensor) -> None:
        """See Stream.begin: the height is that of the whole frame."""
        self.height = x.shape[3] // self._band.rows * sum(self._band.sizes)

    def in_stripes(self, layers: Layers, x: Tensor, count: int) -> Tensor:
        """layers(x, self): a band is not divided further."""
        assert count == 1, count
        self.begin(x)
        return layers(x, self)

    def window(self, x: Tensor, above: int = 0, below: int = 0, grain: int = 1, cached: bool = False) -> Window:
        """All rows of the band and those beyond it that are seen. A band begins and ends where a latent's row does, and
        so at a multiple of every grain that has to be met."""
        past = None
        if cached:
            layer, self._layer = self._layer, self._layer + 1
            self._next.append(None)
            past = None if self.first else self._past[layer]
            if not (self.first or self._reuse):
                self._past[layer] = None  # a past that nobody else holds is freed as soon as it has been used
        x, edges = self._band.extended(x, above, below)
        return Window(x, past, edges)

    def delay(self, x: Tensor, rows: int) -> Tensor:
        """x: nothing runs ahead."""
        return x

    def keep(self, frames: Tensor) -> None:
        """See Stream.keep: with the rows that neighbours gave, so that they need not give them again."""
        layer = self._layer - 1
        if self._reuse:
            past = self._past[layer]
            assert past is not None
            self._next[layer] = past.copy_(frames)
            return
        self._next[layer] = alone(frames)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """See Stream.whole."""
        each, band = x.shape[dim] // self._band.rows, self._band
        return band.mesh.gather(x, [band.sizes[rank] * each for rank in band.holders], dim, band.holders)


def _packed(rows: Tensor) -> Tensor:
    """Rows as they travel, [B, T, R, W, C], whatever the order of this rank's memory: a neighbour's may be another,
    since operations choose it by sizes too."""
    return rows.permute(0, 2, 3, 4, 1).contiguous()


def _room(x: Tensor, rows: int) -> Tensor:
    """For so many of a neighbour's rows as they travel."""
    B, C, T, _, W = x.shape
    return x.new_empty((B, T, rows, W, C))


def _unpacked(rows: Tensor) -> Tensor:
    return rows.permute(0, 4, 1, 2, 3)


def band_of(bands: Bands | None, rows: int, stripes: int) -> Band | None:
    """This rank's part of a frame with so many rows of latents, if ranks share it. Raises InvalidRequest."""
    check_stripes(stripes, rows)
    if bands is None:
        return None
    if stripes != 1:
        raise InvalidRequest(f"stripes is {stripes}; ranks that share a frame's rows take 1")
    return bands.of(rows)


def stream_of(cache: Cache | None, reuse: bool, band: Band | None) -> Stream:
    return Stream(cache, reuse) if band is None else BandStream(cache, band, reuse)
