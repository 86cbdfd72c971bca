"""Derives fastvid/ops/verified.json, the kernels that `auto` may select, from the committed results.

    python benchmarks/verified.py            # writes it
    python benchmarks/verified.py --check    # reports differences between it and the results

A kernel is verified for an operation, an architecture and a shape class if it was faster than the alternative of `auto`
at every measured size of that class, and its file's tests passed on that architecture with the same source. Benchmarks
declare the comparison with `harness.compared`. Results of sources that have changed since are ignored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_tests import right

from fastvid.ops.sources import source_hash

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "fastvid" / "ops" / "verified.json"
ABOUT = "Kernels that `auto` may choose: each has a committed result from a GPU, faster than what it replaces."
FASTER = 1.02  # minimum speedup over the alternative


def tested(records: Iterable[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(architecture, file, source hash) of kernels whose tests all passed there (`gpu_tests.py`)."""
    return {
        (record["machine"]["arch"], file, source)
        for record in records
        if record.get("benchmark") == "gpu-tests"
        for file, source in record["sources"].items()
        if right(record, file)
    }


def rows(records: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of verified.json. records: results by their path from the repository's root."""
    right = tested(records.values())
    found: dict[tuple[str, ...], list[tuple[bool, dict[str, str]]]] = {}
    for path, record in records.items():
        arch = record.get("machine", {}).get("arch")
        for title, of in record.get("compared", {}).items():
            medians = {row["name"]: row["median"] for row in record["results"][title]}
            for backend, kernel in of["kernels"].items():
                if backend not in medians or kernel["source"] != source_hash(backend, kernel["file"]):
                    continue  # it did not run there, or its source has changed
                known = (arch, kernel["file"], kernel["source"]) in right
                faster = medians[of["instead"]] >= FASTER * medians[backend]
                row = {"op": of["op"], "backend": backend, "shape_class": of["shape_class"], "arch": arch, **kernel}
                found.setdefault(tuple(row.values()), []).append((known and faster, row | {"result": path}))
    # It must be faster at all measured sizes of a class.
    return [measured[-1][1] for measured in found.values() if all(fine for fine, _ in measured)]


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every result, by its path from the repository's root."""
    return {f"benchmarks/results/{path.name}": json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    made = {"about": ABOUT, "kernels": rows(read())}
    if args.check:
        sys.exit(0 if json.loads(TABLE.read_text()) == made else f"{TABLE} is not what the results say: {made}")
    TABLE.write_text(json.dumps(made, indent=2) + "\n")
    print(f"{TABLE}: {len(made['kernels'])} kernels")


if __name__ == "__main__":
    main()
