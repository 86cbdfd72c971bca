"""From `fastvid.tune` to frames: the table is made on this machine, and `auto`, `doctor` and `describe` follow it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvid
from fastvid.cli import doctor
from fastvid.models.loaded import LoadOptions
from fastvid.ops import shapes, tuned
from fastvid.ops.dispatch import Ops
from fastvid.pipeline import load
from fastvid.tuning.work import Subject, record

CPU = torch.device("cpu")
REQUEST: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "num_frames": 9}


@pytest.mark.slow
def test_auto_follows_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with fastvid.load("embedded", device="cpu") as pipe:
        before = pipe.generate("a red circle", **REQUEST)
    result = fastvid.tune("embedded", device="cpu", budget=60, only="linears", export=tmp_path / "tune.json")
    assert result.rows and {row["op"] for row in result.rows} <= {"linear", "linear_gelu_tanh"}
    winners = {row["shape_class"]: row["backend"] for row in result.rows if row["op"] == "linear"}
    export = json.loads((tmp_path / "tune.json").read_text())
    assert export["rows"] == [{k: v for k, v in row.items() if k != "result"} for row in tuned.load(CPU)["rows"]]

    report = doctor.doctor("cpu")["ops"]["linear"]
    assert {one["shape_class"]: one["backend"] for one in report["choices"]} == winners
    assert result.path in report["reason"]
    with fastvid.load("embedded", device="cpu") as pipe:
        described = pipe.describe()
        after = pipe.generate("a red circle", **REQUEST)
    assert result.path in described["reasons"]["linear"]
    difference = np.abs(np.asarray(after.frames, np.int16) - np.asarray(before.frames, np.int16))
    assert difference.max() <= 2  # rounded in another way, and nothing else

    tuned.clear()
    with fastvid.load("embedded", device="cpu") as pipe:
        again = pipe.generate("a red circle", **REQUEST)
    assert np.array_equal(again.frames, before.frames)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "frames"), [((64, 64), 17), ((160, 96), 33)])
def test_what_is_recorded_are_the_calls_of_a_request(
    size: tuple[int, int], frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every class that a real request calls is recorded, as often as it calls it."""
    counts: dict[tuple[str, str, str], int] = {}
    bind = load.bind

    def counting(*args: Any, **options: Any) -> Ops:
        ops = bind(*args, **options)

        def counted(op: str) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                name = (op, shapes.dtype_of(op, given), shapes.shape_class(op, given, named))
                counts[name] = counts.get(name, 0) + 1
                return ops.functions[op](*given, **named)

            return call

        bound = {**ops.bound, "solver_step": "counted"}  # so that the operation is called
        return Ops({op: counted(op) for op in ops.functions}, bound, ops.reasons)

    monkeypatch.setattr(load, "bind", counting)
    with fastvid.load("embedded", device="cpu") as pipe:
        pipe.generate("a red circle", width=size[0], height=size[1], num_frames=frames, seed=1)
    monkeypatch.setattr(load, "bind", bind)
    calls = {call.name: call.count for call in record(Subject("embedded", size, frames), LoadOptions(device="cpu"))}
    assert set(counts) <= set(calls)
    here = {name: count for name, count in counts.items() if not name[0].startswith("vae_") and name[0] != "to_rgb"}
    assert here == {name: calls[name] for name in here}  # of the VAE's classes some are called to encode as well
