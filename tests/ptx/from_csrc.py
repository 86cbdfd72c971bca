"""csrc/'s kernels and their launchers: a .cu file compiled by nvcc to PTX and host code, over a runtime that records
what is launched (tests/csrc/recorded_runtime.cpp). So grids, blocks, shared memory, parameters and tensor maps are
those that the launchers give a device."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptx.machine import Launch, Machine
from ptx.memory import Global
from ptx.parse import parse
from torch import Tensor

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which(
    "nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
)
# The level is that of the host code; device code is optimized fully, as in setup.py.
FLAGS = ("-O0", "-std=c++17", "-cudart=none", "-gencode=arch=compute_90a,code=compute_90a", "-shared")
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # of csrc/fastvid.h


class Recorded(ctypes.Structure):
    """`Launch` of recorded_runtime.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("shared", ctypes.c_uint64),
        ("params", ctypes.POINTER(ctypes.c_void_p)),
    )


LISTENER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Recorded))


@dataclass(frozen=True)
class Source:
    """A .cu file: its launchers, and its PTX."""

    library: ctypes.CDLL
    symbols: tuple[str, ...]
    text: str

    def launcher(self, name: str) -> ctypes._NamedFuncPointer:
        """fastvid::name."""
        (symbol,) = [one for one in self.symbols if one.startswith(f"_ZN7fastvid{len(name)}{name}E")]
        return self.library[symbol]

    def record(self, name: str, arguments: Sequence[object], processors: int = 132, text: str = "") -> list[Launch]:
        """What a launcher asks for on a device of so many multiprocessors. text: PTX in the place of the file's own.
        Raises ValueError for the error that it returns."""
        made: list[Launch] = []
        listener = LISTENER(lambda recorded: made.append(self.launch_of(recorded.contents, text or self.text)))
        self.library.recorded_listen(listener, processors)
        error = self.launcher(name)(*arguments)
        self.library.recorded_listen(LISTENER(), processors)
        if error:
            raise ValueError(f"{name} returns the CUDA error {error}")
        return made

    def launch_of(self, recorded: Recorded, text: str) -> Launch:
        kernel = _parsed(text, recorded.kernel.decode())
        params = bytearray(max(param.offset + param.size for param in kernel.params.values()))
        for i, param in enumerate(kernel.params.values()):
            params[param.offset : param.offset + param.size] = ctypes.string_at(recorded.params[i], param.size)
        clusters = kernel.directives.get("reqnctapercluster", (1,))
        cluster = recorded.cluster or clusters[0] * (clusters[1:2] or (1,))[0]
        check_bounds(kernel.directives, tuple(recorded.block))
        return Launch(kernel, tuple(recorded.grid), tuple(recorded.block), recorded.shared, bytes(params), cluster)


@functools.cache
def _parsed(text: str, name: str):  # noqa: ANN202
    return parse(text, name)


def check_bounds(directives: dict[str, tuple[int, ...]], block: tuple[int, ...]) -> None:
    """A block that is larger than a kernel was compiled for would not be launched."""
    most = directives.get("maxntid", (1024,))
    threads = block[0] * block[1] * block[2]
    assert threads <= most[0] * (most[1:2] or (1,))[0] * (most[2:3] or (1,))[0], (block, most)


@functools.cache
def compile_source(name: str) -> Source:
    """csrc/<name>.cu, compiled once for what the sources hold."""
    files = [*sorted((ROOT / "csrc").glob("*.h")), ROOT / f"csrc/{name}.cu", ROOT / "csrc/device.cu"]
    runtime = ROOT / "tests/csrc/recorded_runtime.cpp"
    held = hashlib.sha256(b"".join(path.read_bytes() for path in (*files, runtime))).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"fastvid-ptx-{name}-{os.getuid()}-{held}")
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
            built = Path(folder, "built")
            built.mkdir()
            sources = [str(path) for path in (*files[-2:], runtime)]
            keep = ["--keep", f"--keep-dir={folder}", "-Xcompiler=-fPIC"]
            subprocess.run([NVCC, *FLAGS, *keep, "-o", built / "lib.so", *sources], check=True, capture_output=True)
            shutil.copy(Path(folder, f"{name}.ptx"), built / "kernels.ptx")
            try:
                built.rename(target)
            except OSError:  # another process was faster
                assert target.exists()
    listed = subprocess.run(["nm", "-D", target / "lib.so"], capture_output=True, text=True, check=True).stdout
    symbols = tuple(re.findall(r" T (\S+)", listed))
    return Source(ctypes.CDLL(str(target / "lib.so")), symbols, (target / "kernels.ptx").read_text())


def interpret(launches: Sequence[Launch], tensors: Sequence[Tensor | None], seed: int = 0) -> None:
    """One after the other, as on a stream. Raises Fault."""
    memory = Global([tensor for tensor in tensors if tensor is not None])
    for launch in launches:
        Machine(launch, memory, seed).run()


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def numbers(call: dict[str, tuple[int, ...] | int]) -> ctypes.Array:
    """A call as its C++ struct of 64-bit integers has it."""
    flat = [number for value in call.values() for number in (value if isinstance(value, tuple) else (value,))]
    return (ctypes.c_int64 * len(flat))(*flat)
