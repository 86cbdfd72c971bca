"""diffusers folders with transformers that bitsandbytes or torchao quantized, written by those packages themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quantized_files import bitsandbytes, plain_bitsandbytes
from safetensors.torch import load_file, save_file
from test_marks import ASKED, SIZES, close, held, load
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.safetensors import read_headers

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCALE = 7.874015718698502e-3  # what bitsandbytes takes for 1 / 127


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "published"
    tiny.write_checkpoint(folder, **SIZES)
    return folder


def by_bitsandbytes(published: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> dict[str, Tensor]:
    """The folder with its transformer saved by diffusers with bitsandbytes; returns what its weights mean."""
    bitsandbytes()
    from diffusers import BitsAndBytesConfig, WanTransformer3DModel
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda *_, **__: None)  # which asks for a GPU
        monkeypatch.setattr(kind, "update_device_map", lambda *_: {"": "cpu"})
    settings = BitsAndBytesConfig(**config)
    source = published / "transformer"
    model = WanTransformer3DModel.from_pretrained(source, quantization_config=settings, torch_dtype=torch.float32)
    shutil.copytree(published, folder)
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer")
    return {name: dequantized(layer) for name, layer in model.named_modules() if type(layer).__name__[:6] == "Linear"}


def dequantized(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return plain_bitsandbytes(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        return weight.CB.float() * (weight.SCB * SCALE)[:, None]
    return weight.data


def by_torchao(published: Path, folder: Path, config: Any) -> dict[str, Tensor]:
    """The same by torchao, with all linear layers but the time embedder's. config: None for a scale for the matrix."""
    from diffusers import WanTransformer3DModel
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8Tensor, PerTensor, quantize_

    model = WanTransformer3DModel.from_pretrained(published / "transformer", torch_dtype=torch.float32)
    chosen = {name for name, one in model.named_modules() if isinstance(one, nn.Linear) and "time_embedder" not in name}
    if config is not None:
        quantize_(model, config, lambda layer, name: name in chosen)
    for name in chosen if config is None else ():
        made = Float8Tensor.from_hp(model.get_submodule(name).weight.data, granularity=PerTensor())
        model.get_submodule(name).weight = nn.Parameter(made, requires_grad=False)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    shutil.copytree(published, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata)
    linear = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: one.dequantize() if hasattr(one, "qdata") else one.data for name, one in linear.items()}


def check(folder: Path, published: Path, means: dict[str, Tensor], format: str, frames: bool = False) -> None:
    """Whether a folder's transformer holds its weights as the file does, and they mean the same."""
    pipe = load(folder)
    layers = dict(held(pipe._model.experts.modules[0]))
    assert len(layers) > 10 and not any("time_embedder" in name for name in layers)
    for name, layer in layers.items():
        assert layer.weight.format == format
        assert torch.equal(layer.weight.dequantize(torch.float32), means[name]), name
    if frames:
        plain = folder.with_name("means")
        shutil.copytree(published, plain)
        state = load_file(published / WEIGHTS)
        save_file(state | {f"{name}.weight": weight.contiguous() for name, weight in means.items()}, plain / WEIGHTS)
        close(pipe.generate(**ASKED).frames, load(plain).generate(**ASKED).frames)


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bitsandbytes_4_bits(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double: bool) -> None:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    means = by_bitsandbytes(published, tmp_path / "model", monkeypatch, **config)
    check(tmp_path / "model", published, means, "nf4_double" if double else "nf4", frames=double)


