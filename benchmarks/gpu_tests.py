"""Runs the tests marked `gpu` and records what passed, with the sources of the kernels that were tested.

python benchmarks/gpu_tests.py [tests/test_rgb.py ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from harness import save

from fastvid import kernels, ops
from fastvid.ops import backends

ROOT = Path(__file__).parents[1]


class Record:
    """A pytest plugin that counts."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed += 1


def sources() -> dict[str, str]:
    """File of kernels -> hash of its source; all of csrc is one, where it is built."""
    names = sorted(path.name for path in Path(kernels.__path__[0]).glob("*.py"))
    made = {name: ops.source_hash("triton", name) for name in names}
    return made | ({} if isinstance(backends.extension(), str) else {"csrc": ops.source_hash("cuda", "csrc")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*")
    args = parser.parse_args()
    files = args.tests or sorted(str(p) for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())
    record = Record()
    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *files], plugins=[record])
    facts = {"passed": record.passed, "failed": record.failed, "sources": sources()}
    if torch.cuda.is_available():
        print(save("gpu-tests", {}, "cuda", **facts))
    print(json.dumps({name: facts[name] for name in ("passed", "failed")}))
    raise SystemExit(0 if record.passed and status == 0 else 1)


if __name__ == "__main__":
    main()
