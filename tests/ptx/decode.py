"""Instructions -> functions of a warp, each made once for a kernel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx import accesses, arithmetic, synchronize
from ptx.machine import UINT, Warp
from ptx.memory import PARAM_WINDOW, SHARED_WINDOW, Fault
from ptx.parse import Instruction, Kernel, Not
from ptx.registers import put, reader

Op = Callable[[Warp], None]
IGNORED = {"fence", "membar", "prefetch", "nanosleep", "griddepcontrol", "applypriority", "discard", "prefetchu"}
FAMILIES = {
    **dict.fromkeys(("ld", "ldu", "st", "atom", "red", "ldmatrix", "stmatrix"), accesses.decode),
    **dict.fromkeys(
        ("bar", "barrier", "mbarrier", "cp", "wgmma", "setmaxnreg", "shfl", "vote", "elect", "fence", "activemask"),
        synchronize.decode,
    ),
}


def decode(kernel: Kernel) -> list[Op]:
    """One function for each instruction, and one more that ends a warp."""
    made = [guarded(kernel, i, instruction) for i, instruction in enumerate(kernel.code)]
    return [*made, Warp.leave]


def guarded(kernel: Kernel, index: int, instruction: Instruction) -> Op:
    if instruction.opcode[0] == "bra":
        return branch(instruction, kernel.targets[index])
    op = plain(kernel, index, instruction)
    if instruction.guard is None:
        return op
    slot, negated = instruction.guard

    def under(warp: Warp) -> None:
        """By the lanes of the predicate alone. A group that has to come again does so whole."""
        mask, pc = warp.mask, warp.pc
        wanted = mask & ~warp.r[slot] if negated else mask & warp.r[slot]
        if not wanted.any():
            return
        warp.mask, full = wanted, warp.full
        warp.full = full and bool(wanted.all())
        if warp.full:
            warp.mask = mask
        op(warp)
        if warp.pc in (pc, pc - 1) and not warp.done:
            warp.mask, warp.full = mask, full

    def leave(warp: Warp) -> None:
        wanted = warp.mask & ~warp.r[slot] if negated else warp.mask & warp.r[slot]
        if wanted.all():
            return warp.leave()
        if wanted.any():
            warp.diverge(len(kernel.code), wanted)
        return None

    return leave if instruction.opcode[0] in ("ret", "exit") else under


def branch(instruction: Instruction, target: int) -> Op:
    if instruction.guard is None:

        def jump(warp: Warp) -> None:
            warp.pc = target

        return jump
    slot, negated = instruction.guard

    def fork(warp: Warp) -> None:
        condition = warp.r[slot]
        taken = warp.mask & ~condition if negated else warp.mask & condition
        if not taken.any():
            return
        if (taken == warp.mask).all():
            warp.pc = target
        else:
            warp.diverge(target, taken)

    return fork


def plain(kernel: Kernel, index: int, instruction: Instruction) -> Op:
    name = instruction.opcode[0]
    if name in FAMILIES:
        return FAMILIES[name](kernel, index, instruction)
    if name in IGNORED:
        return lambda warp: None
    if name in ("ret", "exit"):
        return Warp.leave
    if name == "trap":
        return trap
    if name == "mov":
        return move(kernel, instruction)
    if name in ("cvta", "mapa"):
        return address(kernel, instruction)
    if name in ("bfe", "shf"):
        return field(kernel, instruction)
    found = arithmetic.meaning(instruction.opcode)
    if found is None:
        raise Fault(f"not interpreted: {instruction.text}")
    return compute(kernel, instruction, found)


def trap(warp: Warp) -> None:
    raise Fault(f"{warp.where()}: trap")


def compute(kernel: Kernel, instruction: Instruction, found: arithmetic.Meaning) -> Op:
    kinds, made, function = found
    target, *operands = instruction.operands
    if isinstance(target, tuple):
        raise Fault(f"not interpreted: {instruction.text}")
    sources = [reader(kernel, one, kind) for one, kind in zip(operands, kinds, strict=True)]
    store = put(kernel, target, made)
    if len(sources) == 1:
        (a,) = sources
        return lambda warp: store(warp, function(a(warp.r)))
    if len(sources) == 2:
        a, b = sources
        return lambda warp: store(warp, function(a(warp.r), b(warp.r)))
    return lambda warp: store(warp, function(*(one(warp.r) for one in sources)))


def field(kernel: Kernel, instruction: Instruction) -> Op:
    if instruction.opcode[0] == "bfe":
        kind = arithmetic.DTYPES[instruction.opcode[-1]]
        return compute(kernel, instruction, ((kind, np.uint32, np.uint32), kind, arithmetic.extract))
    made = arithmetic.funnel(instruction.opcode[1] == "r")
    return compute(kernel, instruction, ((np.uint32,) * 3, np.uint32, made))


def move(kernel: Kernel, instruction: Instruction) -> Op:
    """Also between a register and the parts of one."""
    target, source = instruction.operands
    if isinstance(target, tuple):
        whole = reader(kernel, source, UINT[kernel.widths[source]])  # type: ignore[index]
        part = UINT[kernel.widths[source] // len(target)]  # type: ignore[index]
        stores = [put(kernel, one, part) for one in target]

        def unpack(warp: Warp) -> None:
            parts = whole(warp.r).view(part).reshape(32, len(stores))
            for i, store in enumerate(stores):
                store(warp, np.ascontiguousarray(parts[:, i]))

        return unpack
    kind = UINT[kernel.widths[target]]  # type: ignore[index]
    store = put(kernel, target, kind)
    if isinstance(source, tuple):
        part = UINT[kernel.widths[target] // len(source)]  # type: ignore[index]
        sources = [reader(kernel, one, part) for one in source]
        return lambda warp: store(warp, np.stack([one(warp.r) for one in sources], 1).view(kind)[:, 0])
    if isinstance(source, Not):
        raise Fault(f"not interpreted: {instruction.text}")
    read = reader(kernel, source, kind)
    return lambda warp: store(warp, read(warp.r))


def address(kernel: Kernel, instruction: Instruction) -> Op:
    """Between generic addresses and those of a space; of a block of the cluster."""
    opcode = instruction.opcode
    kind = arithmetic.DTYPES[opcode[-1]]
    if opcode[0] == "mapa":
        read = [reader(kernel, one, np.uint32) for one in instruction.operands[1:]]
        store = put(kernel, instruction.operands[0], np.uint32)
        return lambda warp: store(warp, synchronize.mapped(*(one(warp.r) for one in read)))
    windows: dict[str, int] = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "param": PARAM_WINDOW}
    window = windows.get(opcode[2] if opcode[1] == "to" else opcode[1], 0)
    if opcode[1] == "to":
        window = -window
    offset = np.array(window & (1 << 64) - 1, np.uint64)
    source, store = reader(kernel, instruction.operands[1], kind), put(kernel, instruction.operands[0], kind)

    def change(warp: Warp) -> None:
        made: NDArray = source(warp.r).astype(np.uint64) + offset
        store(warp, made.astype(kind))

    return change
