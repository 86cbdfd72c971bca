"""Instructions by which threads wait for each other and for other units: barriers, TMA, products, shuffles."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx import tma, wgmma
from ptx.accesses import locate
from ptx.barriers import MBarrier, Named
from ptx.machine import REGISTERS, Block, Warp
from ptx.memory import PARAM_WINDOW, RANK, Fault
from ptx.parse import Instruction, Kernel, Memory
from ptx.registers import put, reader

Op = Callable[[Warp], None]
PATIENCE = 0.7  # how often a wait lasts until the phase ends; else it is given up, which the hardware may do any time


def decode(kernel: Kernel, index: int, instruction: Instruction) -> Op:
    opcode = instruction.opcode
    names = {"bar": named, "barrier": named, "mbarrier": mbarrier, "wgmma": product, "fence": fence}
    names |= {"setmaxnreg": registers, "shfl": shuffle, "vote": vote, "elect": vote, "activemask": vote}
    if opcode[0] == "cp":
        return bulk(kernel, instruction)
    return names[opcode[0]](kernel, instruction)


def one_of(kernel: Kernel, operand: object) -> Callable[[Warp], int]:
    """A number that is the same for all lanes that are there."""
    assert isinstance(operand, int)
    read = reader(kernel, operand, np.uint64 if kernel.widths[operand] == 64 else np.uint32)

    def value(warp: Warp) -> int:
        values = read(warp.r)[warp.mask]
        if (values != values[0]).any():
            raise Fault(f"{warp.where()}: lanes have different values")
        return int(values[0])

    return value


def fence(kernel: Kernel, instruction: Instruction) -> Op:
    if instruction.opcode[1:3] == ("proxy", "async"):
        return lambda warp: warp.block.shared.fence(warp.index)
    return lambda warp: None


# Barriers of warps


def named(kernel: Kernel, instruction: Instruction) -> Op:
    opcode, operands = instruction.opcode, instruction.operands
    if "warp" in opcode:
        return lambda warp: None if warp.whole() else None
    if "cluster" in opcode:
        return cluster_barrier(opcode)
    if "red" in opcode:
        raise Fault(f"not interpreted: {instruction.text}")
    number = one_of(kernel, operands[0])
    count = one_of(kernel, operands[1]) if len(operands) > 1 else lambda warp: 0
    waits = "arrive" not in opcode

    def op(warp: Warp) -> None:
        if not warp.whole():
            return
        which = number(warp)
        if which > 15:
            raise Fault(f"{warp.where()}: there are 16 barriers")
        barrier: Named = warp.block.named[which]
        now = barrier.arrive(warp, count(warp), warp.where())
        if waits and barrier.round == now:
            warp.wait(lambda: barrier.round != now)

    return op


def cluster_barrier(opcode: tuple[str, ...]) -> Op:
    """Every thread of the cluster arrives, and waits; rounds are counted by warps."""

    def arrive(warp: Warp) -> None:
        if warp.whole():
            warp.block.peers[0].cluster_arrivals += 1
            warp.arrivals += 1

    def wait(warp: Warp) -> None:
        if not warp.whole():
            return
        first = warp.block.peers[0]
        wanted = warp.arrivals * sum(len(block.warps) for block in warp.block.peers)
        if first.cluster_arrivals < wanted:
            warp.wait(lambda: first.cluster_arrivals >= wanted)

    return arrive if "arrive" in opcode else wait


# Barriers in shared memory


def mbarrier(kernel: Kernel, instruction: Instruction) -> Op:
    opcode, operands = instruction.opcode, list(instruction.operands)
    action = opcode[1]
    where = next(one for one in operands if isinstance(one, Memory))
    at = locate(kernel, where)
    after = operands[operands.index(where) + 1 :]
    number = reader(kernel, after[0], np.uint32) if after else None
    if action in ("try_wait", "test_wait"):
        return waiting(kernel, instruction, at, number)
    if action not in ("init", "inval", "arrive", "expect_tx"):
        raise Fault(f"not interpreted: {instruction.text}")
    if operands[0] is not where and operands[0] is not None:
        raise Fault(f"the state that an arrival gives is not interpreted: {instruction.text}")
    act = {
        "init": init,
        "inval": inval,
        "arrive": expect if "expect_tx" in opcode else arrive,
        "expect_tx": only_expect,
    }

    def op(warp: Warp) -> None:
        addresses, numbers = at(warp), number(warp.r) if number else np.ones(32, np.uint32)
        for lane in np.flatnonzero(warp.mask):
            block, address = tma.owner(warp.block, int(addresses[lane]))
            if not block.alive():
                raise Fault(f"{warp.where()}: a barrier of a block that has ended")
            act[action](block, address, int(numbers[lane]), warp.where())

    return op


def found(block: Block, address: int, what: str) -> MBarrier:
    if address not in block.mbarriers:
        raise Fault(f"{what}: there is no barrier at {address}")
    return block.mbarriers[address]


def init(block: Block, address: int, count: int, what: str) -> None:
    if address in block.mbarriers or address % 8 or not 1 <= count < 1 << 20:
        raise Fault(f"{what}: a barrier of {count} arrivals at {address} cannot be made")
    block.mbarriers[address] = MBarrier(count)


def inval(block: Block, address: int, count: int, what: str) -> None:
    found(block, address, what)
    del block.mbarriers[address]


def arrive(block: Block, address: int, count: int, what: str) -> None:
    found(block, address, what).arrive(count, what)


def only_expect(block: Block, address: int, count: int, what: str) -> None:
    found(block, address, what).expect(count, what)


def expect(block: Block, address: int, count: int, what: str) -> None:
    barrier = found(block, address, what)
    barrier.expect(count, what)
    barrier.arrive(1, what)


def waiting(kernel: Kernel, instruction: Instruction, at: Callable[[Warp], NDArray], parity: Callable | None) -> Op:
    if "parity" not in instruction.opcode or parity is None:
        raise Fault(f"not interpreted: {instruction.text}")
    result = put(kernel, instruction.operands[0], np.bool_)

    def op(warp: Warp) -> None:
        addresses, wanted, made = at(warp), parity(warp.r), np.zeros(32, np.bool_)
        late: list[tuple[MBarrier, int]] = []
        for lane in np.flatnonzero(warp.mask):
            barrier = found(warp.block, int(addresses[lane]), warp.where())
            made[lane] = barrier.ended(int(wanted[lane]))
            if not made[lane]:
                late.append((barrier, int(wanted[lane])))
        result(warp, made)
        if late and warp.block.machine.random.random() < PATIENCE:
            warp.wait(lambda: any(barrier.ended(phase) for barrier, phase in late))

    return op


# TMA


def bulk(kernel: Kernel, instruction: Instruction) -> Op:
    opcode = instruction.opcode
    if opcode[:3] == ("cp", "async", "bulk"):
        if opcode[3] == "commit_group":
            return lambda warp: [tma.commit(warp, int(lane)) for lane in np.flatnonzero(warp.mask)] and None
        if opcode[3] == "wait_group":
            return bulk_wait(kernel, instruction)
        if opcode[3] == "tensor":
            loads = opcode.index("global") > next(i for i, part in enumerate(opcode) if part.startswith("shared"))
            return tensor_load(kernel, instruction) if loads else tensor_store(kernel, instruction)
    raise Fault(f"not interpreted: {instruction.text}")


def bulk_wait(kernel: Kernel, instruction: Instruction) -> Op:
    left = one_of(kernel, instruction.operands[0])

    def op(warp: Warp) -> None:
        stores = [one for lane in np.flatnonzero(warp.mask) for one in tma.pending_stores(warp, int(lane), left(warp))]
        if not all(store.done for store in stores):
            warp.wait(lambda: all(store.done for store in stores))

    return op


def map_at(warp: Warp, address: int) -> tma.Map:
    machine = warp.block.machine
    if address < PARAM_WINDOW:
        raise Fault(f"{warp.where()}: a tensor map that is no parameter of the grid")
    data = machine.launch.params[address - PARAM_WINDOW :][:128]
    if data not in machine.maps:
        machine.maps[data] = tma.decode(data)
    return machine.maps[data]  # type: ignore[return-value]


def box_of(kernel: Kernel, where: object) -> Callable[[Warp, int], tuple[tma.Map, tuple[int, ...]]]:
    """The map and the first coordinates that a lane names."""
    assert isinstance(where, Memory) and isinstance(where.more[0], tuple)
    at, coordinates = locate(kernel, where), [reader(kernel, one, np.int32) for one in where.more[0]]

    def box(warp: Warp, lane: int) -> tuple[tma.Map, tuple[int, ...]]:
        tensor = map_at(warp, int(at(warp)[lane]))
        if len(tensor.box) != len(coordinates):
            raise Fault(f"{warp.where()}: a map of {len(tensor.box)} dimensions")
        return tensor, tuple(int(one(warp.r)[lane]) for one in coordinates)

    return box


def tensor_load(kernel: Kernel, instruction: Instruction) -> Op:
    to, where, barrier, *more = instruction.operands
    target, signal, box = locate(kernel, to), locate(kernel, barrier), box_of(kernel, where)
    mask = one_of(kernel, more[0]) if "multicast::cluster" in instruction.opcode else None
    if "mbarrier::complete_tx::bytes" not in instruction.opcode:
        raise Fault(f"not interpreted: {instruction.text}")

    def op(warp: Warp) -> None:
        for lane in np.flatnonzero(warp.mask):
            tensor, first = box(warp, int(lane))
            block, address = tma.owner(warp.block, int(target(warp)[lane]))
            signaled, at = tma.owner(warp.block, int(signal(warp)[lane]))
            if signaled is not block:
                raise Fault(f"{warp.where()}: data and barrier in different blocks")
            blocks = tma.peers_of(warp.block, mask(warp)) if mask else [block]
            tma.Load(tensor, first, address, at, blocks, warp.where()).start(warp.block.machine.events)

    return op


def tensor_store(kernel: Kernel, instruction: Instruction) -> Op:
    where, source = instruction.operands[:2]
    box, start = box_of(kernel, where), locate(kernel, source)

    def op(warp: Warp) -> None:
        for lane in np.flatnonzero(warp.mask):
            tensor, first = box(warp, int(lane))
            tma.check(tensor)
            made = tma.Store(tensor, first, int(start(warp)[lane]), warp.block, warp.where())
            warp.stores.setdefault(int(lane), [[]])[-1].append(made)
            warp.block.machine.events.append(made.land)

    return op


def mapped(address: NDArray, rank: NDArray) -> NDArray:
    """Addresses of shared memory in another block of the cluster."""
    return address | (rank + np.uint32(1)) << np.uint32(RANK)


# Products


def product(kernel: Kernel, instruction: Instruction) -> Op:
    opcode = instruction.opcode
    if opcode[1] == "mma_async":
        return multiply(kernel, instruction)
    act: dict[str, Op] = {"fence": wgmma.fence, "commit_group": wgmma.commit}
    if opcode[1] == "wait_group":
        pending = one_of(kernel, instruction.operands[0])
        act["wait_group"] = lambda warp: wgmma.wait_group(warp, pending(warp))

    def op(warp: Warp) -> None:
        if warp.whole():
            act[opcode[1]](warp)

    return op


def multiply(kernel: Kernel, instruction: Instruction) -> Op:
    opcode = instruction.opcode
    result, a, b, add, *flags = instruction.operands
    n, k = (int(number) for number in re.fullmatch(r"m64n(\d+)k(\d+)", opcode[4]).groups())
    kinds = opcode[6], opcode[7]
    assert isinstance(result, tuple) and isinstance(add, int)
    left = a if isinstance(a, tuple) else ()
    numbers = [kernel.constants[flag] for flag in flags]  # type: ignore[index]
    signs = tuple(1 if one == 1 else -1 for one in numbers[:2]) if len(numbers) > 1 else (1, 1)
    turned = numbers[2:]
    transposed = (False, bool(turned[0])) if left and turned else (bool(turned[0]), bool(turned[1])) if turned else None
    shape = wgmma.Shape(n, k, kinds, opcode[5], transposed or (False, False))
    check_shape(shape, result, left, numbers, instruction.text)
    first, second = None if left else one_of(kernel, a), one_of(kernel, b)

    def op(warp: Warp) -> None:
        if not warp.whole():
            return
        adds = warp.r[add]
        if adds.any() != adds.all():
            raise Fault(f"{warp.where()}: lanes do not agree whether to add")
        left_at = first(warp) if first else None
        made = wgmma.Product(shape, left_at, second(warp), bool(adds.all()), signs, result, warp.where())
        wgmma.ask(warp, made, left)

    return op


def check_shape(shape: wgmma.Shape, result: tuple, left: tuple, numbers: list[int], what: str) -> None:
    """What an assembler refuses."""
    size = wgmma.FACTORS[shape.kinds[0]][0]
    integers = shape.result == "s32"
    flags = 0 if integers else 2 if size == 1 else 3 if left else 4
    fits = shape.k * size == 32 and len(result) == shape.n // 2 and len(left) in (0, 4) and len(numbers) == flags
    if not fits or shape.n % (8 if not integers else 16) and shape.n not in (8, 24) or shape.n > 256:
        raise Fault(f"no such product: {what}")
    if shape.kinds[0] != shape.kinds[1] or any(number not in (1, 0xFFFF, 0xFFFFFFFF) for number in numbers[:2]):
        raise Fault(f"no such product: {what}")


# Registers and lanes


def registers(kernel: Kernel, instruction: Instruction) -> Op:
    """Counted for each block: what its warps gave back, others can take; who finds too few waits."""
    wanted = kernel.constants[instruction.operands[0]]  # type: ignore[index]
    grows = instruction.opcode[1] == "inc"
    if wanted % 8 or not 24 <= wanted <= 256:
        raise Fault(f"no such number of registers: {instruction.text}")

    def op(warp: Warp) -> None:
        block, more = warp.block, wanted - warp.registers
        if not warp.whole():
            return
        if (more < 0) if grows else (more > 0):
            raise Fault(f"{warp.where()}: a thread has {warp.registers} registers")
        if grows and block.pool < 32 * more:
            return warp.wait(lambda: block.pool >= 32 * more, again=True)
        warp.warpgroup.same(warp, instruction.text)
        block.pool -= 32 * more
        warp.registers = wanted
        held = sum(32 * one.registers for one in block.warps)
        if held + block.pool > REGISTERS:
            raise Fault(f"{warp.where()}: the block has {held} registers")
        return None

    return op


def shuffle(kernel: Kernel, instruction: Instruction) -> Op:
    target, value, by, clamp, members = instruction.operands
    result, valid = target if isinstance(target, tuple) else (target, None)
    source, amount, bounds, mask = (reader(kernel, one, np.uint32) for one in (value, by, clamp, members))
    store, flag = put(kernel, result, np.uint32), put(kernel, valid, np.bool_)
    mode, lane = instruction.opcode[2], np.arange(32)

    def op(warp: Warp) -> None:
        check_members(warp, mask(warp.r))
        segment = bounds(warp.r) >> np.uint32(8) & np.uint32(31)
        most = (lane & segment) | (bounds(warp.r) & 31 & ~segment)
        step = (amount(warp.r) & np.uint32(31)).astype(np.int64)
        at = {"bfly": lane ^ step, "idx": (lane & segment) | (step & ~segment.astype(np.int64) & 31)}
        at |= {"up": lane - step, "down": lane + step}
        inside = at[mode] >= most if mode == "up" else at[mode] <= most
        store(warp, source(warp.r)[np.where(inside, at[mode], lane)])
        flag(warp, inside)

    return op


def check_members(warp: Warp, mask: NDArray) -> None:
    wanted = int(mask[warp.mask][0])
    here = sum(1 << int(lane) for lane in np.flatnonzero(warp.mask))
    alive = sum(1 << int(lane) for lane in np.flatnonzero(warp.alive))
    if wanted & alive != here:
        raise Fault(f"{warp.where()}: lanes {here:#x} come to what {wanted:#x} do together")


def vote(kernel: Kernel, instruction: Instruction) -> Op:
    """Also which lanes are there, and one of them."""
    opcode = instruction.opcode
    if opcode[0] == "activemask":
        store = put(kernel, instruction.operands[0], np.uint32)
        return lambda warp: store(warp, np.full(32, ballot(warp.mask), np.uint32))
    if opcode[0] == "elect":
        target, mask = instruction.operands[0], reader(kernel, instruction.operands[1], np.uint32)
        chosen, flag = put(kernel, target[0], np.uint32), put(kernel, target[1], np.bool_)  # type: ignore[index]

        def elect(warp: Warp) -> None:
            check_members(warp, mask(warp.r))
            first = int(np.flatnonzero(warp.mask)[0])
            chosen(warp, np.full(32, first, np.uint32))
            flag(warp, np.arange(32) == first)

        return elect
    result, given, members = instruction.operands
    read, mask, mode = reader(kernel, given, np.bool_), reader(kernel, members, np.uint32), opcode[2]
    store = put(kernel, result, np.uint32 if mode == "ballot" else np.bool_)

    def op(warp: Warp) -> None:
        check_members(warp, mask(warp.r))
        values = read(warp.r)
        held = {"any": (values & warp.mask).any(), "all": values[warp.mask].all()}
        made = ballot(values & warp.mask) if mode == "ballot" else held[mode]
        store(warp, np.full(32, made, np.uint32 if mode == "ballot" else np.bool_))

    return op


def ballot(mask: NDArray) -> int:
    return sum(1 << int(lane) for lane in np.flatnonzero(mask))
