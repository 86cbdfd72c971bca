"""The workers of a pipeline, seen from the program that has them: started, told what to do, watched, stopped.

They are child processes with pipes (`fastvid.worker`); nothing of the program's own environment or start method is
touched. One that dies is seen at once, by its end of the pipe and by its exit; one that is silent for `HUNG` seconds,
or does not answer a command by its deadline, counts as hung. Then all are killed, whoever waits gets WorkerFailed, and
the next command starts new ones.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import fastvid.errors
from fastvid import wire
from fastvid.errors import Error, WorkerFailed

HUNG = 10.0  # seconds without a sign
LOOK = 0.1  # seconds between two looks at the processes
GRACE = 10.0  # seconds in which the others have to fail as well, once one has
FOREVER = 1e9
TAIL = 30  # lines of standard error that are kept


class Worker:
    """One rank, and what it answers: messages, then None when there is nothing more to come."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank, self.pid = rank, pid
        self.answers: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self.seen = time.monotonic()

    def read(self, stream: Any) -> None:
        """In a thread: what comes from it, until its end."""
        try:
            while True:
                message = wire.receive(stream)
                self.seen = time.monotonic()
                if wire.BEAT not in message.header:
                    self.answers.put(message)
        except (wire.Closed, OSError, ValueError):
            self.answers.put(None)

    def send(self, message: wire.Message) -> None:
        """Raises OSError or ValueError where it reads no more."""
        raise NotImplementedError

    def ended(self) -> str | None:
        """How it ended, None while it runs."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends it, whatever it does; it is gone when this returns."""
        raise NotImplementedError


