"""A grid of blocks of warps on a random schedule.

A warp's 32 lanes go together: a register is an array of 32. Lanes that took another branch are other groups, and the
group that is furthest behind goes first. Which warp is next, for how many instructions, and when a load or a product
that was started takes place is drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ptx.barriers import MBarrier, Named
from ptx.memory import SHARED_START, Fault, Global, Shared
from ptx.parse import Kernel
from ptx.tma import Store
from ptx.wgmma import Asked, Warpgroup

UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FULL = np.ones(32, np.bool_)
FULL.flags.writeable = False
REGISTERS = 65536  # of a multiprocessor
FOREVER = 1 << 60
Wait = Callable[[], bool]


def never() -> bool:
    """What a group waits for that needs the rest of its warp."""
    return False


@dataclass(frozen=True)
class Launch:
    """What a launcher asks for. params: the bytes of all parameters, where the kernel expects them."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    params: bytes
    cluster: int = 1


@dataclass
class Group:
    """Lanes of a warp at one place."""

    pc: int
    mask: NDArray[np.bool_]
    waiting: Wait | None = None


class Warp:
    def __init__(self, block: Block, index: int, code: list[Callable[[Warp], None]], registers: list[NDArray]) -> None:
        self.block, self.index, self.code, self.r = block, index, code, registers
        self.warpgroup = block.warpgroups[index // 4]
        self.pc, self.limit = 0, FOREVER
        threads = np.arange(32) + 32 * index < block.threads
        self.mask = self.alive = FULL if threads.all() else threads
        self.full = self.mask is FULL
        self.waiting: Wait | None = None
        self.others: list[Group] = []
        self.done = False
        self.registers = block.launch_registers
        self.fenced: list[NDArray] | None = None
        self.products: list[list[Asked]] = [[]]  # groups of them, the last one not committed
        self.arrivals = 0  # at the cluster's barrier
        self.place = 0  # among the warpgroup's instructions
        self.stores: dict[int, list[list[Store]]] = {}  # of a lane: groups of bulk stores

    def run(self, budget: int) -> None:
        code = self.code
        for _ in range(budget):
            if self.pc >= self.limit and not self.settle():
                return
            op = code[self.pc]
            self.pc += 1
            op(self)

    def ready(self) -> bool:
        if self.done:
            return False
        if self.waiting is None or self.waiting():
            return True
        return any(group.waiting is None or group.waiting() for group in self.others)

    def wait(self, until: Wait, again: bool = False) -> None:
        """Lets the group rest; again: it then does the same instruction once more."""
        self.waiting, self.limit = until, -1
        if again:
            self.pc -= 1

    def settle(self) -> bool:
        """Takes the group that is furthest behind of those that can go on; False if there is none."""
        if self.done:
            return False
        groups: dict[int, Group] = {}
        for group in (Group(self.pc, self.mask, self.waiting), *self.others):
            resting = group.waiting is not None and group.waiting is not never and not group.waiting()
            key = group.pc if not resting else -1 - len(groups)
            if key in groups:
                groups[key].mask = groups[key].mask | group.mask
                groups[key].waiting = None
            else:
                groups[key] = group
                group.waiting = group.waiting if resting or group.waiting is never else None
        able = [group for group in groups.values() if group.waiting is None]
        if not able:
            if all(group.waiting is never for group in groups.values()):
                raise Fault(f"a part of a warp alone comes to {self.where()}")
            return False
        first = min(able, key=lambda group: group.pc)
        self.others = [group for group in groups.values() if group is not first]
        self.take(first)
        return True

    def take(self, group: Group) -> None:
        self.pc, self.mask, self.waiting = group.pc, group.mask, None
        if self.mask is not FULL and self.mask.all():
            self.mask = FULL
        self.full = self.mask is FULL
        self.limit = min((other.pc for other in self.others), default=FOREVER)

    def diverge(self, target: int, taken: NDArray[np.bool_]) -> None:
        """The lanes of `taken` go to target, the rest of the group on."""
        rest = self.mask & ~taken
        self.others.append(Group(target, taken))
        self.mask, self.limit = rest, -1

    def whole(self) -> bool:
        """Whether all lanes are here; else the group waits for the others."""
        if self.mask is self.alive or (self.mask == self.alive).all():
            return True
        self.wait(never, again=True)
        return False

    def leave(self) -> None:
        self.alive = self.alive & ~self.mask
        self.mask = self.mask & False
        if self.others:
            first, *self.others = self.others
            self.pc, self.mask, self.waiting, self.limit = first.pc, first.mask, first.waiting, -1
            return
        self.done, self.limit = True, -1
        if any(self.products):
            raise Fault(f"{self.where()}: ends with products that nobody waited for")
        if any(not store.done for groups in self.stores.values() for group in groups for store in group):
            raise Fault(f"{self.where()}: ends with bulk stores that nobody waited for")
        self.block.left()

    def where(self) -> str:
        at = min(max(self.pc - 1, 0), len(self.block.kernel.code) - 1)
        return f"block {self.block.number}, warp {self.index}, instruction {at}: {self.block.kernel.code[at].text[:90]}"


class Block:
    """index: in the grid; rank: in its cluster, of whose blocks `peers` is the list."""

    def __init__(self, machine: Machine, number: int, peers: list[Block]) -> None:
        launch = machine.launch
        self.machine, self.kernel, self.number = machine, launch.kernel, number
        self.peers, self.rank = peers, len(peers)
        peers.append(self)
        (x, y, z), gx, gy = launch.block, *launch.grid[:2]
        self.threads, self.size = x * y * z, launch.block
        self.index = number % gx, number // gx % gy, number // (gx * gy)
        self.symbols, end = place(launch)
        self.shared = Shared(end)
        self.named = [Named(self) for _ in range(16)]
        self.mbarriers: dict[int, MBarrier] = {}
        self.launch_registers, self.pool = registers_of(launch), 0
        warps = -(-self.threads // 32)
        self.warpgroups = [Warpgroup(self, i) for i in range(-(-warps // 4))]
        self.warps: list[Warp] = []
        self.cluster_arrivals = 0  # of warps of all peers, counted by the first block

    def alive(self) -> int:
        """Threads of warps that have not ended."""
        return sum(int(warp.alive.sum()) for warp in self.warps if not warp.done)

    def left(self) -> None:
        for barrier in self.named:
            barrier.settle()


def registers_of(launch: Launch) -> int:
    """Registers a thread has at most, by the kernel's bounds; the multiprocessor gives them in eights."""
    directives = launch.kernel.directives
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    limit = directives.get("maxnreg", (256,))[0]
    most = REGISTERS // (max(threads, 32) * directives.get("minnctapersm", (1,))[0]) // 8 * 8
    return min(most, limit, 256)


def place(launch: Launch) -> tuple[dict[str, int], int]:
    """Addresses of the variables in shared memory, and its end: the dynamic ones lie behind the others."""
    used = [(name, *launch.kernel.shared[name]) for name in dict.fromkeys(launch.kernel.symbols.values())]
    addresses, end = {}, SHARED_START
    for name, align, size in sorted(used, key=lambda one: one[2] == 0):
        end = -(-end // align) * align
        addresses[name] = end
        end += size
    if end + launch.shared > SHARED_START + 227 * 1024:
        raise Fault(f"{end - SHARED_START + launch.shared} bytes of shared memory are more than a block can have")
    return addresses, end + launch.shared


class Machine:
    """launch: see `Launch`; memory: the tensors that it may touch; resident: clusters that run at a time."""

    def __init__(self, launch: Launch, memory: Global, seed: int = 0, resident: int = 3) -> None:
        self.launch, self.memory, self.resident = launch, memory, resident
        self.random = random.Random(seed)
        self.events: list[Callable[[], None]] = []
        self.steps = 0
        self.maps: dict[bytes, object] = {}
        self.eager = self.random.choice((0.02, 0.2, 0.9))  # how soon what was started takes place

    def run(self) -> None:
        """Raises Fault for what the hardware would not do."""
        from ptx.decode import decode

        grid, size = self.launch.grid, self.launch.cluster
        blocks = grid[0] * grid[1] * grid[2]
        if blocks % size:
            raise Fault(f"a grid of {blocks} blocks has no clusters of {size}")
        kernel = self.launch.kernel
        if kernel.decoded is None:
            kernel.decoded = decode(kernel)
        code = kernel.decoded
        with np.errstate(all="ignore"):
            for first in range(0, blocks, size * self.resident):
                self.wave(code, range(first, min(first + size * self.resident, blocks)))

    def wave(self, code: list[Callable[[Warp], None]], numbers: range) -> None:
        warps: list[Warp] = []
        for first in numbers[:: self.launch.cluster]:
            peers: list[Block] = []
            for number in range(first, first + self.launch.cluster):
                block = Block(self, number, peers)
                count = -(-block.threads // 32)
                block.warps = [Warp(block, i, code, registers_for(block, i)) for i in range(count)]
                warps += block.warps
        self.schedule(warps)

    def schedule(self, warps: list[Warp]) -> None:
        weights = [self.random.choice((0.05, 1, 5)) for _ in warps]
        while True:
            ready = [i for i, warp in enumerate(warps) if warp.ready()]
            if self.events and (not ready or self.random.random() < self.eager):
                at = self.random.randrange(len(self.events))
                self.events[at], self.events[-1] = self.events[-1], self.events[at]
                self.events.pop()()
            elif ready:
                chosen = self.random.choices(ready, [weights[i] for i in ready])[0]
                budget = self.random.choice((1, 8, 64, 400))
                self.advance(warps[chosen], budget)
            elif all(warp.done for warp in warps):
                return
            else:
                waiting = "; ".join(warp.where() for warp in warps if not warp.done)
                raise Fault(f"all warps wait for ever: {waiting}")

    def advance(self, warp: Warp, budget: int) -> None:
        self.steps += budget
        try:
            warp.run(budget)
        except (TypeError, AttributeError) as error:
            if "Pending" not in str(error):
                raise
            raise Fault(f"{warp.where()}: uses a register of an unfinished product") from error


def registers_for(block: Block, warp: int) -> list[NDArray]:
    """Every slot, as a warp begins: registers hold what nobody has written."""
    kernel = block.kernel
    garbage = {bits: np.full(32, -1 if bits > 1 else 0, np.int64).astype(kind) for bits, kind in UINT.items()}
    slots = [garbage[width] for width in kernel.widths]
    for slot, number in kernel.constants.items():
        width = kernel.widths[slot]
        slots[slot] = np.full(32, number, np.uint64).astype(UINT[width])
    for slot, name in kernel.special.items():
        slots[slot] = special(block, warp, name).astype(UINT[kernel.widths[slot]])
    for slot, name in kernel.symbols.items():
        slots[slot] = np.full(32, block.symbols[name], UINT[kernel.widths[slot]])
    return slots


def special(block: Block, warp: int, name: str) -> NDArray:
    """What a special register holds in each lane."""
    thread, grid, ranks = np.arange(32) + 32 * warp, block.machine.launch.grid, len(block.peers)
    x, y, _ = block.size
    known: dict[str, object] = {
        "%laneid": np.arange(32),
        "%warpid": warp,
        "%tid": (thread % x, thread // x % y, thread // (x * y)),
        "%ntid": block.size,
        "%ctaid": block.index,
        "%nctaid": grid,
        "%cluster_ctarank": block.rank,
        "%cluster_nctarank": ranks,
        "%cluster_ctaid": (block.rank, 0, 0),
        "%cluster_nctaid": (ranks, 1, 1),
        "%clusterid": (block.number // ranks, 0, 0),
        "%nclusterid": (grid[0] // ranks, *grid[1:]),
    }
    base, _, axis = name.partition(".")
    value = known[base]
    return np.broadcast_to(np.asarray(value["xyz".index(axis)] if axis else value), 32)
