"""Keeps the latest prompts' embeddings, so that a prompt that comes again, such as the negative one, needs no encoder.

An entry depends on the token ids and on the text encoder, whose weights, dtype and device stay as they were loaded (no
LoRA changes it). So every encoder has a cache of its own, and nothing in it goes stale.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

LIMIT = 64 << 20  # bytes: 80 prompts of 200 tokens with UMT5-XXL in 16 bits
ENTRIES = 1024

Ids = tuple[int, ...]


class TextCache:
    """Embeddings by token ids, in host memory; the least recently used leave first. Thread-safe. limit: bytes; 0: keeps
    nothing."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._lock, self._kept = threading.Lock(), OrderedDict[Ids, Tensor]()
        self._bytes = self._hits = self._misses = 0

    def get(self, ids: Ids, make: Callable[[], Tensor]) -> Tensor:
        """The embeddings [1, len(ids), d] of a prompt, not to be changed. `make` computes them, on its device, if they
        are not here; else they are on the host."""
        with self._lock:
            if (found := self._kept.get(ids)) is not None:
                self._kept.move_to_end(ids)
                self._hits += 1
                return found
            self._misses += 1
        made = make()  # meanwhile others may ask
        if made.nbytes <= self.limit:
            self._put(ids, made.detach().to("cpu", copy=True))
        return made

    def _put(self, ids: Ids, rows: Tensor) -> None:
        with self._lock:
            if ids not in self._kept:
                self._kept[ids], self._bytes = rows, self._bytes + rows.nbytes
            while self._bytes > self.limit or len(self._kept) > ENTRIES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def to_dict(self) -> dict[str, int]:
        """Its size and use, for `Pipeline.describe`."""
        with self._lock:
            counts = {"hits": self._hits, "misses": self._misses}
            return {"entries": len(self._kept), "bytes": self._bytes, "limit": self.limit, **counts}


def padded(rows: Tensor, length: int) -> Tensor:
    """A new tensor [1, length, d] of rows [1, n, d], 0 after them."""
    out = torch.zeros(1, length, rows.shape[2], dtype=rows.dtype, device=rows.device)
    out[:, : rows.shape[1]] = rows
    return out
