"""A channel between a program and one of its workers: frames of bytes over a socket.

`multiprocessing.connection` frames and authenticates. Its `send` and `recv` pickle, so they are never used: a message
is JSON and safetensors (`fastvid.workers.messages`), sent with `send_bytes`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, NamedTuple

from fastvid.errors import Error

MAX_BYTES = 1 << 42  # a larger length is not one of a message


class Message(NamedTuple):
    """A JSON object, and the bytes of a safetensors file that it refers to."""

    header: dict[str, Any]
    payload: bytes = b""


class Closed(Error):
    """The other end is gone, or what came is not a message."""


class Channel:
    """One end of a socket. Any thread may send; one thread receives, and closes the channel when that fails."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))  # to shut it down: a Connection cannot
        self._sending = threading.Lock()

    def send(self, message: Message, timeout: float = -1) -> bool:
        """Send a message, or return False if another thread is still sending one after `timeout` seconds.

        Raises Closed.
        """
        if not self._sending.acquire(timeout=timeout):
            return False
        try:
            self.connection.send_bytes(json.dumps([message.header, len(message.payload)]).encode())
            if message.payload:
                self.connection.send_bytes(message.payload)
        except (OSError, ValueError) as error:
            raise Closed(f"nobody reads any more: {error!r}") from error
        finally:
            self._sending.release()
        return True

    def receive(self, max_bytes: int = MAX_BYTES) -> Message:
        """The next message. Raises Closed at the end, and for more than `max_bytes`."""
        try:
            header, size = json.loads(self.connection.recv_bytes(max_bytes))
            payload = self.connection.recv_bytes(min(size, max_bytes)) if size else b""
        except (EOFError, OSError, ValueError, TypeError, RecursionError) as error:
            raise Closed(f"no more messages: {error!r}") from error
        if not isinstance(header, dict) or len(payload) != size:
            raise Closed("what came is not a message")
        return Message(header, payload)

    def authenticate(self, key: bytes) -> None:
        """Check that the other end, a `multiprocessing.connection.Client`, has this key. Raises if it has not."""
        deliver_challenge(self.connection, key)
        answer_challenge(self.connection, key)

    def shut_down(self) -> None:
        """Have both ends see the end of the channel, and wake the threads that send or receive."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free its descriptors, once no thread sends."""
        self.shut_down()
        with self._sending:
            self.connection.close()
            self._socket.close()

    @property
    def closed(self) -> bool:
        return self.connection.closed
