"""A prompt that is changed while its request runs: from the next window, block or segment on.

The caller says it in any thread; the request takes it where a new stretch of frames begins, once.
"""

from __future__ import annotations

import threading


class Switch:
    """What a running request is to show from its next stretch of frames on."""

    def __init__(self) -> None:
        self._lock, self._wanted = threading.Lock(), None
        self.taken: list[tuple[int, str]] = []  # (first frame, prompt), in the order in which they were taken

    def want(self, prompt: str) -> None:
        """The prompt from the next stretch on; one that was not taken yet is forgotten."""
        with self._lock:
            self._wanted = prompt

    def take(self, frame: int) -> str | None:
        """The prompt that is wanted from this frame on, once; None if nothing was said."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
            if wanted is not None:
                self.taken.append((frame, wanted))
            return wanted
