"""What a layer of the video compression networks has to know of earlier frames and of the rows above its own.

A chunk of frames goes through the network as a whole, or in stripes of rows from the top to the bottom, which takes
memory for a stripe instead of a frame. Rows are streamed as time is: a layer makes the rows that the layers after it
need for the stripe's result, and holds on to those of its input that the next stripe sees too. So nothing is computed
twice, and early layers run ahead by what later ones see below them; a stripe may leave nothing for them to do.

Over several ranks (vae_bands.py) the same layers get the same `Window`s, their edges filled by neighbours.

Shapes: B batch, C channels, T frames, R rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastvid.errors import InvalidRequest

Cache = tuple[Tensor, ...]
Layers = Callable[[Tensor, "Stream"], Tensor]


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
        self.held: Tensor | None = None  # rows that came and that a row yet to be done sees
        self.above: Tensor | None = None  # the past of the row above the next one to be done
        self.done = 0  # rows worked on
        self.goal: int | None = None  # rows to be done by the end of the stripe, None for all
        self.sees: tuple[int, int, int] | None = None  # rows of the frame, rows seen below, grain; None for a delay


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
        self._rows = slice(None), slice(None)
        self._planning = False

    def begin(self, x: Tensor) -> None:
        """The walk is at x [B, C, T, R, W]."""
        self.height = x.shape[3]

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All of what x is this rank's part of, along a dimension in which rows lie one after the other."""
        return x

    def in_stripes(self, layers: Layers, x: Tensor, count: int) -> Tensor:
        """layers(x, self) for x [B, C, T, R, W], its result made in `count` parts of as many rows."""
        self.begin(x)
        if count == 1:
            return layers(x, self)
        start = self._layer, self._place, self.height
        # A walk without rows, in which the layers say what they see.
        self._planning = True
        layers(x[:, :, :, :0], self)
        self._planning = False
        places, height = self._places[start[1] :], self.height
        parts, came = [], 0
        for i in range(count):
            need = _set_goals(places, height * (i + 1) // count, height)
            self._layer, self._place, self.height = start
            parts.append(layers(x[:, :, :, came:need], self))
            came = need
        return torch.cat(parts, dim=3)

    def window(self, x: Tensor, above: int = 0, below: int = 0, grain: int = 1, cached: bool = False) -> Window | None:
        """The next rows of all that have come, for a layer that sees `above` and `below` rows; None if there are none.

        They end at a multiple of `grain`, or where the frame does. A cached layer has to `keep` its new past at once.
        """
        place = self._next_place()
        if self._planning:
            place.sees = self.height, below, grain
        start, end = place.done, self._goal(place)
        first, after = start - min(start, above), min(end + below, self.height)
        past = self._take(place, slice(first, after), start, end) if cached else None
        x = _joined(place.held, x)
        place.done = end
        place.held = None if end == self.height else x[:, :, :, end - min(end, above) - first :].clone()
        if start == end:
            return None
        return Window(x[:, :, :, : after - first], past, (start - first, after - end))

    def delay(self, x: Tensor, rows: int) -> Tensor:
        """The next `rows` rows of all x that have come; the others are held."""
        place = self._next_place()
        x = _joined(place.held, x)
        place.held = x[:, :, :, rows:].clone() if rows < x.shape[3] else None
        return x[:, :, :, :rows]

    def keep(self, frames: Tensor) -> None:
        """The new past of the layer whose window was given last, with the rows of that window."""
        layer = self._layer - 1
        old = self._past[layer] if self._reuse else None
        window, whole = self._rows
        if old is None and whole == slice(0, self.height):
            self._next[layer] = alone(frames)
            return
        kept = self._next[layer]
        if kept is None:
            kept = self._next[layer] = like(frames, frames.shape[2], self.height) if old is None else old
        kept[:, :, :, whole] = frames[:, :, :, window]

    def cache(self) -> Cache:
        return cast(Cache, tuple(self._next))  # at the end of a chunk every layer has kept its past

    def _goal(self, place: _Place) -> int:
        if self._planning:
            return 0
        return self.height if place.goal is None else place.goal

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
        if self.first or start == end:
            return None
        past = self._past[layer]
        if end - start == self.height:
            if not self._reuse:
                self._past[layer] = None  # so that a past that nobody else holds is freed as soon as it has been used
            return past
        assert past is not None
        rows_past = past[:, :, :, start : rows.stop]
        if rows.start < start:
            assert place.above is not None
            rows_past = torch.cat((place.above, rows_past), dim=3)
        # Of its own, since the rows done may be overwritten by their new past.
        place.above = past[:, :, :, end - 1 : end].clone()
        return rows_past


def _set_goals(places: list[_Place], rows: int, height: int) -> int:
    """Sets how far every layer has to come for `rows` of `height` rows of the result; how far the input has to."""
    for place in reversed(places):
        if place.sees is not None:
            whole, below, grain = place.sees
            rows = -(-rows * whole // height)
            place.goal, height = min(-(-rows // grain) * grain, whole), whole
            rows = min(place.goal + below, whole)
    return rows


def check_stripes(stripes: int, rows: int) -> None:
    """Raises InvalidRequest unless `rows` rows of latents can be worked on in so many stripes."""
    if not isinstance(stripes, int) or not 1 <= stripes <= rows:
        nearest = min(max(stripes, 1), rows) if isinstance(stripes, int) else 1
        raise InvalidRequest(f"stripes is {stripes!r}; it must be 1 to {rows}, the rows of the latents: try {nearest}")


def nothing(x: Tensor, channels: int, scale: int = 1) -> Tensor:
    """No rows of a result: [B, channels, T, 0, scale * W]."""
    return x.new_empty(*x.shape[:1], channels, x.shape[2], 0, scale * x.shape[4])


def alone(frames: Tensor) -> Tensor:
    """In memory of their own, since a view would keep the whole chunk's activation alive; as they are in training."""
    whole = frames.untyped_storage().nbytes() == frames.nbytes
    return frames if whole or frames.requires_grad else frames.clone()


def _joined(held: Tensor | None, x: Tensor) -> Tensor:
    return x if held is None or not held.shape[3] else torch.cat((held, x), dim=3)


def like(x: Tensor, frames: int, rows: int) -> Tensor:
    """Memory for `frames` whole frames of `rows` rows, in the order of x [B, C, T, R, W]."""
    order = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    shape = (*x.shape[:2], frames, rows, x.shape[4])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
