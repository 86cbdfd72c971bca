"""The profile of a denoising step: what it sees, and that a step of the model copies nothing but what is known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What copies in a step in fp32 on the CPU: the reference of what kernels read where it lies, and tables of a few rows.
KNOWN = {
    ("cat", "fastvid/layers/embeddings.py"),
    ("stack", "fastvid/layers/embeddings.py"),
    ("_to_copy", "fastvid/layers/embeddings.py"),
    ("clone", "fastvid/ops/reference.py"),
}
SMALL = 100  # bytes: numbers of each column


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("profile_step", ROOT / "benchmarks" / "profile_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_copies_are_seen_with_their_bytes(script: ModuleType) -> None:
    x = torch.randn(4, 6)
    with script.Watch() as watch:
        x.t().contiguous()
        x.double()
        torch.cat((x, x))
        x + 1
        x.t().reshape(2, 12)
    report = watch.report()
    seen = sorted((copy["op"], copy["bytes"]) for copy in report["copies"])
    assert seen == [("_to_copy", 192), ("cat", 192), ("clone", 96), ("clone", 96)]
    assert report["copy_bytes"] == 576 and report["counts"]["aten::add"] == 1
    assert all(copy["at"].startswith("tests/benchmarks/test_profile_step.py test_copies") for copy in report["copies"])


def test_a_step_has_no_stray_copies(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["profile_step", "--device", "cpu"])
    script.main()
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    large = [copy for copy in report["copies"] if copy["bytes"] > SMALL * copy["count"]]
    assert {(copy["op"], copy["at"].split()[0]) for copy in large} <= KNOWN
    assert {copy["at"].split()[1] for copy in large if copy["op"] == "clone"} == {"patch_embed:", "_unpatchify:"}
    assert report["counts"]["aten::_scaled_dot_product_flash_attention_for_cpu"] == 24, "12 in each of two calls"
    assert f"{report['copy_count']} copies of" in capsys.readouterr().out and report["slowest"][0]["us"] > 0
