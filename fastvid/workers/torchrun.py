"""Ranks that torchrun has started, on one host or many: rank 0 runs the program and is a worker beside it, the others
serve it over sockets, with the same commands and answers as child processes.

Rank 0 listens on the address that MASTER_ADDR names and on no other. Who connects has to know a key that went through
the ranks' own process group. When a rank is gone, rank 0's program gets WorkerFailed; who started the ranks has to
start them again.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Pipe
from typing import Any, NoReturn

import torch

from fastvid.distributed.mesh import Mesh
from fastvid.errors import Error, InvalidRequest
from fastvid.workers.channel import Channel
from fastvid.workers.group import KILL_TIMEOUT, POLL_INTERVAL, Answers, Worker, WorkerGroup
from fastvid.workers.messages import pack, unpack
from fastvid.workers.team import SILENCE_LIMIT, Team
from fastvid.workers.worker import WorkerServer, init_process_group, serve

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for every process
CONNECT_TIMEOUT = 60.0  # seconds for all ranks
HANDSHAKE_TIMEOUT = 10.0  # seconds for one; a slow one delays nobody
HELLO_BYTES = 1 << 10


def world_size() -> int:
    """How many processes torchrun started together; 0 if this one was started alone, by torchrun or not.

    Raises InvalidRequest for a WORLD_SIZE that is no number.
    """
    count = _world()
    return count if count > 1 else 0


def alone() -> bool:
    """Whether torchrun started this process, and no other."""
    return _world() == 1


def _world() -> int:
    if not all(os.environ.get(name) for name in VARIABLES):
        return 0
    value = os.environ["WORLD_SIZE"]
    if not value.isdecimal() or len(value) > 9:
        raise InvalidRequest(
            f"the environment variable WORLD_SIZE is {value!r:.40}; it must be a number, as torchrun's"
        )
    return int(value)


class TorchrunTeam(Team):
    """All ranks of a torchrun job, seen from rank 0. They cannot be started again."""

    def __init__(
        self, job: WorkerGroup, ranks: int, layout: str | None, model: str, options: Mapping[str, Any]
    ) -> None:
        super().__init__(ranks, layout, model, options)
        self._job = job

    def _launch(self) -> WorkerGroup:
        if self._job.ended():
            raise self._job.failure or Error("the ranks of this job have ended; start it again")
        self._job.watch(SILENCE_LIMIT)
        return self._job


def join(ranks: int, layout: str | None, model: str, options: Mapping[str, Any]) -> TorchrunTeam:
    """On rank 0: all ranks as workers. The others serve rank 0, and end their process when it is done with them."""
    device = init_process_group(options.get("device"), int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    mesh, server = replace(Mesh.of_group(device=device), per_host=per_host), WorkerServer()
    server.join_as(mesh)
    if mesh.rank:
        _serve_rank_0(mesh, server)
    job = WorkerGroup()
    job.workers += [_rank_0(server, job), *_connect_all(mesh, job.answers)]
    return TorchrunTeam(job, ranks, layout, model, options)


def _rank_0(server: WorkerServer, job: WorkerGroup) -> Worker:
    """The rank in this process, in a thread."""
    ours, theirs = map(Channel, Pipe())
    thread = threading.Thread(target=serve, args=(theirs, server, True), name="fastvid-rank", daemon=True)
    thread.start()

    def end() -> None:
        job.end()
        thread.join(KILL_TIMEOUT)  # Python aborts where a thread returns from torch while the interpreter ends

    atexit.register(end)
    return Worker(0, os.getpid(), job.answers, ours)


def _connect_all(mesh: Mesh, answers: Answers) -> list[Worker]:
    """On rank 0: the other ranks, connected."""
    name = os.environ["MASTER_ADDR"]
    host = socket.gethostbyname(name)
    if host.startswith("127.") and int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size)) < mesh.size:
        raise InvalidRequest(
            f"MASTER_ADDR={name} is {host} here, which other hosts cannot reach; "
            f"give an address of this host that they can"
        )
    key = secrets.token_bytes(32)
    with socket.create_server((host, 0), backlog=mesh.size) as listener:
        _broadcast(mesh, {"host": host, "port": listener.getsockname()[1], "key": key.hex()})
        return accept_ranks(listener, key, mesh.size, answers)


def accept_ranks(listener: socket.socket, key: bytes, size: int, answers: Answers) -> list[Worker]:
    """Wait until ranks 1 to size - 1 have connected. Whoever has not the key, or is slow, delays nobody."""
    welcomed: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    ranks: dict[int, Worker] = {}
    until = time.monotonic() + CONNECT_TIMEOUT
    listener.settimeout(POLL_INTERVAL)
    while len(ranks) < size - 1:
        if time.monotonic() > until:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in ranks)
            raise Error(f"ranks that did not connect in {CONNECT_TIMEOUT:g} seconds: {missing}")
        with suppress(TimeoutError, ConnectionError):
            connection, _ = listener.accept()
            given = connection, key, answers, welcomed
            threading.Thread(target=_welcome, args=given, name="fastvid-welcome", daemon=True).start()
        while not welcomed.empty():
            worker = welcomed.get()
            ranks[worker.rank] = worker
    return [ranks[rank] for rank in range(1, size)]


def _welcome(connection: socket.socket, key: bytes, answers: Answers, welcomed: queue.SimpleQueue[Worker]) -> None:
    """Authenticate who has connected. A rank says which one it is; everybody else is sent away."""
    channel = Channel(Connection(connection.detach()))
    timer = threading.Timer(HANDSHAKE_TIMEOUT, channel.shut_down)
    timer.start()
    try:
        channel.authenticate(key)
        hello = unpack(channel.receive(HELLO_BYTES))
        worker = Worker(hello["rank"], hello["pid"], answers, channel)
    except Exception:  # strangers may send anything
        channel.close()
    else:
        welcomed.put(worker)
    finally:
        timer.cancel()


def _serve_rank_0(mesh: Mesh, server: WorkerServer) -> NoReturn:
    meeting = _broadcast(mesh, None)
    channel = Channel(Client((meeting["host"], meeting["port"]), authkey=bytes.fromhex(meeting["key"])))
    channel.send(pack({"rank": mesh.rank, "pid": os.getpid()}))
    serve(channel, server)
    server.close()
    sys.exit(0)


def _broadcast(mesh: Mesh, values: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's values, on all ranks."""
    data = None if values is None else torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    data = mesh.broadcast(None if data is None else data.to(mesh.device))
    received: dict[str, Any] = json.loads(bytes(data.cpu().tolist()))
    return received
