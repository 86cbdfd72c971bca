"""The arithmetic of a pipeline is its own: inside `computing`, the modes that the caller has set change nothing.

    of this thread     torch.compile (see `eager`), grad and inference mode, autocast, default device, torch's function,
                       dispatch and functorch modes, flushing of denormal numbers, numpy's error state
    of the process     TF32 and bf16 shortcuts (fp32 is IEEE fp32, in both of torch's interfaces), cuDNN's and oneDNN's
                       switches, reduced precision of sums, kinds of attention kernels, deterministic algorithms
                       (fastvid's always are)

The default dtype belongs to the process, and other threads need it, so it stays: our code names every dtype. The number
of threads stays as well; sums of fp32 may depend on it.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch.utils import _device, _python_dispatch

from fastvid import notices
from fastvid.errors import Error

# At run time these modules are objects with more attributes than torch's types know.
_MKLDNN: Any = torch.backends.mkldnn
_CUDNN: Any = torch.backends.cudnn
_MATMUL: Any = torch.backends.cuda.matmul
_CUDA: Any = torch.backends.cuda
_FRAMES: Any = torch._C._dynamo.eval_frame
# Of fp32, by library and kind of operation; what is set for all comes first.
PRODUCTS = (("mkldnn", "matmul"), ("cuda", "matmul"))
PRECISIONS = (("generic", "all"), ("mkldnn", "all"), ("cuda", "all"), *PRODUCTS, ("mkldnn", "conv"), ("cuda", "conv"))
_precision_of: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_set_precision: Callable[[str, str, str], Any] = torch._C._set_fp32_precision_setter
SWITCHES = (
    (_MKLDNN, "enabled", True),
    (_CUDNN, "enabled", True),
    (_CUDNN, "benchmark", False),  # it would choose algorithms by their time
    (_CUDNN, "deterministic", False),
    (_MATMUL, "allow_fp16_reduced_precision_reduction", True),
    (_MATMUL, "allow_bf16_reduced_precision_reduction", True),
)
ATTENTION_KERNELS = ("flash", "mem_efficient", "math", "cudnn")
DEVICE_TYPES = ("cpu", "cuda")

Undo = Callable[[], None]
P = ParamSpec("P")
T = TypeVar("T")


class _Process:
    """The settings of the process, which concurrent users share: the first to enter saves the caller's, the last to
    leave puts them back. Also knows whether the process can compute: a forked child has its parent's memory, but not
    its threads."""

    def __init__(self) -> None:
        self._lock, self._inside, self._used = threading.Lock(), 0, False
        self._undo: list[Undo] = []
        self._forked_inside = self._forked_after_use = False

    def enter(self) -> None:
        self._check()
        with self._lock:
            if self._inside == 0:
                self._undo = _own_switches() if self._used else _without_warnings(_own_switches)
            self._inside += 1
            self._used = True

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def forked(self) -> None:
        """In a forked child."""
        self._forked_inside |= self._inside > 0
        self._forked_after_use |= self._used
        self._restore()
        self._lock, self._inside = threading.Lock(), 0  # a thread that is not here may have held the lock

    def _check(self) -> None:
        if self._forked_inside:
            why = "while a request ran, whose locks nobody opens here"
        elif self._forked_after_use and torch.get_num_threads() > 1:
            why = (
                "after fastvid had computed there, and torch's threads are not here (torch.set_num_threads(1) would do)"
            )
        else:
            return
        raise Error(
            f"this process was forked {why}; start it with multiprocessing's 'spawn' or 'forkserver', or fork before "
            f"the first fastvid.load"
        )

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()


def settings() -> dict[str, Any]:
    """The settings of torch that a call of an operation leaves as they are, by name."""
    found: dict[str, Any] = {
        f"{library} {kind} precision": _precision_of(library, kind) for library, kind in PRECISIONS
    }
    found |= {f"{type(owner).__name__}.{name}": getattr(owner, name) for owner, name, _ in SWITCHES}
    found |= {f"{kind} attention": getattr(_CUDA, f"{kind}_sdp_enabled")() for kind in ATTENTION_KERNELS}
    found |= {f"autocast on {kind}": torch.is_autocast_enabled(kind) for kind in DEVICE_TYPES}
    return found | {
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
    }


def _own_switches() -> list[Undo]:
    """Sets the process's switches for a pipeline; returns what sets them back."""
    undo = [_ieee()]

    def change(set_to: Callable[[Any], Any], before: Any, wanted: Any) -> None:
        if before != wanted:
            undo.append(lambda: set_to(before))
            set_to(wanted)

    for owner, name, wanted in SWITCHES:
        change(functools.partial(setattr, owner, name), getattr(owner, name), wanted)
    for kind in ATTENTION_KERNELS:
        change(getattr(_CUDA, f"enable_{kind}_sdp"), getattr(_CUDA, f"{kind}_sdp_enabled")(), True)
    change(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode(), 0)
    return undo


