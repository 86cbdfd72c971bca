"""Commands under a time limit, each in a session of its own: what hangs is killed with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FINE, NOT_STARTED = "done", 127
AFTER_A_KILL = 10.0  # seconds: a process that waits for the driver may be impossible to kill


@dataclass(frozen=True)
class Ended:
    """How a command ended. how: "done", "status 1", "killed by signal 11", "stopped after 9 s" or "not started: ...";
    code: its status, or None if it was stopped."""

    how: str
    code: int | None
    seconds: float


def run(
    command: Sequence[str],
    seconds: float,
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace: float = 0,
) -> Ended:
    """Run a command, with its output in `log`, for at most so many seconds. grace: seconds that it has to end by itself
    after an interrupt, as by Ctrl-C; without it, it is killed at once."""
    begun = time.monotonic()
    with log.open("w") as output:
        try:
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
            )
        except OSError as error:
            return Ended(f"not started: {command[0]}: {error.strerror}", NOT_STARTED, 0.0)
        try:
            code = _wait(child, seconds, grace)
        finally:  # its children too: ranks hold the device
            _signal(child, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(AFTER_A_KILL)
    taken = time.monotonic() - begun
    if code is None:
        return Ended(f"stopped after {seconds:.0f} s", None, taken)
    how = FINE if code == 0 else f"status {code}" if code > 0 else f"killed by signal {-code}"
    return Ended(how, code, taken)


def _wait(child: subprocess.Popen[bytes], seconds: float, grace: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(max(seconds, 0.1))
    if grace:
        _signal(child, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    return None


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def tail(log: Path, characters: int = 4000) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""
