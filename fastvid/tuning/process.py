"""A child process that tunes one family, as its parent sees it: its messages, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

COMMAND = (sys.executable, "-m", "fastvid.tuning.child")
TOLD = 300  # characters of a dead child's last line that are shown


@dataclass(frozen=True)
class Fault:
    """How a child ended before its work was done. at: what it was at; empty if nothing. backend: the one that ran; ""
    if none did. since: when that began."""

    at: Mapping[str, Any]
    backend: str
    why: str
    since: float


class Child:
    """A running child with its job. As a context: it has ended, and everything it started, when the block does."""

    def __init__(self, job: Mapping[str, Any], folder: Path) -> None:
        self._job, self._folder = job, folder
        self._mark, self._errors = folder / "mark", folder / "errors"
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def __enter__(self) -> Child:
        self._mark.write_bytes(b"\0")
        places = os.pathsep.join(filter(None, sys.path))  # so that it finds the package that this process uses
        with open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=Path(__file__).parents[2],  # where no file of the user's shadows a module
                env={**os.environ, "PYTHONPATH": places},
                start_new_session=True,  # Ctrl-C is for the parent
                text=True,
                encoding="utf-8",
            )
        threading.Thread(target=self._read, name="fastvid-tune", daemon=True).start()
        job = {**self._job, "mark": str(self._mark), "threads": torch.get_num_threads()}
        with contextlib.suppress(OSError):  # it has ended already, as its messages will show
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._messages.put(cast("dict[str, Any]", json.loads(line)))
        self._messages.put(None)

    def message(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None if it has ended, {} if it has said nothing for so long."""
        try:
            return self._messages.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return {}

    def fault(self, at: Mapping[str, Any], since: float, limit: float | None) -> Fault:
        """What has happened to it. limit: the seconds in which it said nothing; None: it has ended."""
        backend = at.get("backend") or self._running(at)
        if limit is not None:
            return Fault(at, backend, f"it hung: nothing came of it in {limit:.0f} s", since)
        status = self._process.wait()
        names = {one.value: one.name for one in signal.Signals}  # real-time signals have none
        how = f"exit status {status}" if status >= 0 else names.get(-status, f"signal {-status}")
        lines = self._errors.read_bytes().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][:TOLD]}" if lines else ""
        plain = "".join(c if c.isprintable() else " " for c in f"it crashed ({how}){said}")
        return Fault(at, backend, plain, since)

    def _running(self, at: Mapping[str, Any]) -> str:
        """The back end that runs while several take turns."""
        number = self._mark.read_bytes()[0]
        turns = at.get("of") or [""]
        return str(turns[number]) if number < len(turns) else ""
