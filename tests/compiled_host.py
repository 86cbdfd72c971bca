"""csrc/'s headers on the CPU: a file of tests/csrc/ compiled with them by the host compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))


def compile_host(name: str, *folders: Path) -> ctypes.CDLL:
    """A library of tests/csrc/<name>, compiled once for what the sources hold. folders: of headers that stand for
    others'."""
    source = ROOT / "tests/csrc" / name
    headers = [path for folder in (ROOT / "tests/csrc", ROOT / "csrc", *folders) for path in sorted(folder.glob("*.h"))]
    held = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *headers))).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"fastvid-{source.stem}-{os.getuid()}-{held}.so")
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.so")
        flags = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run(
            [CXX, *flags, *(f"-I{folder}" for folder in (ROOT / "csrc", *folders)), source, "-o", made], check=True
        )
        made.replace(target)
    return ctypes.CDLL(str(target))
