"""What a child process does, in this one: which messages it writes for which back ends."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from test_check import norm

from fastvid.device.precision import computing
from fastvid.ops import tuned
from fastvid.tuning import child
from fastvid.tuning.calls import Call, to_json

LIMIT = 7.0


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str], calls: list[Call] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """The messages about these fakes beside the reference."""
    fakes.install(names, monkeypatch.setattr)
    fakes.CALLS["number"] = 0
    mark = folder / "mark"
    mark.write_bytes(b"\0")
    job = {"seconds": 3.0, "device": "cpu", "calls": [to_json(call) for call in calls or [norm()]], "limit": LIMIT}
    job |= {"rejected": [], "right": [], "done": [], "later": [], "mark": str(mark), "plugin": None} | changes
    out = io.StringIO()
    with computing():
        child.run(child.Job(job, out))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def of(messages: list[dict[str, Any]], kind: str) -> list[Any]:
    return [message[kind] for message in messages if kind in message]


def test_the_fastest_right_one_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    messages = run(monkeypatch, tmp_path, ["sleeping", "right", "off"])
    (row,) = of(messages, "row")
    assert row["backend"] in ("right", "reference") and row["next"] in ("right", "reference")
    assert set(row["times_us"]) == {"reference", "right", "sleeping"} and row["times_us"]["sleeping"] > 50_000
    assert row["median_us"] == min(row["times_us"].values()) and row["next_us"] == sorted(row["times_us"].values())[1]
    assert row["machine"] == tuned.machine(torch.device("cpu"))
    tuned._check_row(row)


WRONG = ["off", "tail", "middle", "faint", "fickle", "scribbling", "overflowing", "refusing", "keeping", "sharing"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_told_and_never_chosen(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    messages = run(monkeypatch, tmp_path, [name, "right"], seconds=0.3)
    (rejected,) = of(messages, "rejected")
    assert rejected["backend"] == name and rejected["why"].isprintable() and rejected["shape_class"] == "d64"
    tuned._check_rejected(rejected)
    (row,) = of(messages, "row")
    assert set(row["times_us"]) == {"reference", "right"}


def test_one_that_changes_a_setting_is_told_and_the_child_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, told = torch.get_default_dtype(), list[dict[str, Any]]()
    monkeypatch.setattr(child.Job, "say", lambda job, **message: told.append(message))
    try:
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, tmp_path, ["setting", "right"], seconds=0.3)
    finally:
        torch.set_default_dtype(before)
    (rejected,) = of(told, "rejected")
    assert rejected["backend"] == "setting" and rejected["why"] == "it changes torch's default dtype"
    assert ended.value.code == child.STICKY


def test_before_each_piece_it_says_what_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    messages = run(monkeypatch, tmp_path, ["right"], seconds=0.3)
    stages = [(at["stage"], at["backend"]) for at in of(messages, "at")]
    wanted = [("checking", "reference"), ("checking", "right"), ("timing", "")]
    assert stages == [("preparing", ""), ("preparing", ""), *wanted]
    assert of(messages, "at")[-1]["of"] == ["reference", "right"]
    assert all(LIMIT <= message["limit"] < LIMIT + 3 for message in messages if "at" in message)
    assert (tmp_path / "mark").read_bytes() in (b"\0", b"\1")


def test_what_another_child_has_found_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = ["rms_norm", "float32", "d64"]
    known = {"rejected": [[*name, "hanging"]], "right": [[*name, "reference"]]}
    messages = run(monkeypatch, tmp_path, ["hanging", "right"], seconds=0.3, **known)
    assert [at["backend"] for at in of(messages, "at") if at["stage"] == "checking"] == ["right"]
    assert set(of(messages, "row")[0]["times_us"]) == {"reference", "right"}
    assert run(monkeypatch, tmp_path, ["hanging"], done=[name]) == []


def test_time_is_shared_by_work_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = [Call("rms_norm", "float32", f"d64 {rows}", norm(rows).given, 10, 1.0, rows) for rows in (200, 2000, 600)]
    began = time.monotonic()
    messages = run(monkeypatch, tmp_path, ["right"], calls, seconds=2.0)
    assert time.monotonic() - began < 3.0
    assert [row["shape_class"] for row in of(messages, "row")] == ["d64 2000", "d64 600", "d64 200"]
    spent = run(monkeypatch, tmp_path, ["right"], calls, seconds=0.0)
    assert [row["why"] for row in of(spent, "unmeasured")] == ["the budget was spent before it"] * 3


def test_new_classes_come_before_those_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = [Call("rms_norm", "float32", f"d64 {rows}", norm(rows).given, 10, 1.0, rows) for rows in (200, 2000)]
    later = [["rms_norm", "float32", "d64 2000"]]
    messages = run(monkeypatch, tmp_path, [], calls, seconds=0.4, later=later)
    assert [row["shape_class"] for row in of(messages, "row")] == ["d64 200", "d64 2000"]


def test_a_call_that_is_too_long_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = Call("rms_norm", "float32", "d64", norm(700).given, 1, 1e15, 1e15)
    messages = run(monkeypatch, tmp_path, ["right"], [long], seconds=2.0)
    (row,) = of(messages, "unmeasured")
    assert "too long for what is left of the budget" in row["why"] and not of(messages, "row")


def test_an_error_that_the_device_does_not_recover_from_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(x: Any, weight: Any, eps: float) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(fakes.FAKES, "broken", broken)
    assert of(run(monkeypatch, tmp_path, ["broken"], seconds=0.3), "row")  # a CPU goes on
    monkeypatch.setattr(child, "_is_broken", lambda device: True)
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, tmp_path, ["broken"])
    assert raised.value.code == child.STICKY


def test_the_default_wins_where_nothing_gains_more_than_times_jitter() -> None:
    near, far = {"reference": 101.0, "triton": 100.0, "aten": 100.5}, {"reference": 110.0, "triton": 100.0}
    assert child._winner(near, "reference") == "reference"
    assert child._winner(far, "reference") == "triton"
    assert child._winner(near, "channels_last") == "triton"  # the default was not right
