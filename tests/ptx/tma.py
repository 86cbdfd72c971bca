"""Tensor maps, and the bulk copies that follow them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ptx.memory import RANK, Fault

if TYPE_CHECKING:
    from ptx.machine import Block, Warp

MAGIC = 0x50414D54
LAYOUT = "<IBBBBQ5Q4Q5H5Bxxxxxxxx"  # of a map in its 128 bytes, as stub_cudart.cpp writes it


@dataclass(frozen=True)
class Map:
    """As cuTensorMapEncodeTiled gets it: from the innermost dimension on, strides in bytes from the second one on.
    size: bytes of a value; swizzle: bytes of a row that is swizzled, or 0."""

    base: int
    size: int
    swizzle: int
    extent: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int, ...]
    every: tuple[int, ...]

    def encode(self) -> bytes:
        """128 bytes that `decode` reads."""
        rank = len(self.extent)
        lists = (self.extent, 5), (self.stride, 4), (self.box, 5), (self.every, 5)
        numbers = [number for values, count in lists for number in (*values, *[0] * (count - len(values)))]
        made = struct.pack(LAYOUT, MAGIC, rank, self.size, self.swizzle, 0, self.base, *numbers)
        return made.ljust(128, b"\0")


def decode(data: bytes) -> Map:
    if len(data) < 128:
        raise Fault("a tensor map outside of the parameters")
    magic, rank, size, swizzle, _, base, *numbers = struct.unpack_from(LAYOUT, data)
    if magic != MAGIC:
        raise Fault("what is no tensor map is used as one")
    extent, stride, box, every = numbers[:5], numbers[5:9], numbers[9:14], numbers[14:19]
    return Map(
        base, size, swizzle, tuple(extent[:rank]), tuple(stride[: rank - 1]), tuple(box[:rank]), tuple(every[:rank])
    )


def check(tensor: Map) -> None:
    """What the driver refuses to encode. Raises Fault."""
    inner = tensor.box[0] * tensor.size
    wrong = {
        "base": tensor.base % 16,
        "extent": any(not 1 <= n <= 1 << 32 for n in tensor.extent),
        "stride": any(n % 16 or not 0 < n < 1 << 40 for n in tensor.stride),
        "box": any(not 1 <= n <= 256 for n in tensor.box) or inner % 16,
        "every": any(not 1 <= n <= 8 for n in tensor.every),
        "swizzle": tensor.swizzle and inner > tensor.swizzle,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise Fault(f"the driver refuses a map with this {name}: {tensor}")


def places(tensor: Map, first: tuple[int, ...], to: int) -> tuple[NDArray, NDArray, NDArray]:
    """(inside, global addresses, shared addresses) of each value of a box that begins at `first`."""
    counts = [-(-box // every) for box, every in zip(tensor.box, tensor.every, strict=True)]
    at, inside = np.zeros(1, np.int64), np.ones(1, np.bool_)
    strides = (tensor.size, *tensor.stride)
    for axis in reversed(range(len(counts))):
        index = first[axis] + np.arange(counts[axis]) * tensor.every[axis]
        inside = (inside[:, None] & ((index >= 0) & (index < tensor.extent[axis]))).ravel()
        at = (at[:, None] + index * strides[axis]).ravel()
    shared = to + np.arange(len(at)) * tensor.size
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[tensor.swizzle]
    return inside, tensor.base + at, shared ^ (shared >> 7 & (1 << bits) - 1) << 4


def box_bytes(tensor: Map) -> int:
    return tensor.size * int(np.prod([-(-box // every) for box, every in zip(tensor.box, tensor.every, strict=True)]))


@dataclass
class Load:
    """A box on its way into the shared memory of blocks, and of barriers at the same place in each."""

    tensor: Map
    first: tuple[int, ...]
    to: int
    barrier: int
    blocks: list[Block]
    what: str

    def start(self, machine_events: list) -> None:
        check(self.tensor)
        if self.to % 128:
            raise Fault(f"{self.what}: a destination that is no multiple of 128")
        for block in self.blocks:
            machine_events.append(lambda block=block: self.land(block))

    def land(self, block: Block) -> None:
        inside, addresses, shared = places(self.tensor, self.first, self.to)
        if not block.alive():
            raise Fault(f"{self.what}: lands in a block that has ended")
        values = np.zeros(len(inside), {1: np.uint8, 2: np.uint16, 4: np.uint32}[self.tensor.size])
        values[inside] = block.machine.memory.load(addresses[inside].astype(np.uint64), values.itemsize, self.what)
        if any(self.to <= at < self.to + values.nbytes for at in block.mbarriers):
            raise Fault(f"{self.what}: overwrites a barrier")
        block.shared.check(shared.astype(np.uint64), values.itemsize, self.what)
        words, at = block.shared.segment.at(shared.astype(np.uint64), values.itemsize)
        words[at] = values
        if self.barrier not in block.mbarriers:
            raise Fault(f"{self.what}: there is no barrier")
        block.mbarriers[self.barrier].complete(values.nbytes, self.what)


@dataclass
class Store:
    """A box on its way out of the shared memory of a block."""

    tensor: Map
    first: tuple[int, ...]
    source: int
    block: Block
    what: str
    done: bool = False

    def land(self) -> None:
        inside, addresses, shared = places(self.tensor, self.first, self.source)
        size = self.tensor.size
        found = self.block.shared.read_async(shared[:, None] + np.arange(size), self.what)
        values = found.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])[:, 0]
        self.block.machine.memory.store(addresses[inside].astype(np.uint64), values[inside], self.what)
        self.done = True


def peers_of(block: Block, mask: int) -> list[Block]:
    return [block.peers[rank] for rank in range(len(block.peers)) if mask >> rank & 1]


def owner(block: Block, address: int) -> tuple[Block, int]:
    """The block whose shared memory an address of the cluster's is in, and the address there."""
    rank = address >> RANK
    return (block.peers[rank - 1] if rank else block), address & ((1 << RANK) - 1)


def commit(warp: Warp, lane: int) -> None:
    warp.stores.setdefault(lane, [[]]).append([])


def pending_stores(warp: Warp, lane: int, left: int) -> list[Store]:
    """Stores of all groups but the last `left`."""
    groups = warp.stores.get(lane, [[]])
    return [store for group in groups[: max(len(groups) - 1 - left, 0)] for store in group]  # type: ignore[misc]
