"""The KV cache of a causal model, for one request and one text: keys and values of the latent frames seen so far.

A frame has a slot in every layer's buffer. The first `sink` frames of the video keep their slots; the others share the
rest in turn, so a new frame replaces the oldest and nothing is moved. The order of keys does not matter to attention:
their positions are in them already (rotary embeddings of absolute positions).

Shapes: B batch, N tokens of the current frames, H heads, D head_dim.
Source: Self-Forcing `wan/modules/causal_model.py` (rolls its buffer), LongLive (sink and window), both Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

from torch import Tensor


class CacheState(TypedDict):
    """A cache's state without keys and values."""

    layers: int
    capacity: int
    sink: int
    slots: list[int]
    next: int


class KVCache:
    """capacity: frames that are attended to, including the current ones. sink: how many first frames are always kept.
    changed: the slots that were filled since the set was last cleared, which is all that a saved cache has to add."""

    def __init__(self, layers: int, capacity: int, sink: int = 0) -> None:
        if not 0 <= sink < capacity:
            raise ValueError(f"sink={sink} has to be below capacity={capacity}")
        self.layers = tuple(LayerCache(self) for _ in range(layers))
        self.capacity, self.sink = capacity, sink
        self.slots: list[int] = []
        self.changed: set[int] = set()
        self.filled = 0
        self._next = 0

    def begin(self, start: int, frames: int) -> None:
        """Prepares the next model call, for these frames (absolute indices): the last ones again, or those that follow.

        Each layer overwrites their slots when the call reaches it.
        """
        stop = start + frames
        if start < self.remade_from(stop):
            raise ValueError(f"{frames} frames at once do not fit into {self.capacity} with {self.sink} kept")
        if start != self._next and (stop != self._next or start < 0):
            raise ValueError(f"frames from {start} on do not follow those up to {self._next}")
        self.slots = [self._slot(frame) for frame in range(start, stop)]
        self._next = stop
        self.filled = min(self._next, self.capacity)
        self.changed.update(self.slots)

    @property
    def place(self) -> CacheState:
        """Its state without keys and values, as `restored` takes it."""
        return {
            "layers": len(self.layers),
            "capacity": self.capacity,
            "sink": self.sink,
            "slots": self.slots,
            "next": self._next,
        }

    @classmethod
    def restored(cls, place: CacheState) -> KVCache:
        """A cache in that state, still empty; `LayerCache.put` then fills every layer's slots."""
        made = cls(place["layers"], place["capacity"], place["sink"])
        made.slots, made._next = list(place["slots"]), place["next"]
        made.filled = min(made._next, made.capacity)
        return made

    def remade_from(self, stop: int) -> int:
        """The first of the frames before `stop` that one call can recompute: all while they fit, then only the latest,
        without the sink."""
        return 0 if stop <= self.capacity else stop - (self.capacity - self.sink)

    def _slot(self, frame: int) -> int:
        return frame if frame < self.sink else self.sink + (frame - self.sink) % (self.capacity - self.sink)


class LayerCache:
    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def frames(self) -> int:
        """How many frames' keys and values `update` returns."""
        return self._cache.filled

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [B, N, H, D] of the current frames; returns all that they attend to, [B, M, H, D] each."""
        cache = self._cache
        self.put(cache.slots, k.unflatten(1, (len(cache.slots), -1)), v.unflatten(1, (len(cache.slots), -1)))
        assert self._keys is not None and self._values is not None
        return self._keys[:, : cache.filled].flatten(1, 2), self._values[:, : cache.filled].flatten(1, 2)

    def put(self, slots: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Stores keys and values [B, slots, N of a frame, H, D] in these slots."""
        if self._keys is None or self._values is None:
            shape = (k.shape[0], self._cache.capacity, *k.shape[2:])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        for slot, at, count in runs(slots):
            self._keys[:, slot : slot + count] = k[:, at : at + count]
            self._values[:, slot : slot + count] = v[:, at : at + count]

    def get(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, slots, N of a frame, H, D] of these slots."""
        assert self._keys is not None and self._values is not None, "nothing has been put into it"
        return self._keys[:, list(slots)], self._values[:, list(slots)]


def runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """(slot, place in the list, count) of slots that follow each other: they are copied without an index, which would
    have to go to the device."""
    starts = [at for at, slot in enumerate(slots) if at == 0 or slot != slots[at - 1] + 1]
    return [(slots[at], at, stop - at) for at, stop in pairwise([*starts, len(slots)])]
