"""`python -m fastvid.workers.worker`: one rank of a pipeline, in a process that the pipeline's program has started.

All ranks get the same commands in the same order and do one after another. So they reach every exchange of tensors
together, and a request is cancelled at the same step everywhere. Rank 0 answers with the result, the others that they
are done. Messages (`fastvid.workers.messages`) go over the socket that is standard input. A thread sends heartbeats, by
which the program sees a rank that hangs; when the program is gone, the worker ends.
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
from multiprocessing.connection import Connection
from typing import Any

from fastvid import notices
from fastvid.workers.channel import Channel, Closed, Message
from fastvid.workers.messages import HEARTBEAT, pack, pack_error, unpack

HEARTBEAT_INTERVAL = 0.5  # seconds
MAX_STREAMS = 1000  # the program limits how many requests run at once
CALLS = ("plan", "embed", "encode", "decode", "describe", "inspect", "set_loras", "calibrate", "warmup")


def main() -> None:
    """Serve the program until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the program
    channel, server = Channel(Connection(os.dup(0))), WorkerServer()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    serve(channel, server)
    server.close()


def serve(channel: Channel, server: WorkerServer, in_program: bool = False) -> None:
    """Answer commands until one says to exit. When the program is gone, whatever runs here, this process ends.

    in_program: this is the program's own process.
    """
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    parent = os.getppid()

    def end() -> None:
        inbox.put(None)
        if not in_program:
            os._exit(0)

    def receive() -> None:
        with contextlib.suppress(Closed):
            while True:
                inbox.put(channel.receive())
        end()

    def send_heartbeats() -> None:
        with contextlib.suppress(Closed):
            while in_program or os.getppid() == parent:  # a fork of the program may hold the other end open
                channel.send(Message({HEARTBEAT: True}), timeout=HEARTBEAT_INTERVAL)  # an answer is a sign as well
                time.sleep(HEARTBEAT_INTERVAL)
        end()

    threading.Thread(target=receive, name="fastvid-commands", daemon=True).start()
    threading.Thread(target=send_heartbeats, name="fastvid-heartbeats", daemon=True).start()
    with contextlib.suppress(Closed):
        while (message := inbox.get()) is not None:
            channel.send(server.answer(message))
            if message.header["do"] == "exit":
                break


