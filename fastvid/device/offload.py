"""Offloading: keeps weights in host memory and copies them to the device while they are used.

"none": every part stays on the device. "text": the text encoder, the image encoder and, if there are two experts, the
experts are copied when needed. "blocks": in addition, the blocks of the transformer and the text encoder stream through
two buffers on the device: the next block is copied while the current one computes. On a CPU the same code runs, but
saves nothing.

Weights never change on the device, so they are never copied back; the device copy is just freed. Modules list their
streamable blocks in `STREAMED` and iterate over them with their attribute `walk`, which is `iter` unless replaced here.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fastvid.errors import OutOfMemory

MODES = ("none", "text", "blocks")  # the least offloading first
SLOTS = 2
ALIGNMENT = 256  # bytes, like CUDA's own allocations
RUN = 2**29  # maximum bytes of weights packed into one host allocation; a larger weight gets its own


class Weights(NamedTuple):
    """Bytes of a module's weights. rest: outside of its streamed blocks; blocks: of each block; buffer: size of a
    buffer for the largest block."""

    rest: int
    blocks: tuple[int, ...] = ()
    buffer: int = 0

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    @property
    def streamed(self) -> int:
        """Bytes on the device if the blocks stream through two buffers."""
        return self.rest + (SLOTS * self.buffer if self.blocks else 0)


def weigh(module: nn.Module) -> Weights:
    """Bytes of a module's weights. The module may be on the meta device."""
    blocks = {id(block): block for block in streamed_blocks(module)}
    inside = {id(p) for block in blocks.values() for p in block.parameters()}
    sizes = {id(p): p.nbytes for p in module.parameters()}
    rest = sum(size for key, size in sizes.items() if key not in inside)
    inner = [[sizes[id(p)] for p in block.parameters()] for block in blocks.values()]
    return Weights(rest, tuple(map(sum, inner)), max((sum(map(_aligned, each)) for each in inner), default=0))


def streamed_blocks(module: nn.Module) -> list[nn.Module]:
    """All blocks in the lists that a module names in `STREAMED`."""
    lists = [cast(nn.ModuleList, module.get_submodule(name)) for name in getattr(module, "STREAMED", ())]
    return [block for blocks in lists for block in blocks]


# ---------------------------------------------------------------- copies


class Lane(Protocol):
    """Runs copies in parallel with the computation. A mark is a point in the order of either, like a CUDA event."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy (target, source) pairs after the mark `after`. Returns the mark of their end."""

    def wait(self, mark: Any) -> None:
        """Make later computation wait for the mark."""

    def mark(self) -> Any:
        """The mark of the end of the computation launched so far."""


class HostLane:
    """Copies synchronously, so nothing has to wait."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> None:
        for target, source in pairs:
            target.copy_(source)

    def wait(self, mark: Any) -> None:
        pass

    def mark(self) -> None:
        pass


class CudaLane:
    """Copies on a separate CUDA stream, synchronized with the computation by events."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.cuda.Stream(device)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self.side):
            self.side.wait_event(after)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.side.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()


