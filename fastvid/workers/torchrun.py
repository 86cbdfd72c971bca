"""Ranks that torchrun has started, on one host or many: rank 0 runs the program and is a worker beside it, the others
serve it. The same commands and answers (`fastvid.workers.messages`) go over sockets instead of pipes.

Rank 0 listens on the address that MASTER_ADDR names and on no other; who connects has to know a word that went through
the ranks' own group. When one of them is gone, rank 0's program gets WorkerFailed; who started them starts them again.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fastvid.distributed.mesh import FOREVER as NO_LIMIT
from fastvid.distributed.mesh import Mesh
from fastvid.errors import Error, InvalidRequest
from fastvid.workers import messages
from fastvid.workers.team import Answers, Team, Worker, Workers
from fastvid.workers.worker import Servant, device_of, serve

SETTINGS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun gives every process
WAIT = 60.0  # seconds for all connections
HELLO = 2.0  # seconds for what one says first


def world_size() -> int:
    """How many processes were started together as torchrun does it; 0 if this one was started alone."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in SETTINGS) else 0


class Peer(Worker):
    """Another rank, over a socket."""

    def __init__(self, rank: int, pid: int, answers: Answers, connection: socket.socket) -> None:
        super().__init__(rank, pid, answers)
        self._connection, self._stream = connection, connection.makefile("wb")
        self._gone: str | None = None
        threading.Thread(target=self._read, name="fastvid-peer", daemon=True).start()

    def _read(self) -> None:
        self.read(self._connection.makefile("rb"))
        self._gone = "its connection is closed"

    def send(self, message: messages.Message) -> None:
        messages.send(self._stream, message)

    def ended(self) -> str | None:
        return self._gone

    def kill(self) -> None:
        for close in (lambda: self._connection.shutdown(socket.SHUT_RDWR), self._connection.close):
            with contextlib.suppress(OSError):
                close()


class Own(Worker):
    """Rank 0, in a thread of the program's own process."""

    def __init__(self, servant: Servant, answers: Answers) -> None:
        super().__init__(0, os.getpid(), answers)
        self._inbox: queue.SimpleQueue[messages.Message | None] = queue.SimpleQueue()
        self._servant, self._gone = servant, False
        threading.Thread(target=self._serve, name="fastvid-rank", daemon=True).start()

    def _serve(self) -> None:
        if self._servant._mesh.device.type == "cuda":
            torch.cuda.set_device(self._servant._mesh.device)
        while (message := self._inbox.get()) is not None and message.header.get("do") != "exit":
            self.answers.put((0, self._servant.answer(message)))
        if message is not None:
            self.answers.put((0, messages.pack({"number": message.header["number"], "made": None})))

    def send(self, message: messages.Message) -> None:
        self._inbox.put(message)

    def ended(self) -> str | None:
        self.seen = time.monotonic()  # it lives as long as the program does
        return "it has ended" if self._gone else None

    def kill(self) -> None:
        self._gone = True
        self._inbox.put(None)


class Peers(Workers):
    """All ranks of a torchrun job, seen from rank 0."""

    def __init__(self, workers: list[Worker], *given: Any) -> None:
        super().__init__(*given)
        self._members: list[Worker] | None = workers

    def _launch(self) -> Team:
        if self._members is None:
            raise self._team.failure or Error("the ranks of this job have ended; start it again")
        members, self._members = self._members, None
        team = Team(members, members[0].answers)
        self._watch(team, self._hung)
        return team


def join(ranks: int, layout: str | None, model: str, options: Mapping[str, Any]) -> Peers:
    """Rank 0: all ranks as workers. The others serve them, and end the process when it is done with them."""
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    where, own = device_of(options.get("device"), local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" and own else "gloo"
        dist.init_process_group(backend, timeout=NO_LIMIT, **({"device_id": where} if backend == "nccl" else {}))
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    mesh, servant = replace(Mesh.of_group(device=where), per_host=per_host), Servant()
    servant.use(mesh)
    if mesh.rank:
        _serve(mesh, servant)
    answers: Answers = queue.SimpleQueue()
    workers = [Own(servant, answers), *_connections(mesh, answers)]
    return Peers(workers, ranks, layout, model, options)


def _connections(mesh: Mesh, answers: Answers) -> list[Peer]:
    host = socket.gethostbyname(os.environ["MASTER_ADDR"])
    if host.startswith("127.") and int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size)) < mesh.size:
        raise InvalidRequest(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']} is {host} here, which other hosts cannot reach; "
            f"give an address of this host that they can"
        )
    with socket.create_server((host, 0), backlog=mesh.size) as listener:
        word = secrets.token_hex(16)
        _tell(mesh, {"host": host, "port": listener.getsockname()[1], "word": word})
        found: dict[int, Peer] = {}
        until = time.monotonic() + WAIT
        while len(found) < mesh.size - 1:
            listener.settimeout(max(until - time.monotonic(), 0.001))
            connection, _ = listener.accept()
            if (hello := _hello(connection, word)) is None:
                connection.close()  # somebody else
            else:
                connection.settimeout(None)
                found[hello["rank"]] = Peer(hello["rank"], hello["pid"], answers, connection)
    return [found[rank] for rank in range(1, mesh.size)]


def _hello(connection: socket.socket, word: str) -> dict[str, Any] | None:
    """What a rank says of itself; None for whoever does not know the word, or takes too long."""
    connection.settimeout(HELLO)
    try:
        hello = messages.receive(connection.makefile("rb", buffering=0), most=1 << 10).header
    except (messages.Closed, OSError, ValueError):
        return None
    known = isinstance(hello, dict) and hmac.compare_digest(str(hello.get("word")).encode(), word.encode())
    return hello if known else None


def _serve(mesh: Mesh, servant: Servant) -> None:
    told = _tell(mesh, None)
    connection = socket.create_connection((told["host"], told["port"]), timeout=WAIT)
    connection.settimeout(None)
    stream = connection.makefile("wb")
    messages.send(stream, messages.Message({"rank": mesh.rank, "pid": os.getpid(), "word": told["word"]}))
    serve(connection.makefile("rb"), stream, servant, lambda: os._exit(0))
    sys.exit(0)


def _tell(mesh: Mesh, values: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's values, on all ranks."""
    data = None if values is None else torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    data = mesh.broadcast(None if data is None else data.to(mesh.device))
    return json.loads(bytes(data.cpu().tolist()))
