"""CUDA graphs of a model's calls: captured once a shape, replayed after that. Launching hundreds of kernels then costs
what launching one does, which counts where calls are short (few tokens), and not where they are long.

A graph reads and writes memory at fixed addresses, so what a call is given is copied there, and its result from there.
These buffers belong to one call at a time: a lock is held from the first copy to the last. Another thread that calls
meanwhile waits, which costs it little: what it starts would wait on the device too.

A shape that is seen for the first time runs eagerly, which compiles and sets up all that its kernels need; when it is
seen again it is captured. Calls that differ in text alone (guidance) share a graph. All graphs share one pool of memory
for what is computed in between, since no two of them ever run at once.

Weights are read where they are. So graphs are for modules whose weights stay on the device, and whoever exchanges
weights calls `free`. A KV cache, which grows and is written to, is no part of a graph: such calls stay eager.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvid.errors import BackendUnavailable, InvalidRequest

LIMIT = 8  # graphs that are kept; of those the one that was used last the longest ago goes
REMEMBERED = 64  # shapes that are known to have run eagerly


class Capture(Protocol):
    """What records a call, and plays it again."""

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Record a call: (what plays it again, its result's buffer, which the first playing fills)."""

    def alone(self) -> AbstractContextManager[None]:
        """What is started inside runs after all that was started inside before, whatever threads and streams."""

    def release(self) -> None:
        """Nothing that was played is under way any more; what is recorded next takes new memory."""


class CudaCapture:
    """torch.cuda.CUDAGraph, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self._done: torch.cuda.Event | None = None

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # The decoder's thread may allocate meanwhile: an error only if this thread does what cannot be recorded.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            made = call()
        return graph.replay, made

    @contextmanager
    def alone(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            yield
            self._done = stream.record_event()

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        self.pool = torch.cuda.graph_pool_handle()


class Graphs:
    """Calls functions of tensors, by graphs from the second call of a shape on. limit: how many graphs are kept.

    A function is a bound method of a module whose weights stay where they are; its arguments are tensors, plain values,
    and tuples (of tuples) of them, its result is a tensor. No gradients are taken.
    """

    def __init__(self, backend: Capture, limit: int = LIMIT) -> None:
        self.backend, self.limit = backend, limit
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: deque[Hashable] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), in memory of its own."""
        given: list[Tensor] = []
        key = (function, _shape(args, given))
        with self._lock:
            if key in self._graphs or key in self._seen:
                with self.backend.alone():
                    return self._find(key, given).run(given)
            self._seen.append(key)
        return function(*args)

    def free(self) -> None:
        """Let go of all graphs and their memory; shapes that are seen again begin anew."""
        with self._lock:
            if self._graphs:
                self.backend.release()
            self._graphs.clear()
            self._seen.clear()

    def _find(self, key: tuple[Callable[..., Tensor], Any], given: list[Tensor]) -> _Graph:
        """The graph of a shape, captured if there is none."""
        if key not in self._graphs:
            if len(self._graphs) >= self.limit:
                self.backend.release()  # what goes must not be under way
                self._graphs.popitem(last=False)
            self._graphs[key] = _Graph(self.backend, *key, given)
        self._graphs.move_to_end(key)
        return self._graphs[key]


class _Graph:
    """One captured call with its buffers."""

    def __init__(self, backend: Capture, function: Callable[..., Tensor], shape: Any, given: list[Tensor]) -> None:
        self._inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in given]
        self._copied: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(given)
        self._fill(given)
        args = _with(shape, iter(self._inputs))
        self._replay, self._made = backend.capture(lambda: function(*args))

    def run(self, given: list[Tensor]) -> Tensor:
        self._fill(given)
        self._replay()
        return self._made.clone()

    def _fill(self, given: list[Tensor]) -> None:
        """Copy what is not there yet: keys and values of a text are the same in every step."""
        new = [i for i, tensor in enumerate(given) if not self._holds(i, tensor)]
        if new:
            torch._foreach_copy_([self._inputs[i] for i in new], [given[i] for i in new])
        for i in new:
            self._copied[i] = weakref.ref(given[i]), given[i]._version

    def _holds(self, number: int, tensor: Tensor) -> bool:
        copied = self._copied[number]
        return copied is not None and copied[0]() is tensor and copied[1] == tensor._version


def _shape(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a graph depends on beside numbers, and the tensors in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Like(value)
    if isinstance(value, tuple):
        return type(value), tuple(_shape(one, tensors) for one in value)
    return value


class _Like(tuple):
    """Stands for a tensor of this shape, type and device."""

    def __new__(cls, tensor: Tensor) -> _Like:
        return super().__new__(cls, (tuple(tensor.shape), tensor.dtype, tensor.device))


def _with(shape: Any, tensors: Iterator[Tensor]) -> Any:
    """The arguments again, with these tensors."""
    if isinstance(shape, _Like):
        return next(tensors)
    if isinstance(shape, tuple):
        kind, inner = shape
        made = [_with(one, tensors) for one in inner]
        return kind(*made) if hasattr(kind, "_fields") else kind(made)
    return shape


# ---------------------------------------------------------------- the choice


def check(asked: Any) -> Any:
    """What was asked for: "auto", True or False. Raises InvalidRequest for anything else."""
    if asked != "auto" and not isinstance(asked, bool):
        raise InvalidRequest(f"cuda_graphs={asked!r:.40}: allowed is 'auto', True or False; the nearest is 'auto'")
    return asked


def choose(asked: Any, device: torch.device, stays: bool, caches: bool, ranks: int = 1) -> tuple[bool, str]:
    """Whether a model's calls are to be replayed, and why. stays: its weights stay on the device; caches: it is called
    with a KV cache; ranks: that share its tokens.

    Asked for with True it works or raises: BackendUnavailable without a CUDA device, InvalidRequest where graphs would
    have nothing to do. "auto" waits for committed GPU results, as it does with kernels.
    """
    if asked is False:
        return False, "off: asked for"
    if device.type != "cuda":
        if asked is True:
            raise BackendUnavailable(f"cuda_graphs=True needs a CUDA device, not {str(device)!r}; 'auto' always runs")
        return False, f"off: {device.type}"
    if asked == "auto":
        return False, "off: no committed GPU result"
    if caches:
        raise InvalidRequest("cuda_graphs=True: this model's KV cache changes with every call; leave it at 'auto'")
    if ranks > 1:
        raise InvalidRequest(
            "cuda_graphs=True: ranks exchange tensors within a call; leave it at 'auto', or parallel at 1"
        )
    if not stays:
        raise InvalidRequest(
            "cuda_graphs=True: weights that are offloaded have no fixed place; with it goes offload='none', or leave "
            "cuda_graphs at 'auto'"
        )
    return True, "on: asked for"
