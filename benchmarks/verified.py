"""Derives fastvid/ops/verified.json, the back ends that `auto` may choose on GPUs, from the committed results.

    python benchmarks/verified.py            # writes it
    python benchmarks/verified.py --check    # reports differences between it and the results

Results are those of `fastvid tune --export`, which has verified each back end itself, and of benchmarks that declare a
comparison with `harness.compared`. A measurement is of one call: an operation, a dtype and a shape class on one kind of
GPU. Its row names the fastest back end that qualifies:

- the source is the same today (for a library its version, which the machine that reads the row compares);
- it was not rejected by `fastvid tune` for this class on this kind of GPU, with this source;
- the tests of a kernel of ours did not fail there with this source (`gpu_tests.py`). A benchmark's result needs tests
  that passed, since it compares with the reference alone;
- a kernel of ours is at least 2 % faster than every library.

What does not qualify costs that measurement alone. Rows of a class are sorted, the one with the largest gain first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cuda_resources import build
from gpu_tests import COVERS
from harness import passed

from fastvid.ops import dispatch, sources

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "fastvid" / "ops" / "verified.json"
ABOUT = "Back ends that `auto` may choose: each has a committed result from a GPU, faster than what it replaces."
OURS = ("triton", "cuda")
FASTER = 1.02  # least speed of a kernel of ours, relative to the fastest library
Records = Mapping[str, Mapping[str, Any]]
"""Results by their path from the repository's root."""


@dataclass(frozen=True)
class Measurement:
    """Medians of the back ends for one call, in microseconds. backends: those that may be chosen -> (file, source).
    tuned: whether each was verified when it was measured."""

    op: str
    dtype: str
    shape_class: str
    machine: str
    times: Mapping[str, float]
    backends: Mapping[str, tuple[str, str | None]]
    tuned: bool
    result: str


@dataclass(frozen=True)
class Known:
    """What results say against back ends. rejected: (machine, op, dtype, shape class, back end, source). right and
    wrong: (machine, file, source) of kernels whose tests passed, or did not."""

    rejected: frozenset[tuple[str, ...]]
    right: frozenset[tuple[str, str, str]]
    wrong: frozenset[tuple[str, str, str]]


def rows(records: Records) -> list[dict[str, Any]]:
    """The rows of verified.json."""
    known = Known(frozenset(rejections(records)), *tests_of(records))
    found: dict[tuple[str, ...], tuple[float, dict[str, Any]]] = {}
    for one in measurements(records):
        if (row := row_of(one, known)) is None:
            continue
        gain = least(one) / row["median_us"] if row["backend"] in OURS else 1.0
        of = tuple(row[name] for name in ("op", "machine", "dtype", "shape_class", "backend", "source"))
        if of not in found or gain > found[of][0]:
            found[of] = gain, row
    return [row for _, (_, row) in sorted(found.items(), key=lambda item: (item[0][:4], -item[1][0], item[0]))]


def row_of(one: Measurement, known: Known) -> dict[str, Any] | None:
    """The row of a measurement; None if no back end qualifies."""
    candidates = [name for name in one.backends if name in one.times and not disqualified(name, one, known)]
    fitting = [name for name in candidates if name not in OURS or FASTER * one.times[name] <= least(one)]
    if not fitting:
        return None
    best = min(fitting, key=lambda name: one.times[name])
    # What is faster still does not qualify.
    others = {name: time for name, time in one.times.items() if name != best and time >= one.times[best]}
    after = min(others, key=lambda name: others[name], default=None)
    file, source = one.backends[best]
    return {
        "op": one.op,
        "dtype": one.dtype,
        "shape_class": one.shape_class,
        "backend": best,
        "machine": one.machine,
        "file": file,
        "source": source,
        "median_us": round(one.times[best], 2),
        "next": after,
        "next_us": None if after is None else round(others[after], 2),
        "result": one.result,
    }


def least(one: Measurement) -> float:
    """The time of the fastest library."""
    return min((time for name, time in one.times.items() if name not in OURS), default=math.inf)


def disqualified(backend: str, one: Measurement, known: Known) -> bool:
    file, source = one.backends[backend]
    if source is None or backend in dispatch.APPROXIMATE:
        return True
    if (one.machine, one.op, one.dtype, one.shape_class, backend, source) in known.rejected:
        return True
    if backend not in OURS:
        return False
    files = {(one.machine, name, current(name) or "") for name in file.split("+")}
    tested = files <= known.right or (one.tuned and not files & known.wrong)
    return source != now(file) or not tested


