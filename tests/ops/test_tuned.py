"""The user's table of tuned operations: what is kept, what is dropped, and what is refused."""

from __future__ import annotations

import json
import os
import stat
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvid.errors import Error, FastvidWarning
from fastvid.ops import sources, tuned

CPU = torch.device("cpu")
SOURCE = sources.source_hash("packed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    return tmp_path


def row(shape_class: str = "k256 n1024", **changes: Any) -> tuned.Row:
    made = {"op": "linear", "dtype": "float32", "shape_class": shape_class, "backend": "packed", "machine": "a CPU"}
    made |= {
        "file": "",
        "source": sources.source_hash("packed"),
        "median_us": 12.5,
        "next": "reference",
        "next_us": 20.0,
    }
    return made | {"times_us": {"packed": 12.5, "reference": 20.0}} | changes


def rejection(shape_class: str = "k256 n1024", **changes: Any) -> tuned.Row:
    made = {
        "op": "linear",
        "dtype": "float32",
        "shape_class": shape_class,
        "backend": "packed",
        "source": sources.source_hash("packed"),
    }
    return made | {"why": "wrong by 0.1"} | changes


def refused() -> str:
    with pytest.raises(tuned.TableRefused) as raised:
        tuned.load(CPU)
    with pytest.warns(FastvidWarning, match="until then auto goes without it"):
        assert tuned.read(CPU)["rows"] == []
    return str(raised.value)


def test_a_table_comes_back_as_it_was_written() -> None:
    path = tuned.write(CPU, [row()], [rejection()])
    assert tuned.read(CPU)["rows"] == [row(result=str(path))]
    assert tuned.load(CPU)["rejected"] == [rejection()]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(path.parent.glob("*.partial"))


def test_without_a_table_there_are_no_rows_and_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.read(CPU)["rows"] == []


def test_new_rows_take_the_place_of_their_class_alone() -> None:
    tuned.write(CPU, [row("small"), row("large")], [rejection("small"), rejection("large")])
    tuned.write(CPU, [row("small", backend="reference", median_us=20.0, next="packed", next_us=12.5)])
    found = {each["shape_class"]: each["backend"] for each in tuned.read(CPU)["rows"]}
    assert found == {"small": "reference", "large": "packed"}
    assert [each["shape_class"] for each in tuned.load(CPU)["rejected"]] == ["large"]


@pytest.mark.parametrize("name", ["device", "threads", "driver", "torch", "triton"])
def test_a_table_with_another_key_is_empty(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned.write(CPU, [row()])
    content = json.loads(path.read_text())
    content["key"][name] = "another"
    path.write_text(json.dumps(content))
    assert tuned.read(CPU)["rows"] == []
    tuned.write(CPU, [row("new")])
    assert [each["shape_class"] for each in tuned.read(CPU)["rows"]] == ["new"]


def test_rows_of_changed_kernels_leave_the_table_with_the_next_write(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(CPU, [row("old", source="another")], [rejection("old too", source="another")])
    tuned.write(CPU, [row("new")])
    assert [each["shape_class"] for each in tuned.load(CPU)["rows"]] == ["new"]
    assert tuned.load(CPU)["rejected"] == []


def test_each_number_of_threads_has_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    three = tuned.write(CPU, [row()])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert tuned.read(CPU)["rows"] == [] and tuned.path_of(CPU) != three


BROKEN: dict[str, Any] = {
    "no JSON": "{",
    "cut": None,
    "not an object": "[]",
    "no rows": json.dumps({"version": 1, "key": {}}),
    "of another version": json.dumps({"version": 2, "key": {}, "rows": [], "rejected": []}),
    "a row that is none": json.dumps({"version": 1, "key": {}, "rows": [3], "rejected": []}),
    "deep": "[" * 100_000,
    "NaN": json.dumps({"version": 1, "key": {}, "rows": [row(median_us=float("nan"))], "rejected": []}),
    "not text": b"\xff\xfe",
}
BAD_ROWS: dict[str, dict[str, Any]] = {
    "negative time": {"median_us": -1.0},
    "infinite time": {"next_us": 1e999},
    "a whole number": {"median_us": 12},
    "no name": {"backend": 7},
    "escape": {"op": "linear\x1b[31m"},
    "long": {"source": "x" * 1000},
    "another entry": {"surprise": 1},
    "times of others": {"times_us": {"reference": 20.0}},
    "no time": {"median_us": None, "times_us": {}, "next": None, "next_us": None},
    "next is a list": {"next": [1]},
    "next is a number": {"next": 5, "next_us": None},
    "next without a time": {"next": "ghost", "next_us": None},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_table_is_refused_by_name(what: str) -> None:
    path = tuned.write(CPU, [row()])
    text = path.read_bytes()[:-40] if BROKEN[what] is None else BROKEN[what]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "damaged" in refused() and str(path) in refused()
    with pytest.raises(tuned.TableRefused):  # nor is it written over
        tuned.write(CPU, [row()])


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_row_with_other_values_is_refused(what: str) -> None:
    path = tuned.write(CPU, [row()])
    content = json.loads(path.read_text())
    content["rows"][0] |= BAD_ROWS[what]
    path.write_text(json.dumps(content))
    assert "damaged" in refused()


def test_a_huge_table_is_refused_unread() -> None:
    path = tuned.write(CPU, [row()])
    with open(path, "r+b") as file:
        file.truncate(tuned.MAX_BYTES + 1)
    assert "bytes" in refused()


@pytest.mark.parametrize("target", ["file", "folder", "fastvid"])
def test_what_another_user_owns_is_refused(target: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned.write(CPU, [row()])
    foreign = {"file": path, "folder": path.parent, "fastvid": path.parent.parent}[target].stat().st_ino

    def owned(look: Any) -> Any:
        def status(*args: Any, **options: Any) -> os.stat_result:
            found = look(*args, **options)
            return os.stat_result((*found[:4], 12345, *found[5:])) if found.st_ino == foreign else found

        return status

    monkeypatch.setattr(os, "lstat", owned(os.lstat))
    monkeypatch.setattr(os, "fstat", owned(os.fstat))
    assert "belongs to another user (number 12345)" in refused()


@pytest.mark.parametrize(("target", "mode"), [("file", 0o666), ("file", 0o620), ("folder", 0o777), ("fastvid", 0o777)])
def test_what_others_can_write_is_refused(target: str, mode: int) -> None:
    path = tuned.write(CPU, [row()])
    {"file": path, "folder": path.parent, "fastvid": path.parent.parent}[target].chmod(mode)
    assert "can be written by others" in refused()


def test_a_careless_umask_makes_no_table_that_is_refused() -> None:
    before = os.umask(0)
    try:
        tuned.write(CPU, [row()])
    finally:
        os.umask(before)
    assert len(tuned.load(CPU)["rows"]) == 1


@pytest.mark.parametrize("target", ["file", "folder"])
def test_links_are_not_followed(target: str, tmp_path: Path) -> None:
    path = tuned.write(CPU, [row()])
    place = path if target == "file" else path.parent
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    refused()
    with pytest.raises(Error):
        tuned.write(CPU, [row()])
    tuned.clear()
    assert (tmp_path / "moved").exists() and not place.is_symlink()


def test_a_pipe_in_the_place_of_a_table_is_refused_and_not_waited_for() -> None:
    path = tuned.write(CPU, [row()])
    path.unlink()
    os.mkfifo(path)
    assert "not an ordinary file" in refused()


def test_writers_take_turns() -> None:
    def write(number: int) -> None:
        for part in range(5):
            tuned.write(CPU, [row(f"class {number} {part}")])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each["shape_class"] for each in tuned.read(CPU)["rows"]}) == 40


def test_a_table_is_whole_or_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned.write(CPU, [row()])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Error, match="No space left on device"):
        tuned.write(CPU, [row("new")])
    assert [each["shape_class"] for each in tuned.read(CPU)["rows"]] == ["k256 n1024"]
    assert not list(path.parent.glob("*.partial"))


def test_clear_removes_tables_that_are_refused_too() -> None:
    path = tuned.write(CPU, [row()])
    path.write_text("{")
    assert tuned.clear() == [path]
    assert tuned.read(CPU)["rows"] == [] and tuned.clear() == []
