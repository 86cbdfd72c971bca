"""Memory that kernels see: global by its real addresses, shared memory and parameters by windows of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARED_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61  # where generic addresses of shared memory and of parameters begin
SHARED_START = 1024  # what lies below is the system's
RANK = 24  # bits of a shared address below the rank of the block, plus 1, in its cluster; 0 is the block itself


class Fault(Exception):
    """What the hardware would not do, does not define, or would never end."""


class Segment:
    """Bytes from an address on."""

    def __init__(self, start: int, data: Bytes) -> None:
        self.start, self.end, self.data = start, start + len(data), data
        self.views: dict[int, tuple[int, NDArray]] = {}

    def view(self, size: int) -> tuple[int, NDArray]:
        """(first address, words of `size` bytes), at multiples of their size."""
        if size not in self.views:
            skip = -self.start % size
            whole = (len(self.data) - skip) // size * size
            self.views[size] = self.start + skip, self.data[skip : skip + whole].view(UNSIGNED[size])
        return self.views[size]

    def at(self, addresses: NDArray, size: int) -> tuple[NDArray, NDArray]:
        """(words, indices of those at the addresses)."""
        first, words = self.view(size)
        return words, (addresses - np.uint64(first)) // np.uint64(size)


class Global:
    """Pieces of host memory that a kernel may touch."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.segments = [_segment(tensor) for tensor in tensors if tensor.numel()]

    def split(self, addresses: NDArray, size: int, what: str) -> Iterable[tuple[Segment, NDArray]]:
        """(segment, indices of the addresses in it); Fault where one lies in none, or is no multiple of its size."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"{what}: an address is no multiple of {size}")
        if not len(addresses):
            return
        left = np.ones(len(addresses), np.bool_)
        for segment in self.segments:
            inside = (addresses >= segment.start) & (addresses + np.uint64(size) <= segment.end)
            found = np.flatnonzero(inside)
            if len(found):
                left[found] = False
                yield segment, found
            if not left.any():
                return
        raise Fault(f"{what}: outside of all tensors, at {int(addresses[left][0]):#x}")

    def load(self, addresses: NDArray, size: int, what: str) -> NDArray:
        made = np.zeros(len(addresses), UNSIGNED[size])
        for segment, found in self.split(addresses, size, what):
            words, at = segment.at(addresses[found], size)
            made[found] = words[at]
        return made

    def store(self, addresses: NDArray, values: NDArray, what: str) -> None:
        size = values.itemsize
        for segment, found in self.split(addresses, size, what):
            words, at = segment.at(addresses[found], size)
            words[at] = values[found]


def _segment(tensor: torch.Tensor) -> Segment:
    """All that lies between a tensor's first element and its last one."""
    reach = 1 + sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    back = sum((size - 1) * min(stride, 0) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr() + back * tensor.element_size()
    held = (ctypes.c_uint8 * (reach * tensor.element_size())).from_address(start)
    segment = Segment(start, np.frombuffer(held, np.uint8))
    segment.tensor = tensor  # type: ignore[attr-defined]  # it has to live as long
    return segment


class Shared:
    """Of a block. `dirty`: bytes that a warp, by its number plus 1, has written without a fence for the async proxy."""

    def __init__(self, size: int) -> None:
        self.segment = Segment(0, np.full(size, 0xFF, np.uint8))  # NaN in every type
        self.dirty = np.zeros(size, np.uint8)

    def check(self, addresses: NDArray, size: int, what: str) -> None:
        if (addresses % np.uint64(size)).any():
            raise Fault(f"{what}: an address is no multiple of {size}")
        if len(addresses) and (int(addresses.max()) + size > self.segment.end or int(addresses.min()) < SHARED_START):
            raise Fault(f"{what}: outside of the block's shared memory, which ends at {self.segment.end}")

    def load(self, addresses: NDArray, size: int, what: str) -> NDArray:
        self.check(addresses, size, what)
        words, at = self.segment.at(addresses, size)
        return words[at]

    def store(self, addresses: NDArray, values: NDArray, warp: int, what: str) -> None:
        size = values.itemsize
        self.check(addresses, size, what)
        words, at = self.segment.at(addresses, size)
        words[at] = values
        for byte in range(size):
            self.dirty[addresses.astype(np.int64) + byte] = warp + 1

    def fence(self, warp: int) -> None:
        self.dirty[self.dirty == warp + 1] = 0

    def read_async(self, addresses: NDArray, what: str) -> Bytes:
        """Bytes, by TMA or by the matrix units."""
        if int(addresses.max()) >= self.segment.end or int(addresses.min()) < SHARED_START:
            raise Fault(f"{what}: outside of the block's shared memory, which ends at {self.segment.end}")
        if self.dirty[addresses].any():
            raise Fault(f"{what}: reads what was written without fence.proxy.async")
        return self.segment.data[addresses]
