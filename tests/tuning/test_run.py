"""The parent: children that hang, crash or are interrupted; the budget; the table and the export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from test_check import norm

from fastvid.errors import Error, InvalidRequest
from fastvid.models.loaded import LoadOptions
from fastvid.ops import tuned
from fastvid.tuning import process
from fastvid.tuning import run as tuning
from fastvid.tuning.calls import FAMILIES, Call
from fastvid.tuning.work import Subject

CPU = torch.device("cpu")
NORM = Call("rms_norm", "float32", "d64", norm().given, 10, 1e4, 1e5)
LIMIT = 6.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def tune(
    monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str], budget: float = 8.0, **changes: Any
) -> tuning.Tuned:
    """Tunes these fakes beside the reference, for one call."""
    fakes.install(names, monkeypatch.setattr)
    monkeypatch.setattr(tuning, "record", lambda subject, options: [NORM])
    settings: dict[str, Any] = {"families": tuple(FAMILIES), "limit": LIMIT, "progress": lambda event: None} | changes
    plan = tuning.Plan(CPU, LoadOptions(device="cpu"), budget, plugin=fakes.plugin(folder, names), **settings)
    return tuning.run(plan, [Subject("embedded")], folder / "export.json")


def rejected(result: tuning.Tuned) -> dict[str, str]:
    return {row["backend"]: row["why"] for row in result.rejected}


@pytest.mark.slow
def test_what_is_right_gets_a_row_in_the_table(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    events: list[Mapping[str, Any]] = []
    result = tune(monkeypatch, cache, ["right", "off", "sleeping"], progress=events.append)
    (row,) = result.rows
    assert (
        set(row["times_us"]) == {"reference", "right", "sleeping"} and "off double precision" in rejected(result)["off"]
    )
    table = tuned.load(CPU)
    assert [{k: v for k, v in one.items() if k != "result"} for one in table["rows"]] == [row]
    assert table["rejected"] == result.rejected and result.path == str(tuned.path_of(CPU))
    assert events[0]["stage"] == "recording" and {"op", "stage", "done", "total"} <= set(events[-1])
    export = json.loads((cache / "export.json").read_text())
    assert (export["benchmark"], export["rows"], export["rejected"]) == ("tune", [row], result.rejected)
    assert {"device", "torch", "threads", "commit", "date"} <= set(export["machine"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hanging", "it hung: nothing came of it in"),
        ("aborting", "SIGABRT"),
        ("faulting", "SIGSEGV"),
        ("signalling", "signal "),
        ("setting", "it changes torch's default dtype"),
    ],
)
def test_a_kernel_that_hangs_or_crashes_costs_itself_alone(
    name: str, why: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    times: list[float] = []
    result = tune(monkeypatch, cache, [name, "right"], progress=lambda at: times.append(time.monotonic()))
    assert max(b - a for a, b in pairwise(times[1:])) < LIMIT + 60  # the limit, and the start of another child
    assert why in rejected(result)[name] and list(rejected(result)) == [name]
    assert set(result.rows[0]["times_us"]) == {"reference", "right"}
    assert [row["backend"] for row in tuned.load(CPU)["rejected"]] == [name]


@pytest.mark.slow
def test_a_kernel_that_hangs_while_it_is_timed_is_found_among_those_that_take_turns(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    result = tune(monkeypatch, cache, ["right", "slow_to_hang"], budget=6.0, limit=4.0)
    assert list(rejected(result)) == ["slow_to_hang"]
    assert set(result.rows[0]["times_us"]) == {"reference", "right"}


@pytest.mark.slow
def test_the_budget_is_kept_by_work_that_is_longer_than_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    times: list[float] = []
    result = tune(monkeypatch, cache, ["hanging"], 2.0, limit=300.0, progress=lambda at: times.append(time.monotonic()))
    assert time.monotonic() - times[1] < 2.2 + tuning.GRACE + 2  # from the child's first message on
    assert [row["why"] for row in result.unmeasured] == ["the budget was spent in it"] and not result.rejected


@pytest.mark.slow
def test_an_interruption_keeps_what_is_done(cache: Path) -> None:
    """The first class is done, the second hangs, and then comes Ctrl-C."""
    script = f"""
    import dataclasses, sys
    sys.path[:0] = [{str(Path(__file__).parent)!r}]
    import fakes, test_run
    from pathlib import Path
    from fastvid.tuning import run as tuning
    from fastvid.tuning.work import Subject
    folder, names = Path({str(cache)!r}), ["right", "hanging"]
    fakes.install(names)
    other = dataclasses.replace(test_run.NORM, shape_class="d64 more", count=1)
    tuning.record = lambda subject, options: [dataclasses.replace(test_run.NORM, count=100), other]
    def progress(event):
        print(event.get("shape_class"), event.get("backend"), flush=True)
    plan = tuning.Plan(test_run.CPU, test_run.LoadOptions(device="cpu"), 60.0, ("norms",), 4.0, progress,
                       fakes.plugin(folder, names))
    tuning.run(plan, [Subject("embedded")], folder / "export.json")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for line in child.stdout:
        if line.split() == ["d64", "more", "hanging"]:
            break
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode != 0 and "KeyboardInterrupt" in errors, errors
    assert [row["shape_class"] for row in tuned.load(CPU)["rows"]] == ["d64"]
    assert [row["shape_class"] for row in json.loads((cache / "export.json").read_text())["rows"]] == ["d64"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread of the child has to see it")
def test_no_child_outlives_its_parent(cache: Path) -> None:
    """The kernel hangs and holds Python's lock when the parent is killed."""
    script = f"""
    import sys
    sys.path[:0] = [{str(Path(__file__).parent)!r}]
    import fakes, pytest, test_run
    from pathlib import Path
    with pytest.MonkeyPatch.context() as patch:
        test_run.tune(patch, Path({str(cache)!r}), ["clinging"], 60.0)
    """
    told = cache / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "FAKES_PID": str(told)}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    end, place = time.monotonic() + 5, Path(f"/proc/{told.read_text()}/stat")
    while place.exists() and place.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may be here to bury it
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_child_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "raise SystemExit('torch is broken')"))
    with pytest.raises(Error, match="does not start: it crashed .exit status 1.: torch is broken"):
        tune(monkeypatch, cache, ["right"])


