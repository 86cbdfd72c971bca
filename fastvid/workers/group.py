"""The workers of one start, as the program sees them: where messages go, what shows that one is gone or hangs.

A group fails once, as a whole: then all of its workers are killed, and whoever waits for them gets WorkerFailed.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe

from fastvid.errors import Error, WorkerFailed
from fastvid.workers.channel import Channel, Closed, Message
from fastvid.workers.messages import HEARTBEAT

POLL_INTERVAL = 0.1  # seconds between two looks at the workers
NO_LIMIT = 7 * 86400.0  # seconds
KILL_TIMEOUT = 5.0  # seconds until a killed process is gone; one that a driver holds may never be
OUTPUT_LINES = 30  # the last lines of a worker's output that are kept
CLOSED = "this pipeline was closed; load the model again"
COMMAND = (sys.executable, "-m", "fastvid.workers.worker")

log = logging.getLogger("fastvid.workers")

Answers = queue.SimpleQueue[tuple[int, Message | None]]
"""What the workers of a group answer: (rank, message), and (rank, None) when no more will come from that rank."""


class Worker:
    """One rank, at the other end of a channel. A thread receives its answers, and puts them into `answers`."""

    def __init__(self, rank: int, pid: int, answers: Answers, channel: Channel) -> None:
        self.rank, self.pid, self._answers, self._channel = rank, pid, answers, channel
        self.last_seen = time.monotonic()
        threading.Thread(target=self._receive, name="fastvid-answers", daemon=True).start()

    def _receive(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self.last_seen = time.monotonic()
                if HEARTBEAT not in message.header:
                    self._answers.put((self.rank, message))
        except Closed:
            self._answers.put((self.rank, None))
            self._channel.close()

    def send(self, message: Message) -> None:
        """Raises Closed where nobody reads it."""
        self._channel.send(message)

    def ended(self) -> str | None:
        """How it ended; None while it runs."""
        return "its connection is closed" if self._channel.closed else None

    def kill(self) -> None:
        """End it whatever it does, without waiting."""
        self._channel.shut_down()

    def wait(self) -> None:
        """Wait until a worker that was killed is gone."""


class ChildWorker(Worker):
    """A process that was started here, with a socket as its standard input."""

    def __init__(
        self, rank: int, answers: Answers, environment: Mapping[str, str], descriptors: Sequence[int] = ()
    ) -> None:
        ours, theirs = Pipe()
        assert isinstance(ours, Connection)
        try:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",  # Python imports from here first: nothing may be found
                pass_fds=descriptors,
                start_new_session=True,  # an interrupt of the program does not reach it
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._output: collections.deque[str] = collections.deque(maxlen=OUTPUT_LINES)
        self._output_reader = threading.Thread(target=self._read_output, name="fastvid-output", daemon=True)
        self._output_reader.start()
        super().__init__(rank, self._process.pid, answers, Channel(ours))

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._output.append(line.decode(errors="replace").rstrip())

    def ended(self) -> str | None:
        if (code := self._process.poll()) is None:
            return None
        self._output_reader.join(POLL_INTERVAL)  # what it started may still hold its output open
        lines = [line for line in self._output if line.strip()]
        how = f"it was killed by {_signal_name(-code)}" if code < 0 else f"it ended with status {code}"
        hint = " (the system does that where memory runs out)" if code == -signal.SIGKILL else ""
        return how + hint + (f"; it last said: {lines[-1]:.300}" if lines else "")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # with what it has started, such as compilers
        super().kill()

    def wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_TIMEOUT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class WorkerGroup:
    """All workers of one start.

    failure: why it ended, if a worker failed. silence_limit: seconds without an answer or heartbeat after which a
    worker counts as hung. warm_shapes: of requests that ran to their end, so that their kernels are compiled.
    """

    def __init__(self, workers: Sequence[Worker] = (), answers: Answers | None = None) -> None:
        self.workers, self.answers = list(workers), queue.SimpleQueue() if answers is None else answers
        self.failure: WorkerFailed | None = None
        self.silence_limit, self.warm_shapes = NO_LIMIT, set[tuple[int, ...]]()
        self._pid = os.getpid()
        self._lock, self._ending, self._gone = threading.Lock(), threading.Event(), threading.Event()
        self._exit_expected = False

    def watch(self, silence_limit: float) -> None:
        """Look after the workers in a thread, until the group ends."""
        self.silence_limit = silence_limit
        threading.Thread(target=self._watch, name="fastvid-watch", daemon=True).start()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ending.wait(POLL_INTERVAL):
            now, limit = time.monotonic(), self.silence_limit
            if now - before > limit / 2:  # this program was stopped, not the workers
                for worker in self.workers:
                    worker.last_seen = now
            before = now
            for worker in self.workers:
                if (cause := worker.ended()) is not None:
                    self.fail(worker.rank, cause)
                elif now - worker.last_seen > limit:
                    self.fail(worker.rank, f"it gave no sign for {limit:g} seconds")

    def expect_exit(self) -> None:
        """From now on, a worker that ends has not failed."""
        self._exit_expected = True

    def fail(self, rank: int, cause: str) -> None:
        """End all workers because this one failed. The first failure counts."""
        if self._exit_expected:
            return
        with self._lock:
            first = self.failure is None and not self._ending.is_set()
            if first:
                self.failure = WorkerFailed(rank, self.workers[rank].pid, cause)
        if first:
            log.warning("%s; all %d ranks are ended", self.failure, len(self.workers))
        self.end()

    def end(self) -> None:
        """Kill all workers, wait until they are gone, and wake those who wait for answers."""
        if os.getpid() != self._pid or self._gone.is_set():  # a fork does not own them
            return
        self._ending.set()
        for worker in self.workers:  # all before the first wait
            worker.kill()
        for worker in self.workers:
            worker.wait()
        self._gone.set()
        self.answers.put((0, None))

    def ended(self) -> bool:
        """Whether it has ended or is about to."""
        return self._ending.is_set()

    def error(self) -> Error:
        """What is raised for a command to a group that has ended."""
        return self.failure or Error(CLOSED)

    def failed(self, rank: int, cause: str) -> Error:
        """End all workers because this one failed; the error to raise."""
        self.fail(rank, cause)
        return self.error()

    def unreachable(self, rank: int) -> Error:
        """The error to raise for a rank whose channel is closed. The watch sees how it ended, or another one before."""
        return self.error() if self._gone.wait(20 * POLL_INTERVAL) else self.failed(rank, "it closed its connection")
