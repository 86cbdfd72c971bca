"""Side-by-side timing: all cases run in every round, in an order that shifts by one each round, and medians are
compared, so that slowdowns of the machine affect all cases equally.

Each case is warmed up first. On CUDA the L2 cache is flushed before every run, and runs are timed with events. Times
are in microseconds, rates in GB/s (10^9) and TFLOP/s; `speed` is relative to the first case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

L2_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any current GPU
MIN_ROUNDS, MAX_ROUNDS = 3, 100  # of `measure_within`


@dataclass(frozen=True)
class Case:
    """A function to time. bytes_moved: minimum bytes read and written; flops: operations; 0 if not meaningful."""

    name: str
    run: Callable[[], Any]
    bytes_moved: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Row:
    """The measurements of a case; times in microseconds."""

    name: str
    median: float
    fastest: float
    slowest: float
    rounds: int
    gb_per_s: float
    tflop_per_s: float
    speed: float


Timer = Callable[[Callable[[], Any]], float]
"""A run -> its microseconds."""


def measure(cases: Sequence[Case], device: torch.device | str, rounds: int = 20, warm_up: int = 3) -> list[Row]:
    """Run all cases `rounds` times, interleaved. Drops the result of a case before the next one starts."""
    timer = timer_of(torch.device(device))
    _warm_up(cases, warm_up)
    return _rows(cases, [_round(cases, timer, number) for number in range(rounds)])


def measure_within(cases: Sequence[Case], device: torch.device, seconds: float) -> list[Row]:
    """The same for about so many seconds: at least MIN_ROUNDS rounds, or a single one where that would take twice as
    long. The cases have run before."""
    timer, end = timer_of(device), time.monotonic() + seconds
    rounds: list[list[float]] = []
    while len(rounds) < MAX_ROUNDS:
        began = time.monotonic()
        rounds.append(_round(cases, timer, len(rounds)))
        took, left = time.monotonic() - began, end - time.monotonic()
        if took > left + (seconds if len(rounds) < MIN_ROUNDS else 0):
            break
    return _rows(cases, rounds)


def timer_of(device: torch.device) -> Timer:
    return _CudaTimer(device) if device.type == "cuda" else _host_timer


def _warm_up(cases: Sequence[Case], times: int) -> None:
    for case in cases:
        for _ in range(times):
            case.run()


def _round(cases: Sequence[Case], timer: Timer, number: int) -> list[float]:
    """The microseconds of each case in one round."""
    times = [0.0] * len(cases)
    for j in range(len(cases)):
        k = (number + j) % len(cases)
        times[k] = timer(cases[k].run)
    return times


def _rows(cases: Sequence[Case], rounds: Sequence[Sequence[float]]) -> list[Row]:
    times = list(zip(*rounds, strict=True)) if rounds else []
    baseline = statistics.median(times[0])
    return [row_of(case, taken, baseline) for case, taken in zip(cases, times, strict=True)]


def row_of(case: Case, times: Sequence[float], baseline: float) -> Row:
    """The row of a case from its microseconds. baseline: the median that its speed is relative to."""
    median = statistics.median(times)
    rates = case.bytes_moved / median / 1e3, case.flops / median / 1e6
    return Row(case.name, median, min(times), max(times), len(times), *rates, speed=baseline / median)


def _host_timer(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


class _CudaTimer:
    """Flushes the L2 cache, then times a run with two events."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, run: Callable[[], Any]) -> float:
        self.flush.zero_()
        self.events[0].record()
        run()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) * 1e3
