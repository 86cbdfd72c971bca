"""Batches on the command line: every prompt with every seed, names, refusals, interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvid.cli.batches import parse_seeds, read_prompts
from fastvid.cli.commands import INTERRUPTED, OK, USAGE, main
from fastvid.cli.writing import VideoFile
from fastvid.engine.events import Started

RED, BLUE = "a red circle moving right on a white background", "a blue square growing on a black background"
SHORT = ("--steps", "1", "--num-frames", "5", "--quiet", "--device", "cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text(f"{RED}\n\n  {BLUE}\r\n")
    return tmp_path


def test_every_prompt_with_every_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompts", "p.txt", "--seeds", "3-4", "-o", "out.npy", "--json", *SHORT]) == OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(one["output"]).name for one in records] == [f"out-000{n}.npy" for n in (1, 2, 3, 4)]
    assert [(one["recipe"]["prompt"], one["seed"]) for one in records] == [(RED, 3), (RED, 4), (BLUE, 3), (BLUE, 4)]
    assert main(["generate", BLUE, "--seed", "3", "-o", "alone.npy", *SHORT]) == OK
    assert np.array_equal(np.load("alone.npy"), np.load("out-0003.npy"))


def test_names(folder: Path) -> None:
    Path("p.jsonl").write_text(json.dumps({"prompt": RED, "seed": 8, "negative_prompt": BLUE}))
    assert main(["generate", "--prompts", "p.jsonl", "-o", "a{number}-{seed}.gif", *SHORT]) == OK
    image = ["image", RED, "--seeds", "5,7", "--steps", "1", "--quiet", "--batch-size", "2"]
    assert main([*image, "-o", "pictures/"]) == OK
    assert main([*image, "--frames-dir", "frames"]) == OK
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert made == {
        "p.txt", "p.jsonl", "a0001-8.gif", "pictures/0001.png", "pictures/0002.png", "frames/0001/000000.png",
        "frames/0002/000000.png",
    }  # fmt: skip


def test_what_is_finished_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, started = VideoFile.add, list[Started]()

    def interrupted(file: VideoFile, event: Any) -> None:
        add(file, event)
        started.extend([event] if isinstance(event, Started) else [])
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoFile, "add", interrupted)
    assert main(["generate", "--prompts", "p.txt", "-o", "out.npy", *SHORT]) == INTERRUPTED
    assert sorted(os.listdir(folder)) == ["out-0001.npy", "p.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "p.txt", "-o", "-"], "standard output takes one video"),
        (["--prompts", "p.txt", RED, "-o", "a.mp4"], "--prompts and a prompt are both given"),
        ([RED, "--seeds", "1,2", "--seed", "3", "-o", "a.mp4"], "--seeds and --seed are both given"),
        ([RED, "--seeds", "1,2", "--checkpoint", "job", "-o", "a.mp4"], "--checkpoint is of one video"),
        ([RED, "--seeds", "1,2", "-o", "a{sed}.mp4"], "there is no {sed}; the nearest is {seed}"),
        ([RED, "--seeds", "1,2", "-o", "a{number.mp4"], "write {number} and {seed}"),
        (["--prompts", "p.txt", "--seeds", "1,2", "-o", "a{seed}.mp4"], "two videos would be a1.mp4"),
        ([RED, "--seeds", "1-x", "-o", "a.mp4"], "'1-x' is no seed"),
        ([RED, "--seeds", "4-1", "-o", "a.mp4"], "the nearest is 1-4"),
        ([RED, "--seeds", f"{2**63}", "-o", "a.mp4"], f"the nearest is {2**63 - 1}"),
        ([RED, "--seeds", "1-99999", "-o", "a.mp4"], "more than 10000 videos"),
        (["--prompts", "p.txt", "--width", "63", "-o", "a.mp4"], "video 1 of 2: --width=63"),
        (["--prompts", "bad.jsonl", "-o", "a.mp4"], "line 2: there is no 'sed'; the nearest is seed"),
        (["--prompts", "empty.jsonl", "-o", "a.mp4"], "holds no prompt"),
        (["--prompts", "words.jsonl", "-o", "a.mp4"], "line 1 is no JSON object with a prompt"),
        (["--prompts", "seeds.jsonl", "--seeds", "1", "-o", "a.mp4"], "gives seeds, too"),
        (["--prompts", "seeds.jsonl", "-o", "a.mp4"], "video 1 of 1: --seed="),
    ],
)  # fmt: skip
def test_refused_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "sed": 1}')
    Path("empty.jsonl").write_text("\n\n")
    Path("words.jsonl").write_text("a red circle")
    Path("seeds.jsonl").write_text('{"prompt": "a", "seed": "x"}')
    monkeypatch.setattr("fastvid.api.load", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(os.listdir(folder))
    assert main(["generate", *flags]) == USAGE
    assert message in capsys.readouterr().err and sorted(os.listdir(folder)) == before


def test_a_plan_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--prompts", "p.txt", "--seeds", "1-3", "--device-memory", "24GB", "-o", "a.mp4"]) == OK
    assert "6 such videos" in capsys.readouterr().out
    assert main(["plan", RED, "--seeds", "1-3", "--device-memory", "24GB", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["videos"] == 3


def test_seeds_and_prompts_as_they_are_written() -> None:
    assert parse_seeds("1-3, 7 ,9-9") == [1, 2, 3, 7, 9]
    Path("bom.txt").write_bytes(b"\xef\xbb\xbfa\n# b")
    assert read_prompts("bom.txt") == [{"prompt": "a"}, {"prompt": "# b"}]
