"""What the benchmark scripts share: side-by-side timing (`fastvid.tuning.timing`), tables and results. Use fresh random
data, never zeros.

    rows = measure([Case("eager", eager, bytes_moved=n), Case("kernel", kernel, bytes_moved=n)], device)
    print(table(rows))
    save("rgb", rows, device)      # benchmarks/results/rgb-<device>.json, or under $OUT
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvid.ops import dispatch
from fastvid.ops.sources import file_of, source_hash
from fastvid.tuning.machine import device_name, machine
from fastvid.tuning.timing import Case, Row, measure, row_of

__all__ = ["Case", "Row", "compared", "machine", "measure", "passed", "result_of", "row_of", "save", "table", "why_not"]

ROOT = Path(__file__).parents[1]


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
    return folder / f"{name}-{_slug(device_name(device))}.json"


def compared(op: str, shape_class: str, instead: str, *backends: str) -> dict[str, Any]:
    """What rows say of an operation's kernels, for `verified.py`: save(..., compared={title: compared(...)}).

    instead: the row of what `auto` takes without them. backends: of ours, which are also the rows' names.
    """
    files = {name: file_of(op, name, shape_class) for name in backends}
    sources = {name: {"file": file, "source": source_hash(name, file)} for name, file in files.items()}
    return {"op": op, "shape_class": shape_class, "instead": instead, "kernels": sources}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
