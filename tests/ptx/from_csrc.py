"""csrc/'s kernels, launchers and bindings: `fastvid._C` with PTX for machine code, over a runtime that records what is
launched (tests/csrc/recorded_runtime.cpp). So grids, blocks, shared memory, parameters and tensor maps are those that a
device would be given."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptx.machine import Launch, Machine
from ptx.memory import Global
from ptx.parse import parse
from torch import Tensor

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "tests/csrc/recorded_runtime.cpp"
NVCC = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which(
    "nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
)
# The level is that of the host code; device code is optimized fully, as in setup.py.
FLAGS = ("-O0", "-std=c++17", "-cudart=none", "-gencode=arch=compute_90a,code=compute_90a")


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
class Extension:
    """`fastvid._C` over the recorded runtime, and the PTX of each .cu file."""

    module: Any
    runtime: ctypes.CDLL
    texts: Mapping[str, str]

    def record(self, call: Callable[[Any], None], processors: int = 132, text: str = "") -> list[Launch]:
        """What `call` of the module asks for on a device of so many multiprocessors. text: PTX in the place of what
        nvcc made. Raises what the module raises."""
        made: list[Launch] = []
        listener = LISTENER(lambda recorded: made.append(self.launch_of(recorded.contents, text)))
        self.runtime.recorded_listen(listener, processors)
        try:
            call(self.module)
        finally:
            self.runtime.recorded_listen(LISTENER(), processors)
        return made

    def launch_of(self, recorded: Recorded, text: str) -> Launch:
        name = recorded.kernel.decode()
        kernel = _parsed(next(one for one in (text, *self.texts.values()) if name in one), name)
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
def extension() -> Extension:
    """Compiled once for what the sources hold."""
    files = [*sorted((ROOT / "csrc").iterdir()), RUNTIME]
    held = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"fastvid-ptx-{os.getuid()}-{held}")
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the first one
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
                build(Path(folder))
                Path(folder, "built").rename(target)
    library = str(target / "_C.so")
    spec = importlib.util.spec_from_file_location(
        "recorded._C", library
    )  # a built fastvid._C would be found by its name
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Extension(module, ctypes.CDLL(library), {path.stem: path.read_text() for path in target.glob("*.ptx")})


def build(folder: Path) -> None:
    """folder/built: the module, and the PTX of each .cu file."""
    built = folder / "built"
    built.mkdir()
    includes = [f"-I{path}" for path in (setup().pybind11_include(), sysconfig.get_path("include"))]
    names = {"ARCHS": '"90a"', "CUDA_VERSION": '"0"', "SOURCE_HASHES": "{}"}
    defines = [f"-DFASTVID_{name}={value}" for name, value in names.items()]

    def compile_one(source: Path) -> Path:
        own = folder / source.stem
        own.mkdir()
        keep = ["--keep", f"--keep-dir={own}"] if source.suffix == ".cu" else [*includes, *defines]
        command = [NVCC, *FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", *keep, "-c", source, "-o", own / "made.o"]
        subprocess.run(command, check=True, capture_output=True)
        for made in own.glob(f"{source.stem}.ptx"):
            shutil.copy(made, built / made.name)
        return own / "made.o"

    with ThreadPoolExecutor(2) as pool:
        sources = [*(ROOT / "csrc").glob("*.cu"), ROOT / "csrc/bindings.cpp", RUNTIME]
        objects = list(pool.map(compile_one, sources))
    link = [os.environ.get("CXX", "g++"), "-shared", "-Wl,-Bsymbolic"]  # a real runtime may be loaded beside this one
    subprocess.run([*link, "-o", built / "_C.so", *objects], check=True)


@functools.cache
def setup() -> Any:
    spec = importlib.util.spec_from_file_location("fastvid_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpret(launches: Sequence[Launch], tensors: Sequence[Tensor | None], seed: int = 0) -> None:
    """One after the other, as on a stream. Raises Fault."""
    memory = Global([tensor for tensor in tensors if tensor is not None])
    for launch in launches:
        Machine(launch, memory, seed).run()
