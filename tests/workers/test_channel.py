"""Channels: what arrives, what is refused, who is let in, and that nothing is pickled."""

from __future__ import annotations

import ast
import os
import queue
import socket
import threading
import time
from contextlib import ExitStack
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastvid
from fastvid.errors import Error
from fastvid.workers import torchrun
from fastvid.workers.channel import Channel, Closed, Message
from fastvid.workers.group import Answers
from fastvid.workers.messages import pack

KEY = bytes(range(32))


@pytest.fixture
def ends():
    channels = [Channel(connection) for connection in Pipe()]
    yield channels
    for channel in channels:
        channel.close()


def test_messages_arrive_in_order_from_many_threads(ends) -> None:
    ours, theirs = ends
    received: list[Message] = []
    threads = [
        threading.Thread(target=lambda i=i: [ours.send(Message({"n": [i, j]}, bytes([i]) * 100_000)) for j in range(9)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    while len(received) < 36:
        received.append(theirs.receive())
    for i in range(4):
        assert [m.header["n"][1] for m in received if m.header["n"][0] == i] == list(range(9))
    assert all(m.payload == bytes([m.header["n"][0]]) * 100_000 for m in received)


def test_the_end_is_seen_on_both_sides(ends) -> None:
    ours, theirs = ends
    ours.send(Message({"last": 1}))
    waiting = threading.Thread(target=lambda: pytest.raises(Closed, ours.receive))
    waiting.start()
    ours.shut_down()
    waiting.join(5)
    assert not waiting.is_alive() and theirs.receive() == Message({"last": 1})
    with pytest.raises(Closed):
        theirs.receive()
    ours.close()
    with pytest.raises(Closed):
        ours.send(Message({}))
    with pytest.raises(Closed):
        theirs.send(Message({}))
    assert ours.closed and not theirs.closed


def test_a_sender_that_nobody_reads_from_is_woken(ends) -> None:
    ours, _ = ends
    sender = threading.Thread(target=lambda: pytest.raises(Closed, ours.send, Message({}, bytes(1 << 24))))
    sender.start()
    time.sleep(0.1)
    assert ours.send(Message({}), timeout=0.05) is False, "another thread is sending"
    ours.shut_down()
    sender.join(5)
    assert not sender.is_alive()


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xff" * 64],
        [b"{}"],
        [b"[1]"],
        [b'["text", 0]'],
        [b"[{}, -1]"],
        [b'[{}, "x"]'],
        [b"[{}, 5]", b"four"],
        [b"[{}, 9]", b"too long for it"],
        [b"x" * 5000],
        [b"[" * 100_000],
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(ends, frames: list[bytes]) -> None:
    ours, theirs = ends
    for frame in frames:
        ours.connection.send_bytes(frame)
    with pytest.raises(Closed):
        theirs.receive(max_bytes=4096 if len(frames[0]) == 5000 else 1 << 20)


@pytest.mark.parametrize("sent", [b"\x00", b"\x00\x00\x00\x09[{}, 0", b"\xff\xff\xff\xff" + b"\x7f" * 8, b"\x80" * 64])
def test_what_breaks_off_or_claims_to_be_huge_is_refused(ends, sent: bytes) -> None:
    ours, theirs = ends
    os.write(ours.connection.fileno(), sent)
    ours.close()
    with pytest.raises(Closed):
        theirs.receive()


def test_nothing_is_pickled() -> None:
    """A Connection's own send and recv are never called, and pickle is not imported."""
    root = Path(fastvid.__file__).parent
    for path in [*(root / "workers").glob("*.py"), *(root / "serve").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("send", "recv"):
                assert not ast.unparse(node.value).endswith("connection"), f"{path}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not any("pickle" in name or name in ("marshal", "dill") for name in names), path


# ---------------------------------------------------------------- torchrun's ranks


def say_hello(address: tuple[str, int], rank: int, key: bytes = KEY) -> Channel:
    channel = Channel(Client(address, authkey=key))
    channel.send(pack({"rank": rank, "pid": 100 + rank}))
    return channel


def test_strangers_neither_get_in_nor_delay_the_ranks(monkeypatch) -> None:
    monkeypatch.setattr(torchrun, "HANDSHAKE_TIMEOUT", 5.0)
    answers: Answers = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        address = listener.getsockname()
        accepted: list = []
        accepting = threading.Thread(target=lambda: accepted.extend(torchrun.accept_ranks(listener, KEY, 3, answers)))
        accepting.start()
        for said in (b"", b"\xff" * 64, b"\x00\x00\x00\x20", b"GET / HTTP/1.1\r\n\r\n"):  # some wait, some talk
            stranger = stack.enter_context(socket.create_connection(address))
            stranger.sendall(said)
        socket.create_connection(address).close()
        with pytest.raises((AuthenticationError, EOFError, OSError)):
            Client(address, authkey=b"another")
        began = time.monotonic()
        ranks = [say_hello(address, rank) for rank in (2, 1)]
        accepting.join(4)
        assert not accepting.is_alive() and time.monotonic() - began < 4
        assert [(worker.rank, worker.pid) for worker in accepted] == [(1, 101), (2, 102)]
        ranks[0].send(Message({"number": 1}))
        assert answers.get(timeout=5) == (2, Message({"number": 1}))
        accepted[0].send(Message({"do": "exit"}))
        assert ranks[1].receive() == Message({"do": "exit"})
        for channel in ranks:
            channel.close()
        assert {answers.get(timeout=5) for _ in ranks} == {(1, None), (2, None)}


def test_one_who_is_slow_is_sent_away(monkeypatch) -> None:
    monkeypatch.setattr(torchrun, "HANDSHAKE_TIMEOUT", 0.2)
    ours, theirs = socket.socketpair()
    welcomed: queue.SimpleQueue = queue.SimpleQueue()
    with theirs:
        torchrun._welcome(ours, KEY, queue.SimpleQueue(), welcomed)
        theirs.settimeout(5)
        while theirs.recv(4096):  # the challenge, then the end
            pass
    assert welcomed.empty()


def test_ranks_that_do_not_come_are_named(monkeypatch) -> None:
    monkeypatch.setattr(torchrun, "CONNECT_TIMEOUT", 0.3)
    refused = pytest.raises(Error, match="did not connect in 0.3 seconds: 1, 2")
    with socket.create_server(("127.0.0.1", 0)) as listener, refused:
        torchrun.accept_ranks(listener, KEY, 3, queue.SimpleQueue())


def test_an_address_that_other_hosts_cannot_reach_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(fastvid.InvalidRequest, match="MASTER_ADDR=localhost is 127.0.0.1 here"):
        torchrun._connect_all(SimpleNamespace(size=4), queue.SimpleQueue())