class WorkerServer:
    """A rank's pipeline and its open streams. The command {"do": NAME, ...} calls the method do_NAME."""

    def __init__(self) -> None:
        self.rank = 0
        self.mesh: Any = None
        self._changes_folder = True  # the program's own process stays where it is
        self._pipe: Any = None
        self._streams: dict[int, tuple[str, Any]] = {}  # and the folder that paths are relative to

    def answer(self, message: Message) -> Message:
        """Do what a message says, and return the result or the error."""
        head: dict[str, Any] = {"number": message.header.get("number")}
        with notices.collected() as texts:  # all ranks have the same to say, so rank 0 says it
            try:
                values = unpack(message)
                values.pop("number", None)
                result = getattr(self, f"do_{values.pop('do')}")(**values)
                head["warnings"] = texts if self.rank == 0 else []
                return pack({**head, "result": result if self.rank == 0 else None})
            except BaseException as error:
                return pack({**head, "error": {**pack_error(error), "trace": traceback.format_exc()[-4000:]}})

    def do_join(self, rank: int, size: int, port: int, fd: int | None, device: str | None, threads: int | None) -> None:
        """Join the ranks' process group, which meets at a port of this machine. fd: rank 0's socket that listens there.
        threads: of PyTorch, if they are not as many as it chooses."""
        import torch
        import torch.distributed as dist

        from fastvid.distributed.mesh import FOREVER, Mesh

        self.rank = rank
        if threads is not None:
            torch.set_num_threads(threads)
        listening: dict[str, Any] = {"master_listen_fd": fd} if fd is not None else {}
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, FOREVER, wait_for_workers=False, **listening)
        own_device = init_process_group(device, rank, store=store, rank=rank, world_size=size)
        self.mesh = Mesh.of_group(device=own_device)

    def join_as(self, mesh: Any) -> None:
        """Be a rank of a mesh that exists. Rank 0 is in the program's own process."""
        self.rank, self.mesh, self._changes_folder = mesh.rank, mesh, mesh.rank > 0

    def do_load(self, model: str, layout: str | None, options: dict[str, Any], folder: str) -> dict[str, Any]:
        """Load the model, and describe it. folder: what paths are relative to."""
        from fastvid.distributed.layout import parse_parallel
        from fastvid.models.loaded import LoadOptions
        from fastvid.pipeline.load import load_model
        from fastvid.pipeline.pipeline import Pipeline

        self._enter(folder)
        set_device(self.mesh.device)
        options["device"] = str(self.mesh.device)
        wanted = parse_parallel(layout).layout if layout else None
        self._pipe = Pipeline(load_model(model, LoadOptions(**options, layout=wanted), self.mesh), MAX_STREAMS)
        description: dict[str, Any] = self._pipe.describe()
        return description

    def do_start(
        self, id: int, verb: str, options: dict[str, Any], keep_frames: bool, keep_latents: bool, folder: str
    ) -> None:
        """Open the stream of a request."""
        self._enter(folder)
        self._streams[id] = folder, self._pipe._start(verb, options, keep_frames, keep_latents)

    def do_resume(self, id: int, path: str, options: dict[str, Any], folder: str) -> None:
        """Open the stream of a request that goes on from its checkpoint."""
        self._enter(folder)
        self._streams[id] = folder, self._pipe.resume(path, **options)

    def do_next(self, id: int, prompt: str | None = None) -> Any:
        """The next event of a stream; None at its end. prompt: see Stream.change_prompt."""
        folder, stream = self._streams[id]
        self._enter(folder)
        if prompt is not None:
            stream.change_prompt(prompt)
        return next(stream, None)

    def do_close(self, ids: list[int]) -> None:
        """Close streams."""
        for id in ids:
            if id in self._streams:
                folder, stream = self._streams.pop(id)
                self._enter(folder)
                stream.close()

    def do_exit(self) -> None:
        """Nothing more: `serve` ends."""

    def do_call(self, name: str, args: list[Any], options: dict[str, Any], folder: str) -> Any:
        """Call one of the pipeline's other methods."""
        if name not in CALLS:
            raise ValueError(f"{name} is not a call; allowed are {', '.join(CALLS)}")
        self._enter(folder)
        return getattr(self._pipe, name)(*args, **options)

    def _enter(self, folder: str) -> None:
        """Make a folder the current one. Where it is gone, reading from it raises."""
        if self._changes_folder:
            with contextlib.suppress(OSError):
                os.chdir("/")
                os.chdir(folder)

    def close(self) -> None:
        """Leave the process group."""
        self._streams.clear()
        if self.mesh is not None and self.mesh.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def init_process_group(name: str | None, local_rank: int, **where: Any) -> Any:
    """Initialize torch.distributed, unless it is, and return this rank's device. name: the device that was asked for.
    local_rank: among the ranks of this host. where: how the ranks meet."""
    import torch.distributed as dist

    from fastvid.distributed.mesh import FOREVER

    device, own = rank_device(name, local_rank)
    set_device(device)
    if not dist.is_initialized():
        nccl = device.type == "cuda" and own
        bound = {"device_id": device} if nccl else {}
        dist.init_process_group("nccl" if nccl else "gloo", timeout=FOREVER, **bound, **where)
    return device


def set_device(device: Any) -> None:
    """Make a GPU the current one of this thread."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def rank_device(name: str | None, local_rank: int) -> tuple[Any, bool]:
    """A rank's device, and whether no other rank has it. "cuda" (or None where there is one) is another GPU for each
    rank of a host, "cuda:0" the same one for all."""
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" or device.index is not None:
        return device, False
    return torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1)), True


if __name__ == "__main__":
    main()
    sys.stdout.flush()
