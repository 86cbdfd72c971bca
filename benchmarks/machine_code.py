"""How many instructions csrc/'s kernels have on sm_90a, in all and in their main loop. Needs nvcc, c++filt and
cuobjdump, but no GPU.

    python benchmarks/machine_code.py                      # writes results/machine-code.json
    python benchmarks/machine_code.py --before 86340b3     # also its "before": the same of another revision
    python benchmarks/machine_code.py --show conv.cu       # prints before -> now, a kernel a line; writes nothing

A row: "kernel" counts all instructions by class (`sass.CLASSES`) and "loop" those of the main loop (`sass.hottest`), if
there is one, with parts that few iterations run, such as masks. "order": how products, waits for products and
exponentials follow one another in the loop. "chain of maxima": how many there wait for one another. "registers": how
many the code names.
`tests/kernels/test_machine_code.py` checks that the table is up to date.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import sass
from cuda_resources import ROOT, build, compile_file, files, short_names

TABLE = Path(__file__).with_name("results") / "machine-code.json"
ARCH = "90a"
Rows = dict[str, dict[str, dict[str, Any]]]  # file -> kernel -> row


def row_of(code: sass.Code) -> dict[str, Any]:
    loop = sass.hottest(code)
    row = {"registers": sass.registers(code), "kernel": sass.count(code)}
    if len(loop) == len(code):
        return row
    return row | {"loop": sass.count(loop), "chain of maxima": sass.chain(loop, "FMNMX"), "order": sass.order(loop)}


def rows_of(target: Path) -> dict[str, dict[str, Any]]:
    """Kernel -> row, of an object file."""
    found = sass.functions(target, ARCH)
    return dict(sorted(zip(short_names(found), map(row_of, found.values()), strict=True)))


def measure(root: Path = ROOT) -> Rows:
    """The rows of the csrc/ in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for file in files(root):
            target = Path(folder, f"{file}.o")
            compile_file(file, target, [ARCH], root)
            made[file] = rows_of(target)
        return made


def measure_revision(revision: str) -> Rows:
    """The rows of csrc/ as it was in a commit."""
    packed = subprocess.run(["git", "archive", revision, "csrc"], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
        return measure(Path(folder))


def read() -> dict[str, Any]:
    """The committed table: the version of nvcc, Rows of the sources as they are ("kernels"), and those of an earlier
    revision ("before")."""
    return json.loads(TABLE.read_text())


def write(table: dict[str, Any]) -> None:
    """A kernel a line, so that a change shows which ones it changes."""

    def text(rows: Rows) -> str:
        texts = []
        for file, kernels in rows.items():
            each = (f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
            texts.append(f"  {json.dumps(file)}: {{\n" + ",\n".join(each) + "\n  }")
        return "{\n" + ",\n".join(texts) + "\n }"

    parts = {"nvcc": json.dumps(table["nvcc"]), "revision": json.dumps(table["revision"])}
    parts |= {key: text(table[key]) for key in ("before", "kernels")}
    TABLE.write_text("{\n" + ",\n".join(f' "{key}": {part}' for key, part in parts.items()) + "\n}\n")


def show(before: Rows, now: Rows, file: str) -> list[str]:
    """Lines for each kernel of a file: its counts before -> now."""

    def pair(old: object, new: object) -> str:
        return f"{new}" if old == new else f"{old} -> {new}"

    made = []
    for name, row in now.get(file, {}).items():
        old = before.get(file, {}).get(name, {})
        for part in ("loop", "kernel"):
            was, counts = old.get(part, {}), row.get(part, {})
            made.append(f"{name} {part}: " + ", ".join(f"{k} {pair(was.get(k, 0), v)}" for k, v in counts.items()))
        for what in ("registers", "chain of maxima"):
            made.append(f"{name} {what}: " + pair(old.get(what, 0), row.get(what, 0)))
        made.append(f"{name} order: " + pair("; ".join(old.get("order", [])), "; ".join(row.get("order", []))))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION")
    parser.add_argument("--show", metavar="FILE")
    args = parser.parse_args()
    setup, table = build(), read()
    now = measure()
    if args.show:
        print(*show(table["before"], now, args.show), sep="\n")
        return
    if args.before:
        table |= {"revision": args.before, "before": measure_revision(args.before)}
    write(table | {"nvcc": setup.cuda_version(setup.find_nvcc()), "kernels": now})
    print(TABLE)


if __name__ == "__main__":
    main()
