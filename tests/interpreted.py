"""Tests marked `interpret` run in a child process in which Triton interprets kernels on CPU tensors."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


def run_interpreted(file: str, only: str = "") -> None:
    """Run the tests of a file that are marked `interpret`, or only those whose names match; what fails there fails
    here, with its output."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the child process")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpret", "-p", "no:cacheprovider", "-k", only, file]
    child = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert re.search(r"\b\d+ passed", child.stdout)
