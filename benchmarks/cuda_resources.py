"""The resources of csrc/'s kernels on every architecture, from ptxas. Needs nvcc and c++filt, but no GPU.

    python benchmarks/cuda_resources.py            # writes results/cuda-resources.json
    python benchmarks/cuda_resources.py --check    # reports regressions, spills and ptxas warnings; writes nothing

A row: registers per thread at the start (warpgroups may reallocate them later), bytes spilled per thread, bytes of
static shared memory per block. `tests/kernels/test_cuda_resources.py` checks that the table is up to date.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("results") / "cuda-resources.json"
GROWN = 1.10  # registers or shared memory beyond this share of what is recorded are a growth
SAID = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def build() -> ModuleType:
    """The module setup.py, which finds nvcc and its options."""
    spec = importlib.util.spec_from_file_location("fastvid_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(root: Path = ROOT) -> list[str]:
    """Of kernels: what has none (device.cu) is left out."""
    return sorted(path.name for path in (root / "csrc").glob("*.cu") if "__global__" in path.read_text())


def compile_file(file: str, target: Path, archs: Sequence[str] | None = None, root: Path = ROOT) -> str:
    """Compile root/csrc/file for `archs`, or all architectures of a wheel; returns the output of ptxas."""
    setup = build()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs or setup.DEFAULT_ARCHS.split(";")]
    command = [setup.find_nvcc(), "-O3", "-std=c++17", *codes, "-Xptxas=-v", "-c", str(root / "csrc" / file)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr


def short_names(mangled: Iterable[str]) -> list[str]:
    """Kernels as the tables call them: their names and template arguments."""
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    plain = names.replace("(anonymous namespace)::", "").splitlines()
    return [re.search(r"(\w+(<.*>)?)\(", name).group(1) for name in plain]


def rows_of(said: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> row."""
    found = list(SAID.finditer(said))
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for one, name in zip(found, short_names(one["kernel"] for one in found), strict=True):
        rows.setdefault(name, {})[one["arch"]] = {
            "registers": int(one["registers"]),
            "spilled": int(one["stack"]) + int(one["stores"]) + int(one["loads"]),
            "shared": int(one["shared"] or 0),
        }
    return rows


def read() -> dict[str, Any]:
    """The committed table: {"nvcc": version, "kernels": {file: {kernel: {architecture: row}}}}"""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": None, "kernels": {}}


def worse(said: str, recorded: dict[str, Any], same: bool) -> Iterator[str]:
    """Yield the regressions of a file. same: the table is from the same nvcc, so its numbers are comparable."""
    for line in said.splitlines():
        if re.search(r"\bwarning\b|C75\d\d|setmaxnreg|serializ", line, re.IGNORECASE):
            yield line  # ptxas leaves registers where they are, or waits for each product
    rows = rows_of(said)
    if rows.keys() != recorded.keys():
        yield f"the table has {sorted(recorded)}, and the file {sorted(rows)}: run benchmarks/cuda_resources.py"
    for name, row in rows.items():
        for arch, found in row.items():
            known = recorded.get(name, {}).get(arch)
            if found["spilled"] > (known["spilled"] if known else 0):
                yield f"{name} on sm_{arch} spills {found['spilled']} bytes"
            for what in ("registers", "shared"):
                if same and known and found[what] > GROWN * known[what]:
                    yield f"{name} on sm_{arch}: {what} grew from {known[what]} to {found[what]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    setup, table = build(), read()
    version = setup.cuda_version(setup.find_nvcc())
    with tempfile.TemporaryDirectory() as folder:
        said = {file: compile_file(file, Path(folder, f"{file}.o")) for file in files()}
    if args.check:
        same = table["nvcc"] == version
        wrong = [line for file, text in said.items() for line in worse(text, table["kernels"].get(file, {}), same)]
        sys.exit("\n".join(wrong) or 0)
    rows = {file: rows_of(text) for file, text in said.items()}
    TABLE.write_text(json.dumps({"nvcc": version, "kernels": rows}, indent=1) + "\n")
    print(TABLE)


if __name__ == "__main__":
    main()