def _without_warnings(function: Callable[[], T]) -> T:
    """Torch 2.9 warns once a process of its old interface to TF32, which is none of the caller's doing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def _ieee() -> Undo:
    """Makes fp32 IEEE fp32; returns what gives both of torch's interfaces what they had.

    In the new one a kind of operations without a value of its own takes that of its library, and a library that of all:
    from the top down, only what then still says something else is changed. The old one, of products, has a state
    beside it, and torch refuses to read it (as cuBLAS and torch.compile do) where they differ.
    """
    before = [_precision_of(*place) for place in PRECISIONS]
    changed = [(place, said) for place, said in zip(PRECISIONS, before, strict=True) if _set_to_ieee(place)]
    products = torch.get_float32_matmul_precision()  # beside "ieee" always readable
    if products != "highest":
        torch.set_float32_matmul_precision("highest")
        for place in PRODUCTS:
            _set_to_ieee(place)

    def undo() -> None:
        if products != "highest":
            torch.set_float32_matmul_precision(products)
            for place in PRODUCTS:
                _set_precision(*place, "none")
        for place, said in changed:
            _set_precision(*place, said)
        for place, said in zip(PRECISIONS, before, strict=True):
            if _precision_of(*place) != said:  # "ieee" of its own, which the old interface has overwritten
                _set_precision(*place, said)

    return undo


def _set_to_ieee(place: tuple[str, str]) -> bool:
    """Whether that was needed."""
    if _precision_of(*place) == "ieee":
        return False
    _set_precision(*place, "ieee")
    return True


_PROCESS = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.forked)


class _Depth(threading.local):
    """How many blocks of `computing` this thread is in."""

    value = 0


_DEPTH = _Depth()


class computing(AbstractContextManager[None]):  # noqa: N801 - used like a function
    """The caller's modes change nothing inside the block; they are back after it.

    Generators never yield inside the block, so a single-threaded caller never sees a change. With several threads, the
    process's settings come back when the last of them leaves. Raises Error in a forked child that cannot compute.

    device: warns of modes that ask for something else than a pipeline on this device does.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device, self._left = device, ExitStack()

    def __enter__(self) -> None:
        _DEPTH.value += 1
        if _DEPTH.value > 1:
            return
        try:
            ignored = [] if self._device is None else list(_ignored(self._device))
            with ExitStack() as entered:
                _enter_all(entered)
                self._left = entered.pop_all()
        except BaseException:
            _DEPTH.value -= 1
            raise
        for message in ignored:
            notices.warn(message)

    def __exit__(self, *_: Any) -> None:
        _DEPTH.value -= 1
        self._left.close()


def _enter_all(entered: ExitStack) -> None:
    """Leaves every mode of this thread, and sets the process's."""
    _PROCESS.enter()
    entered.callback(_PROCESS.leave)
    entered.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))  # numpy's defaults
    if torch._C._functorch.peek_interpreter_stack() is not None:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        entered.enter_context(temporarily_clear_interpreter_stack())
    if torch._C._len_torch_dispatch_stack():
        entered.enter_context(_python_dispatch._disable_current_modes())
    if torch._C._len_torch_function_stack():
        entered.enter_context(_without_function_modes())
    for kind in DEVICE_TYPES:
        if torch.is_autocast_enabled(kind):
            torch.set_autocast_enabled(kind, False)
            entered.callback(torch.set_autocast_enabled, kind, True)
    if torch.is_inference_mode_enabled():  # its tensors could not be changed by later requests
        entered.enter_context(torch.inference_mode(False))
    entered.enter_context(torch.no_grad())
    if _flushes_denormals():
        torch.set_flush_denormal(False)
        entered.callback(torch.set_flush_denormal, True)


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """A function that torch.compile, around a call of it, neither traces nor compiles."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        before = _FRAMES.set_eval_frame(None)
        try:
            return function(*args, **options)
        finally:
            _FRAMES.set_eval_frame(before)

    cast(Any, call)._torchdynamo_disable = True  # what torch.compiler.disable sets, without its import of a second
    return call


def computes(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A pipeline's method that runs in `computing`."""

    @eager
    @functools.wraps(method)
    def call(pipe: Any, /, *args: P.args, **options: P.kwargs) -> T:
        with computing(pipe._model.device):
            return method(pipe, *args, **options)

    return call


class Computed(Generic[T]):
    """The values of a generator, each computed in `computing`."""

    def __init__(self, values: Generator[T, None, None], device: torch.device) -> None:
        self._values, self._device = values, device

    def __next__(self) -> T:
        with computing(self._device):
            return next(self._values)

    def close(self) -> None:
        with computing():
            self._values.close()


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Without torch function modes, among them the default device."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        while modes:
            torch._C._push_on_torch_function_stack(modes.pop())


def _flushes_denormals() -> bool:
    """Whether this thread takes numbers nearest to zero for zero; torch does not tell."""
    return sys.float_info.min / 2 == 0.0


def _ignored(device: torch.device) -> Iterator[str]:
    """What the caller's modes ask for and a pipeline does not do."""
    if torch.is_autocast_enabled(device.type):
        yield (
            "torch.autocast does not change a pipeline's precision, which load(dtype=..., vae_dtype=...) chooses; "
            "leave the call out of the autocast block"
        )
    for mode in _modes():
        if isinstance(mode, _device.DeviceContext):
            if torch.device(mode.device).type != device.type:
                yield f"the default device {mode.device} is not used: this pipeline was loaded on {device}"
        else:
            yield f"{type(mode).__name__} sees nothing of a pipeline's work, which runs outside of the caller's modes"


def _modes() -> Iterator[Any]:
    """The function and dispatch modes of this thread."""
    for place in range(torch._C._len_torch_function_stack()):
        yield torch._C._get_function_stack_at(place)
    for place in range(torch._C._len_torch_dispatch_stack()):
        yield torch._C._get_dispatch_stack_at(place)
