"""Loads, stores and atomic operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx.arithmetic import DTYPES
from ptx.machine import Warp
from ptx.memory import PARAM_WINDOW, SHARED_WINDOW, Fault
from ptx.parse import Instruction, Kernel, Memory
from ptx.registers import put, reader
from ptx.tma import owner

SPACES = ("param", "global", "shared", "shared::cta", "shared::cluster", "const", "local")


def space_of(opcode: tuple[str, ...]) -> str:
    found = next((part for part in opcode if part in SPACES), "generic")
    return "shared" if found == "shared::cta" else found


def decode(kernel: Kernel, index: int, instruction: Instruction) -> Callable[[Warp], None]:
    name = instruction.opcode[0]
    if name in ("ldmatrix", "stmatrix"):
        return matrices(kernel, instruction)
    if name in ("atom", "red"):
        return atomic(kernel, instruction)
    return load(kernel, instruction) if name == "ld" else store(kernel, instruction)


def locate(kernel: Kernel, where: object) -> Callable[[Warp], NDArray]:
    """The addresses of all lanes."""
    assert isinstance(where, Memory)
    base, offset = reader(kernel, where.slot, np.uint64), np.array(where.offset & (1 << 64) - 1, np.uint64)
    if kernel.widths[where.slot] == 32:
        narrow = reader(kernel, where.slot, np.uint32)
        return lambda warp: narrow(warp.r).astype(np.uint64) + offset
    return lambda warp: base(warp.r) + offset


def fetch(warp: Warp, space: str, addresses: NDArray, size: int, what: str) -> NDArray:
    if space == "param":
        data = warp.block.machine.launch.params
        if int(addresses.max()) + size > len(data):
            raise Fault(f"{what}: outside of the parameters")
        return np.array([int.from_bytes(data[int(a) : int(a) + size], "little") for a in addresses], f"u{size}")
    if space == "shared":
        return warp.block.shared.load(addresses, size, what)
    if space == "global":
        return warp.block.machine.memory.load(addresses, size, what)
    if space == "generic":
        space, window = generic(addresses, what)
        return fetch(warp, space, addresses - np.uint64(window), size, what)
    raise Fault(f"not interpreted: {what}")


def generic(addresses: NDArray, what: str) -> tuple[str, int]:
    """The space that addresses are in, and where it begins."""
    first, last = int(addresses.min()), int(addresses.max())
    for space, window in (("param", PARAM_WINDOW), ("shared", SHARED_WINDOW), ("global", 0)):
        if first >= window:
            return space, window
        if last >= window:
            raise Fault(f"{what}: addresses of several spaces at once are not interpreted")
    raise AssertionError


def parts_of(operand: object) -> tuple[object, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def load(kernel: Kernel, instruction: Instruction) -> Callable[[Warp], None]:
    target, where = instruction.operands[:2]
    kind, space, what = DTYPES[instruction.opcode[-1]], space_of(instruction.opcode), instruction.text
    stores = [put(kernel, one, kind) for one in parts_of(target)]
    at, size = locate(kernel, where), np.dtype(kind).itemsize
    vector = size * len(stores)

    def op(warp: Warp) -> None:
        addresses = at(warp)[warp.mask]
        if (addresses % np.uint64(vector)).any():
            raise Fault(f"{warp.where()}: a vector that is not aligned")
        for i, one in enumerate(stores):
            made = np.zeros(32, f"u{size}")
            made[warp.mask] = fetch(warp, space, addresses + np.uint64(i * size), size, what)
            one(warp, made.view(kind))

    return op


def store(kernel: Kernel, instruction: Instruction) -> Callable[[Warp], None]:
    where, source = instruction.operands[:2]
    kind, space, what = DTYPES[instruction.opcode[-1]], space_of(instruction.opcode), instruction.text
    sources = [reader(kernel, one, kind) for one in parts_of(source)]
    at, size = locate(kernel, where), np.dtype(kind).itemsize
    vector = size * len(sources)

    def op(warp: Warp) -> None:
        addresses = at(warp)[warp.mask]
        if (addresses % np.uint64(vector)).any():
            raise Fault(f"{warp.where()}: a vector that is not aligned")
        for i, one in enumerate(sources):
            values = one(warp.r).view(f"u{size}")[warp.mask]
            write(warp, space, addresses + np.uint64(i * size), values, what)

    return op


def write(warp: Warp, space: str, addresses: NDArray, values: NDArray, what: str) -> None:
    if space == "generic":
        space, window = generic(addresses, what)
        addresses = addresses - np.uint64(window)
    if space == "shared":
        warp.block.shared.store(addresses, values, warp.index, what)
    elif space == "shared::cluster":
        for address, value in zip(addresses, values, strict=True):
            block, inside = owner(warp.block, int(address))
            block.shared.store(np.array([inside], np.uint64), np.array([value]), warp.index, what)
    elif space == "global":
        warp.block.machine.memory.store(addresses, values, what)
    else:
        raise Fault(f"not interpreted: {what}")


ATOMIC: dict[str, Callable[..., object]] = {
    "add": lambda old, a: old + a,
    "max": lambda old, a: max(old, a),
    "min": lambda old, a: min(old, a),
    "or": lambda old, a: old | a,
    "and": lambda old, a: old & a,
    "exch": lambda old, a: a,
    "cas": lambda old, a, b: b if old == a else old,
}


def atomic(kernel: Kernel, instruction: Instruction) -> Callable[[Warp], None]:
    opcode, what = instruction.opcode, instruction.text
    kind, space = DTYPES[opcode[-1]], space_of(opcode)
    function = next(ATOMIC[part] for part in opcode[1:] if part in ATOMIC)
    returned, (where, *values) = None, list(instruction.operands)
    if opcode[0] == "atom":
        returned, where, *values = instruction.operands
    at, sources, result = locate(kernel, where), [reader(kernel, v, kind) for v in values], put(kernel, returned, kind)
    unsigned = f"u{np.dtype(kind).itemsize}"

    def op(warp: Warp) -> None:
        addresses, given, made = at(warp), [one(warp.r) for one in sources], np.zeros(32, kind)
        for lane in np.flatnonzero(warp.mask):
            place = addresses[lane : lane + 1]
            old = fetch(warp, space, place, np.dtype(kind).itemsize, what).view(kind)
            made[lane] = old[0]
            new = np.array([function(old[0], *(one[lane] for one in given))]).astype(kind)
            write(warp, space, place, new.view(unsigned), what)
        result(warp, made)

    return op


def matrices(kernel: Kernel, instruction: Instruction) -> Callable[[Warp], None]:
    """8 x 8 matrices of 16 bits: lane i names a row of 16 bytes, and holds two neighbours of row i / 4."""
    opcode, what = instruction.opcode, instruction.text
    loads = opcode[0] == "ldmatrix"
    registers, where = instruction.operands if loads else instruction.operands[::-1]
    slots, at = parts_of(registers), locate(kernel, where)
    stores = [put(kernel, one, np.uint32) for one in slots] if loads else []
    sources = [reader(kernel, one, np.uint32) for one in slots]
    row, column = np.ogrid[:8, :8]
    transposed = "trans" in opcode
    lane, half = (column * 4 + row // 2, row % 2) if transposed else (row * 4 + column // 2, column % 2)

    def op(warp: Warp) -> None:
        if not warp.whole():
            return
        rows = at(warp)
        for i in range(len(slots)):
            start = rows[8 * i : 8 * i + 8]
            if (start % np.uint64(16)).any():
                raise Fault(f"{warp.where()}: a row that is not aligned")
            places = (start[:, None] + 2 * np.arange(8, dtype=np.uint64)).ravel()
            if loads:
                words = np.zeros((32, 2), np.uint16)
                words[lane, half] = warp.block.shared.load(places, 2, what).reshape(8, 8)
                stores[i](warp, words.view(np.uint32)[:, 0])
            else:
                words = sources[i](warp.r)[:, None].view(np.uint16)
                warp.block.shared.store(places, words[lane, half].ravel(), warp.index, what)

    return op
