"""Writing into a file beside what makes the frames: in a thread, in order, with little waiting."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np

WAITING = 2  # writes that are under way or wait; then `write` waits too, so that memory stays bounded


class Beside:
    """Hands frames to a sink in a thread; the file is the same. An error of the sink is raised by a later `write`, or
    by `finish`. Leaving the block waits for the write under way and drops what has not begun: put it inside of the
    sink's own block. `seconds`: how long the sink was at work.

    with FrameSink(...) as sink:
        with Beside(sink) as beside:
            beside.write(frames)    # again and again
            beside.finish()
        sink.close(recipe)
    """

    def __init__(self, sink: Any) -> None:
        self._sink, self.seconds = sink, 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastvid-write")
        self._coming: deque[Future[None]] = deque()

    def write(self, frames: np.ndarray) -> None:
        """uint8 RGB frames [T, H, W, 3]; they are not to be changed any more."""
        while len(self._coming) >= WAITING:
            self._coming.popleft().result()
        self._coming.append(self._thread.submit(self._write, frames))

    def finish(self) -> None:
        """All of them are written when this returns."""
        while self._coming:
            self._coming.popleft().result()

    def _write(self, frames: np.ndarray) -> None:
        mark = time.perf_counter()
        self._sink.write(frames)
        self.seconds += time.perf_counter() - mark

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