class Child(Worker):
    """A process that was started here."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        super().__init__(rank, process.pid)
        self.process = process
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        for work, given in ((self.read, (process.stdout,)), (self._read_errors, ())):
            threading.Thread(target=work, args=given, name="fastvid-worker", daemon=True).start()

    def _read_errors(self) -> None:
        for line in self.process.stderr:
            self._tail.append(line.decode(errors="replace").rstrip())

    def send(self, message: wire.Message) -> None:
        wire.send(self.process.stdin, message)

    def ended(self) -> str | None:
        if (code := self.process.poll()) is None:
            return None
        time.sleep(0.02)  # what it printed last is still being read
        lines = [line for line in self._tail if line.strip()]
        told = f"; it last said: {lines[-1]:.300}" if lines else ""
        return (f"it was killed by {_signal(-code)}" if code < 0 else f"it ended with status {code}") + told

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class Team:
    """All ranks of one start. It fails once, and is then over."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers, self.failure = workers, None
        self._lock, self._over, self._gone = threading.Lock(), threading.Event(), threading.Event()
        self._leaving = False

    def watch(self, hung: float) -> None:
        """In a thread, until it is over: processes that ended, and those that are silent."""
        before = time.monotonic()
        while not self._over.wait(LOOK):
            now = time.monotonic()
            if now - before > hung / 2:  # this program was stopped, not they
                for worker in self.workers:
                    worker.seen = now
            before = now
            for worker in self.workers:
                if (how := worker.ended()) is not None:
                    self.fail(worker.rank, how)
                elif now - worker.seen > hung:
                    self.fail(worker.rank, f"it gave no sign for {hung:g} seconds")

    def leave(self) -> None:
        """From now on their ends are no failures."""
        self._leaving = True

    def fail(self, rank: int, cause: str) -> None:
        """Stops all, for this reason; the first one counts."""
        with self._lock:
            if self.failure is None and not self._over.is_set() and not self._leaving:
                self.failure = WorkerFailed(rank, self.workers[rank].pid, cause)
        if not self._leaving:
            self.end()

    def end(self) -> None:
        """Ends all of them, and wakes those who wait for answers."""
        self._over.set()
        for worker in self.workers:
            worker.end()
        self._gone.set()
        for worker in self.workers:
            worker.answers.put(None)

    def ended(self) -> bool:
        """Whether it is over."""
        return self._over.is_set()

    def gone(self, seconds: float) -> bool:
        """Waits until all of them are gone; whether they are."""
        return self._gone.wait(seconds)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Workers:
    """As many workers as there are ranks, with a model loaded. A context; `close` ends them.

    ranks, layout (None: as suits each request), model, options: what each loads. hung: seconds, see the head of this
    file.
    """

    def __init__(
        self, ranks: int, layout: str | None, model: str, options: Mapping[str, Any], hung: float = HUNG
    ) -> None:
        self.ranks, self.generation = ranks, 0
        self.options = dict(options)
        self.described: dict[str, Any] = {}
        self._layout, self._model, self._hung = layout, model, hung
        self._lock, self._numbers = threading.RLock(), itertools.count(1)
        self._team: Team | None = None
        self._failures: dict[int, WorkerFailed] = {}
        self._closed = False
        self._end = weakref.finalize(self, lambda: None)

    def start(self) -> None:
        """Starts them, unless they run, and has them load the model."""
        with self._lock:
            if self._closed:
                raise Error("this pipeline was closed; load the model again")
            if self._team is not None and not self._team.ended():
                return
            if self._team is not None and self._team.failure is not None:
                self._failures = {self.generation: self._team.failure}
            self.generation += 1
            self._team = self._launch()
            self._end.detach()
            self._end = weakref.finalize(self, Team.end, self._team)
            try:
                self.described = self._ask({"do": "load", **self._loaded()}, FOREVER)
            except BaseException:
                self._team.end()
                raise

    def _loaded(self) -> dict[str, Any]:
        return {"model": self._model, "layout": self._layout, "options": self.options}

    def _launch(self) -> Team:
        listener = socket.create_server(("127.0.0.1", 0), backlog=max(16, 2 * self.ranks))
        environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **os.environ}
        command, workers = [sys.executable, "-m", "fastvid.worker"], []
        device = self.options.get("device")
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // self.ranks)
        with listener:
            for rank in range(self.ranks):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                    start_new_session=True,  # what interrupts the program does not interrupt them
                )
                workers.append(Child(rank, process))
            team = self._watched(workers)
            port, joined = listener.getsockname()[1], {"size": self.ranks, "threads": threads}
            joined |= {"device": None if device is None else str(device), "port": port}
            own = [{"rank": rank, "fd": listener.fileno() if rank == 0 else None} for rank in range(self.ranks)]
            try:
                self._collect(team, self._tell(team, [{"do": "join", **joined, **one} for one in own]), FOREVER)
            except BaseException:
                team.end()
                raise
        return team

    def _watched(self, workers: list[Worker]) -> Team:
        team = Team(workers)
        threading.Thread(target=team.watch, args=(self._hung,), name="fastvid-watch", daemon=True).start()
        return team

    def command(self, do: str, deadline: float = FOREVER, **values: Any) -> Any:
        """Has all of them do something, and returns what rank 0 made. deadline: seconds until one that has not answered
        counts as hung.

        Raises what they raised; WorkerFailed if one has died or hangs, or they do not agree.
        """
        with self._lock:
            self.start()
            return self._ask({"do": do, **values}, deadline)

    def running(self, generation: int) -> bool:
        """Whether the workers of a start still run."""
        with self._lock:
            return generation == self.generation and self._team is not None and not self._team.ended()

    def failure(self, generation: int) -> WorkerFailed | None:
        """Why the workers of a start do not run any more, if one has failed."""
        if generation == self.generation and self._team is not None:
            return self._team.failure
        return self._failures.get(generation)

    def close(self) -> None:
        """Ends them: they are asked to first. Commands after that are refused."""
        with self._lock:
            team, self._team, self._closed = self._team, None, True
            if team is None or team.ended():
                return
            team.leave()
            try:
                self._collect(team, self._tell(team, [{"do": "exit"}] * self.ranks), 2.0)
                for _ in range(20):
                    if all(worker.ended() is not None for worker in team.workers):
                        break
                    time.sleep(LOOK)
            except Error:
                pass
            team.end()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ------------------------------------------------------------ messages

    def _ask(self, values: dict[str, Any], deadline: float) -> Any:
        team = self._team
        return self._collect(team, self._tell(team, [values] * self.ranks), deadline)

    def _tell(self, team: Team, values: list[dict[str, Any]]) -> int:
        """Sends every rank its message; what they are numbered."""
        number = next(self._numbers)
        same = wire.pack({**values[0], "number": number}) if all(one is values[0] for one in values) else None
        for worker, one in zip(team.workers, values, strict=True):
            try:
                worker.send(same or wire.pack({**one, "number": number}))
            except (OSError, ValueError):
                raise self._why(team, worker) from None
        return number

    def _collect(self, team: Team, number: int, deadline: float) -> Any:
        """What rank 0 made, once all have answered."""
        until, answers = time.monotonic() + deadline, []
        for worker in team.workers:
            answers.append(self._answer(team, worker, number, until))
            if "error" in answers[-1].header:
                until = min(until, time.monotonic() + GRACE)
        failed = [wire.unpack(answer).get("error") for answer in answers]
        if not any(failed):
            return wire.unpack(answers[0])["made"]
        rank, told = next((rank, error) for rank, error in enumerate(failed) if error)
        if not all(failed):
            team.fail(rank, f"it raised {told['kind']}: {told['text']}, and others did not")
            raise team.failure
        raise error_of(told)

    def _why(self, team: Team, worker: Worker) -> Error:
        """The error for a worker that cannot be reached: the watch sees how it ended, or that another did before."""
        if not team.gone(20 * LOOK):
            team.fail(worker.rank, "it closed its pipe")
        return team.failure or Error("this pipeline was closed; load the model again")

    def _answer(self, team: Team, worker: Worker, number: int, until: float) -> wire.Message:
        while True:
            try:
                answer = worker.answers.get(timeout=max(0.0, min(until - time.monotonic(), 3600.0)))
            except queue.Empty:
                if time.monotonic() < until:
                    continue
                team.fail(worker.rank, "it did not answer in the time that its work takes at most")
                raise team.failure from None
            if answer is None:  # its end, or that of all
                raise self._why(team, worker)
            if answer.header["number"] == number:  # else of a command that nobody waits for any more
                return answer


def error_of(told: Mapping[str, str]) -> Exception:
    """The error that a worker has raised: of the same class, where it is one of ours or of Python's own."""
    kind, text = told["kind"], told["text"]
    for module in (fastvid.errors, builtins):
        found = getattr(module, kind, None)
        if isinstance(found, type) and issubclass(found, Exception) and found is not WorkerFailed:
            try:
                return found(text)
            except TypeError:
                break
    return Error(f"{kind}: {text}")
