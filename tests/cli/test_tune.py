"""The command line of tuning: its flags, its progress, and the table as text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvid
from fastvid.cli import commands
from fastvid.cli import tune as cli
from fastvid.ops import sources, tuned
from fastvid.tuning import run as tuning

CPU = torch.device("cpu")
ROW = {"op": "linear", "dtype": "float32", "shape_class": "64 to 64 rows 2^6", "backend": "packed", "machine": "this"}
ROW |= {"file": "", "source": sources.source_hash("packed"), "median_us": 12.5, "next": "reference", "next_us": 20.0}
ROW |= {"times_us": {"packed": 12.5, "reference": 20.0}}
BAD = {name: ROW[name] for name in ("op", "dtype", "shape_class", "source")} | {"backend": "aten", "why": "off by 0.1"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def told(make: Callable[..., tuning.Tuned], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line gives to `tune`."""
    given: dict[str, Any] = {}

    def stand_in(**options: Any) -> tuning.Tuned:
        given.update(options)
        return make(options)

    monkeypatch.setattr(tuning, "tune", stand_in)
    return given


def done(options: dict[str, Any]) -> tuning.Tuned:
    options["progress"]({"model": "embedded", "stage": "checking", "op": "linear", "done": 1, "total": 9})
    spent = [{**ROW, "why": "the budget was spent before it"}] * 5
    return tuning.Tuned("/cache/tune/this.json", [ROW], [BAD], spent, 61.0)


def test_flags_reach_the_function_and_its_result_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = told(done, monkeypatch)
    words = "--model embedded --size 64x64 --num-frames 9 --budget 5.5 --device cpu --dtype fp32 --only rgb,ends"
    assert commands.main(["tune", *words.split(), "--export", "a.json"]) == 0
    del given["progress"]
    assert given == {
        **{"model": "embedded", "size": "64x64", "num_frames": 9, "budget": 5.5, "device": "cpu"},
        **{"dtype": "fp32", "only": "rgb,ends", "export": "a.json"},
    }
    out, err = capsys.readouterr()
    assert "linear float32 64 to 64 rows 2^6" in out and "12.5 us, next reference 20.0 us" in out
    assert "aten is not used: off by 0.1" in out and "and 2 more" in out
    assert "1 choices in 1:01 min: /cache/tune/this.json" in out and "embedded [1/9]: checking linear" in err


def test_quiet_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told(done, monkeypatch)
    assert commands.main(["tune", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == [ROW] and err == ""


def test_an_interruption_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: dict[str, Any]) -> tuning.Tuned:
        raise KeyboardInterrupt

    told(interrupted, monkeypatch)
    assert commands.main(["tune"]) == 130
    assert "what was measured until now is in the table" in capsys.readouterr().err


def test_the_table_is_shown_and_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    path = tuned.write(CPU, [ROW], [BAD])
    assert commands.main(["tune", "--show", "--device", "cpu"]) == 0
    assert "packed" in (text := capsys.readouterr().out) and str(path) in text and "aten is not used" in text
    assert commands.main(["tune", "--show", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rejected"] == [BAD]
    assert commands.main(["tune", "--clear"]) == 0 and not path.exists()
    assert str(path) in capsys.readouterr().out
    assert commands.main(["tune", "--show", "--device", "cpu"]) == 0
    assert "there is no table" in capsys.readouterr().out


def test_a_table_that_cannot_be_trusted_is_told_by_show(capsys: pytest.CaptureFixture[str]) -> None:
    tuned.write(CPU, [ROW]).write_text("{")
    assert commands.main(["tune", "--show", "--device", "cpu"]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("words", ["--device cuda", "--show --device cuda"])
def test_a_device_that_is_not_there(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["tune", *words.split()]) == 1
    assert "no CUDA device is found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--budget x", "--budget x: a number is needed, such as --budget 300"),
        ("--frames 1.5", "--num-frames 1.5: a number is needed"),
        ("--size 64", "--size="),
        ("--only attenion", "the nearest is attention"),
        ("--sizes 64x64", "the nearest is --size"),
        ("--show --model embedded", "--model: --show tunes nothing"),
        ("--clear --device cpu", "--device: --clear tunes nothing"),
        ("--device tpu", "'tpu'"),
        ("extra", "unexpected 'extra'"),
    ],
)
def test_bad_words(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["tune", *words.split()]) == 2
    assert message in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_and_others_a_line_now_and_then() -> None:
    terminal, file, times = Terminal(), io.StringIO(), iter(range(0, 100, 2))
    for stream in (terminal, file):
        line = cli.Line(stream, clock=lambda: next(times))
        for number in range(4):
            line.event({"model": "embedded", "stage": "checking", "op": "a" * (9 - number), "done": number, "total": 4})
        line.close()
    assert "\n" not in terminal.getvalue() and terminal.getvalue().endswith("\r")
    assert 1 <= file.getvalue().count("\n") < 4


def test_the_face_has_it() -> None:
    assert fastvid.tune is tuning.tune
