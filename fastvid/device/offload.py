"""Weights in host memory that are copied to the device while they are used.

"none": every part stays on the device. "text": text encoder and image encoder are copied when they are needed, and of
two experts the one in use. "blocks": the same, and the blocks of transformer and text encoder go through two buffers on
the device: the next one is copied while the present one computes. On the CPU the same steps are made and save nothing.

Weights never change on the device, so nothing is copied back: leaving frees the copy. Modules list their streamable
blocks in `STREAMED` and iterate over them by their attribute `walk`, which is `iter` unless it is replaced here.
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
ALIGNMENT = 256  # bytes; what CUDA's own allocations have
RUN = 2**29  # bytes of weights that are packed into one run of host memory, or one weight if that is larger


class Weights(NamedTuple):
    """Bytes of a module's weights: those outside of the blocks that it walks, those of each block, and of a buffer that
    takes the largest."""

    rest: int
    blocks: tuple[int, ...] = ()
    buffer: int = 0

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    @property
    def streamed(self) -> int:
        """Bytes on the device with the blocks in two buffers."""
        return self.rest + (SLOTS * self.buffer if self.blocks else 0)


def weigh(module: nn.Module) -> Weights:
    """Bytes of a module's weights, also on the meta device."""
    blocks = {id(block): block for block in streamed_blocks(module)}
    inside = {id(p) for block in blocks.values() for p in block.parameters()}
    sizes = {id(p): p.nbytes for p in module.parameters()}
    rest = sum(size for key, size in sizes.items() if key not in inside)
    inner = [[sizes[id(p)] for p in block.parameters()] for block in blocks.values()]
    return Weights(rest, tuple(map(sum, inner)), max((sum(map(_aligned, each)) for each in inner), default=0))


def streamed_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that a module walks, of all lists that it names."""
    lists = [cast(nn.ModuleList, module.get_submodule(name)) for name in getattr(module, "STREAMED", ())]
    return [block for blocks in lists for block in blocks]


# ---------------------------------------------------------------- the two ways to copy


class Lane(Protocol):
    """Where copies run, beside the computation. A mark is a point in the order of either."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy (target, source) pairs once the mark `after` is passed; returns the mark of their end."""

    def wait(self, mark: Any) -> None:
        """Later computation waits for the mark."""

    def mark(self) -> Any:
        """The end of the computation up to here."""


class HostLane:
    """Copies are made at once, so nothing has to wait."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> None:
        for target, source in pairs:
            target.copy_(source)

    def wait(self, mark: Any) -> None:
        pass

    def mark(self) -> None:
        pass


class CudaLane:
    """Copies run on a stream of their own, ordered against the computing by events."""

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
    """The way to copy to a device."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


# ---------------------------------------------------------------- blocks, one after the other


