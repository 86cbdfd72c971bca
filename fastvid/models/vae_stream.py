"""What a layer of the video compression networks has to know of earlier frames and of the rows above its own.

A chunk of frames goes through the network as a whole, or in stripes of rows from the top to the bottom, which takes
memory for a stripe instead of a frame. Rows are streamed as time is: a convolution makes the rows whose neighbours have
come and holds on to the last ones for the next stripe. So nothing is computed twice, the rows that are done lag behind
those that came by what the layers before see below themselves, and the last stripe, where the frame ends, brings up
the rest. A stripe of a few rows may give a layer nothing to do; then no rows come out.

A decoder over several devices would hand the same layers the same `Window`s, its edges filled by neighbours.

Shapes: B batch, C channels, T frames, R rows, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid.errors import InvalidRequest

Cache = tuple[Tensor, ...]


@dataclass(frozen=True)
class Window:
    """What a layer works on: rows, those above and below that are only there to be seen, and their past.

    x [B, C, T, R, W]; past [B, C, kt - 1, R, W], None where nothing came before or the layer keeps none; edges: how
    many rows at the top and at the bottom of x get no result. Beyond an edge of 0 the frame ends.
    """

    x: Tensor
    past: Tensor | None
    edges: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows that get a result."""
        return self.x.shape[3] - sum(self.edges)


class _Place:
    """What one layer holds between two stripes of a chunk."""

    def __init__(self) -> None:
        self.came = 0  # rows given to the layer
        self.done = 0  # rows worked on
        self.held: Tensor | None = None  # rows that came and that a row yet to be done sees
        self.above: Tensor | None = None  # the past of the row above the next one to be done


class Stream:
    """Walks one chunk through the network: hands every layer its past and its rows and collects its new past.

    The layers run in a fixed order, so the cache is a plain tuple in that order; None means nothing came before. With
    `reuse` the cache's own memory becomes that of the new one. `height` is that of the whole frame where the walk is.
    """

    def __init__(self, cache: Cache | None, reuse: bool = False) -> None:
        self.first = cache is None
        self.height = 0
        self._reuse = reuse and not self.first
        self._past: list[Tensor | None] = list(cache or ())
        self._next: list[Tensor | None] = []
        self._places: list[_Place] = []
        self._layer = self._place = 0
        self._top = self._bottom = True
        self._rows = slice(None), slice(None)

    def stripes(self, x: Tensor, count: int) -> Iterator[Tensor]:
        """The rows of x [B, C, T, R, W] in `count` parts; all layers up to the next part see this one."""
        layer, place, height = self._layer, self._place, x.shape[3]
        parts = x.tensor_split(count, dim=3)
        for i, part in enumerate(parts):
            self._layer, self._place, self.height = layer, place, height
            self._top, self._bottom = i == 0, i == len(parts) - 1
            yield part
        self._top = self._bottom = True

    def window(self, x: Tensor, above: int = 0, below: int = 0, grain: int = 1, cached: bool = False) -> Window | None:
        """The next rows of all that have come, for a layer that sees `above` and `below` rows; None if there are none.

        They end at a multiple of `grain`, or where the frame does. A cached layer has to `keep` its new past at once.
        """
        place = self._next_place()
        place.came += x.shape[3]
        start = place.done
        end = self.height if self._bottom else max(start, (place.came - below) // grain * grain)
        x = _joined(place.held, x)
        first = start - min(start, above)
        after = min(end + below, self.height)
        place.done = end
        place.held = None if self._bottom else x[:, :, :, end - min(end, above) - first :].clone()
        past = self._take(place, slice(first, after), start, end) if cached else None
        if start == end:
            return None
        return Window(x[:, :, :, : after - first], past, (start - first, after - end))

    def delay(self, x: Tensor, rows: int) -> Tensor:
        """The next `rows` rows of all x that have come; the others are held."""
        place = self._next_place()
        x = _joined(place.held, x)
        place.held = None if self._bottom else x[:, :, :, rows:].clone()
        return x[:, :, :, :rows]

    def keep(self, frames: Tensor) -> None:
        """The new past of the layer whose window was given last, with the rows of that window."""
        layer = self._layer - 1
        old = self._past[layer] if self._reuse else None
        if self._top and self._bottom and old is None:
            # A view would keep the whole chunk's activation alive.
            whole = frames.untyped_storage().nbytes() == frames.nbytes
            self._next[layer] = frames if whole or frames.requires_grad else frames.clone()
            return
        if self._next[layer] is None:
            self._next[layer] = _like(frames, self.height) if old is None else old
        window, whole = self._rows
        self._next[layer][:, :, :, whole] = frames[:, :, :, window]

    def cache(self) -> Cache:
        return tuple(self._next)

    def _next_place(self) -> _Place:
        if self._place == len(self._places):
            self._places.append(_Place())
        self._place += 1
        return self._places[self._place - 1]

    def _take(self, place: _Place, rows: slice, start: int, end: int) -> Tensor | None:
        """The past of a layer's rows; its new past will be that of the rows from start to end."""
        layer, self._layer = self._layer, self._layer + 1
        if layer == len(self._next):
            self._next.append(None)
        self._rows = slice(start - rows.start, end - rows.start), slice(start, end)
        if self.first:
            return None
        if self._top and self._bottom:
            past = self._past[layer]
            if not self._reuse:
                self._past[layer] = None  # so that a past that nobody else holds is freed as soon as it has been used
            return past
        past = self._past[layer][:, :, :, start : rows.stop]
        if rows.start < start:
            past = torch.cat((place.above, past), dim=3)
        if end > start:
            # Of its own, since the rows done may be overwritten by their new past.
            place.above = self._past[layer][:, :, :, end - 1 : end].clone()
        return past


def check_stripes(stripes: int, rows: int) -> None:
    """Raises InvalidRequest unless `rows` rows of latents can be worked on in so many stripes."""
    if not isinstance(stripes, int) or not 1 <= stripes <= rows:
        nearest = min(max(stripes, 1), rows) if isinstance(stripes, int) else 1
        raise InvalidRequest(f"stripes is {stripes!r}; it must be 1 to {rows}, the rows of the latents: try {nearest}")


def nothing(x: Tensor, channels: int, scale: int = 1) -> Tensor:
    """No rows of a result: [B, channels, T, 0, scale * W]."""
    return x.new_empty(*x.shape[:1], channels, x.shape[2], 0, scale * x.shape[4])


def _joined(held: Tensor | None, x: Tensor) -> Tensor:
    return x if held is None or not held.shape[3] else torch.cat((held, x), dim=3)


def _like(frames: Tensor, rows: int) -> Tensor:
    """Memory for whole frames, in the order of these rows [B, C, T, R, W]."""
    order = torch.channels_last_3d if frames.stride(1) == 1 else torch.contiguous_format
    shape = (*frames.shape[:3], rows, frames.shape[4])
    return torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=order)
