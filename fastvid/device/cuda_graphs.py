"""CUDA graphs of a model's calls: captured once per shape, then replayed. Launching hundreds of kernels then costs as
much as launching one. This helps short calls (few tokens), not long ones.

A graph reads and writes fixed addresses, so arguments are copied into its buffers and the result out of them. A lock
covers a call from the first copy to the last, so the buffers serve one call at a time. A waiting thread loses little:
its kernels would wait on the device anyway.

The first call of a shape runs eagerly, which compiles and sets up its kernels. The second call captures it. Calls that
differ only in text (guidance) share a graph. All graphs share one memory pool for intermediate results, since no two of
them run at once.

Graphs read weights in place, so they are only for modules whose weights stay on the device. Call `free` after changing
weights. Calls with a KV cache, which grows and is written to, stay eager.
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

from fastvid.checks import guarded, refuse
from fastvid.errors import BackendUnavailable, InvalidRequest

LIMIT = 8  # graphs kept; the least recently used one is evicted
REMEMBERED = 64  # shapes remembered as warmed up


class Capture(Protocol):
    """Records calls for replay."""

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Record a call without running it: (replay function, the result's buffer, which each replay fills)."""

    def alone(self) -> AbstractContextManager[None]:
        """Work launched in this block runs after all work of earlier blocks, on any thread and stream."""

    def release(self) -> None:
        """Wait until all replays are done. Later recordings use a new memory pool."""


class CudaCapture:
    """torch.cuda.CUDAGraph, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self._done: torch.cuda.Event | None = None

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # The decoder's thread may allocate meanwhile, so only forbidden calls of this thread are errors.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result

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
    """Calls functions through CUDA graphs, from the second call of a shape on. limit: number of graphs kept.

    A function must be a bound method of a module whose weights do not move. Its arguments are tensors, hashable values
    and nested tuples of them; its result is a tensor. Gradients are not supported.
    """

    def __init__(self, backend: Capture, limit: int = LIMIT) -> None:
        self.backend, self.limit = backend, limit
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: deque[Hashable] = deque(maxlen=REMEMBERED)
        self._scope: Hashable = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args). The result is a new tensor, not a graph's buffer."""
        tensors: list[Tensor] = []
        key = (function, _shape(args, tensors), self._scope)
        with self._lock:
            if key in self._graphs or key in self._seen:
                with self.backend.alone():
                    return self._find(key, tensors).run(tensors)
            self._seen.append(key)
        return function(*args)

    def free(self) -> None:
        """Free all graphs and their memory, and forget all shapes."""
        with self._lock:
            if self._graphs:
                self.backend.release()
            self._graphs.clear()
            self._seen.clear()

    @contextmanager
    def within(self, scope: Hashable) -> Iterator[None]:
        """Calls inside the block have graphs of their own for this scope: they read other memory than those without."""
        before, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = before

    def _find(self, key: tuple[Callable[..., Tensor], Any, Hashable], tensors: list[Tensor]) -> _Graph:
        """The graph of a shape. Captures it if there is none."""
        if key not in self._graphs:
            if len(self._graphs) >= self.limit:
                self.backend.release()  # the evicted graph may still be running
                self._graphs.popitem(last=False)
            self._graphs[key] = _Graph(self.backend, *key[:2], tensors)
        self._graphs.move_to_end(key)
        return self._graphs[key]


class _Graph:
    """One captured call with its buffers."""

    def __init__(self, backend: Capture, function: Callable[..., Tensor], shape: Any, tensors: list[Tensor]) -> None:
        self._inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        self._copied: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(tensors)
        self._fill(tensors)
        args = _with(shape, iter(self._inputs))
        self._replay, self._made = backend.capture(lambda: function(*args))

    def run(self, tensors: list[Tensor]) -> Tensor:
        self._fill(tensors)
        self._replay()
        return self._made.clone()

    def _fill(self, tensors: list[Tensor]) -> None:
        """Copy the inputs that changed since the last call. Keys and values of a text are the same in every step."""
        new = [i for i, tensor in enumerate(tensors) if not self._holds(i, tensor)]
        if new:
            torch._foreach_copy_([self._inputs[i] for i in new], [tensors[i] for i in new])
        for i in new:
            self._copied[i] = weakref.ref(tensors[i]), tensors[i]._version

    def _holds(self, number: int, tensor: Tensor) -> bool:
        copied = self._copied[number]
        return copied is not None and copied[0]() is tensor and copied[1] == tensor._version


def _shape(value: Any, tensors: list[Tensor]) -> Hashable:
    """The hashable structure of a call's arguments, with `_Like` for tensors. Appends the tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Like(value)
    if isinstance(value, tuple):
        return type(value), tuple(_shape(one, tensors) for one in value)
    return value


class _Like(tuple):
    """Placeholder for a tensor of this shape, dtype and device."""

    def __new__(cls, tensor: Tensor) -> _Like:
        return super().__new__(cls, (tuple(tensor.shape), tensor.dtype, tensor.device))


def _with(shape: Any, tensors: Iterator[Tensor]) -> Any:
    """Rebuild arguments from their structure, with these tensors in place of `_Like`."""
    if isinstance(shape, _Like):
        return next(tensors)
    if isinstance(shape, tuple):
        kind, inner = shape
        items = [_with(one, tensors) for one in inner]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return shape


# ---------------------------------------------------------------- the choice


@guarded("'auto', True or False; the nearest is 'auto'")
def check(name: str, asked: Any) -> str | bool:
    """Return `cuda_graphs=` if it is "auto", True or False. Raises InvalidRequest otherwise."""
    if isinstance(asked, str) and asked == "auto":
        return "auto"
    return asked if isinstance(asked, bool) else refuse(name, asked, "'auto', True or False", "'auto'")


def choose(asked: Any, device: torch.device, stays: bool, caches: bool, ranks: int = 1) -> tuple[bool, str]:
    """Whether to replay a model's calls as CUDA graphs, and why. stays: its weights stay on the device; caches: it uses
    a KV cache; ranks: number of ranks that share its tokens.

    True either works or raises: BackendUnavailable without a CUDA device, InvalidRequest if graphs can't be used.
    "auto" is off until there are committed GPU results, like for kernels.
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
