"""verified.json holds what committed results show, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvid.ops import choices, sources

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import verified  # noqa: E402

RGB, TESTS, TUNE = (f"benchmarks/results/{name}.json" for name in ("rgb", "tests", "tune"))
SOURCE = sources.source_hash("triton", "rgb.py")
CLASS = "values 2^24"
Records = dict[str, dict[str, Any]]


def recorded(machine: str = "sm_90", source: str | None = SOURCE, **outcome: Any) -> dict[str, Any]:
    """What gpu_tests.py records: those of to_rgb's Triton kernel passed, those of something else failed."""
    fine = {"passed": 3, "failed": [], "ended": "done", "sources": {"rgb.py": source, "rgb.cu": None}}
    other = {"passed": 0, "failed": ["x"], "ended": "done", "sources": {"solver_step.py": "0"}}
    files = {"tests/kernels/test_rgb.py": fine | outcome, "tests/kernels/test_step_kernels.py": other}
    return {"benchmark": "gpu-tests", "machine": {"arch": machine}, "files": files}


def bench(times: dict[str, float], machine: str = "sm_90", source: str | None = SOURCE) -> dict[str, Any]:
    """What a benchmark of to_rgb saves."""
    backends = {
        "reference": {"file": "", "source": "torch 2.11.0"},
        "compiled": {"file": "", "source": "torch 2.11.0, triton 3.6.0"},
        "triton": {"file": "rgb.py", "source": source},
        "cuda": {"file": "rgb.cu", "source": verified.current("rgb.cu")},
    }
    of = {"op": "to_rgb", "dtype": "bfloat16", "shape_class": CLASS, "backends": backends}
    times = {**times, "copy of as many bytes": 1.0}
    return {
        "benchmark": "rgb",
        "machine": {"arch": machine},
        "compared": {"480p": of},
        "results": {"480p": [{"name": name, "median": time} for name, time in times.items()]},
    }


def tuned(
    backend: str = "triton",
    times: dict[str, float] | None = None,
    machine: str = "sm_90",
    source: str | None = SOURCE,
    rejected: tuple[dict[str, str], ...] = (),
) -> dict[str, Any]:
    """What `fastvid tune --export` writes."""
    times = times or {"triton": 5.0, "reference": 10.0}
    after = min((name for name in times if name != backend), key=lambda name: times[name], default=None)
    row = {"op": "to_rgb", "dtype": "bfloat16", "shape_class": CLASS, "backend": backend, "machine": machine}
    row |= {"file": sources.file_of("to_rgb", backend), "source": source, "median_us": times[backend]}
    row |= {"next": after, "next_us": times.get(after), "times_us": times}
    return {"benchmark": "tune", "machine": {"arch": machine}, "rows": [row], "rejected": list(rejected)}


def of(rows: list[dict[str, Any]]) -> list[tuple[str, float, str | None, float | None]]:
    return [(row["backend"], row["median_us"], row["next"], row["next_us"]) for row in rows]


TIMES = {"reference": 10.0, "triton": 5.0}


def test_a_kernel_that_is_right_and_faster_is_taken() -> None:
    (row,) = verified.rows({RGB: bench(TIMES), TESTS: recorded()})
    assert set(row) == set(choices.COLUMNS)
    assert row == {
        "op": "to_rgb",
        "dtype": "bfloat16",
        "shape_class": CLASS,
        "backend": "triton",
        "machine": "sm_90",
        "file": "rgb.py",
        "source": SOURCE,
        "median_us": 5.0,
        "next": "reference",
        "next_us": 10.0,
        "result": RGB,
    }
    (choice,) = choices.choices("to_rgb", [row], lambda _: True)
    assert choice.gain == 2 and choice.result == RGB


@pytest.mark.parametrize(
    ("result", "tests"),
    [
        (bench({"reference": 10.0, "triton": 9.9}), recorded()),  # too little
        (bench({"reference": 10.0, "triton": 11.0}), recorded()),
        (bench({"reference": 10.0, "compiled": 5.05, "triton": 5.0}), recorded()),  # a library is nearly as fast
        (bench(TIMES, source="0" * 64), recorded(source="0" * 64)),  # it has changed since
        (bench(TIMES), recorded(source="0" * 64)),
        (bench(TIMES), recorded(machine="sm_100")),
        (bench(TIMES), recorded(passed=0)),
        (bench(TIMES), recorded(failed=["tests/kernels/test_rgb.py::test_on_a_gpu"])),
        (bench(TIMES), recorded(ended="stopped after 200 s")),
        (bench(TIMES), {}),  # never tested
        (tuned(source="0" * 64), {}),
        (tuned(), recorded(failed=["tests/kernels/test_rgb.py::test_on_a_gpu"])),
        (tuned(times={"triton": 9.9, "reference": 10.0}), recorded()),
    ],
)
def test_any_other_kernel_is_not(result: dict[str, Any], tests: dict[str, Any]) -> None:
    assert "triton" not in {row["backend"] for row in verified.rows({RGB: result, TESTS: tests})}


def test_the_fastest_library_is_taken_where_no_kernel_of_ours_is_faster() -> None:
    made = bench({"reference": 10.0, "compiled": 5.05, "triton": 5.0})
    assert of(verified.rows({RGB: made, TESTS: recorded()})) == [("compiled", 5.05, "reference", 10.0)]