def test_bitsandbytes_8_bits(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means = by_bitsandbytes(published, tmp_path / "model", monkeypatch, load_in_8bit=True)
    check(tmp_path / "model", published, means, "int8")
    file = tmp_path / "model" / WEIGHTS
    state = load_file(file)
    save_file(state | {"proj_out.weight_format": torch.tensor(2, dtype=torch.uint8)}, file)
    refused(tmp_path / "model", "proj_out.weight_format is not 0: weights in the order of a GPU's tiles")
    save_file({name: tensor for name, tensor in state.items() if name != "proj_out.weight"}, file)
    refused(tmp_path / "model", "proj_out.weight is missing, without which")


@pytest.mark.parametrize("kind", ["int8", "float8", "float8_tensor"])
def test_torchao(published: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao", reason="torchao is needed")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = {"int8": Int8WeightOnlyConfig(version=2), "float8": Float8WeightOnlyConfig()}.get(kind)
    means = by_torchao(published, tmp_path / "model", config)
    check(tmp_path / "model", published, means, "int8" if kind == "int8" else "fp8_e4m3", frames=kind == "int8")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder).check()


def header(type: str, block: list[int]) -> dict[str, str]:
    return {"proj_out.weight": json.dumps({"_type": type, "_data": {"block_size": block}})}


def test_torchao_of_other_kinds(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "model"))
    state = load_file(published / WEIGHTS)
    N, K = state.pop("proj_out.weight").shape
    codes = {"proj_out._weight_qdata": torch.ones(N, K, dtype=torch.int8), "proj_out._weight_scale": torch.ones(N, 1)}

    def save(metadata: dict[str, str], **more: Tensor) -> None:
        added = {f"proj_out._weight_{name}": tensor for name, tensor in more.items()}
        save_file(state | codes | added, folder / WEIGHTS, metadata)

    save(header("Int8Tensor", [1, K]))
    open_checkpoint(folder).check()
    save(header("IntxUnpackedToInt8Tensor", [1, K]))
    refused(folder, "proj_out.weight is quantized by torchao as IntxUnpackedToInt8Tensor of I8")
    save({})
    refused(folder, "by torchao as no type of I8 .* Int8Tensor and Float8Tensor matrices")
    save(header("Int8Tensor", [1, 32]))
    refused(folder, r"by torchao in blocks of \[1, 32\]")
    save(header("Int8Tensor", [1, K]), act_pre_scale=torch.ones(K))
    refused(folder, "with proj_out._weight_act_pre_scale")
    save(header("Int8Tensor", [1, K]), zero_point=torch.zeros(N, 1, dtype=torch.int8))
    load(folder)
    save(header("Int8Tensor", [1, K]), zero_point=torch.ones(N, 1, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="proj_out.weight is quantized by torchao with zero points"):
        load(folder)


@pytest.mark.parametrize("method", ["quanto", "sdnq", "modelopt", "auto-round"])
def test_other_methods_are_named(published: Path, tmp_path: Path, method: str) -> None:
    """By config.json, where tensors do not tell."""
    folder = Path(shutil.copytree(published, tmp_path / "model"))
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    state = load_file(published / WEIGHTS)
    save_file(state | {"proj_out.weight": state["proj_out.weight"].to(torch.int8)}, folder / WEIGHTS)
    match = f"(?i)is quantized by .*{method.replace('-', '')}.*bitsandbytes or torchao's"
    refused(folder, match)
    N = len(state["proj_out.weight"])
    codes = {"proj_out.weight": torch.ones_like(state["proj_out.weight"], dtype=torch.int8)}
    save_file(state | codes | {"proj_out.weight_scale": torch.ones(N, 1)}, folder / WEIGHTS)
    refused(folder, match)  # tensors that look like a form that is read


def test_pickled_torchao(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "model"))
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))
    refused(folder, "is quantized by torchao; save it again with torchao 0.16 or later")


@pytest.mark.parametrize("offset", ["9" * 400, "-" + "9" * 400, "NaN", "true", '"1"'])
def test_an_offset_that_is_no_number(offset: str, tmp_path: Path) -> None:
    """Of scales that are quantized themselves. Whole numbers in JSON may have any number of digits."""
    text = f'{{"shape": [64, 64], "blocksize": 64, "nested_blocksize": 256, "nested_offset": {offset}}}'
    state = {
        "a.weight": torch.zeros(2048, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.zeros(64, dtype=torch.uint8),
        "a.weight.quant_map": torch.zeros(16),
        "a.weight.nested_absmax": torch.zeros(1),
        "a.weight.nested_quant_map": torch.zeros(256),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="an offset are expected|JSON"):
        read_headers([tmp_path / "a.safetensors"])
