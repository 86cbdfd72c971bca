"""The workers of a pipeline, seen from the program that has them: started, told what to do, watched, stopped.

They are child processes with pipes (`fastvid.workers.worker`); nothing of the program's own environment or start method
is touched. One that dies is seen at once, by its end of the pipe and by its exit; one that is silent for `HUNG`
seconds, or does not answer a command by its deadline, counts as hung. Then all are killed, whoever waits gets
WorkerFailed, and the next command starts new ones.
"""

from __future__ import annotations

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

from fastvid.errors import Error, WorkerFailed
from fastvid.workers import messages as wire
from fastvid.workers.messages import error_of

HUNG = 9.5  # seconds without a sign: with the looking and the killing, it is over within 10
JOINING = 120.0  # the same while they start: one that loads large libraries from a slow disk gives none meanwhile
LOOK = 0.1  # seconds between two looks at the processes
GRACE = 9.5  # seconds in which the others have to fail as well, once one has
KILLED = 5.0  # seconds that a killed process may take to be gone: one that a driver holds may never be
FOREVER = 1e9
TAIL = 30  # lines of standard error that are kept


Answers = queue.SimpleQueue[tuple[int, wire.Message | None]]
"""What all ranks of a team have answered: (rank, message), and (rank, None) when nothing more is to come of one."""


class Worker:
    """One rank, whose answers go to `answers`."""

    def __init__(self, rank: int, pid: int, answers: Answers) -> None:
        self.rank, self.pid, self.answers = rank, pid, answers
        self.seen = time.monotonic()

    def read(self, stream: Any) -> None:
        """In a thread: what comes from it, until its end."""
        try:
            while True:
                message = wire.receive(stream)
                self.seen = time.monotonic()
                if wire.BEAT not in message.header:
                    self.answers.put((self.rank, message))
        except (wire.Closed, OSError, ValueError):
            self.answers.put((self.rank, None))

    def send(self, message: wire.Message) -> None:
        """Raises OSError or ValueError where it reads no more."""
        raise NotImplementedError

    def ended(self) -> str | None:
        """How it ended, None while it runs."""
        raise NotImplementedError

    def kill(self) -> None:
        """Has it end, whatever it does, without waiting for that."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends it; it is gone when this returns."""
        self.kill()