class Prefetcher:
    """Iterates over modules with the weights of each on the device while it is used.

    Two buffers of `capacity` bytes: while the module in one computes, the next one's weights are copied into the other.
    One walk at a time (`Swapped` holds a lock); starting a walk, or `recall`, ends one that was left unfinished.
    homes: the host copy of every parameter.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self.device, self.lane = device, lane or make_lane(device)
        self.homes: dict[nn.Parameter, Tensor] = {}
        self.capacity = 0
        self._buffers: list[Tensor] = []
        self._left: list[Any] = []  # of each buffer, the end of what was computed from it
        self._coming: list[Any] = []  # ends of copies that nothing waits for yet
        self._out: list[nn.Parameter] = []
        self._walk: object = None

    def take(self, homes: dict[nn.Parameter, Tensor], blocks: Iterable[nn.Module]) -> None:
        """Register host copies, and make room for the largest block."""
        self.homes |= homes
        sizes = [sum(_aligned(homes[p].nbytes) for p in block.parameters()) for block in blocks]
        self.capacity = max(self.capacity, *sizes)

    def __call__(self, modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Walk modules, each of them a block or a part of one."""
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
            self._coming.remove(arrived)
            self._bind(views)
            yield module
            if self._walk is not walk:
                raise RuntimeError("a walk over blocks went on after another one had started")
            self._unbind()
            self._left[number % SLOTS] = self.lane.mark()

    def recall(self) -> None:
        """End a walk: parameters point to host memory again, and later computation waits for unfinished copies."""
        self._walk = None
        self._unbind()
        for mark in self._coming:
            self.lane.wait(mark)
        self._coming.clear()
        # A computation that an exception cut off may still read a buffer.
        self._left = [self.lane.mark() for _ in self._buffers]

    def close(self) -> None:
        """Free the buffers until the next walk."""
        self.recall()
        self._buffers, self._left = [], []

    def _open(self) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(self.capacity, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
            # The memory may be what kernels still under way have just given back.
            self._left = [self.lane.mark() for _ in self._buffers]

    def _send(self, module: nn.Module, slot: int) -> tuple[list[tuple[nn.Parameter, Tensor]], Any]:
        """Start copying a module's weights into a buffer: (the parameters with their views of it, the copy's end)."""
        views, start = [], 0
        for parameter in module.parameters():
            home = self.homes[parameter]
            views.append((parameter, _view(self._buffers[slot], start, home)))
            start += _aligned(home.nbytes)
        arrived = self.lane.copy([(view, self.homes[p]) for p, view in views], self._left[slot])
        self._coming.append(arrived)
        return views, arrived

    def _bind(self, views: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter, view in views:
            parameter.data = view
            self._out.append(parameter)

    def _unbind(self) -> None:
        # Kernels that were started hold the buffer's addresses themselves.
        for parameter in self._out:
            parameter.data = self.homes[parameter]
        self._out.clear()


# ---------------------------------------------------------------- modules in host memory


class Walker(Protocol):
    """A module that iterates over its blocks by `walk`."""

    walk: Callable[[Iterable[nn.Module]], Iterator[nn.Module]]


class Offloaded:
    """A module whose weights are in host memory (pinned for a GPU). With a prefetcher its blocks are streamed, and only
    the rest is copied as a whole."""

    def __init__(self, module: nn.Module, device: torch.device, prefetcher: Prefetcher | None = None) -> None:
        self.module, self.device, self.prefetcher = module, device, prefetcher
        self._homes: dict[str, Tensor] = {}
        self._here = False
        self.settle()
        if prefetcher is not None:
            cast(Walker, module).walk = prefetcher  # modules that list blocks in STREAMED have it

    def settle(self) -> None:
        """Make the weights that the module now has in host memory its host copies."""
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
        """Copy the weights that are not streamed to the device, if they are not there."""
        if self._here:
            return
        walked = {p for b in streamed_blocks(self.module) for p in b.parameters()} if self.prefetcher else set()
        self._here = True  # also if the device is full half-way: then `leave` has something to do
        for parameter in self.module.parameters():
            if parameter not in walked:
                parameter.data = torch.empty_like(parameter.data, device=self.device).copy_(
                    parameter.data, non_blocking=True
                )

    def leave(self) -> None:
        """Give the device's memory back."""
        if self._here:
            for name, parameter in self.module.named_parameters():
                parameter.data = self._homes[name]
            self._here = False


class Resident:
    """Modules that stay where they are; the interface of Swapped."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)

    @contextmanager
    def use(self, number: int) -> Iterator[nn.Module]:
        """One of them."""
        yield self.modules[number]

    @contextmanager
    def change(self) -> Iterator[None]:
        """Weights may be exchanged until the block ends."""
        yield


class Swapped:
    """Modules of which one at a time is on the device, for one user at a time.

    linger: the last one used stays until another is asked for. stream: blocks go through a prefetcher that all of them
    share.
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
        """One of them, on the device until the block ends. Other threads wait until then."""
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
        """All of them in host memory until the block ends, so that weights can be exchanged there."""
        with self._lock:
            self._clear()
            try:
                yield
            finally:
                if self.prefetcher is not None:
                    self.prefetcher.homes.clear()  # of parameters that may be gone
                for module in self.offloaded:
                    module.settle()

    def _clear(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        for module in self.offloaded:
            module.leave()


# ---------------------------------------------------------------- host memory


def host_memory(size: int, pin: bool = False) -> Tensor:
    """uint8 [size] on pages of its own, page-locked for a GPU if `pin`; freed with the last tensor that looks at it.

    Not torch's pinned allocator: that rounds up to a power of two, 28 GB to 45. Raises OutOfMemory if the system does
    not lock so much.
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
    """The parameters in runs of at most RUN bytes."""
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
    """Move parameters into host memory of ours, one behind the other; returns where each is now."""
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
