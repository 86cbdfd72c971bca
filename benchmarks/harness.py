"""Side-by-side timing, shared by the benchmark scripts.

Runs all cases in every round, in an order that shifts by one each round, and compares medians, so that slowdowns of the
machine affect all cases equally. Each case is warmed up first. On CUDA, the L2 cache is flushed before every run, and
runs are timed with events. Use fresh random data, never zeros.

    rows = measure([Case("eager", eager, bytes_moved=n), Case("kernel", kernel, bytes_moved=n)], device)
    print(table(rows))
    save("rgb", rows, device)      # benchmarks/results/rgb-<device>.json, or under $OUT

Times are in microseconds, rates in GB/s (10^9) and TFLOP/s; `speed` is relative to the first case.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastvid.ops import dispatch
from fastvid.ops.sources import file_of, source_hash

ROOT = Path(__file__).parents[1]
L2_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any current GPU


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


def measure(cases: Sequence[Case], device: torch.device | str, rounds: int = 20, warm_up: int = 3) -> list[Row]:
    """Run all cases `rounds` times, interleaved. Drops the result of a case before the next one starts."""
    timer = _CudaTimer(torch.device(device)) if torch.device(device).type == "cuda" else _host_timer
    for case in cases:
        for _ in range(warm_up):
            case.run()
    times: list[list[float]] = [[] for _ in cases]
    for i in range(rounds):
        for j in range(len(cases)):
            k = (i + j) % len(cases)
            times[k].append(timer(cases[k].run))
    baseline = statistics.median(times[0])
    return [_row(case, taken, baseline) for case, taken in zip(cases, times, strict=True)]


def _row(case: Case, times: list[float], baseline: float) -> Row:
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


def table(rows: Sequence[Row], title: str = "") -> str:
    """The rows as a text table, without rates that are not meaningful."""
    lines = [title] if title else []
    lines.append(f"{'':<24} {'median us':>12} {'fastest':>12} {'slowest':>12} {'GB/s':>9} {'TFLOP/s':>9} {'speed':>8}")
    for row in rows:
        rates = [f"{rate:9.1f}" if rate else f"{'':>9}" for rate in (row.gb_per_s, row.tflop_per_s)]
        times = f"{row.median:12.1f} {row.fastest:12.1f} {row.slowest:12.1f}"
        lines.append(f"{row.name:<24} {times} {rates[0]} {rates[1]} {row.speed:7.2f}x")
    return "\n".join(lines)


def save(
    name: str, results: dict[str, Sequence[Row]] | Sequence[Row], device: torch.device | str, **facts: Any
) -> Path:
    """Write results as JSON with a description of the machine. facts: anything else that a reader needs (sizes,
    versions)."""
    groups = results if isinstance(results, dict) else {name: results}
    record = {
        "benchmark": name,
        "machine": machine(torch.device(device)),
        **facts,
        "results": {title: [asdict(row) for row in rows] for title, rows in groups.items()},
    }
    path = _path(name, torch.device(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def result_of(name: str, device: torch.device) -> dict[str, Any] | None:
    """The last result that `save` wrote for this device; None if there is none."""
    path = _path(name, device)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """Why a back end of an operation isn't measured: it cannot run here, or its tests ran on this device and did not
    pass (`gpu_tests.py`), so that it may fault or hang. None if it can be."""
    function = dispatch.implementations()[op].get(backend)
    if function is None:
        return f"{op} has no {backend} back end"
    if reason := dispatch.why_not(backend, device) or dispatch.lacks(function, device):
        return reason
    record = result_of("gpu-tests", device)
    if record is None or "files" not in record:
        return None
    files = file_of(op, backend).split("+")
    names = [name for name in files if record["sources"].get(name, "") == source_hash(backend, name)]
    outcomes = {test: record["files"].get(test) for name in names for test in record["covers"].get(name, ())}
    bad = [name for name, outcome in outcomes.items() if outcome and not passed(outcome)]
    return f"{', '.join(bad)} did not pass on this device" if bad else None


def passed(outcome: dict[str, Any]) -> bool:
    """Whether no test of a file failed, as `gpu_tests.py` records it; all of them may be for another device."""
    return outcome["ended"] == "done" and not outcome["failed"]


def _path(name: str, device: torch.device) -> Path:
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return folder / f"{name}-{_slug(_device_name(device))}.json"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {cpu_name()}"


def compared(op: str, shape_class: str, instead: str, *backends: str) -> dict[str, Any]:
    """What rows say of an operation's kernels, for `verified.py`: save(..., compared={title: compared(...)}).

    instead: the row of what `auto` takes without them. backends: of ours, which are also the rows' names.
    """
    files = {name: file_of(op, name, shape_class) for name in backends}
    sources = {name: {"file": file, "source": source_hash(name, file)} for name, file in files.items()}
    return {"op": op, "shape_class": shape_class, "instead": instead, "kernels": sources}


def machine(device: torch.device) -> dict[str, Any]:
    """A description of the machine, for results."""
    on_gpu = device.type == "cuda"
    return {
        "device": _device_name(device),
        "arch": dispatch.architecture(device),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return match.group(1) if match else platform.processor()


def commit() -> str:
    """The current commit, with a + if there are changes; "unknown" outside a checkout."""
    head = _run("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else "unknown"


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
