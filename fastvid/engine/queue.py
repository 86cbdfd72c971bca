"""Requests on one pipeline, and whose turn it is.

Beginning: first come, first served, at most `running` at once. A request that has not begun holds what was given with
it and nothing on the device. A stream that its caller leaves alone for PATIENCE seconds does not count while that
lasts: somebody who pulls several streams by turns, from one thread or many, never waits for what only he can move.

Steps: those that have begun take turns, `steps` at a time. Who has made a step stands at the end of the line again, so
with one step at a time it is round robin. Text, pictures and decoding in the same place take turns in that line too;
decoding beside denoising has a line of its own, one chunk at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fastvid.errors import Cancelled

RUNNING = 4  # requests at once if nothing else is said: each has latents, texts and a decoder's cache on the device
PATIENCE = 0.5  # seconds: far more than a caller takes over frames, far less than a request


class Line:
    """Who may work now: the first `width` of those in line. No state of a request is in it.

    tool: what one after the other works with, and is made by the first to need it, such as a CUDA stream.
    """

    def __init__(self, width: int = 1) -> None:
        self._width, self._line, self._change = width, [], threading.Condition()
        self.tool: Any = None

    @contextmanager
    def turn(self, place: Place) -> Iterator[Line]:
        """A turn, once those who came before have had theirs. Raises Cancelled if the request is, before or while it
        waits."""
        mine = object()
        try:
            with self._change:
                self._line.append(mine)
                self._change.wait_for(lambda: place.stopped or mine in self._line[: self._width])
            place.check()
            yield self
        finally:
            with self._change:
                self._line.remove(mine)
                self._change.notify_all()

    def wake(self) -> None:
        """Those who wait look again whether they were stopped."""
        with self._change:
            self._change.notify_all()


class Place:
    """One request among the others on its pipeline. It works only inside `begun`, and there in turns."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self._stopped = queue, threading.Event()
        self.left_alone: float | None = None  # since when its caller does something else

    @property
    def stopped(self) -> bool:
        """Whether the request was cancelled."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raises Cancelled if it was."""
        if self.stopped:
            raise Cancelled("the request was cancelled")

    def stop(self) -> None:
        """Cancel it, from any thread, also while it waits."""
        self._stopped.set()
        self._queue.wake()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Waits until the request may begin; until the block ends it is one of those that have. Raises Cancelled."""
        try:
            self._queue.admit(self)
            yield
        finally:
            self._queue.leave(self)

    @contextmanager
    def pulled(self) -> Iterator[None]:
        """Its caller waits for it until the block ends."""
        self.left_alone = None
        try:
            yield
        finally:
            self.left_alone = time.monotonic()
            self._queue.look_again()

    def step(self) -> AbstractContextManager[Line]:
        """A turn to make a step, or to do what else the device does for it. Raises Cancelled."""
        return self._queue.steps.turn(self)

    def decoding(self) -> AbstractContextManager[Line]:
        """A turn to decode a chunk beside denoising. Raises Cancelled."""
        return self._queue.decoding.turn(self)


class Queue:
    """The order of the requests on one pipeline: see the head of this file."""

    def __init__(self, running: int = RUNNING, steps: int = 1) -> None:
        self.steps, self.decoding, self._most = Line(steps), Line(), running
        self._change = threading.Condition()
        self._waiting: list[Place] = []
        self._begun: list[Place] = []

    def admit(self, place: Place) -> None:
        """Waits until a request may begin. Raises Cancelled."""
        with self._change:
            self._waiting.append(place)
            try:
                while not place.stopped and (seconds := self._until_free(place)) != 0:
                    self._change.wait(seconds)
                place.check()
                self._begun.append(place)
            finally:
                self._waiting.remove(place)
                self._change.notify_all()

    def leave(self, place: Place) -> None:
        """A request has ended, if it had begun."""
        with self._change:
            self._begun = [other for other in self._begun if other is not place]
            self._change.notify_all()

    def look_again(self) -> None:
        """Those who wait to begin count again."""
        if self._waiting:
            with self._change:
                self._change.notify_all()

    def wake(self) -> None:
        """Those who wait, to begin or for a turn, look whether they were cancelled."""
        self.look_again()
        self.steps.wake()
        self.decoding.wake()

    def _until_free(self, place: Place) -> float | None:
        """Seconds until a request may begin, as things are; None if something has to happen first."""
        if self._waiting[0] is not place:
            return None
        now = time.monotonic()
        until = [None if (since := p.left_alone) is None else since + PATIENCE - now for p in self._begun]
        counted = [seconds for seconds in until if seconds is None or seconds > 0]
        if len(counted) < self._most:
            return 0
        pauses = sorted(seconds for seconds in counted if seconds is not None)
        excess = len(counted) - self._most
        return pauses[excess] if excess < len(pauses) else None
