"""What ranks send each other where they share the rows of frames in the VAE (`models.vae_bands`), and how long they
take together: the rank with the most rows computes, and waits for every exchange, since a layer begins with it.

What goes over a cut between two bands grows with the frames and with the width, what the middle block gathers with the
frames and their latents; so both are read off a network without values, for one latent frame and for the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastvid.distributed.cost_model import Link
from fastvid.distributed.mesh import shares
from fastvid.models.common.vae_stream import Cache, Stream, Window
from fastvid.models.wan.vae import WanVAE
from fastvid.planning.estimate import SIDE


@dataclass(frozen=True)
class Halos:
    """Of a stream's first latent frame and of each later one: rows, values that go over a cut between two bands for a
    column of latents, both ways; one_way, the most that one side sends of these; keys, values that the middle block
    gathers for a pixel of latents. layers: how many exchange rows."""

    rows: tuple[int, int]
    one_way: tuple[int, int]
    keys: tuple[int, int]
    layers: int


@dataclass(frozen=True)
class Shared:
    """A stream of so many latent frames of height x width latents, in so many chunks, whose rows `ranks` share. made:
    bytes of what all of them have in the end; itemsize: of a number inside."""

    halos: Halos
    frames: int
    height: int
    width: int
    chunks: int
    ranks: int
    itemsize: int
    made: int

    @property
    def holders(self) -> int:
        """Ranks that hold rows."""
        return min(self.ranks, self.height)

    @property
    def share(self) -> float:
        """Of the rows, those of the rank that has the most."""
        return shares(self.height, self.ranks)[0] / self.height

    def _of(self, each: tuple[int, int]) -> int:
        return (each[0] + (self.frames - 1) * each[1]) * self.width * self.itemsize

    @property
    def moved(self) -> int:
        """Bytes that all ranks send."""
        rows, keys = self._of(self.halos.rows), self._of(self.halos.keys) * self.height
        return (rows + keys) * (self.holders - 1) + self.made * (self.ranks - 1)

    @property
    def sent(self) -> float:
        """Bytes that the rank with the most rows sends, one with neighbours on both sides if there is any."""
        rows = self._of(self.halos.rows if self.holders > 2 else self.halos.one_way) * (self.holders > 1)
        keys = self._of(self.halos.keys) * self.height * self.share * (self.holders - 1)
        return rows + keys + self.made * self.share * (self.ranks - 1)

    def seconds(self, alone: float, link: Link) -> float:
        """alone: what one rank would take. link: the slowest between them."""
        if self.ranks == 1:
            return alone
        exchanges = (self.halos.layers + 1) * (self.holders > 1) + 1  # the middle block's, and the result's
        return alone * self.share + self.chunks * exchanges * link.latency + self.sent / link.bandwidth


class Noting(Stream):
    """A walk through whole frames that adds up what their bands would exchange."""

    def __init__(self, cache: Cache | None = None) -> None:
        super().__init__(cache)
        self.rows = self.one_way = self.keys = self.layers = 0

    def window(self, x: torch.Tensor, above: int = 0, below: int = 0, **given: Any) -> Window | None:
        """See Stream.window."""
        row = x[:, :, :, :1].numel()
        self.rows += (above + below) * row
        self.one_way += max(above, below) * row
        self.layers += above + below > 0
        return super().window(x, above, below, **given)

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See Stream.whole."""
        self.keys += x.numel()
        return x


@torch.no_grad()
def count_halos(vae: WanVAE, decode: bool = True) -> Halos:
    """What bands exchange in decoding, or encoding. vae: with weights or without."""
    config, walks = vae.config, []
    with torch.device("meta"):
        empty = type(vae)(config)
        for latents in (1, 2):
            walk = Noting()
            if decode:
                empty.decoder(torch.empty(1, config.z_dim, latents, SIDE, SIDE), walk)
            else:
                side, frames = SIDE * config.spatial_scale, config.temporal_scale * (latents - 1) + 1
                empty.encoder(torch.empty(1, 3, frames, side, side), walk)
            walks.append(walk)

    def each(name: str, area: int) -> tuple[int, int]:
        first, both = (getattr(walk, name) // area for walk in walks)
        return first, both - first

    return Halos(each("rows", SIDE), each("one_way", SIDE), each("keys", SIDE**2), walks[0].layers)
