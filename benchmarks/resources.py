"""The resources of every Triton kernel on every architecture, from binaries compiled here. Needs no GPU.

    python benchmarks/resources.py            # updates changed files in results/kernel-resources.json
    python benchmarks/resources.py --all      # updates all files
    python benchmarks/resources.py --check    # reports regressions and spills; writes nothing

A row: registers per thread, bytes spilled per thread, bytes of shared memory per block, and the hardware units used
(mma, wgmma, tcgen05, tma, and mfma on AMD's). `tests/kernels/test_resources.py` checks that the table is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from fastvid import kernels
from fastvid.kernels.ahead import Resources, Variant, compile_ahead
from fastvid.kernels.devices import ARCHITECTURES, SHARED, Arch

TABLE = Path(__file__).with_name("results") / "kernel-resources.json"
GROWN = 1.10  # registers or shared memory beyond this share of what is recorded are a growth


def files() -> dict[str, list[Variant]]:
    """File of kernels -> its variants."""
    names = sorted(path.stem for path in Path(kernels.__path__[0]).glob("*.py"))
    modules = [importlib.import_module(f"fastvid.kernels.{name}") for name in names if name != "__init__"]
    return {m.__name__.rpartition(".")[2]: m.variants() for m in modules if hasattr(m, "variants")}


def source_hash(file: str) -> str:
    return hashlib.sha256(Path(kernels.__path__[0], f"{file}.py").read_bytes()).hexdigest()


def read() -> dict[str, Any]:
    """The committed table: {"triton": version, "kernels": {file: {"source": hash, "variants": {name: {arch: row}}}}}"""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "kernels": {}}


def launches(variants: list[Variant], all_of_them: bool) -> list[tuple[Variant, Arch]]:
    """What is compiled: each variant for each of its architectures, or the first one of each kernel for each."""
    if all_of_them:
        return [(variant, arch) for variant in variants for arch in variant.archs]
    first = {(id(v.kernel), arch): (v, arch) for v in reversed(variants) for arch in v.archs}
    return sorted(first.values(), key=lambda one: ARCHITECTURES.index(one[1]))


def worse(variant: Variant, arch: Arch, found: Resources, recorded: dict[str, Any] | None, same: bool) -> Iterator[str]:
    """Yield the regressions. same: the table is from the same Triton version, so its numbers are comparable."""
    name = f"{variant.name} on {arch}"
    if found.shared > SHARED[arch]:
        yield f"{name} takes {found.shared} bytes of shared memory, and a block has {SHARED[arch]}"
    allowed = recorded["spilled"] if recorded else 0
    if found.spilled > allowed:
        yield f"{name} spills {found.spilled} bytes ({allowed} are recorded)"
    if recorded and same:
        for what in ("registers", "shared"):
            if getattr(found, what) > GROWN * recorded[what]:
                yield f"{name}: {what} grew from {recorded[what]} to {getattr(found, what)}"
        if lost := set(recorded["units"]) - set(found.units):
            yield f"{name} no longer uses {', '.join(sorted(lost))}"


def check(file: str, variants: list[Variant]) -> list[str]:
    """Compile one variant of each kernel for every architecture, or all variants if the file has changed since."""
    table = read()
    known = table["kernels"].get(file, {"source": None, "variants": {}})
    changed = known["source"] != source_hash(file)
    wrong = [f"{file}.py has changed since its row was made: run benchmarks/resources.py"] if changed else []
    for variant, arch in launches(variants, changed):
        recorded = known["variants"].get(variant.name, {}).get(str(arch))
        same = table["triton"] == triton.__version__
        wrong += worse(variant, arch, compile_ahead(variant, arch), recorded, same)
    return wrong


def record(everything: bool) -> dict[str, Any]:
    """The table with the rows of changed files (everything: of all files) measured again."""
    old, rows = read(), {}
    everything = everything or old["triton"] != triton.__version__
    for file, variants in files().items():
        if not everything and old["kernels"].get(file, {}).get("source") == source_hash(file):
            rows[file] = old["kernels"][file]
            continue
        made: dict[str, Any] = {}
        for variant in variants:
            made[variant.name] = {str(arch): asdict(compile_ahead(variant, arch)) for arch in variant.archs}
            print(f"{file:<16} {variant.name:<40} {made[variant.name]}", flush=True)
        rows[file] = {"source": source_hash(file), "variants": made}
    return {"triton": triton.__version__, "kernels": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    if args.check:
        wrong = [line for file, variants in files().items() for line in check(file, variants)]
        sys.exit("\n".join(wrong) or 0)
    TABLE.write_text(json.dumps(record(args.all), indent=1) + "\n")
    print(TABLE)


if __name__ == "__main__":
    main()
