"""What is logged: nothing until somebody listens, and no prompt above DEBUG."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import fastvid
from fastvid.cli import commands

PROMPT = "a red circle that nobody shall read"
FEW = {"num_inference_steps": 1, "num_frames": 1, "seed": 1}


def test_it_is_silent_by_default(tmp_path: Path) -> None:
    code = f"import fastvid; fastvid.load('embedded', device='cpu').generate('a red circle', **{FEW!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_loading_planning_and_steps_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fastvid"):
        pipe = fastvid.load("embedded", device="cpu")
        pipe.generate(PROMPT, **FEW)
    told = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert any(line.startswith("loaded embedded") for line in told)
    assert any("attention" in line and ("sdpa" in line or "library" in line) for line in told)
    assert any(line.startswith("plan: 1 frames of 64x64") for line in told)
    assert not any(PROMPT in line for line in told)
    steps = [record for record in caplog.records if record.getMessage().startswith("step 1 of 1")]
    assert [step.levelno for step in steps] == [logging.DEBUG]
    assert all(record.name.startswith("fastvid.") for record in caplog.records)


@pytest.mark.parametrize(
    ("words", "name", "shown"), [(["--verbose"], "", True), ([], "info", True), ([], "error", False)]
)
def test_the_command_line_can_tell_it(
    words: list[str],
    name: str,
    shown: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FASTVID_LOG", name)
    few = ["--num-frames", "1", "--steps", "1", "--quiet"]
    assert commands.main(["generate", PROMPT, "-o", str(tmp_path / "o.npy"), *few, *words]) == 0
    err = capsys.readouterr().err
    assert ("loaded embedded" in err and "plan:" in err) == shown and PROMPT not in err
    assert all(isinstance(one, logging.NullHandler) for one in logging.getLogger("fastvid").handlers)


def test_an_unknown_level_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVID_LOG", "verbos")
    assert commands.main(["inspect", "embedded"]) == 2
    assert "FASTVID_LOG='verbos': allowed is one of debug, info, warning, error" in capsys.readouterr().err
