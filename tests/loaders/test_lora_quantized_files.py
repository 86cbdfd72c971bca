"""LoRAs on quantized files as ComfyUI writes them, the head's product quantized as well: the frames are those of LoRAs
that are merged into the weights that the files mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_files as forms
import test_marks as marks
import tiny
import torch
from safetensors.torch import save_file

from fastvid.models.wan.weight_names import ORIGINAL


@pytest.mark.parametrize(
    "form", ["fp8_scaled", *(pytest.param(one, marks=pytest.mark.slow) for one in marks.FORMS if one != "fp8_scaled")]
)
def test_loras_on_a_quantized_file(form: str, tmp_path: Path) -> None:
    published = tmp_path / "published"
    tiny.write_checkpoint(published, **marks.SIZES)
    file = forms.quantized(marks.tensors(published / "transformer", ORIGINAL), marks.FORMS[form][0])
    quantized = marks.load(marks.comfy(published, tmp_path / "quantized", file))
    plain = marks.load(marks.comfy(published, tmp_path / "plain", forms.File(file.means, {})))
    loras: list[Any] = [(written(tmp_path / "style.safetensors", plain), 0.7)]
    base = quantized.generate(**marks.ASKED).latents
    asked = quantized.generate(**marks.ASKED, loras=loras).latents
    for pipe in (quantized, plain):
        pipe.set_loras(loras)
    beside, merged = (pipe.generate(**marks.ASKED).latents for pipe in (quantized, plain))
    assert (base - merged).norm() > 0.05 * merged.norm()
    assert all((made - merged).norm() < 1e-5 * merged.norm() for made in (asked, beside))
    quantized.set_loras()
    assert torch.equal(quantized.generate(**marks.ASKED).latents, base)


def written(path: Path, pipe: Any) -> Path:
    """A LoRA of every linear layer, of norms and of biases."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    for name, weight in pipe._model.transformer.state_dict().items():
        stem, _, kind = f"transformer.{name}".rpartition(".")
        if kind == "weight" and weight.ndim == 2:
            tensors[f"{stem}.lora_A.weight"] = torch.randn(3, weight.shape[1], generator=draw) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 3, generator=draw) * 0.2
        elif name.endswith(("norm2.weight", "to_q.bias")):
            role = "diff" if kind == "weight" else "diff_b"
            tensors[f"{stem}.{role}"] = torch.randn(weight.shape, generator=draw) * 0.3
    save_file(tensors, path)
    return path
