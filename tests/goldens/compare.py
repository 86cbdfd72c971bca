"""Compare two outputs of make.py and name each difference. Exit code 1 if there is any.

    python compare.py OLD NEW [--exact | --tolerance 1] [--ignore PATTERN]

--exact (the default): everything is equal, the hashes too.
--tolerance N: frames may differ by N of 255, for another machine or another version of torch. Hashes (names that end in
"sha256", and the hashes of files) are not looked at then. Everything else is equal, numbers to a relative 1e-6.
--ignore: leaves out differences whose name matches, such as "plans/*/bytes_decoder"; may be repeated.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MISSING = object()


def main() -> int:
    asked = arguments()
    found = [one for one in differences(asked.old, asked.new, asked.tolerance) if not ignored(one[0], asked.ignore)]
    for name, what in found:
        print(f"{name}: {what}")
    how = "exactly" if asked.tolerance is None else f"within {asked.tolerance} of 255"
    print(f"{len(found)} differences" if found else f"equal {how}: {summary(asked.new)}")
    return 1 if found else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a folder that make.py has written")
    parser.add_argument("new", type=Path, help="another one")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_const", const=None, dest="tolerance", help="bytes are equal (default)")
    how.add_argument("--tolerance", type=int, help="levels of 255 that frames may differ by")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="of names; may be repeated")
    return parser.parse_args()


def ignored(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def differences(old: Path, new: Path, tolerance: int | None = None) -> Iterator[tuple[str, str]]:
    """Pairs of a name (area/case/field) and what differs there."""
    yield from differences_of(read(old), read(new), "", tolerance)
    yield from frame_differences(load(old), load(new), tolerance)


def read(folder: Path) -> dict[str, Any]:
    name = "golden.json" if (folder / "golden.json").exists() else "small.json"
    return json.loads((folder / name).read_text())


def load(folder: Path) -> dict[str, np.ndarray]:
    name = "frames.npz" if (folder / "frames.npz").exists() else "small.npz"
    with np.load(folder / name) as found:
        return {key: found[key] for key in found.files}


def differences_of(old: Any, new: Any, name: str, tolerance: int | None) -> Iterator[tuple[str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            below = f"{name}/{key}" if name else key
            yield from differences_of(old.get(key, MISSING), new.get(key, MISSING), below, tolerance)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences_of(one, other, f"{name}[{number}]", tolerance)
    elif not (tolerance is not None and is_hash(name, old, new)) and not same(old, new, tolerance):
        yield name, f"{shown(old)} -> {shown(new)}"


def is_hash(name: str, old: Any, new: Any) -> bool:
    return name.endswith("sha256") or all(isinstance(one, str) and len(one) == 64 for one in (old, new))


def same(old: Any, new: Any, tolerance: int | None) -> bool:
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (old, new))
    return old == new or (tolerance is not None and numbers and math.isclose(old, new, rel_tol=1e-6))


def shown(value: Any) -> str:
    return "(nothing)" if value is MISSING else f"{json.dumps(value):.200}"


def frame_differences(
    old: dict[str, np.ndarray], new: dict[str, np.ndarray], tolerance: int | None
) -> Iterator[tuple[str, str]]:
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            yield f"{name}/frames", "(nothing) -> frames" if name in new else "frames -> (nothing)"
        elif old[name].shape != new[name].shape:
            yield f"{name}/frames", f"{old[name].shape} -> {new[name].shape}"
        elif (most := int(np.abs(old[name].astype(int) - new[name]).max(initial=0))) > (tolerance or 0):
            yield f"{name}/frames", f"differ by up to {most} of 255"


def summary(folder: Path) -> str:
    return ", ".join(f"{area} {len(cases)}" for area, cases in read(folder).items())


if __name__ == "__main__":
    sys.exit(main())
