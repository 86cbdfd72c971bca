"""What a result says of the machine that it was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastvid.device.devices import cpu_name, driver
from fastvid.ops import dispatch

ROOT = Path(__file__).parents[2]  # of a checkout


def machine(device: torch.device) -> dict[str, Any]:
    """A description of the machine, for results."""
    return {
        "device": device_name(device),
        "arch": dispatch.architecture(device),
        "driver": driver() if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017 - for 3.10
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {cpu_name()}"


def commit() -> str:
    """The current commit, with a + if there are changes; "unknown" outside a checkout."""
    if not (ROOT / ".git").exists():
        return "unknown"
    head = _git("rev-parse", "--short=12", "HEAD")
    return f"{head}{'+' if _git('status', '--porcelain', '--untracked-files=no') else ''}" if head else "unknown"


def _git(*words: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
