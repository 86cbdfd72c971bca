"""8-bit copies of published models: `fastvid download NAME --quantize FORMAT`, then `load(NAME, quantize=FORMAT)`."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from fake_pipe import run

import fastvid
from fastvid.errors import CheckpointError
from fastvid.files import cache_folder
from fastvid.layers.quantized import Quantized
from fastvid.loaders import copies, hub

NAME = "wan2.1-t2v-1.3b"


def codes(pipe: fastvid.Pipeline) -> dict[str, torch.Tensor]:
    layers = {n: m for n, m in pipe._model.transformer.named_modules() if isinstance(m, Quantized)}
    return {name: layer.weight.dequantize(torch.float32) for name, layer in layers.items()}


def test_a_copy_is_made_once_and_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_checkpoint(tmp_path / "hub")
    monkeypatch.setattr(hub, "find", lambda model, repair=False: tmp_path / "hub")
    made = codes(fastvid.load(NAME, device="cpu", quantize="int8"))
    assert made and copies.find(NAME, "int8") is None
    status, out, _ = run(capsys, "download", NAME, "--quantize", "int8")
    folder = Path(out.strip())
    assert status == 0 and folder.parent == cache_folder() / "models" and copies.find(NAME, "int8") == folder
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    monkeypatch.setattr(hub, "find", lambda model, repair=False: pytest.fail("the hub is asked"))
    assert run(capsys, "download", NAME, "--quantize", "int8")[1].strip() == str(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    pipe = fastvid.load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", device="cpu", quantize="int8")
    taken = codes(pipe)
    assert taken.keys() == made.keys() and all(torch.equal(taken[name], made[name]) for name in made)
    assert pipe.inspect()["folder"] == str(folder)
    assert copies.find(NAME, "fp8") is None and copies.find(NAME, None) is None
    assert copies.find(str(tmp_path / "hub"), "int8") is None


def test_what_cannot_be_copied_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "find", lambda model, repair=False: tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError):
        copies.make(NAME, "fp8", print)
    assert copies.find(NAME, "fp8") is None and not list((cache_folder() / "models").glob("*fp8*"))
    status, _, said = run(capsys, "download", NAME, "--quantize", "int4")
    assert status == 2 and "nearest is int8" in said
