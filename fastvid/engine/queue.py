"""The scheduler of a pipeline: which requests may begin, and whose turn it is.

Begin: first come, first served, at most `running` at once. A request that waits to begin holds only its inputs, and
nothing on the device. A stream that its caller has not pulled for PATIENCE seconds does not count as running, so a
caller who pulls several streams in turn, from one thread or from many, never waits for himself.

Turns: running requests work in turns, round robin, `steps` at a time: a denoising step, a text, a chunk decoded in
place. Chunks decoded beside denoising have a line of their own, one at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fastvid.errors import Cancelled

RUNNING = 4  # the default: each request has latents, texts and a decoder's cache on the device
PATIENCE = 0.5  # seconds: far longer than a caller handles frames, far shorter than a request


class Ticket:
    """One request in a pipeline's scheduler. It works only inside `admitted`, and there only in its turns."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._cancelled = scheduler, threading.Event()
        self.idle_since: float | None = None  # when its caller stopped waiting for it

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raises Cancelled if the request was cancelled."""
        if self.cancelled:
            raise Cancelled("the request was cancelled")

    def cancel(self) -> None:
        """Cancel the request, from any thread, also while it waits."""
        self._cancelled.set()
        self._scheduler.notify()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Waits until the request may begin; it counts as running until the block ends. Raises Cancelled."""
        try:
            self._scheduler.admit(self)
            yield
        finally:
            self._scheduler.leave(self)

    @contextmanager
    def pulled(self) -> Iterator[None]:
        """The caller waits for the request until the block ends."""
        self.idle_since = None
        try:
            yield
        finally:
            self.idle_since = time.monotonic()
            self._scheduler.notify_waiting()

    def step(self) -> AbstractContextManager[None]:
        """A turn for a step, or for other work on the device. Raises Cancelled, also while waiting."""
        return self._scheduler.step_turn(self)

    def decoding(self) -> AbstractContextManager[Scheduler]:
        """A turn to decode a chunk beside denoising. Raises Cancelled, also while waiting."""
        return self._scheduler.decode_turn(self)


class Scheduler:
    """Decides for all requests on one pipeline. It holds no state of a request but its tickets.

    decode_stream: the CUDA stream of all chunks that are decoded beside denoising; the first of them makes it.
    """

    def __init__(self, running: int = RUNNING, steps: int = 1) -> None:
        self._max_running, self._max_steps = running, steps
        self._change = threading.Condition()
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._step_line: list[object] = []
        self._decode_line: list[object] = []
        self.decode_stream: Any = None

    @property
    def running(self) -> int:
        """How many requests have begun and not ended."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many wait to begin."""
        return len(self._waiting)

    def admit(self, ticket: Ticket) -> None:
        """Waits until a request may begin. Raises Cancelled."""
        with self._change:
            self._waiting.append(ticket)
            try:
                while not ticket.cancelled and (seconds := self._seconds_to_wait(ticket)) != 0:
                    self._change.wait(seconds)
                ticket.check()
                self._running.append(ticket)
            finally:
                self._waiting.remove(ticket)
                self._change.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """A request has ended, whether it had begun or not."""
        with self._change:
            self._running = [other for other in self._running if other is not ticket]
            self._change.notify_all()

    def step_turn(self, ticket: Ticket) -> AbstractContextManager[None]:
        """See Ticket.step."""
        return self._turn(ticket, self._step_line, self._max_steps)

    @contextmanager
    def decode_turn(self, ticket: Ticket) -> Iterator[Scheduler]:
        """See Ticket.decoding."""
        with self._turn(ticket, self._decode_line, 1):
            yield self

    def notify(self) -> None:
        """All who wait look again whether they may go on, or were cancelled."""
        with self._change:
            self._change.notify_all()

    def notify_waiting(self) -> None:
        """The same, but free where no request waits to begin."""
        if self._waiting:
            self.notify()

    @contextmanager
    def _turn(self, ticket: Ticket, line: list[object], width: int) -> Iterator[None]:
        turn = object()
        try:
            with self._change:
                line.append(turn)
                self._change.wait_for(lambda: ticket.cancelled or turn in line[:width])
            ticket.check()
            yield
        finally:
            with self._change:
                line.remove(turn)
                self._change.notify_all()

    def _seconds_to_wait(self, ticket: Ticket) -> float | None:
        """Seconds until a request may begin, as things are now; None if something has to happen first."""
        if self._waiting[0] is not ticket:
            return None
        now = time.monotonic()
        left = [None if (since := other.idle_since) is None else since + PATIENCE - now for other in self._running]
        counted = [seconds for seconds in left if seconds is None or seconds > 0]
        excess = len(counted) - self._max_running
        if excess < 0:
            return 0
        idle = sorted(seconds for seconds in counted if seconds is not None)
        return idle[excess] if excess < len(idle) else None
