"""The workers of a pipeline: started, told what to do, watched, started again.

They are child processes (`fastvid.workers.worker`), each with a socket; the program's own environment and start method
stay as they are. A worker that dies is seen by its exit; one that gives no sign for SILENCE_LIMIT seconds, or does not
answer a command by its deadline, counts as hung. Then all of them are killed, whoever waits gets WorkerFailed, and the
next command starts new ones.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from fastvid import env, notices
from fastvid.errors import Error
from fastvid.workers.channel import Closed, Message
from fastvid.workers.group import CLOSED, NO_LIMIT, POLL_INTERVAL, ChildWorker, WorkerGroup
from fastvid.workers.messages import pack, unpack, unpack_error

SILENCE_LIMIT = 9.5  # seconds: with the polling and the killing, a hang is over within 10
STARTUP_SILENCE_LIMIT = 120.0  # loading large libraries from a slow disk blocks heartbeats
OTHERS_FAIL_WITHIN = 9.5  # seconds, once one rank has raised an error
EXIT_TIMEOUT = 2.0  # seconds for workers that are asked to exit

log = logging.getLogger("fastvid.workers")


class Team:
    """As many workers as there are ranks, with a model loaded. `close` ends them.

    group: those that were started last. description: of the loaded pipeline. ranks, layout (None: chosen for each
    request), model, options: what each worker loads.
    """

    def __init__(self, ranks: int, layout: str | None, model: str, options: Mapping[str, Any]) -> None:
        self.ranks, self.options = ranks, dict(options)
        self.group: WorkerGroup | None = None
        self.description: dict[str, Any] = {}
        self.model, self._layout, self._folder = model, layout, current_folder()
        self._lock, self._numbers = threading.RLock(), itertools.count(1)
        self._pid, self._closed = os.getpid(), False
        self._finalizer: weakref.finalize[..., Team] | None = None

    def start(self) -> WorkerGroup:
        """Start the workers and load the model, unless they run."""
        self.check_process()
        with self._lock:
            if self._closed:
                raise Error(CLOSED)
            if self.group is None or self.group.ended():
                self._start()
            assert self.group is not None
            return self.group

    def check_process(self) -> None:
        if os.getpid() != self._pid:  # in a fork: its commands would mix with those of the other process
            raise Error(f"this pipeline belongs to process {self._pid}, which loaded it; load the model again here")

    def _start(self) -> None:
        log.info("%s %d ranks", "starting" if self.group is None else "restarting", self.ranks)
        began = time.monotonic()
        self.group = group = self._launch()
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, group.end)
        load = {"model": self.model, "layout": self._layout, "options": self.options, "folder": self._folder}
        try:
            self.description = self._run(group, NO_LIMIT, [{"do": "load", **load}] * self.ranks)
        except BaseException:
            group.end()
            raise
        pids = ", ".join(str(worker.pid) for worker in group.workers)
        log.info("%d ranks run after %.2f s (processes %s)", self.ranks, time.monotonic() - began, pids)

    def _launch(self) -> WorkerGroup:
        """New workers that have joined a process group."""
        group, environment = WorkerGroup(), worker_environment(os.environ, sys.path)
        device = self.options.get("device")
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, env.available_cores() // self.ranks)
        try:
            # The workers' process group meets here. Rank 0 inherits the socket: its port cannot be taken meanwhile.
            with socket.create_server(("127.0.0.1", 0), backlog=max(16, 2 * self.ranks)) as listener:
                descriptors = [listener.fileno()]
                for rank in range(self.ranks):
                    worker = ChildWorker(rank, group.answers, environment, [] if rank else descriptors)
                    group.workers.append(worker)
                group.watch(max(STARTUP_SILENCE_LIMIT, SILENCE_LIMIT))
                join = {"do": "join", "size": self.ranks, "port": listener.getsockname()[1], "threads": threads}
                join["device"] = None if device is None else str(device)
                own = [{"rank": rank, "fd": None if rank else descriptors[0]} for rank in range(self.ranks)]
                self._run(group, NO_LIMIT, [{**join, **one} for one in own])
        except BaseException:
            group.end()
            raise
        group.silence_limit = SILENCE_LIMIT
        return group

    def command(self, do: str, deadline: float = NO_LIMIT, group: WorkerGroup | None = None, **values: Any) -> Any:
        """Have all workers do something, and return rank 0's result. See `fastvid.workers.worker.WorkerServer`.

        deadline: seconds after which a worker that has not answered counts as hung. group: the command is for these
        workers, and is not done by new ones. Raises what the workers raised, and WorkerFailed if one dies or hangs, or
        if only some of them raise.
        """
        self.check_process()
        with self._lock:
            current = self.start() if group is None else group
            if current is not self.group or current.ended():
                raise current.error()
            return self._run(current, deadline, [{"do": do, **values}] * self.ranks)

    def close(self) -> None:
        """Ask the workers to exit, and kill those that do not. Commands after that are refused."""
        if os.getpid() != self._pid:  # a fork does not own them, and the lock may be held for ever there
            return
        with self._lock:
            group, self.group, self._closed = self.group, None, True
            if group is None or group.ended():
                return
            group.expect_exit()
            try:
                self._run(group, EXIT_TIMEOUT, [{"do": "exit"}] * self.ranks)
                until = time.monotonic() + EXIT_TIMEOUT
                while time.monotonic() < until and any(worker.ended() is None for worker in group.workers):
                    time.sleep(POLL_INTERVAL)
            except Error:
                pass
            group.end()
            log.info("%d ranks ended", self.ranks)

    # ------------------------------------------------------------ messages

    def _run(self, group: WorkerGroup, deadline: float, commands: Sequence[dict[str, Any]]) -> Any:
        """Send each rank its command, and return rank 0's result."""
        return self._collect(group, self._send(group, commands), deadline)

    def _send(self, group: WorkerGroup, commands: Sequence[dict[str, Any]]) -> int:
        """Send each rank its command; returns the number that their answers have."""
        number = next(self._numbers)
        same = all(command is commands[0] for command in commands)
        messages = [pack({**command, "number": number}) for command in (commands[:1] if same else commands)]
        rank = 0
        try:
            for rank, worker in enumerate(group.workers):
                worker.send(messages[0 if same else rank])
        except Closed:
            raise group.unreachable(rank) from None
        except BaseException:  # an interrupt: some ranks have the command, others do not
            group.end()
            raise
        return number

    def _collect(self, group: WorkerGroup, number: int, deadline: float) -> Any:
        """Rank 0's result, once all have answered."""
        until, answers = time.monotonic() + deadline, dict[int, dict[str, Any]]()
        errors: dict[int, dict[str, str]] = {}
        while len(answers) < len(group.workers) and (answer := self._next_answer(group, until)) is not None:
            rank, message = answer
            if message is None:
                raise group.unreachable(rank)
            if message.header["number"] == number:  # not of a command whose caller was interrupted
                answers[rank] = unpack(message)
                if "error" in answers[rank]:
                    errors[rank] = answers[rank]["error"]
                    until = min(until, time.monotonic() + OTHERS_FAIL_WITHIN)
        notices.warn_all(answers.get(0, {}).get("warnings", ()))
        for rank, packed in errors.items():
            log.debug("rank %d raised %s", rank, packed["trace"])
        if len(errors) == len(group.workers):
            raise unpack_error(errors[0])
        if len(answers) == len(group.workers) and not errors:
            return answers[0]["result"]
        if not errors:
            late = min(set(range(len(group.workers))) - set(answers))
            raise group.failed(late, "it did not answer in the time that its work takes at most")
        rank, packed = min(errors.items())  # the others wait for it, or have done what it has not
        failure = group.failed(rank, f"it raised {packed['kind']}: {packed['text']}, and others did not")
        raise failure from unpack_error(packed)

    def _next_answer(self, group: WorkerGroup, until: float) -> tuple[int, Message | None] | None:
        """The next answer; None if there is none by then."""
        try:
            return group.answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None


def worker_environment(environment: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """The program's environment, with the places that it imports from, idle threads that sleep, and loopback where no
    interface is named."""
    places = os.pathsep.join(os.path.abspath(place) for place in path if os.pathsep not in place)
    own = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **env.thread_variables(environment)}
    own.pop("OMP_NUM_THREADS", None)  # each rank is told its share of the cores
    return {**own, **environment, "PYTHONPATH": places}


def current_folder() -> str:
    """What the ranks take relative paths from. Raises Error where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        raise Error(
            "the current folder was removed; change to one that exists, so that ranks can start there"
        ) from None
