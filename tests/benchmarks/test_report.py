"""Tables and plots of results, from results of a GPU whose limits are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import report  # noqa: E402


def row(name: str, median: float, tflops: float = 0.0, gb: float = 0.0) -> dict:
    return {"name": name, "median": median, "tflop_per_s": tflops, "gb_per_s": gb}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    groups = {
        f"{tokens:,} tokens": [
            row("reference", 900.0 * tokens, 50, 10),
            row("sdpa-cudnn", 100.0 * tokens, 600, 80),
            row("sdpa-flash", 120.0 * tokens, 500, 70),
            row("triton", 80.0 * tokens, 632, 86),
        ]
        for tokens in (32760, 75600)
    }
    for device in ("NVIDIA H200", "NVIDIA Other"):
        record = {"benchmark": "attention", "machine": {"device": device}, "results": groups}
        (tmp_path / f"attention-{device[-5:]}.json").write_text(json.dumps(record))
    return tmp_path


def test_shares_and_speeds(results: Path) -> None:
    lines = list(report.read(results))
    assert len(lines) == 16
    (line,) = [x for x in lines if (x.device, x.name, x.group[:2]) == ("NVIDIA H200", "triton", "32")]
    assert line.of_limit == pytest.approx(632 / 790)
    assert line.speed(report.EAGER) == pytest.approx(900 / 80)
    assert line.speed(report.LIBRARIES) == pytest.approx(100 / 80)
    assert line.speed(report.COMPILED) is None
    assert {x.of_limit for x in lines if x.device == "NVIDIA Other"} == {None}


def test_a_table_has_every_case(results: Path) -> None:
    text = report.table(list(report.read(results)))
    assert text.count("| 32,760 tokens: ") == 8 and "| 632.0 | 86.0 | 80% | 11.25 |  | 1.25 |" in text


def test_files(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(results), "--out", str(tmp_path / "docs")])
    report.main()
    made = {path.name for path in (tmp_path / "docs").iterdir()}
    assert made == {"benchmarks.md", "benchmarks-roofline.svg", "benchmarks-attention.svg"}  # nothing of a VAE
    assert "16 cases, 2 plots" in capsys.readouterr().out
    assert "32,760" not in (tmp_path / "docs" / "benchmarks-roofline.svg").read_text()
