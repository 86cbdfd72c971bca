"""Runs a function on several ranks: processes on this machine that are connected by gloo over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

CHILD = """
import datetime, importlib, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
rank, size, port, module, name, *args = sys.argv[1:]
store = dist.TCPStore("127.0.0.1", int(port), int(size), is_master=False, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(size))
from fastvid.distributed.mesh import Mesh
getattr(importlib.import_module(module), name)(Mesh.of_group(), *args)
dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(size: int, function, *args: str, timeout: float = 300) -> list[str]:
    """function(mesh, *args) on so many ranks; args are strings. What each has printed; fails if one of them does."""
    import torch.distributed as dist

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, size, True, wait_for_workers=False, master_listen_fd=listener.detach())
    paths = os.pathsep.join(
        filter(None, [str(TESTS), *map(str, filter(Path.is_dir, TESTS.iterdir())), os.environ.get("PYTHONPATH")])
    )
    env = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(port), function.__module__, function.__name__, *args],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        ended = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    del store
    failed = [
        f"rank {r}:\n{err[-3000:]}" for r, (c, (_, err)) in enumerate(zip(children, ended, strict=True)) if c.returncode
    ]
    assert not failed, "\n".join(failed)
    return [out for out, _ in ended]
