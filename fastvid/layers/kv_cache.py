"""Keys and values of the latent frames that a causal model has been through, for one request and one text.

A frame has a slot in every layer's buffer. The first `sink` frames of the video keep theirs; the others take turns in
the rest, so the oldest goes when a new one comes and nothing is ever moved. Attention does not ask in which order keys
lie: their positions are in them already (rotary embeddings of absolute positions).

Shapes: B batch, N tokens of the frames at hand, H heads, D head width.
Source: Self-Forcing `wan/modules/causal_model.py` (rolls its buffer), LongLive (sink and window), both Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """capacity: frames that are attended to in all, the current ones among them. sink: the first so many always.
    changed: the slots that were filled since it was last emptied; a saved cache grows by those alone."""

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
        """The next call of the model is for these frames (absolute indices): the last ones again, or those that follow.

        Their keys and values take the place of what was there, in every layer, as the call gets to it.
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
    def place(self) -> dict[str, int | list[int]]:
        """Where it stands, beside its keys and values: what `restored` takes."""
        return {
            "layers": len(self.layers),
            "capacity": self.capacity,
            "sink": self.sink,
            "slots": self.slots,
            "next": self._next,
        }

    @classmethod
    def restored(cls, place: dict[str, int | list[int]]) -> KVCache:
        """An empty one that stands there; every layer's slots are then put back with `LayerCache.put`."""
        made = cls(place["layers"], place["capacity"], place["sink"])
        made.slots, made._next = list(place["slots"]), place["next"]
        made.filled = min(made._next, made.capacity)
        return made

    def remade_from(self, stop: int) -> int:
        """The first frame of those before `stop` that one call can put into it anew: all while they fit, and then the
        latest, but not the sink."""
        return 0 if stop <= self.capacity else stop - (self.capacity - self.sink)

    def _slot(self, frame: int) -> int:
        return frame if frame < self.sink else self.sink + (frame - self.sink) % (self.capacity - self.sink)


class LayerCache:
    """One layer's part of a KVCache."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def frames(self) -> int:
        """Frames whose keys and values `update` returns."""
        return self._cache.filled

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps k, v [B, N, H, D] of the frames that were begun; returns all that they attend to [B, M, H, D]."""
        cache = self._cache
        self.put(cache.slots, k.unflatten(1, (len(cache.slots), -1)), v.unflatten(1, (len(cache.slots), -1)))
        return self._keys[:, : cache.filled].flatten(1, 2), self._values[:, : cache.filled].flatten(1, 2)

    def put(self, slots: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Keys and values [B, slots, N of a frame, H, D] into these slots."""
        if self._keys is None or self._values is None:
            shape = (k.shape[0], self._cache.capacity, *k.shape[2:])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        where = torch.tensor(slots, device=k.device)
        for buffer, new in ((self._keys, k), (self._values, v)):
            buffer.index_copy_(1, where, new)

    def get(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, slots, N of a frame, H, D] of these slots."""
        return self._keys[:, list(slots)], self._values[:, list(slots)]
