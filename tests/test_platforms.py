"""A plain `generate` needs nothing that only POSIX systems have, and no Triton: it runs on macOS and Windows too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Hides modules and functions as if the system did not have them, then runs the command line.
HIDDEN = """
import os, signal, sys

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "triton")


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


for name in MODULES:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
import torch  # torch itself may look for some of these at import

for name in ("register_at_fork", "getuid", "geteuid", "getgid", "fork", "sched_getaffinity", "getloadavg", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGSTOP"):
    if hasattr(signal, name):
        delattr(signal, name)
"""

RUN = """
from fastvid.cli import main

status = main(["generate", "a red circle moving right on a white background", "--steps", "1", "--quiet",
               "--device", "cpu", "-o", sys.argv[1]])
sys.exit(status)
"""


def test_generate_needs_no_posix_and_no_triton(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    done = subprocess.run([sys.executable, "-c", HIDDEN + RUN, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert out.stat().st_size > 1000


def test_they_are_really_hidden() -> None:
    code = HIDDEN + "\nimport triton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "No module named 'triton'" in done.stderr
