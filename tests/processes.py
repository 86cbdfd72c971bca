"""What tests of other processes look at: who is alive, who listens where."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_here() -> set[int]:
    """Workers that this process has."""
    own = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found = {int(pid) for path in own for pid in path.read_text().split()}
    return {pid for pid in found if alive(pid) and b"fastvid.workers.worker" in _command_line(pid)}


def _command_line(pid: int) -> bytes:
    """Empty if the process ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def listening(pids: set[int]) -> list[str]:
    """Addresses, as /proc has them, on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes]


def off(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two videos' bytes."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())
