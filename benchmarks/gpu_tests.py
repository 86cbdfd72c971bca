"""Runs the tests marked `gpu` and records the results, with hashes of the tested kernels' sources.

    python benchmarks/gpu_tests.py [--jobs 3] [--seconds 200] [--in-all 400] [tests/kernels/test_rgb.py ...]

Each file runs in a separate process with a limit, several side by side, so that a kernel that crashes or hangs does not
affect the others. Each result is recorded at once. Files that passed with the same sources are skipped, unless --again
is given. A file that has no time left, or is cut off by --in-all, is not recorded: the next call runs it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import limited
import torch
from harness import passed, result_of, save

from fastvid.ops.sources import source_hash

ROOT = Path(__file__).parents[1]
# Test file -> kernels that it tests: files of kernels/ and csrc/. The most important first: what takes most of a step.
COVERS = {
    "tests/kernels/test_attention_cuda.py": ("attention.cu", "attention_pair.cu"),
    "tests/kernels/test_attention_kernels.py": ("attention.py",),
    "tests/kernels/test_gemm_kernels.py": ("devices.py", "gemm.py", "head.py", "linear_gelu.py", "patch_embed.py"),
    "tests/kernels/test_linear_quantized.py": ("codes.py", "linear_eight.py", "linear_quantized.py"),
    "tests/kernels/test_conv_cuda.py": ("conv.cu", "vae_norm.cu"),
    "tests/kernels/test_vae_kernels.py": ("vae_conv.py", "vae_norm.py"),
    "tests/kernels/test_norms_kernels.py": ("qk_norm_rope.py", "row_norms.py"),
    "tests/kernels/test_rgb.py": ("rgb.cu", "rgb.py"),
    "tests/kernels/test_dequantize.py": ("dequantize.cu",),
    "tests/kernels/test_step_kernels.py": ("solver_step.py",),
    "tests/ops/test_attention_library.py": (),
    "tests/ops/test_compiled.py": (),
    "tests/device/test_graphs.py": (),
    "tests/kernels/test_sparse_attention.py": ("sparse_attention.py",),
    "tests/kernels/test_attention_eight.py": ("attention_eight.cu", "quantize.cu"),
    "tests/device/test_offload.py": (),
    "tests/distributed/test_parallel.py": (),
}
LEAST = 15  # seconds: with less left no file is begun
OUT_OF_TIME = 3  # exit status


def sources(names: Iterable[str]) -> dict[str, str | None]:
    """Kernel file -> hash of its source; None for those of csrc/ if it isn't built."""
    return {name: source_hash("cuda" if name.endswith(".cu") else "triton", name) for name in names}


def run(file: str, seconds: float) -> dict[str, Any]:
    """Run the tests of a file and return the outcome."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        ended = limited.run([*command, file], seconds, log, cwd=ROOT)
        said = log.read_text(errors="replace")
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    crashed = ended.code is None or ended.code < 0  # the status tells of failed tests too, which the report names
    outcome = {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": [f"{file}::{case.get('name')}" for case in bad],
        "ended": ended.how if crashed else limited.FINE if cases else f"without a report, with status {ended.code}",
        "seconds": round(ended.seconds, 1),
        "sources": sources(COVERS.get(file, ())),
    }
    if outcome["ended"] != limited.FINE:
        outcome["at"] = (re.findall(r"^\S+::\S+", said, re.MULTILINE) or [""])[-1]
    if not passed(outcome):
        print(said[-6000:], flush=True)
    print(
        f"{file}: {outcome['passed']} passed, {len(bad)} failed, {outcome['ended']}, {outcome['seconds']} s", flush=True
    )
    return outcome


def done(file: str, outcome: dict[str, Any] | None) -> bool:
    """Whether a file passed before, with the kernels as they are now."""
    return outcome is not None and passed(outcome) and outcome["sources"] == sources(COVERS.get(file, ()))


def everything(args: argparse.Namespace, device: torch.device, files: dict[str, dict[str, Any]]) -> list[str]:
    """Run the files that have not passed, put their outcomes into `files` and record them. Returns those that there was
    no time for."""
    until, lock, left_out = time.monotonic() + args.in_all, threading.Lock(), []

    def run_and_save(file: str) -> None:
        left = until - time.monotonic()
        outcome = run(file, min(args.seconds, left)) if left >= LEAST else None
        with lock:
            if outcome is None or ("stopped" in outcome["ended"] and left < args.seconds):
                left_out.append(file)
                return
            files[file] = outcome
            if args.record:
                save("gpu-tests", {}, device, files=dict(sorted(files.items())))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_and_save, [one for one in args.tests if args.again or not done(one, files.get(one))]))
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=list(COVERS))
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=200, help="limit of a file (default: 200)")
    parser.add_argument("--in-all", type=float, default=3600, help="after which nothing runs any more")
    parser.add_argument("--again", action="store_true", help="what passed before too")
    parser.add_argument("--record", action="store_true", default=torch.cuda.is_available(), help="also on a CPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = dict((result_of("gpu-tests", device) or {}).get("files", {}))
    left_out = everything(args, device, files)
    ran = [file for file in args.tests if file in files and file not in left_out]
    wrong = [file for file in ran if not passed(files[file])]
    skipped = [file for file in ran if files[file]["skipped"] and not files[file]["passed"]]
    count = sum(files[file]["passed"] for file in ran)
    print(json.dumps({"passed": count, "all skipped": skipped, "wrong": wrong, "no time": left_out}))
    sys.exit(1 if wrong or len(skipped) == len(args.tests) else OUT_OF_TIME if left_out else 0)


if __name__ == "__main__":
    main()
