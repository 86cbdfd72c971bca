"""The runner of tests that need a GPU: what faults or hangs is recorded, and costs no other file its result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from compiled_host import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_tests
import harness

HEAD = (
    "import os, signal, time\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_first():\n    pass\n\n\n@pytest.mark.gpu\n"
)
SECOND = {
    "fine": "def test_second():\n    pass\n",
    "wrong": "def test_second():\n    assert False\n",
    "faulting": "def test_second():\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "hanging": "def test_second():\n    time.sleep(600)\n",
}


@pytest.mark.parametrize("kind", SECOND)
def test_every_end_is_recorded(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(HEAD + SECOND[kind])
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    outcome = gpu_tests.run(str(file), 8 if kind == "hanging" else 60)
    assert harness.passed(outcome) == (kind == "fine")
    if kind == "fine":
        assert outcome["passed"] == 2
    elif kind == "wrong":
        assert outcome["passed"] == 1 and outcome["failed"] == [f"{file}::test_second"] and outcome["ended"] == "done"
    else:
        assert outcome["ended"] == {"faulting": "killed by signal 11", "hanging": "stopped after 8 s"}[kind]
        assert outcome["at"].endswith("::test_second")


def test_every_file_and_every_kernel_is_covered() -> None:
    marked = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()}
    pretended = {file for file in marked if file.startswith("tests/benchmarks/")}
    assert marked - pretended == set(gpu_tests.COVERS)
    cuda = {p.name for p in (ROOT / "csrc").glob("*.cu") if "__global__" in p.read_text()}
    kernels = {p.name for p in (ROOT / "kernels").glob("*.py")} - {"__init__.py", "ahead.py"}
    assert kernels | cuda == {name for names in gpu_tests.COVERS.values() for name in names}


def test_what_did_not_pass_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(harness.earlier.__globals__, "RESULTS", tmp_path / "none")
    device = torch.device("cpu")
    monkeypatch.setattr(harness.dispatch, "why_not", lambda *_: None)

    def why() -> str | None:
        return harness.why_not("attention", "triton", device)

    assert why() is None  # never tested
    outcome = {"passed": 3, "failed": [], "ended": "done"}
    source = harness.source_hash("triton", "attention.py")
    outcome["sources"] = {"attention.py": source}
    for changed, fine in (({}, True), ({"ended": "stopped after 9 s"}, False), ({"failed": ["x"]}, False)):
        path = harness.save("gpu-tests", {}, device, files={"tests/test_a.py": outcome | changed})
        assert (why() is None) == fine
    path.write_text(path.read_text().replace(source, "another"))
    assert why() is None  # it is another kernel by now