def test_operations_with_one_back_end_start_no_child(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(process, "COMMAND", ("/nonexistent",))
    assert tune(monkeypatch, cache, []).rows == []


def test_nothing_is_measured_where_the_table_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    path = tuned.write(CPU, [])
    path.write_text("{")
    monkeypatch.setattr(process, "COMMAND", ("/nonexistent",))
    with pytest.raises(tuned.TableRefused, match="damaged"):
        tune(monkeypatch, cache, ["right"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"only": "attenion"}, "the nearest is attention"),
        ({"only": ["rgb", "vae"]}, "only='vae'"),
        ({"only": []}, "names no family"),
        ({"only": 5}, "only=5"),
        ({"budget": 0}, "budget=0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"num_frames": 17}, "give model too"),
        ({"size": "64x64"}, "give model too"),
        ({"model": "embedded", "size": "64"}, "widthxheight"),
        ({"model": "embedded", "num_frames": 0}, "num_frames=0"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"export": "/nonexistent/tune.json"}, "cannot be written"),
        ({"model": 7}, "model=7"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_done(given: dict[str, Any], message: str, cache: Path) -> None:
    with pytest.raises(InvalidRequest, match=message.replace("(", r"\(")):
        tuning.tune(**{"device": "cpu"} | given)
    assert not tuned.folder().exists()


def test_an_export_does_not_go_over_a_table() -> None:
    with pytest.raises(InvalidRequest, match="where the tables are"):
        tuning.tune(export=tuned.write(CPU, []))


def test_a_cpu_is_tuned_for_the_embedded_model_and_a_gpu_for_the_published_ones() -> None:
    assert {one.model for one in tuning.subjects(None, None, None, CPU)} == {"embedded"}
    models = [one.model for one in tuning.subjects(None, None, None, torch.device("cuda"))]
    assert models == ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "embedded", "embedded"]
    assert tuning.subjects("embedded", (96, 64), 9, CPU) == [Subject("embedded", (96, 64), 9)]
