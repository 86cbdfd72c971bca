"""The scheduler of a pipeline: admits requests, and shares the device between the running ones.

Admission: first come, first served, at most `running` requests at once. A waiting request holds only its inputs, and
nothing on the device. A stream that its caller has not pulled for PATIENCE seconds does not count as running, so a
caller that pulls several streams in turn, from one thread or several, cannot deadlock.

Turns: round robin among running requests, `steps` turns at a time. A turn is a denoising step, encoding a prompt, or
decoding a chunk in place. Chunks decoded beside denoising have a second queue, one turn at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fastvid.errors import Cancelled

RUNNING = 4  # default; each running request holds latents, prompt embeddings and a VAE cache on the device
PATIENCE = 0.5  # seconds; far longer than a caller takes to handle frames, far shorter than a request


class Ticket:
    """One request's handle to the scheduler. The request uses the device only inside `admitted`, and there only in its
    turns."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._cancelled = scheduler, threading.Event()
        self.idle_since: float | None = None  # since when no caller waits for its events

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raises Cancelled if the request was cancelled."""
        if self.cancelled:
            raise Cancelled("the request was cancelled")

    def cancel(self) -> None:
        """Cancels the request, running or waiting. Thread-safe."""
        self._cancelled.set()
        self._scheduler.notify()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Waits for admission; the request counts as running until the block ends. Raises Cancelled."""
        try:
            self._scheduler.admit(self)
            yield
        finally:
            self._scheduler.leave(self)

    @contextmanager
    def pulled(self) -> Iterator[None]:
        """Marks that the caller waits for the request's next event, until the block ends."""
        self.idle_since = None
        try:
            yield
        finally:
            self.idle_since = time.monotonic()
            self._scheduler.notify_waiting()

    def step(self) -> AbstractContextManager[None]:
        """Waits for a turn to do a step, or other work on the device. Raises Cancelled."""
        return self._scheduler.step_turn(self)

    def decoding(self) -> AbstractContextManager[Scheduler]:
        """Waits for a turn to decode a chunk beside denoising. Raises Cancelled."""
        return self._scheduler.decode_turn(self)


class Scheduler:
    """Schedules all requests of one pipeline; knows them only by their tickets.

    decode_stream: the CUDA stream of all chunks decoded beside denoising; created with the first.
    """

    def __init__(self, running: int = RUNNING, steps: int = 1) -> None:
        self._max_running, self._max_steps = running, steps
        self._change = threading.Condition()
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._step_queue: list[object] = []
        self._decode_queue: list[object] = []
        self.decode_stream: Any = None

    @property
    def running(self) -> int:
        """The number of admitted requests that have not ended."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for admission."""
        return len(self._waiting)

    def admit(self, ticket: Ticket) -> None:
        """Waits until the request may begin. Raises Cancelled."""
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
        """Removes a request that has ended, admitted or not."""
        with self._change:
            self._running = [other for other in self._running if other is not ticket]
            self._change.notify_all()

    def step_turn(self, ticket: Ticket) -> AbstractContextManager[None]:
        """See Ticket.step."""
        return self._turn(ticket, self._step_queue, self._max_steps)

    @contextmanager
    def decode_turn(self, ticket: Ticket) -> Iterator[Scheduler]:
        """See Ticket.decoding."""
        with self._turn(ticket, self._decode_queue, 1):
            yield self

    def notify(self) -> None:
        """Wakes all waiting requests to check whether they may proceed or were cancelled."""
        with self._change:
            self._change.notify_all()

    def notify_waiting(self) -> None:
        """`notify`, if any request waits for admission."""
        if self._waiting:
            self.notify()

    @contextmanager
    def _turn(self, ticket: Ticket, queue: list[object], width: int) -> Iterator[None]:
        """Waits until this turn is among the first `width` of the queue."""
        turn = object()
        try:
            with self._change:
                queue.append(turn)
                self._change.wait_for(lambda: ticket.cancelled or turn in queue[:width])
            ticket.check()
            yield
        finally:
            with self._change:
                queue.remove(turn)
                self._change.notify_all()

    def _seconds_to_wait(self, ticket: Ticket) -> float | None:
        """Seconds until a request may begin if nothing else changes; None if something has to change first."""
        if self._waiting[0] is not ticket:
            return None
        now = time.monotonic()
        # Seconds until each running request counts as idle; None for one that its caller waits for.
        patience = [None if (since := other.idle_since) is None else since + PATIENCE - now for other in self._running]
        counted = [seconds for seconds in patience if seconds is None or seconds > 0]
        excess = len(counted) - self._max_running
        if excess < 0:
            return 0
        idle = sorted(seconds for seconds in counted if seconds is not None)
        return idle[excess] if excess < len(idle) else None