class Child(Worker):
    """A process that was started here."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], answers: Answers) -> None:
        super().__init__(rank, process.pid, answers)
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
        how = f"it was killed by {_signal(-code)}" if code < 0 else f"it ended with status {code}"
        return how + (" (the system does that where memory runs out)" if code == -signal.SIGKILL else "") + told

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # it leads a group: with what it has started, such as compilers

    def end(self) -> None:
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILLED)
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class Team:
    """All ranks of one start. It fails once, and is then over."""

    def __init__(self, workers: list[Worker], answers: Answers) -> None:
        self.workers, self.answers = workers, answers
        self.failure: WorkerFailed | None = None
        self.limit = FOREVER  # seconds without a sign
        self._process = os.getpid()
        self._lock, self._over, self._gone = threading.Lock(), threading.Event(), threading.Event()
        self._leaving = False

    def watch(self) -> None:
        """In a thread, until it is over: processes that ended, and those that are silent."""
        before = time.monotonic()
        while not self._over.wait(LOOK):
            now, limit = time.monotonic(), self.limit
            if now - before > limit / 2:  # this program was stopped, not they
                for worker in self.workers:
                    worker.seen = now
            before = now
            for worker in self.workers:
                if (how := worker.ended()) is not None:
                    self.fail(worker.rank, how)
                elif now - worker.seen > limit:
                    self.fail(worker.rank, f"it gave no sign for {limit:g} seconds")

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
        if os.getpid() != self._process or self._over.is_set() and self._gone.is_set():
            return  # a fork, which has none; or done before
        self._over.set()
        for worker in self.workers:  # all of them first: none outlives another that takes its time
            worker.kill()
        for worker in self.workers:
            worker.end()
        self._gone.set()
        self.answers.put((0, None))

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
        self._process, self._folder = os.getpid(), os.getcwd()
        self._team: Team | None = None
        self._failures: dict[int, WorkerFailed] = {}
        self._closed = False
        self._end = weakref.finalize(self, lambda: None)

    def start(self) -> None:
        """Starts them, unless they run, and has them load the model."""
        self._check_process()
        with self._lock:
            if self._closed:
                raise Error("this pipeline was closed; load the model again")
            if self._team is not None and not self._team.ended():
                return
            if self._team is not None and self._team.failure is not None:
                self._failures[self.generation] = self._team.failure
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
        return {"model": self._model, "layout": self._layout, "options": self.options, "folder": self._folder}

    def _launch(self) -> Team:
        listener = socket.create_server(("127.0.0.1", 0), backlog=max(16, 2 * self.ranks))
        environment = environment_of(dict(os.environ), sys.path)
        team = Team([], queue.SimpleQueue())
        device = self.options.get("device")
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cores() // self.ranks)
        try:
            with listener:
                for rank in range(self.ranks):
                    process = subprocess.Popen(
                        [sys.executable, "-m", "fastvid.workers.worker"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        env=environment,
                        cwd="/",  # which comes first where they import from: nothing may be found there
                        pass_fds=[listener.fileno()] if rank == 0 else [],
                        start_new_session=True,  # what interrupts the program does not interrupt them
                    )
                    team.workers.append(Child(rank, process, team.answers))
                self._watch(team, max(JOINING, self._hung))
                port, joined = listener.getsockname()[1], {"size": self.ranks, "threads": threads}
                joined |= {"device": None if device is None else str(device), "port": port}
                own = [{"rank": rank, "fd": listener.fileno() if rank == 0 else None} for rank in range(self.ranks)]
                self._collect(team, self._tell(team, [{"do": "join", **joined, **one} for one in own]), FOREVER)
        except BaseException:
            team.end()
            raise
        team.limit = self._hung
        return team

    def _watch(self, team: Team, limit: float) -> None:
        team.limit = limit
        threading.Thread(target=team.watch, name="fastvid-watch", daemon=True).start()

    def command(self, do: str, deadline: float = FOREVER, **values: Any) -> Any:
        """Has all of them do something, and returns what rank 0 made. deadline: seconds until one that has not answered
        counts as hung.

        Raises what they raised; WorkerFailed if one has died or hangs, or they do not agree.
        """
        self._check_process()
        with self._lock:
            self.start()
            return self._ask({"do": do, **values}, deadline)

    def _check_process(self) -> None:
        if os.getpid() != self._process:  # a fork: its commands would mix with those of the other one
            raise Error(f"this pipeline belongs to process {self._process}, which loaded it; load the model again here")

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
            if team is None or team.ended() or os.getpid() != self._process:
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
        first = wire.pack({**values[0], "number": number})
        messages = [first if one is values[0] else wire.pack({**one, "number": number}) for one in values]
        rank = 0
        try:
            for rank, worker in enumerate(team.workers):
                worker.send(messages[rank])
        except (OSError, ValueError):
            raise self._why(team, rank) from None
        except BaseException:  # an interrupt: some have it, others do not or in part, so they are in step no more
            team.end()
            raise
        return number

    def _collect(self, team: Team, number: int, deadline: float) -> Any:
        """What rank 0 made, once all have answered."""
        until, found, failed = time.monotonic() + deadline, {}, {}
        while len(found) < len(team.workers):
            if (answer := self._answer(team, until)) is None:
                break
            rank, message = answer
            if message is None:  # its end, or that of all
                raise self._why(team, rank)
            if message.header["number"] == number:  # else of a command that nobody waits for any more
                found[rank] = wire.unpack(message)
                if "error" in found[rank]:
                    failed[rank] = found[rank]["error"]
                    until = min(until, time.monotonic() + GRACE)
        if len(found) == len(team.workers) and not failed:
            return found[0]["made"]
        if len(failed) == len(team.workers):
            raise error_of(failed[0])
        cause = None
        if failed:  # others wait for it, or have done what it has not: they are in step no more
            rank, told = min(failed.items())
            cause = error_of(told)
            team.fail(rank, f"it raised {told['kind']}: {told['text']}, and others did not")
        else:
            rank = min(set(range(len(team.workers))) - set(found))
            team.fail(rank, "it did not answer in the time that its work takes at most")
        raise self._over(team) from cause

    def _answer(self, team: Team, until: float) -> tuple[int, wire.Message | None] | None:
        """The next answer; None if there is none by then."""
        while True:
            try:
                return team.answers.get(timeout=max(0.0, min(until - time.monotonic(), 3600.0)))
            except queue.Empty:
                if time.monotonic() >= until:
                    return None

    def _why(self, team: Team, rank: int) -> Error:
        """The error for a rank that cannot be reached: the watch sees how it ended, or that another did before."""
        if not team.gone(20 * LOOK):
            team.fail(rank, "it closed its pipe")
        return self._over(team)

    def _over(self, team: Team) -> Error:
        return team.failure or Error("this pipeline was closed; load the model again")


def environment_of(own: dict[str, str], path: list[str]) -> dict[str, str]:
    """A worker's environment: the program's, with loopback for what is not said, and with what it imports from."""
    found = [os.path.abspath(place) for place in path if os.pathsep not in place]
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **own, "PYTHONPATH": os.pathsep.join(found)}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
