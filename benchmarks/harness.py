"""What the benchmark scripts share: side-by-side timing (`fastvid.tuning.timing`), tables and results. Use fresh random
data, never zeros.

    rows = measure([Case("eager", eager, bytes_moved=n), Case("kernel", kernel, bytes_moved=n)], device)
    print(table(rows))
    save("rgb", rows, device)      # benchmarks/results/rgb-<device>.json, or under $OUT
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvid.benchmarks.host import RESULTS, earlier, slug
from fastvid.ops import dispatch, shapes
from fastvid.ops.sources import file_of, source_hash
from fastvid.tuning.machine import device_name, machine
from fastvid.tuning.timing import Case, Row, measure, row_of

__all__ = ["Case", "Measured", "Row", "compared", "functions", "machine", "measure", "passed", "result_of", "right"]
__all__ += ["row_of", "save", "table", "why_not"]

Measured = tuple[list[Row], dict[str, Any]]
"""Rows, and what they compare (`compared`)."""


def right(runs: Mapping[str, Callable[[], Any]], allowed: Mapping[str, float] | float) -> dict[str, Callable[[], Any]]:
    """The runs whose results are close to the first one's. What is not, or cannot run, is told of and left out, and
    costs no other its measurement. allowed: relative error, ||a - b|| / ||b||, of all, or of those that it names."""
    names = iter(runs)
    expected, kept = _tensors(runs[next(names)]()), dict(runs)
    for name in names:
        try:
            off = max(_error(a, b) for a, b in zip(_tensors(runs[name]()), expected, strict=True))
        except RuntimeError as error:  # of PyTorch: "no available kernel"; of Triton: too much shared memory
            said = str(error).splitlines()[0]
        else:
            most = allowed if isinstance(allowed, float) else allowed[name]
            said = "" if off <= most else f"IT IS WRONG, off by {off:.1e} of {most:.1e}"
        if said:
            print(f"{name} is left out: {said}", flush=True)
            del kept[name]
    return kept


def _tensors(made: Any) -> list[torch.Tensor]:
    return [made] if isinstance(made, torch.Tensor) else [one for one in made if isinstance(one, torch.Tensor)]


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    off = (a.float() - b.float()).norm() / b.float().norm()
    return float(off.nan_to_num(nan=torch.inf))


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
    """The last result that `save` wrote for this device, in this folder or in that of committed results; None if there
    is none."""
    path = earlier(_path(name, device))
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """Why a back end of an operation isn't measured: it cannot run here, or its tests ran on this device and did not
    pass (`gpu_tests.py`), so that it may fault or hang. None if it can be."""
    function = dispatch.implementations()[op].get(backend)
    if function is None:
        return f"{op} has no {backend} back end"
    if reason := dispatch.why_not(backend, device) or dispatch.lacks(function, device):
        return reason
    files = (result_of("gpu-tests", device) or {}).get("files", {})
    bad = [test for test, outcome in files.items() if not passed(outcome) and _tested(outcome, op, backend)]
    return f"{', '.join(bad)} did not pass on this device" if bad else None


def _tested(outcome: dict[str, Any], op: str, backend: str) -> bool:
    """Whether a file's tests ran this back end's kernel, as it is now."""
    hashes = outcome["sources"]
    return any(hashes.get(name, "") == source_hash(backend, name) for name in file_of(op, backend).split("+"))


def functions(op: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The back ends of an operation that are measured on a device, the reference first. Others are told of."""
    every = dispatch.implementations()[op]
    reasons = {name: why_not(op, name, device) for name in every}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}")
    return {name: every[name] for name in sorted(every, key="reference".__ne__) if not reasons[name]}


def passed(outcome: dict[str, Any]) -> bool:
    """Whether no test of a file failed, as `gpu_tests.py` records it; all of them may be for another device."""
    return outcome["ended"] == "done" and not outcome["failed"]


def _path(name: str, device: torch.device) -> Path:
    folder = Path(os.environ.get("OUT") or RESULTS)
    return folder / f"{name}-{slug(device_name(device))}.json"


def compared(op: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What rows that are named after back ends compare, for `verified.py`: save(..., compared={title: compared(...)}).

    args and kwargs: of the call that is measured, for its dtype and shape class.
    """
    shape_class = shapes.shape_class(op, args, kwargs or {})
    exact = [name for name in dispatch.implementations()[op] if name not in dispatch.APPROXIMATE]
    files = {name: file_of(op, name, shape_class) for name in exact}
    return {
        "op": op,
        "dtype": shapes.dtype_of(op, args),
        "shape_class": shape_class,
        "backends": {name: {"file": file, "source": source_hash(name, file)} for name, file in files.items()},
    }
