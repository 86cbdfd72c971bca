"""Frames that are made before it is their turn to come out, in temporary files: memory does not grow with them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np


class Spool:
    """Arrays of frames by the number of the part that they belong to. Nothing is left after `close`."""

    def __init__(self) -> None:
        self._files: dict[int, Any] = {}
        self._shapes: dict[int, list[tuple[int, ...]]] = {}

    def put(self, number: int, frames: np.ndarray) -> None:
        """Keeps uint8 frames [n, H, W, 3] behind those that are there of this part."""
        if number not in self._files:
            self._files[number] = tempfile.TemporaryFile(prefix="fastvid-")  # noqa: SIM115 - closed by `close`
        self._files[number].write(np.ascontiguousarray(frames).tobytes())
        self._shapes.setdefault(number, []).append(frames.shape)

    def __contains__(self, number: int) -> bool:
        return number in self._files

    def take(self, number: int) -> Iterator[np.ndarray]:
        """The frames of a part as they were put, once."""
        file = self._files.pop(number)
        file.seek(0)
        try:
            for shape in self._shapes.pop(number):
                yield np.frombuffer(file.read(int(np.prod(shape))), dtype=np.uint8).reshape(shape)
        finally:
            file.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
