"""Runs the tests marked `gpu` and records the results, with hashes of the tested kernels' sources.

    python benchmarks/gpu_tests.py [--jobs 3] [--seconds 200] [tests/kernels/test_rgb.py ...]

Each file runs in a separate process with a timeout, several in parallel, so that a kernel that crashes or hangs does
not affect the others. Files that already passed with the same sources are skipped, unless --again is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from harness import passed, result_of, save

from fastvid.ops.sources import source_hash

ROOT = Path(__file__).parents[1]
# Test file -> kernels that it tests: files of kernels/ and csrc/. Tests that have never run come first.
COVERS = {
    "tests/kernels/test_rgb.py": ("rgb.cu", "rgb.py"),
    "tests/kernels/test_attention_cuda.py": ("attention.cu",),
    "tests/kernels/test_conv_cuda.py": ("conv.cu", "vae_norm.cu"),
    "tests/kernels/test_attention_eight.py": ("attention_eight.cu", "quantize.cu"),
    "tests/kernels/test_vae_kernels.py": ("vae_conv.py", "vae_norm.py"),
    "tests/kernels/test_attention_kernels.py": ("attention.py",),
    "tests/kernels/test_sparse_attention.py": ("sparse_attention.py",),
    "tests/kernels/test_gemm_kernels.py": ("gemm.py", "head.py", "linear_gelu.py", "patch_embed.py"),
    "tests/kernels/test_norms_kernels.py": ("qk_norm_rope.py", "row_norms.py"),
    "tests/kernels/test_step_kernels.py": ("solver_step.py",),
    "tests/device/test_graphs.py": (),
    "tests/device/test_offload.py": (),
    "tests/distributed/test_parallel.py": (),
}
FINE = "done"


def sources() -> dict[str, str]:
    """Kernel file -> hash of its source; without those of csrc/ if it isn't built."""
    names = sorted({name for covered in COVERS.values() for name in covered})
    hashes = {name: source_hash("cuda" if name.endswith(".cu") else "triton", name) for name in names}
    return {name: source for name, source in hashes.items() if source}


def right(record: dict[str, Any], kernel: str) -> bool:
    """Whether all files that test a kernel passed, and at least one ran tests instead of skipping all."""
    outcomes = [record.get("files", {}).get(file) for file in record.get("covers", {}).get(kernel, ())]
    return all(one and passed(one) for one in outcomes) and any(one["passed"] for one in outcomes)


def run(file: str, seconds: float) -> dict[str, Any]:
    """Run the tests of a file and return the outcome."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        with log.open("w") as output:
            child = subprocess.Popen(
                [*command, file], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
            try:
                code = child.wait(seconds)
                ended = FINE if code >= 0 else f"killed by signal {-code}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds:.0f} s"
            with contextlib.suppress(ProcessLookupError):  # kill child processes too: ranks hold the device
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        told = log.read_text(errors="replace")
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    outcome = {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": [f"{file}::{case.get('name')}" for case in bad],
        "ended": ended if cases or ended != FINE else f"without a report, with status {code}",
        "seconds": round(time.monotonic() - begun, 1),
    }
    if outcome["ended"] != FINE:
        outcome["at"] = (re.findall(r"^\S+::\S+", told, re.MULTILINE) or [""])[-1]
    if not passed(outcome):
        print(told[-6000:], flush=True)
    print(
        f"{file}: {outcome['passed']} passed, {len(bad)} failed, {outcome['ended']}, {outcome['seconds']} s", flush=True
    )
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=list(COVERS))
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=200, help="for a file (default: 200)")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    own, device = sources(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = result_of("gpu-tests", device) or {}
    files = before.get("files", {}) if before.get("sources") == own else {}
    wanted = [file for file in args.tests if args.again or not passed(files.get(file, {"ended": "not run"}))]
    covers: dict[str, list[str]] = {}
    for file, names in COVERS.items():
        for name in names:
            covers.setdefault(name, []).append(file)

    lock = threading.Lock()

    def run_and_save(file: str) -> None:
        outcome = run(file, args.seconds)
        with lock:
            files[file] = outcome
            if device.type != "cuda":
                return
            save("gpu-tests", {}, device, files=dict(sorted(files.items())), covers=covers, sources=own)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_and_save, wanted))
    wrong = [file for file in args.tests if not passed(files[file])]
    skipped = [file for file in args.tests if files[file]["skipped"] and not files[file]["passed"]]
    print(
        json.dumps(
            {
                "passed": sum(one["passed"] for one in files.values()),
                "all skipped": skipped,
                "not as they should be": wrong,
            }
        )
    )
    raise SystemExit(bool(wrong) or len(skipped) == len(args.tests))


if __name__ == "__main__":
    main()
