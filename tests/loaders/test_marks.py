"""Quantized safetensors files as ComfyUI and LightX2V write them: told by their marks, kept as they are, and meaning
what the packages that wrote them say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_files as forms
import tiny
import torch
from quantized_files import quantized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastvid
from fastvid.layers.quantized import Quantized
from fastvid.loaders import weight_files
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL, origins

# Files without a config.json are taken to have heads of 128, as all published ones.
SIZES = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1, "ffn_dim": 96}
ASKED: dict[str, Any] = {
    **{"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "seed": 1, "flow_shift": 5.0},
    **{"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "blue", "solver": "euler"},
}
PARTS = {"transformer": ORIGINAL, "text_encoder": DIFFUSERS}
E5M2 = torch.float8_e5m2
FORMS = {
    "fp8_scaled": (forms.fp8_scaled, "fp8_e4m3"),
    "fp8_scaled_e5m2": (partial(forms.fp8_scaled, dtype=E5M2, inputs=False), "fp8_e5m2"),
    "plain_fp8": (forms.plain_fp8, "fp8_e4m3"),
    "comfy_fp8": (forms.comfy_fp8, "fp8_e4m3"),
    "comfy_fp8_e5m2": (forms.comfy_fp8_e5m2, "fp8_e5m2"),
    "comfy_int8": (forms.comfy_int8, "int8"),
    "comfy_int8_rows": (forms.comfy_int8_rows, "int8"),
    "comfy_convrot": (forms.comfy_convrot, "int8"),
    "comfy_mxfp8": (forms.comfy_mxfp8, "mxfp8"),
    "comfy_nvfp4": (forms.comfy_nvfp4, "nvfp4"),
    "lightx2v_int8": (forms.lightx2v, "int8"),
    "lightx2v_fp8": (partial(forms.lightx2v, dtype=torch.float8_e4m3fn), "fp8_e4m3"),
    "lightx2v_mxfp8": (forms.lightx2v_mxfp8, "mxfp8"),
    "lightx2v_nvfp4": (forms.lightx2v_nvfp4, "nvfp4_low"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marks") / "published"
    tiny.write_checkpoint(folder, **SIZES)
    return folder


def tensors(folder: Path, to: str, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a part of a diffusers folder under the names of a layout."""
    state = {name: tensor for file in weight_files.find_files(folder) for name, tensor in load_file(file).items()}
    made = origins(state, to)
    return {prefix + name: origin.make(state.__getitem__).contiguous() for name, origin in made.items()}


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata)
    return path


def comfy(model: Path, root: Path, transformer: Any = None, text: Any = None) -> Path:
    """models/ of ComfyUI; transformer, text: files of these parts. Returns the transformer's."""
    encoder = text or forms.File(tensors(model / "text_encoder", DIFFUSERS), {})
    write(root / "text_encoders" / "umt5.safetensors", encoder.tensors, encoder.metadata)
    write(root / "vae" / "wan_2.1_vae.safetensors", tensors(model / "vae", ORIGINAL))
    shutil.copytree(model / "tokenizer", root / "tokenizer", dirs_exist_ok=True)
    made = transformer or forms.File(tensors(model / "transformer", ORIGINAL), {})
    return write(root / "diffusion_models" / "wan2.1_t2v_tiny.safetensors", made.tensors, made.metadata)


def load(file: Path, **options: Any) -> fastvid.Pipeline:
    return fastvid.load(str(file), device="cpu", **{"dtype": "float32", **options})


def held(module: nn.Module) -> Iterator[tuple[str, Quantized]]:
    yield from ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Quantized))


def same_weights(module: nn.Module, means: dict[str, Tensor], formats: set[str]) -> int:
    """Whether the layers of a module hold a file's weights as they are; returns how many are quantized."""
    wanted = {name: origin.make(means.__getitem__) for name, origin in origins(means, DIFFUSERS).items()}
    count = 0
    for name, layer in held(module):
        assert layer.weight.format in formats
        assert torch.equal(layer.weight.dequantize(torch.float32), wanted[f"{name}.weight"]), name
        count += 1
    return count


def close(made: np.ndarray, truth: np.ndarray) -> None:
    assert truth.std() > 1
    assert (np.abs(made.astype(int) - truth.astype(int)) <= 1).mean() >= 0.999


# ---------------------------------------------------------------- each form


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, published: Path, tmp_path: Path) -> None:
    make, format = FORMS[form]
    file = quantized(tensors(published / "transformer", ORIGINAL), make)
    pipe = load(comfy(published, tmp_path, file))
    transformer = pipe._model.experts.modules[0]
    assert same_weights(transformer, file.means, {format}) == len(forms.linear_layers(file.means))


@pytest.mark.parametrize(
    "form", ["comfy_fp8", *(pytest.param(one, marks=pytest.mark.slow) for one in FORMS if one != "comfy_fp8")]
)
def test_frames(form: str, published: Path, tmp_path: Path) -> None:
    """Both a transformer and a text encoder in a form make the frames of the weights that they mean."""
    made = [quantized(tensors(published / part, to), FORMS[form][0]) for part, to in PARTS.items()]
    file = comfy(published, tmp_path / "quantized", *made)
    plain = comfy(published, tmp_path / "plain", *(forms.File(one.means, {}) for one in made))
    close(load(file).generate(**ASKED).frames, load(plain).generate(**ASKED).frames)
