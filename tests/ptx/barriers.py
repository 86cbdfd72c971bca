"""Barriers: those by number, of warps, and those in shared memory, which also count bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptx.memory import Fault

if TYPE_CHECKING:
    from ptx.machine import Block, Warp

MOST_BYTES = (1 << 20) - 1


class Named:
    """bar.sync and bar.arrive: threads are counted by whole warps."""

    def __init__(self, block: Block) -> None:
        self.block, self.round = block, 0
        self.expected: int | None = None  # of threads; 0: of all that are there
        self.arrived: list[int] = []

    def arrive(self, warp: Warp, expected: int, what: str) -> int:
        """The round to wait for the end of."""
        if expected % 32:
            raise Fault(f"{what}: {expected} is no multiple of 32 threads")
        if self.arrived and self.expected != expected:
            raise Fault(f"{what}: expects {expected} threads where others expect {self.expected}")
        if warp.index in self.arrived:
            raise Fault(f"{what}: warp {warp.index} comes twice in a round")
        self.expected = expected
        self.arrived.append(warp.index)
        now = self.round
        self.settle()
        return now

    def settle(self) -> None:
        wanted = self.expected or self.block.alive()
        if self.arrived and 32 * len(self.arrived) >= wanted:
            self.arrived, self.round = [], self.round + 1


class MBarrier:
    """In shared memory. A phase ends once all have arrived and all bytes are there."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.bytes, self.phase = 0, 0

    def arrive(self, count: int, what: str) -> None:
        self.pending -= count
        if self.pending < 0:
            raise Fault(f"{what}: more arrivals than the {self.arrivals} of a phase")
        self.settle()

    def expect(self, count: int, what: str) -> None:
        self.bytes += count
        if abs(self.bytes) > MOST_BYTES:
            raise Fault(f"{what}: more bytes than a barrier counts")

    def complete(self, count: int, what: str) -> None:
        self.expect(-count, what)
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def ended(self, parity: int) -> bool:
        """Whether the phase of this parity is over: the one that runs has the other."""
        return self.phase % 2 != parity