# ---------------------------------------------------------------- what the results hold


def measurements(records: Records) -> Iterator[Measurement]:
    """On GPUs: a CPU's fastest back end depends on its threads, and is the matter of the user's own table."""
    for path, record in records.items():
        if record.get("benchmark") == "tune":
            for row in record["rows"]:
                if is_gpu(row["machine"]):
                    backends = {row["backend"]: (row["file"], row["source"])}
                    times = {row["backend"]: row["median_us"]} | row.get("times_us", {})
                    if row["next"]:
                        times[row["next"]] = row["next_us"]
                    of = (row["op"], row["dtype"], row["shape_class"], row["machine"])
                    yield Measurement(*of, times, backends, True, path)
        for title, of in record.get("compared", {}).items():
            times = {row["name"]: row["median"] for row in record["results"][title]}
            backends = {name: (one["file"], one["source"]) for name, one in of["backends"].items()}
            times = {name: time for name, time in times.items() if name in backends}
            if is_gpu(machine := record["machine"]["arch"]):
                yield Measurement(of["op"], of["dtype"], of["shape_class"], machine, times, backends, False, path)


def rejections(records: Records) -> Iterator[tuple[str, ...]]:
    """What `fastvid tune` found wrong, on the machines of its results."""
    for record in records.values():
        if record.get("benchmark") == "tune":
            machine = record["machine"]["arch"]
            for row in record["rejected"]:
                yield (machine, *(row[name] for name in ("op", "dtype", "shape_class", "backend", "source")))


def tests_of(records: Records) -> tuple[frozenset[tuple[str, str, str]], frozenset[tuple[str, str, str]]]:
    """(machine, file, source) of kernels that passed all of their tests, at least one of which ran; and of those that
    failed one, or hung in it."""
    right, wrong = set(), set()
    for record in records.values():
        if record.get("benchmark") != "gpu-tests":
            continue
        machine, outcomes = record["machine"]["arch"], record["files"]
        kernels = {kernel for names in COVERS.values() for kernel in names}
        for kernel in kernels:
            of = [outcomes.get(file) for file, names in COVERS.items() if kernel in names]
            ran = [one for one in of if one is not None and one["sources"].get(kernel)]
            wrong |= {(machine, kernel, one["sources"][kernel]) for one in ran if not passed(one)}
            hashes = {one["sources"][kernel] for one in ran}
            if len(ran) == len(of) and len(hashes) == 1 and all(map(passed, ran)) and any(one["passed"] for one in ran):
                right.add((machine, kernel, hashes.pop()))
    return frozenset(right), frozenset(wrong)


def is_gpu(machine: str) -> bool:
    return re.fullmatch(r"sm_\d+|gfx\w+", machine) is not None


# ---------------------------------------------------------------- what the sources are today


def now(file: str) -> str | None:
    """The hash of a row's file or files, of csrc/ as it lies here: fastvid._C may be older, or not built."""
    return sources.joined([current(name) for name in file.split("+")])


@cache
def current(file: str) -> str | None:
    if file.endswith(".cu"):
        return build().source_hashes(ROOT / "csrc").get(file)
    return sources.source_hash("triton", file)


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every result, by its path from the repository's root."""
    return {f"benchmarks/results/{path.name}": json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def differences(made: Iterable[dict[str, Any]], committed: Iterable[dict[str, Any]]) -> list[str]:
    """The rows that only one of them has."""
    new, old = ([json.dumps(row) for row in rows] for rows in (made, committed))
    return [f"missing: {row}" for row in new if row not in old] + [
        f"without a result: {r}" for r in old if r not in new
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    made = {"about": ABOUT, "kernels": rows(read())}
    if args.check:
        old = json.loads(TABLE.read_text())
        said = "\n".join(differences(made["kernels"], old["kernels"])) or "the order is another"
        sys.exit(0 if old == made else f"{TABLE} is not what the results say:\n{said}\nrun benchmarks/verified.py")
    TABLE.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{TABLE}: {len(made['kernels'])} rows")


if __name__ == "__main__":
    main()
