"""What `inspect` says of files that hold quantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from fake_pipe import run
from safetensors.torch import load_file, save_file

from fastvid import api
from fastvid.ops import formats_rows


def test_each_part_says_what_it_is_and_what_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    tiny.write_checkpoint(folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    state = load_file(file)
    names = [name for name in state if ".ffn." in name and name.endswith(".weight")]
    for name in names:
        data = formats_rows.quantize_weight(state[name], "fp8_e4m3")
        state[name] = data["codes"].view(torch.float8_e4m3fn)
        state[f"{name.removesuffix('.weight')}.weight_scale"] = data["scale"][:, None]
    save_file(state, file)
    found = api.inspect(str(folder))
    part = found["parts"]["transformer"]
    assert part["quantized"] == [{"format": "fp8_e4m3", "weights": len(names), "products": "exact"}]
    assert part["bits_per_weight"] == round(8 * part["bytes"] / part["parameters"], 2) < 32
    assert "quantized" not in found["parts"]["vae"] and found["runs"]["device"] == "cpu"
    assert set(found["runs"]) == {"linear", "linear_quantized", "device"}
    status, out, _ = run(capsys, "inspect", str(folder))
    assert status == 0 and f"format=fp8_e4m3 weights={len(names)} products=exact" in out
    assert "runs" not in json.loads(run(capsys, "inspect", "embedded", "--json")[1])