def make_lane(device: torch.device) -> Lane:
    """The lane for a device."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


# ---------------------------------------------------------------- streaming blocks


class Prefetcher:
    """Iterates over modules. The weights of the current one are on the device.

    Has two buffers of `capacity` bytes: while the module in one computes, the next one's weights are copied into the
    other. Only one walk runs at a time (`Swapped` holds a lock); starting a walk, or `recall`, ends an unfinished one.
    homes: parameter -> host copy.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self.device, self.lane = device, lane or make_lane(device)
        self.homes: dict[nn.Parameter, Tensor] = {}
        self.capacity = 0
        self._buffers: list[Tensor] = []
        self._buffer_free: list[Any] = []  # for each buffer, the mark after which it may be overwritten
        self._arriving: list[Any] = []  # end marks of copies that nothing waits for yet
        self._on_device: list[nn.Parameter] = []
        self._walk: object = None

    def take(self, homes: dict[nn.Parameter, Tensor], blocks: Iterable[nn.Module]) -> None:
        """Register host copies, and size the buffers for the largest block."""
        self.homes |= homes
        sizes = [sum(_aligned(homes[p].nbytes) for p in block.parameters()) for block in blocks]
        self.capacity = max(self.capacity, *sizes)

    def __call__(self, modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Walk over modules, each a block or a part of one."""
        self.recall()
        self._open()
        self._walk = walk = object()
        queue = list(modules)
        ahead = self._send(queue[0], 0) if queue else None
        for number, module in enumerate(queue):
            assert ahead is not None
            views, arrived = ahead
            if number + 1 < len(queue):
                ahead = self._send(queue[number + 1], (number + 1) % SLOTS)
            self.lane.wait(arrived)
            self._arriving.remove(arrived)
            self._bind(views)
            try:
                yield module
            except GeneratorExit:  # the caller needs no further module
                if self._walk is walk:
                    self.recall()
                raise
            if self._walk is not walk:
                raise RuntimeError("a walk over blocks went on after another one had started")
            self._unbind()
            self._buffer_free[number % SLOTS] = self.lane.mark()

    def recall(self) -> None:
        """End a walk: point parameters to host memory again, and make later computation wait for unfinished copies."""
        self._walk = None
        self._unbind()
        for mark in self._arriving:
            self.lane.wait(mark)
        self._arriving.clear()
        # After an exception, kernels may still read a buffer.
        self._buffer_free = [self.lane.mark() for _ in self._buffers]

    def close(self) -> None:
        """Free the buffers until the next walk."""
        self.recall()
        self._buffers, self._buffer_free = [], []

    def _open(self) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(self.capacity, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
            # Running kernels may still use memory that the allocator has reused for these buffers.
            self._buffer_free = [self.lane.mark() for _ in self._buffers]

    def _send(self, module: nn.Module, slot: int) -> tuple[list[tuple[nn.Parameter, Tensor]], Any]:
        """Start copying a module's weights into a buffer. Returns (parameters with their views of it, the end mark)."""
        views, start = [], 0
        for parameter in module.parameters():
            if (home := self.homes.get(parameter)) is None:
                continue  # a value that replaces a weight for this request, on the device already
            views.append((parameter, _view(self._buffers[slot], start, home)))
            start += _aligned(home.nbytes)
        arrived = self.lane.copy([(view, self.homes[p]) for p, view in views], self._buffer_free[slot])
        self._arriving.append(arrived)
        return views, arrived

    def _bind(self, views: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter, view in views:
            parameter.data = view
            self._on_device.append(parameter)

    def _unbind(self) -> None:
        # Running kernels are not affected: they hold the buffer's addresses.
        for parameter in self._on_device:
            parameter.data = self.homes[parameter]
        self._on_device.clear()


# ---------------------------------------------------------------- modules in host memory


class Walker(Protocol):
    """A module that iterates over its blocks by `walk`."""

    walk: Callable[[Iterable[nn.Module]], Iterator[nn.Module]]


class Offloaded:
    """A module with its weights in host memory (pinned for a GPU). With a prefetcher, its blocks are streamed and
    `arrive` copies only the other weights."""

    def __init__(self, module: nn.Module, device: torch.device, prefetcher: Prefetcher | None = None) -> None:
        self.module, self.device, self.prefetcher = module, device, prefetcher
        self._homes: dict[str, Tensor] = {}
        self._on_device = False
        for layer in module.modules():
            if hasattr(layer, "keeps"):
                cast(Any, layer).keeps = False
        self.settle()
        if prefetcher is not None:
            cast(Walker, module).walk = prefetcher  # modules that list blocks in STREAMED have it

    def settle(self) -> None:
        """Store the module's current weights (in host memory) as its host copies."""
        fresh = {n: p for n, p in self.module.named_parameters() if n not in self._homes}
        for run in _runs(fresh):
            self._homes |= _pack(run, pin=self.device.type == "cuda")
        for name, parameter in self.module.named_parameters():
            home = self._homes[name]
            if parameter.data_ptr() != home.data_ptr():
                home.copy_(parameter.data)
                parameter.data = home
        if self.prefetcher is not None:
            blocks = streamed_blocks(self.module)
            self.prefetcher.take({p: self._homes[n] for n, p in self.module.named_parameters()}, blocks)

    def arrive(self) -> None:
        """Copy all weights that are not streamed to the device, unless they are there already."""
        if self._on_device:
            return
        walked = {p for b in streamed_blocks(self.module) for p in b.parameters()} if self.prefetcher else set()
        self._on_device = True  # set first, so that `leave` cleans up if the device runs out of memory
        for parameter in self.module.parameters():
            if parameter not in walked:
                parameter.data = torch.empty_like(parameter.data, device=self.device).copy_(
                    parameter.data, non_blocking=True
                )

    def leave(self) -> None:
        """Free the device copies."""
        if self._on_device:
            for name, parameter in self.module.named_parameters():
                parameter.data = self._homes[name]
            self._on_device = False


class Resident:
    """Modules that are not offloaded, with the interface of `Swapped`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)

    @contextmanager
    def use(self, number: int) -> Iterator[nn.Module]:
        """The module with this index."""
        yield self.modules[number]

    @contextmanager
    def change(self) -> Iterator[None]:
        """Weights may be replaced inside the block."""
        yield


class Swapped:
    """Modules that take turns on the device: one module, and one user, at a time.

    linger: the last used module stays until another is needed. stream: blocks are streamed through a prefetcher that
    all modules share.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device | str,
        *,
        stream: bool = False,
        linger: bool = False,
        lane: Lane | None = None,
    ) -> None:
        self.modules, self.linger, self._lock = tuple(modules), linger, threading.Lock()
        device = torch.device(device)
        self.prefetcher = Prefetcher(device, lane) if stream else None
        self.offloaded = [Offloaded(m, device, self.prefetcher if streamed_blocks(m) else None) for m in modules]

    @contextmanager
    def use(self, number: int) -> Iterator[nn.Module]:
        """The module with this index, on the device inside the block. Other threads wait until it ends."""
        with self._lock:
            for other in self.offloaded:
                if other is not self.offloaded[number]:
                    other.leave()
            try:
                self.offloaded[number].arrive()
                yield self.modules[number]
            except BaseException:
                self._clear()
                raise
            else:
                if not self.linger:
                    self._clear()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Moves all modules to host memory, so that their weights can be replaced inside the block."""
        with self._lock:
            self._clear()
            try:
                yield
            finally:
                if self.prefetcher is not None:
                    self.prefetcher.homes.clear()  # its parameters may be gone
                for module in self.offloaded:
                    module.settle()

    def _clear(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        for module in self.offloaded:
            module.leave()


# ---------------------------------------------------------------- host memory


def host_memory(size: int, pin: bool = False) -> Tensor:
    """uint8 [size] on its own pages, page-locked for a GPU if `pin`; freed with its last view.

    Avoids torch's pinned allocator, whose rounding up to powers of two turns 28 GB into 45. Raises OutOfMemory if the
    system can't lock that much.
    """
    private: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, max(1, size), **private)
    memory = torch.frombuffer(pages, dtype=torch.uint8, count=size) if size else torch.empty(0, dtype=torch.uint8)
    if pin and size:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)):
            raise OutOfMemory(
                f"{size / 2**30:.1f} GiB of host memory could not be page-locked for offloading; allow more locked "
                "memory (ulimit -l), free host memory, or choose less offloading"
            )
        weakref.finalize(pages, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


def _runs(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Split parameters into runs of at most RUN bytes."""
    run: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in parameters.items():
        if run and size + parameter.nbytes > RUN:
            yield run
            run, size = {}, 0
        run[name], size = parameter, size + parameter.nbytes
    if run:
        yield run


def _pack(run: dict[str, nn.Parameter], pin: bool) -> dict[str, Tensor]:
    """Move parameters into one new host allocation; returns their tensors there."""
    memory, homes, start = host_memory(sum(_aligned(p.nbytes) for p in run.values()), pin), {}, 0
    for name, parameter in run.items():
        homes[name] = _view(memory, start, parameter.data).copy_(parameter.data)
        parameter.data = homes[name]
        start += _aligned(parameter.nbytes)
    return homes


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
