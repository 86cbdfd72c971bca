"""Which back end `auto` takes for the calls of an operation, from results: committed ones, then the user's own.

A row is a result for one operation, dtype and shape class on one kind of machine (`COLUMNS`). It counts only if it is
of this machine and of exactly this source code, if the back end can run here, and if `fastvid tune` has not found that
back end wrong here. Rows of verified.json, which come from committed results, precede those of the user's table
(tuned.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvid.ops import shapes

Function = Callable[..., Any]
Row = Mapping[str, Any]
Key = tuple[str, str]
"""(dtype, shape class)"""

COLUMNS = {
    "op": "the operation",
    "dtype": 'what it computes in, "bfloat16"',
    "shape_class": "as shapes.shape_class tells it",
    "backend": "the fastest of those that were right",
    "machine": 'an architecture ("sm_90", committed results) or a name (the user\'s own)',
    "file": "the kernel's file; empty for libraries",
    "source": "hash of the kernel's source, or the library's version",
    "median_us": "time of a call in microseconds",
    "next": "the next best back end; empty if there is none",
    "next_us": "its time",
    "result": "where the result is: a path",
}


@dataclass(frozen=True)
class Choice:
    """What runs for one shape class of an operation. Times in microseconds; `next_best` is None where nothing else was
    right. result: the file that shows it."""

    dtype: str
    shape_class: str
    backend: str
    median_us: float
    next_best: str | None
    next_us: float | None
    result: str

    @property
    def gain(self) -> float | None:
        """How many times as fast as the next best."""
        return self.next_us / self.median_us if self.next_us else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DispatchByShape:
    """A function that runs, for each shape class, the back end that is fastest there, and `rest` for all others.

    kernels: (dtype, shape class) -> function.
    """

    op: str
    kernels: Mapping[Key, Function]
    rest: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = shapes.dtype_of(self.op, args), shapes.shape_class(self.op, args, kwargs)
        return self.kernels.get(key, self.rest)(*args, **kwargs)


def committed() -> list[dict[str, Any]]:
    """The rows of verified.json, which benchmarks/verified.py derives from the committed results."""
    return json.loads(Path(__file__).with_name("verified.json").read_text(encoding="utf-8"))["kernels"]


def choices(op: str, rows: Iterable[Row], counts: Callable[[Row], bool]) -> list[Choice]:
    """The choices for an operation: for each dtype and shape class the first row that counts."""
    found: dict[Key, Choice] = {}
    for row in rows:
        key = row["dtype"], row["shape_class"]
        if row["op"] == op and key not in found and counts(row):
            found[key] = _choice(row)
    return [found[key] for key in sorted(found)]


def _choice(row: Row) -> Choice:
    return Choice(
        row["dtype"],
        row["shape_class"],
        row["backend"],
        float(row["median_us"]),
        row.get("next") or None,
        float(row["next_us"]) if row.get("next_us") else None,
        row["result"],
    )


def summary(found: Iterable[Choice], default: str) -> str:
    """ "cuda for 3 shape classes, triton for 1, else cudnn"; "cudnn" if that is fastest for all."""
    counts = Counter(one.backend for one in found)
    if set(counts) == {default}:
        return default
    parts = [f"{name} for {count}" for name, count in sorted(counts.items())]
    parts[0] += " shape class" if counts[min(counts)] == 1 else " shape classes"
    return f"{', '.join(parts)}, else {default}"


def why(found: Iterable[Choice]) -> str:
    """Who measured it, and how much faster it is than the next best."""
    gains = [one.gain for one in found if one.gain]
    results = ", ".join(sorted({one.result for one in found}))
    if not gains:
        return f"fastest in {results}"
    low, high = (f"{gain:.2f}" for gain in (min(gains), max(gains)))
    return f"{low if low == high else f'{low} to {high}'} x the next best in {results}"