def test_tune_verifies_by_itself() -> None:
    assert of(verified.rows({TUNE: tuned()})) == [("triton", 5.0, "reference", 10.0)]
    library = tuned("compiled", {"compiled": 4.0, "triton": 5.0}, source="torch 2.11.0, triton 3.6.0")
    assert of(verified.rows({TUNE: library})) == [("compiled", 4.0, "triton", 5.0)]


@pytest.mark.parametrize("machine", ["cpu", "AMD EPYC"])
def test_a_cpu_s_results_are_left_to_the_user_s_own_table(machine: str) -> None:
    assert not verified.rows(
        {RGB: bench(TIMES, machine=machine), TESTS: recorded(machine), TUNE: tuned(machine=machine)}
    )


def test_what_is_slow_or_wrong_costs_itself_alone() -> None:
    """Not the other sizes of its class, nor the other back ends."""
    made = bench(TIMES)
    made["compared"]["1080p"] = made["compared"]["480p"]
    made["results"]["1080p"] = [{"name": "reference", "median": 20.0}, {"name": "triton", "median": 21.0}]
    rows = verified.rows({RGB: made, TESTS: recorded()})
    assert of(rows)[0] == ("triton", 5.0, "reference", 10.0)
    wrong = {"op": "to_rgb", "dtype": "bfloat16", "shape_class": CLASS, "backend": "cuda", "why": "it hangs"}
    times = {"reference": 10.0, "triton": 5.0, "cuda": 4.0}
    passed = recorded(sources={"rgb.py": SOURCE, "rgb.cu": verified.current("rgb.cu")})
    assert of(verified.rows({RGB: bench(times), TESTS: passed}))[0][0] == "cuda"
    cuda = wrong | {"source": verified.current("rgb.cu")}
    rejects = tuned(rejected=(cuda,))
    rejects["rows"] = []
    assert of(verified.rows({RGB: bench(times), TESTS: passed, TUNE: rejects})) == [("triton", 5.0, "reference", 10.0)]
    for other in ({"shape_class": "values 2^20"}, {"dtype": "float16"}, {"source": "0"}, {"op": "rms_norm"}):
        rejects["rejected"] = [cuda | other]
        assert of(verified.rows({RGB: bench(times), TESTS: passed, TUNE: rejects}))[0][0] == "cuda"


def test_the_fastest_of_a_class_comes_first_whatever_the_order_of_the_files() -> None:
    fast, slow = tuned(times={"triton": 2.0, "reference": 10.0}), tuned(times={"triton": 8.0, "reference": 10.0})
    cuda = tuned("cuda", {"cuda": 4.0, "reference": 10.0}, source=verified.current("rgb.cu"))
    for paths in (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")):
        rows = verified.rows(dict(sorted(zip(paths, (fast, slow, cuda), strict=True))))
        assert of(rows) == [("triton", 2.0, "reference", 10.0), ("cuda", 4.0, "reference", 10.0)]


def test_other_classes_and_machines_have_rows_of_their_own() -> None:
    other = tuned(machine="sm_100")
    third = tuned()
    third["rows"][0]["shape_class"] = "values 2^20"
    rows = verified.rows({"a": tuned(), "b": other, "c": third})
    assert {(row["machine"], row["shape_class"]) for row in rows} == {
        ("sm_90", CLASS),
        ("sm_100", CLASS),
        ("sm_90", "values 2^20"),
    }


def test_kernels_that_run_after_each_other_must_all_be_the_same() -> None:
    row = tuned("cuda", {"cuda": 4.0, "reference": 10.0})["rows"][0]
    row |= {"op": "vae_norm_silu_conv3d", "file": "conv.cu+vae_norm.cu", "source": verified.now("conv.cu+vae_norm.cu")}
    record = {"benchmark": "tune", "machine": {"arch": "sm_90"}, "rows": [row], "rejected": []}
    assert len(verified.rows({TUNE: record})) == 1
    failed = {
        "passed": 1,
        "failed": ["x"],
        "ended": "done",
        "sources": {"vae_norm.cu": verified.current("vae_norm.cu")},
    }
    failures = {
        "benchmark": "gpu-tests",
        "machine": {"arch": "sm_90"},
        "files": {"tests/kernels/test_conv_cuda.py": failed},
    }
    assert not verified.rows({TUNE: record, TESTS: failures})
    row["source"] = verified.current("conv.cu")
    assert not verified.rows({TUNE: record})


def test_approximations_are_never_chosen() -> None:
    row = tuned()["rows"][0] | {"op": "attention", "backend": "cuda_int8", "file": "attention_eight.cu+quantize.cu"}
    row["source"] = verified.now(row["file"])
    assert row["source"]
    assert not verified.rows({TUNE: {"benchmark": "tune", "machine": {"arch": "sm_90"}, "rows": [row], "rejected": []}})


def test_the_table_is_what_the_results_say() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "verified.py"), "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert json.loads((ROOT / "fastvid" / "ops" / "verified.json").read_text())["about"]


def test_a_difference_is_told() -> None:
    (row,) = verified.rows({TUNE: tuned()})
    assert verified.differences([row], []) == [f"missing: {json.dumps(row)}"]
    assert verified.differences([], [row]) == [f"without a result: {json.dumps(row)}"]
    assert not verified.differences([row], [row])
