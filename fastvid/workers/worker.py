"""`python -m fastvid.workers.worker`: a rank of a pipeline that a program has started, and what it does for it.

All ranks get the same commands in the same order, and do one after another; so whatever makes them exchange tensors
they do together, and a request is cancelled at the same step everywhere. Rank 0 answers with what was made, the others
that it was. Messages (`fastvid.workers.messages`) come on standard input and go on standard output; what anything
prints goes to standard error. A beat goes out twice a second from a thread of its own, so that the program sees a rank
that hangs; when the program is gone, so is the worker.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from fastvid.workers import messages

BEATS = 0.5  # seconds between two
STREAMS = 1000  # the program counts how many requests run at once


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts the program means its request
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    serve(commands, answers, Servant(), lambda: os._exit(0))


def serve(commands: BinaryIO, answers: BinaryIO, servant: Servant, end: Callable[[], None]) -> None:
    """Answers commands until there are no more or one says so; `end` is called as soon as nobody is there to answer."""
    inbox: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
    lock, parent = threading.Lock(), os.getppid()

    def read() -> None:
        try:
            while True:
                inbox.put(messages.receive(commands))
        except (messages.Closed, OSError, ValueError):
            end()

    def beat() -> None:
        # The pipes' ends need not tell that the program is gone: a process that it forked may hold them.
        with contextlib.suppress(OSError, ValueError):
            while os.getppid() == parent:
                if lock.acquire(timeout=BEATS):  # an answer is a sign as well
                    try:
                        messages.send(answers, messages.Message({messages.BEAT: True}))
                    finally:
                        lock.release()
                time.sleep(BEATS)
        end()

    for work in (read, beat):
        threading.Thread(target=work, name=f"fastvid-{work.__name__}", daemon=True).start()
    while (message := inbox.get()).header.get("do") != "exit":
        answer = servant.answer(message)
        try:
            with lock:
                messages.send(answers, answer)
        except (OSError, ValueError):
            end()
            return
    with lock:
        messages.send(answers, messages.pack({"number": message.header["number"], "made": None}))
    servant.close()


class Servant:
    """What a rank holds: its pipeline and the streams that are open. A command is `do` and what its method takes."""

    def __init__(self) -> None:
        self.rank = 0
        self._moves = True  # into the folder that paths are relative to; the program's own process stays where it is
        self._mesh: Any = None
        self._pipe: Any = None
        self._streams: dict[int, tuple[str, Any]] = {}  # with the folder that its paths are relative to

    def answer(self, message: messages.Message) -> messages.Message:
        """Does what a message says: what was made, or the error."""
        number = message.header.get("number")
        try:
            values = messages.unpack(message)
            values.pop("number", None)
            made = getattr(self, f"do_{values.pop('do')}")(**values)
            return messages.pack({"number": number, "made": made if self.rank == 0 else None})
        except BaseException as error:
            told = {"kind": type(error).__name__, "text": str(error), "trace": traceback.format_exc()[-4000:]}
            return messages.pack({"number": number, "error": told})

    def do_join(self, rank: int, size: int, port: int, fd: int | None, device: str | None, threads: int | None) -> None:
        """Become a rank of a group that meets at a port of this machine. fd: of rank 0, a socket that listens there."""
        import torch
        import torch.distributed as dist

        from fastvid.distributed.mesh import FOREVER, Mesh

        self.rank = rank
        if threads is not None:
            torch.set_num_threads(threads)
        where, own = device_of(device, rank)
        given = {"master_listen_fd": fd} if rank == 0 else {}
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, FOREVER, wait_for_workers=False, **given)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        backend = "nccl" if where.type == "cuda" and own else "gloo"
        bound = {"device_id": where} if backend == "nccl" else {}
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=FOREVER, **bound)
        self._mesh = Mesh.of_group(device=where)

    def use(self, mesh: Any) -> None:
        """Be the rank that a mesh says, in a process that is one already."""
        self.rank, self._mesh, self._moves = mesh.rank, mesh, mesh.rank > 0

    def _go(self, folder: str) -> None:
        if self._moves:
            with contextlib.suppress(OSError):  # what is read from one that is not there says so
                os.chdir("/")
                os.chdir(folder)

    def do_load(self, model: str, layout: str | None, options: dict[str, Any], folder: str) -> dict[str, Any]:
        """Load the model, as a rank of the group. folder: what paths are relative to, here and in what follows."""
        from fastvid.distributed.layout import parse_parallel
        from fastvid.models.loaded import LoadOptions
        from fastvid.pipeline.load import load_model
        from fastvid.pipeline.pipeline import Pipeline

        self._go(folder)
        options["device"] = str(self._mesh.device)
        asked = parse_parallel(layout).layout if layout else None
        self._pipe = Pipeline(load_model(model, LoadOptions(**options, layout=asked), self._mesh), STREAMS)
        return self._pipe.describe()

    def do_start(
        self, id: int, verb: str, options: dict[str, Any], keep_frames: bool, keep_latents: bool, folder: str
    ) -> None:
        """Open the stream of a request."""
        self._go(folder)
        self._streams[id] = folder, self._pipe._start(verb, options, keep_frames, keep_latents)

    def do_resume(self, id: int, path: str, options: dict[str, Any], folder: str) -> bool:
        """Open that of one that goes on."""
        self._go(folder)
        self._streams[id] = folder, self._pipe.resume(path, **options)
        return True

    def do_next(self, id: int, prompt: str | None = None) -> Any:
        """The stream's next event, or None; prompt: to show from the next window on."""
        folder, stream = self._streams[id]
        self._go(folder)
        if prompt is not None:
            stream.change_prompt(prompt)
        return next(stream, None)

    def do_close(self, ids: list[int]) -> None:
        """Let go of streams."""
        for id in ids:
            if id in self._streams:
                folder, stream = self._streams.pop(id)
                self._go(folder)
                stream.close()

    def do_call(self, name: str, given: list[Any], options: dict[str, Any], folder: str) -> Any:
        """One of the pipeline's other methods."""
        if name not in ("plan", "embed", "encode", "decode", "describe", "inspect", "set_loras"):
            raise ValueError(f"{name} is nothing that a pipeline can be asked for")
        self._go(folder)
        return getattr(self._pipe, name)(*given, **options)

    def do_wait(self, seconds: float) -> None:
        """Do nothing for a while: for tests of what happens then."""
        time.sleep(seconds)

    def close(self) -> None:
        """Leave the group."""
        self._streams.clear()
        if self._mesh is not None and self._mesh.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def device_of(device: str | None, rank: int) -> tuple[Any, bool]:
    """A rank's device, and whether it is its own: "cuda" (or None where there is one) is one for each rank on a host,
    "cuda:0" the same one for all."""
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type != "cuda" or where.index is not None:
        return where, False
    return torch.device("cuda", rank % max(torch.cuda.device_count(), 1)), True


if __name__ == "__main__":
    main()
    sys.stdout.flush()
