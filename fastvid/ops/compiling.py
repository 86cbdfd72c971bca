"""Functions compiled by torch.compile, each once for all numbers of tokens, and in the same way in every process.

A function is compiled for one device, one set of dtypes and one set of fixed sizes (widths of a model), at its first
call. Sizes of a request stay symbolic. It is compiled on stand-ins of one fixed shape, not on the call's own tensors:
what Inductor makes depends a little on sizes that it sees, and equal requests have to give equal bytes whatever ran
before.

Inductor keeps what it compiles in its own cache on disk (TORCHINDUCTOR_CACHE_DIR), for later processes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastvid import notices

# Sizes of the stand-ins, by letter. They differ, because torch.compile takes equal ones for one size.
SIZES = {"R": 2048, "G": 6, "n": 256, "K": 3, "C": 32, "T": 5, "P": 1024}
LARGEST = 2**31  # elements of a tensor: from here on compiled indices would need 64 bits, another compilation
COMPILERS = ("g++", "clang++", "cl")
PATIENCE = 60.0  # seconds to wait for a trace of another thread

_lock = threading.RLock()  # compiling and calling exclude each other: traces are global in torch
_compiled: dict[tuple[Any, ...], Callable[..., Any] | None] = {}  # None: it cannot be compiled
_warned: set[str] = set()


def run(
    body: Callable[..., Any],
    spec: Sequence[str],
    tensors: Sequence[Tensor],
    static: tuple[Any, ...],
    eager: Callable[[], Any],
) -> Any:
    """body(*tensors, *static), compiled; what eager() returns if it cannot be compiled, with a warning.

    spec: for each tensor a letter per dimension, of SIZES for a size of the request, "." for a fixed size: "R." for
    tokens [R, d]. Tensors are contiguous. Sizes of 1, tensors of 2^31 elements and gradients would each need another
    compilation: these calls run eager().
    """
    if not _usual(spec, tensors):
        return eager()
    key = _key(body, spec, tensors, static)
    with _lock:
        if key not in _compiled:
            _compiled[key] = _compile(body, spec, tensors, static)
        function = _compiled[key]
        if function is not None:
            try:
                return _call(function, [x.detach() for x in tensors], static)  # parameters are of another type
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of whichever of torch's many layers
                result = eager()  # raises what has nothing to do with compiling
                _compiled[key] = None
                _warn(body, error)
                return result
    return eager()


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None if it can, as far as one can tell before."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (there is one for Linux)"
        old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0)
        return "torch.compile needs sm_70 or newer" if old else None
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), *COMPILERS)):
        return f"torch.compile needs a C++ compiler ({', '.join(COMPILERS)})"
    return None


def _usual(spec: Sequence[str], tensors: Sequence[Tensor]) -> bool:
    for letters, x in zip(spec, tensors, strict=True):
        if x.numel() >= LARGEST or x.device.type == "meta" or (x.requires_grad and torch.is_grad_enabled()):
            return False
        if any(letter != "." and size < 2 for letter, size in zip(letters, x.shape, strict=True)):
            return False
    return True


def _key(
    body: Callable[..., Any], spec: Sequence[str], tensors: Sequence[Tensor], static: tuple[Any, ...]
) -> tuple[Any, ...]:
    sizes = (
        (x.dtype, *(size for letter, size in zip(letters, x.shape, strict=True) if letter == "."))
        for letters, x in zip(spec, tensors, strict=True)
    )
    return body, tuple(spec), tensors[0].device, static, *sizes


def _compile(
    body: Callable[..., Any], spec: Sequence[str], tensors: Sequence[Tensor], static: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """The compiled function, which has run once; None if it failed, which the caller's next line will notice."""
    try:
        function = torch.compile(_copy(body), dynamic=False, fullgraph=True, options=_options())
        _call(function, [_stand_in(letters, x) for letters, x in zip(spec, tensors, strict=True)], static)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whichever of torch's many layers
        _warn(body, error)
        return None
    return function


def _call(function: Callable[..., Any], tensors: Sequence[Tensor], static: tuple[Any, ...]) -> Any:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with torch.no_grad():
                return function(*tensors, *static)
        except RuntimeError as error:
            # A caller's other thread traces a model of its own, and torch knows one trace a process.
            if "FX to symbolically trace" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _copy(body: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own code object: torch keeps compilations by code, and gives up after eight of one."""
    assert isinstance(body, FunctionType)
    code = body.__code__.replace(co_name=f"{body.__name__}_{len(_compiled)}")
    return FunctionType(code, body.__globals__, code.co_name)


def _stand_in(letters: str, x: Tensor) -> Tensor:
    shape = [size if letter == "." else SIZES[letter] for letter, size in zip(letters, x.shape, strict=True)]
    made = torch.zeros(shape, dtype=x.dtype, device=x.device)
    for place, letter in enumerate(letters):
        if letter != ".":
            torch._dynamo.mark_dynamic(made, place)
    return made


@functools.cache
def _options() -> dict[str, Any]:
    """Compiled in this process, one kernel at a time, and no choice by measured time, which would change bytes."""
    from torch._inductor import config

    wanted = {"compile_threads": 1, "triton.cudagraphs": False, "max_autotune": False, "deterministic": True}
    return {name: value for name, value in wanted.items() if name in config.get_config_copy()}


def _warn(body: Callable[..., Any], error: Exception) -> None:
    name = body.__name__.strip("_")
    if name in _warned:
        return
    _warned.add(name)
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    notices.warn(
        f"{name} was not compiled and runs in eager PyTorch, slower: {lines[0][:200]}. "
        "torch.compile needs Triton and a C compiler on a GPU, a C++ compiler on a CPU"
    )
