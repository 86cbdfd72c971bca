"""Are the emulators' tests good enough? All the mistakes of kernel_mutations.py have to be caught.

    python tests/mutate_kernels.py [--jobs 2] [part of a name ...]

Each mutation is made in a copy of csrc/ and of the tests, and a few tests run on it, in this order, up to the first
that fails. The table is benchmarks/results/kernel-mutations.json; with arguments, rows of others stay as they are. A
mutation that no test catches makes the exit status 1. Three to six minutes with two jobs; test_mutate_kernels.py keeps
the list up to date.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
from kernel_mutations import MUTATIONS, Mutation, mutate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/kernel-mutations.json"
KEPT = ("name", "kernel", "file", "same", "caught_by", "said", "seconds")
MODULES = (
    "torch",
    "hypothesis",
    "fastvid.ops.attention_gpu",
    "fastvid.ops.vae_gpu",
)  # slow to import
PATIENCE = 2  # seconds that an emulated barrier is waited for
TESTS = {
    "attention": [
        "kernels/test_attention_cuda.py::test_blocks_take_uneven_works_from_a_counter",
        "kernels/test_attention_cuda.py::test_pairs_of_blocks",
        "kernels/test_attention_cuda.py::test_patterns_of_a_video",
        "kernels/test_attention_cuda.py::test_scores_far_apart",
        "kernels/test_attention_cuda.py::test_rings_go_round_many_times",
        "kernels/test_attention_cuda.py::test_dense",
        "kernels/test_attention_cuda.py::test_sparse",
    ],
    "attention_eight": [
        "kernels/test_attention_eight.py::test_tiles_begin_at_blocks",
        "kernels/test_attention_eight.py::test_patterns_of_a_video",
        "kernels/test_attention_eight.py::test_values_of_very_different_size",
        "kernels/test_attention_eight.py::test_rows_that_look_at_small_values_alone_are_as_good",
        "kernels/test_attention_eight.py::test_what_is_not_finite_shows",
        "kernels/test_attention_eight.py::test_quantized_as_the_eager_form",
        "kernels/test_attention_eight.py::test_rings_go_round_many_times",
        "kernels/test_attention_eight.py::test_sparse",
        "kernels/test_attention_eight.py::test_dense",
    ],
    "conv": [
        "kernels/test_conv_cuda.py::test_every_width_and_strides",
        "kernels/test_conv_cuda.py::test_what_becomes_of_tiles",
        "kernels/test_conv_cuda.py::test_all_operations",
    ],
    "norm": [
        "kernels/test_conv_cuda.py::test_norm_of_views",
        "kernels/test_conv_cuda.py::test_norm_counts_in_as_many_bits_as_it_takes",
        "kernels/test_conv_cuda.py::test_norm_of_every_width",
        "kernels/test_conv_cuda.py::test_silu_of_the_special_function_unit",
    ],
}


def copied(to: Path) -> None:
    """What the tests need of this repository; the package itself is imported from where it is."""
    shutil.copytree(ROOT / "csrc", to / "csrc")
    shutil.copytree(ROOT / "tests/csrc", to / "tests/csrc")
    shutil.copytree(ROOT / "tests/kernels", to / "tests/kernels")
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, to / "tests")
    shutil.copy(ROOT / "pyproject.toml", to)
    with (to / "tests/conftest.py").open("a") as conftest:  # a failure is not made smaller: it takes long
        conftest.write(
            "\nfrom hypothesis import Phase\n"
            "settings.register_profile('mutated', settings.get_profile('thorough'), phases=[Phase.generate])\n"
            "settings.load_profile('mutated')\n"
        )


def compiler(folder: Path) -> Path:
    """One that is faster, has the tests wait for less long, and minds nothing that a mutation leaves unused."""
    made = folder / "compiler"
    used = shutil.which(os.environ.get("CXX", "g++"))
    made.write_text(f'#!/bin/sh\nexec {used} "$@" -O1 -w -DEMULATED_SECONDS={PATIENCE}\n')
    made.chmod(0o755)
    return made


class Run:
    """Tests of a kernel in a child process, which has this one's modules."""

    def __init__(self, kernel: str, mutation: Mutation | None = None) -> None:
        self.mutation = mutation
        self.begun = time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="mutated-")
        self.told = Path(self.folder.name, "told.txt")
        folder = Path(self.folder.name)
        copied(folder)
        if mutation:
            path = folder / "csrc" / mutation.file
            path.write_text(mutate(path.read_text(), mutation))
        self.child = os.fork()
        if self.child == 0:
            self._test(folder, [f"tests/{test}" for test in TESTS[kernel]])

    def _test(self, folder: Path, tests: list[str]) -> NoReturn:
        status = 3
        try:
            with self.told.open("w") as told:
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
            os.chdir(folder)
            os.environ |= {"TMPDIR": str(folder), "CXX": str(compiler(folder))}
            tempfile.tempdir = str(folder)
            status = pytest.main(["-xq", "-m", "", "--tb=short", "-rf", "-p", "no:cacheprovider", *tests])
            sys.stdout.flush()
        finally:
            os._exit(status)

    def result(self, status: int) -> dict[str, Any]:
        """A row of the table: the first test that fails, none if there is none, and what it says."""
        told = self.told.read_text()
        self.folder.cleanup()
        row = {"caught_by": "", "said": "", "seconds": round(time.monotonic() - self.begun, 1)}
        failed = re.findall(r"^FAILED tests/(\S+)", told, re.MULTILINE)
        if os.WIFSIGNALED(status):
            row |= {"caught_by": "all tests", "said": f"the process ended with signal {os.WTERMSIG(status)}"}
        elif failed and "CalledProcessError" not in told:
            said = re.findall(r"^E +(.*)", told, re.MULTILINE)
            row |= {"caught_by": failed[0], "said": said[0] if said else ""}
        elif os.WEXITSTATUS(status):
            raise RuntimeError(f"the tests did not run:\n{told}")
        return asdict(self.mutation) | row if self.mutation else row


