"""`fastvid bench`: runs the benchmark scripts, each in its own process."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvid.checks import near_name
from fastvid.errors import Error, InvalidRequest


def scripts() -> dict[str, Path]:
    """The benchmark scripts, by name."""
    spec = importlib.util.find_spec("fastvid.benchmarks")
    folders = spec.submodule_search_locations if spec else None
    paths = sorted(Path(folders[0]).glob("bench_*.py")) if folders else []
    return {path.stem.removeprefix("bench_"): path for path in paths}


def summary(path: Path) -> str:
    """The first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def check(names: Sequence[str]) -> dict[str, Path]:
    """The scripts of these benchmarks. Raises InvalidRequest for an unknown name."""
    known = scripts()
    for name in names:
        if name not in known:
            near = (near_name(name, tuple(known)) or "in `fastvid bench`") if known else "none: they are not installed"
            raise InvalidRequest(
                f"benchmark {name[:60]!r} is not known; the nearest is {near} (`fastvid bench` lists them)"
            )
    return {name: known[name] for name in names}


def run(names: Sequence[str], out: Path, flags: Sequence[str] = ()) -> None:
    """Runs benchmarks one after the other. The scripts print tables and write results as JSON to the folder `out`.

    flags: passed to each script. Raises Error if any script failed, after all of them have run.
    """
    paths = check(names)
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, path in paths.items():
        process = subprocess.run([sys.executable, str(path), *flags], env={**os.environ, "OUT": str(out)}, check=False)
        failed += [f"{name} (exit status {process.returncode})"] if process.returncode else []
    if failed:
        raise Error(f"failed: {', '.join(failed)}")
