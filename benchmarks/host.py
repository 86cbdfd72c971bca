"""What results are named after, and the GPU by its driver. Without torch, which may hang where a GPU does."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache  # asking the driver can take a second
def gpu(what: str) -> str:
    """A property of the first GPU, as nvidia-smi names it: "name", "compute_cap", "driver_version"; "" without one."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.partition("\n")[0].strip()


def earlier(file: Path) -> Path:
    """A result as it was before this call: in the folder of results, if it is not yet in $OUT."""
    return file if file.exists() else RESULTS / file.name


def slug(text: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200", as in the names of results."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
