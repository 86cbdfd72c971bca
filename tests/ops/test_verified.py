"""verified.json holds what committed results show, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastvid.ops import dispatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import verified  # noqa: E402


def records(**changes) -> dict:
    """A result in which to_rgb's Triton kernel is twice as fast, and that its tests passed."""
    source = dispatch.source_hash("triton", "rgb.py")
    said = {
        "arch": "sm_90",
        "arch tested": "sm_90",
        "source": source,
        "source tested": source,
        "passed": 3,
        "failed": [],
        "ended": "done",
        "times": {"reference": 10.0, "triton": 5.0},
    } | changes
    kernel = {"triton": {"file": "rgb.py", "source": said["source"]}}
    return {
        "benchmarks/results/rgb.json": {
            "benchmark": "rgb",
            "machine": {"arch": said["arch"]},
            "compared": {"480p": {"op": "to_rgb", "shape_class": "any", "instead": "reference", "kernels": kernel}},
            "results": {"480p": [{"name": name, "median": time} for name, time in said["times"].items()]},
        },
        "benchmarks/results/tests.json": {
            "benchmark": "gpu-tests",
            "machine": {"arch": said["arch tested"]},
            "files": {
                "tests/kernels/test_rgb.py": {
                    "passed": said["passed"],
                    "failed": said["failed"],
                    "ended": said["ended"],
                },
                "tests/test_other.py": {"passed": 0, "failed": ["tests/test_other.py::test_it"], "ended": "done"},
            },
            "covers": {"rgb.py": ["tests/kernels/test_rgb.py"], "other.py": ["tests/test_other.py"]},
            "sources": {"rgb.py": said["source tested"]},
        },
    }


def test_a_kernel_that_is_right_and_faster_is_taken() -> None:
    (row,) = verified.rows(records())
    assert (row["op"], row["backend"], row["arch"], row["file"]) == ("to_rgb", "triton", "sm_90", "rgb.py")


@pytest.mark.parametrize(
    "changes",
    [
        {"times": {"reference": 10.0, "triton": 9.9}},
        {"times": {"reference": 10.0, "triton": 11.0}},
        {"source": "0" * 64, "source tested": "0" * 64},
        {"source tested": "0" * 64},
        {"arch tested": "sm_100"},
        {"passed": 0},
        {"failed": ["tests/kernels/test_rgb.py::test_on_a_gpu"]},
        {"ended": "stopped after 200 s"},
    ],
)
def test_any_other_is_not(changes: dict) -> None:
    assert not verified.rows(records(**changes))


def test_every_size_of_a_class_has_to_be_faster() -> None:
    made = records()
    result = made["benchmarks/results/rgb.json"]
    result["compared"]["1080p"] = result["compared"]["480p"]
    result["results"]["1080p"] = [{"name": "reference", "median": 10.0}, {"name": "triton", "median": 11.0}]
    assert not verified.rows(made)
    result["compared"]["1080p"] = {**result["compared"]["480p"], "shape_class": "large"}
    assert [row["shape_class"] for row in verified.rows(made)] == ["any"]


def test_the_table_is_what_the_results_say() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "verified.py"), "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert json.loads((ROOT / "fastvid" / "ops" / "verified.json").read_text())["about"]