def run_all(chosen: list[Mutation], jobs: int) -> list[dict[str, Any]]:
    """A row for each; `jobs` of them at a time."""
    waiting, running, rows = list(chosen), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            started = Run(waiting[0].kernel, waiting.pop(0))
            running[started.child] = started
        child, status = os.wait()
        row = running.pop(child).result(status)
        rows[row["name"]] = row
        outcome = row["caught_by"] or ("harmless" if row["same"] else "SURVIVED")
        print(f"{row['seconds']:6.1f} s  {row['kernel']:15}  {row['name']:48}", outcome, flush=True)
    return [rows[mutation.name] for mutation in chosen]


def write(rows: list[dict[str, Any]]) -> None:
    """Put these rows into the table, in the order of the list; what is no longer in it is dropped."""
    known = {row["name"]: row for row in json.loads(RESULTS.read_text())["mutations"]} if RESULTS.exists() else {}
    known |= {row["name"]: {key: row[key] for key in KEPT} for row in rows}
    table = [known[one.name] for one in MUTATIONS if one.name in known]
    RESULTS.write_text(json.dumps({"patience": PATIENCE, "mutations": table}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of those to run; all")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    sys.path.remove(str(Path(__file__).parent))  # a child has the copy's tests
    sys.path.append(str(ROOT))
    for module in MODULES:
        importlib.import_module(module)
    chosen = [one for one in MUTATIONS if not asked.names or any(n in one.name for n in asked.names)]
    for kernel in {one.kernel: None for one in chosen}:
        unchanged = Run(kernel)
        if (row := unchanged.result(os.waitpid(unchanged.child, 0)[1]))["caught_by"]:
            sys.exit(f"without any mutation a test of {kernel} fails: {row}")
    begun = time.monotonic()
    rows = run_all(chosen, asked.jobs)
    wrong = [row["name"] for row in rows if bool(row["caught_by"]) == bool(row["same"])]
    print(f"{len(rows)} mutations in {time.monotonic() - begun:.0f} s, not as they should be: {wrong or 'none'}")
    write(rows)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
