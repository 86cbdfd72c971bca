"""Quantized safetensors files as ComfyUI and LightX2V write them: told by their marks, kept as they are, and meaning
what the packages that wrote them say."""

from __future__ import annotations

import json
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
from fastvid.errors import CheckpointError
from fastvid.layers.quantized import Quantized
from fastvid.loaders import safetensors, weight_files
from fastvid.loaders.checkpoint import _open_part, fill
from fastvid.loaders.find import find_part
from fastvid.models.registry import build_empty, hold_quantized, kind_of
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
    "lightx2v_comfyui": (forms.lightx2v_comfyui, "int8"),
    "torchao_nvfp4": (forms.torchao_nvfp4, "nvfp4_low"),
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


@pytest.mark.parametrize("form", [forms.comfy_int8_rows, partial(forms.comfy_convrot, group=16)])
def test_tables(form: Any, published: Path, tmp_path: Path) -> None:
    """The text encoder's table of words: rows are looked up, then dequantized."""
    made = quantized(tensors(published / "text_encoder", DIFFUSERS), form, ["shared"])
    encoder = load(comfy(published, tmp_path, text=made))._model.text_encoder
    ids = torch.tensor([[3, 0, 7], [1, 1, 2]])
    assert "shared" in dict(held(encoder))
    torch.testing.assert_close(encoder.shared(ids), made.means["shared.weight"][ids], atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- forms of files


def opened(file: Path, **options: Any) -> nn.Module:
    return load(file, **options)._model.experts.modules[0]


def test_old_fp8_behind_a_prefix(published: Path, tmp_path: Path) -> None:
    """As in all-in-one files, with the mark; some layers in 16 bits, all else in F16."""
    prefix = "model.diffusion_model."
    state = {name: tensor.half() for name, tensor in tensors(published / "transformer", ORIGINAL, prefix).items()}
    layers = [layer for layer in forms.linear_layers(state) if "head" not in layer and "time_" not in layer]
    made = quantized(state, forms.fp8_scaled, layers)
    made.tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    text = tensors(published / "text_encoder", DIFFUSERS, "text_encoders.umt5xxl.transformer.")
    encoder = quantized(text, forms.fp8_scaled)
    encoder.tensors["text_encoders.umt5xxl.transformer.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    whole = made.tensors | encoder.tensors | tensors(published / "vae", ORIGINAL, "vae.")
    file = write(tmp_path / "checkpoints" / "wan.safetensors", whole)
    pipe = load(file, parts={"tokenizer": published / "tokenizer"})
    assert same_weights(pipe._model.experts.modules[0], made.means, {"fp8_e4m3"}) == len(layers)
    assert same_weights(pipe._model.text_encoder, encoder.means, {"fp8_e4m3"}) == 14
    for _, layer in held(pipe._model.text_encoder):
        assert layer.weight.data["input_scale"] == 0.5
    assert pipe._model.experts.modules[0].condition_embedder.time_proj.weight.dtype == torch.float32


def test_shards(published: Path, tmp_path: Path) -> None:
    """A layer's tensors stand in two shards, and each shard's header has marks of its own layers."""
    state = tensors(published / "transformer", DIFFUSERS)
    made = quantized(state, forms.comfy_int8_rows, marks="header")
    layers = json.loads(made.metadata["_quantization_metadata"])["layers"]
    folder = Path(shutil.copytree(published, tmp_path / "model")) / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in range(2):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        part = {key: one for i, (key, one) in enumerate(sorted(made.tensors.items())) if i % 2 == number}
        mine = {layer: mark for i, (layer, mark) in enumerate(sorted(layers.items())) if i % 2 == number}
        write(folder / name, part, {"_quantization_metadata": json.dumps({"layers": mine})})
        index |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same_weights(opened(folder.parent), made.means, {"int8"}) == len(layers)


def test_blocks_of_lightx2v(published: Path, tmp_path: Path) -> None:
    """A file for each block and one for the rest, with an index, in a folder of its own."""
    state = tensors(published / "transformer", ORIGINAL)
    chosen = [layer for layer in forms.linear_layers(state) if "attn" in layer or "ffn" in layer]
    made = quantized(state, forms.lightx2v, chosen)
    comfy(published, tmp_path)
    folder, index = tmp_path / "diffusion_models" / "int8", {}
    for name in ("block_0.safetensors", "non_block.safetensors"):
        part = {key: one for key, one in made.tensors.items() if key.startswith("blocks.") == (name[:3] == "blo")}
        write(folder / name, part)
        index |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same_weights(opened(folder / "block_0.safetensors"), made.means, {"int8"}) == len(chosen)


@pytest.mark.parametrize("in_file", ["", "model.diffusion_model."])
@pytest.mark.parametrize("in_header", ["", "net.", "model.diffusion_model."])
def test_marks_in_the_header(published: Path, tmp_path: Path, in_file: str, in_header: str) -> None:
    """Whose names may have another prefix, or none. ConvRot: without its mark the layer would mean other weights."""
    state = tensors(published / "transformer", ORIGINAL, in_file)
    made = quantized(state, forms.comfy_convrot, marks="header", bare=in_file)
    listed = json.loads(made.metadata["_quantization_metadata"])
    listed["layers"] = {in_header + layer: mark for layer, mark in listed["layers"].items()}
    made.metadata["_quantization_metadata"] = json.dumps(listed)
    file = write(tmp_path / "x.safetensors", made.tensors, made.metadata)
    entries = safetensors.read_headers([file])
    turned = [layer for layer, mark in listed["layers"].items() if mark.get("convrot")]
    assert len(turned) > 8
    assert sum(one.source is not None and one.source.rotation == 64 for one in entries.values()) == len(turned)
    if in_file == in_header:
        several = {**listed["layers"], "vae.decoder.x": {"format": "int8_tensorwise"}}
        write(file, made.tensors, {"_quantization_metadata": json.dumps({"layers": several})})
        assert safetensors.read_headers([file]) == entries, "a mark of a layer that is not there means nothing"


def test_a_layer_among_plain_ones(published: Path, tmp_path: Path) -> None:
    """q alone is quantized, beside k and v, which a plain model computes in one product."""
    chosen = ["blocks.0.self_attn.q", "blocks.0.cross_attn.v", "text_embedding.2"]
    made = quantized(tensors(published / "transformer", ORIGINAL), forms.comfy_int8_rows, chosen)
    pipe = load(comfy(published, tmp_path / "mixed", made))
    assert same_weights(pipe._model.experts.modules[0], made.means, {"int8"}) == 3
    plain = comfy(published, tmp_path / "plain", forms.File(made.means, {}))
    close(pipe.generate(**ASKED).frames, load(plain).generate(**ASKED).frames)


@pytest.mark.slow
def test_two_experts(tmp_path: Path) -> None:
    """Each in a form of its own, and the frames are those of the weights that they mean."""
    two = tmp_path / "published"
    tiny.write_checkpoint(two, 1, boundary_ratio=0.875, **SIZES)
    names = {"transformer": "wan2.2_t2v_high_noise_14B", "transformer_2": "wan2.2_t2v_low_noise_14B"}
    shapes = {"transformer": forms.comfy_convrot, "transformer_2": forms.fp8_scaled}
    made = {name: quantized(tensors(two / name, ORIGINAL), form) for name, form in shapes.items()}
    for folder, field in (("quantized", "tensors"), ("plain", "means")):
        comfy(two, tmp_path / folder).unlink()
        for name, one in made.items():
            write(tmp_path / folder / "diffusion_models" / f"{names[name]}.safetensors", getattr(one, field))
    high = f"diffusion_models/{names['transformer']}.safetensors"
    pipe = load(tmp_path / "quantized" / high)
    for module, name in zip(pipe._model.experts.modules, made, strict=True):
        assert same_weights(module, made[name].means, {"int8", "fp8_e4m3"}) > 10
    close(pipe.generate(**ASKED).frames, load(tmp_path / "plain" / high).generate(**ASKED).frames)


def test_rows_that_fill_up_a_block(tmp_path: Path) -> None:
    """nvfp4 of 40 outputs is stored as 48, and only the bias tells."""
    made, means, mark = forms.comfy_nvfp4(torch.randn(40, 80))
    state = {f"a.{end}": tensor for end, tensor in made.items()} | {"a.comfy_quant": forms.mark_tensor(mark)}
    assert state["a.weight"].shape == (48, 40)
    file = write(tmp_path / "x.safetensors", state)
    assert safetensors.read_headers([file])["a.weight"].shape == (48, 80)
    file = write(file, state | {"a.bias": torch.zeros(40)})
    assert safetensors.read_headers([file])["a.weight"].shape == (40, 80)


def test_marks_that_find_no_layer(tmp_path: Path) -> None:
    weight = {"a.b.weight": torch.ones(64, 64, dtype=torch.int8), "a.b.weight_scale": torch.ones(64, 1)}
    mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    header = {"_quantization_metadata": json.dumps({"layers": {"c.d": mark}})}
    file = write(tmp_path / "x.safetensors", weight, header)
    with pytest.raises(CheckpointError, match="marks c.d, which are not there, and a.b have no mark"):
        safetensors.read_headers([file])


def test_all_in_fp8(published: Path, tmp_path: Path) -> None:
    """Plain fp8 throughout: what is no matrix of a layer is widened, embeddings stay."""
    state = tensors(published / "transformer", ORIGINAL)
    text = tensors(published / "text_encoder", DIFFUSERS)
    small = [{name: one.to(torch.float8_e4m3fn) for name, one in part.items()} for part in (state, text)]
    wide = [forms.File({name: one.float() for name, one in part.items()}, {}) for part in small]
    file = comfy(published, tmp_path / "fp8", *(forms.File(part, {}) for part in small))
    vae = tensors(published / "vae", ORIGINAL)
    write(tmp_path / "fp8" / "vae" / "wan_2.1_vae.safetensors", {k: v.to(E5M2) for k, v in vae.items()})
    plain = comfy(published, tmp_path / "plain", *wide)
    write(tmp_path / "plain" / "vae" / "wan_2.1_vae.safetensors", {k: v.to(E5M2).float() for k, v in vae.items()})
    pipe = load(file)
    assert "shared" in dict(held(pipe._model.text_encoder))
    assert not list(held(pipe._model.vae)) and pipe._model.vae.decoder.conv_in.weight.dtype == torch.float32
    close(pipe.generate(**ASKED).frames, load(plain).generate(**ASKED).frames)


def test_an_image_encoder_whose_fused_layers_are_split(tmp_path: Path) -> None:
    """CLIP's original q, k and v are one matrix; scales for the matrix and for its rows."""
    config = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 28, "patch_size": 14, "hidden_act": "gelu"}
    module = build_empty("image_encoder", kind_of("image_encoder").read_config(config))
    theirs = {name: torch.randn(one.shape) * 0.1 for name, one in module.state_dict().items()}
    state = {name: origin.make(theirs.__getitem__) for name, origin in origins(theirs, ORIGINAL).items()}
    for name, form in {"scalar": forms.fp8_scaled, "rows": forms.lightx2v}.items():
        made = quantized({key: one.contiguous() for key, one in state.items()}, form)
        file = write(tmp_path / name / "model.safetensors", made.tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
        found = find_part("image_encoder", file)
        part = _open_part(found, "CLIPVisionModel", tmp_path)
        assert part.problems == ()
        filled = build_empty("image_encoder", part.config)
        hold_quantized(filled, part.quantized, torch.float32)
        fill(filled, part, "cpu", torch.float32)
        means = {key: origin.make(made.means.__getitem__) for key, origin in origins(made.means, DIFFUSERS).items()}
        layers = dict(held(filled))
        assert sorted({name.rpartition(".")[2] for name in layers}) == ["fc1", "fc2", "out_proj"]
        for name, layer in layers.items():
            assert torch.equal(layer.weight.dequantize(torch.float32), means[f"vision_model.{name}.weight"])
        for leaf in ("q_proj", "k_proj", "v_proj"):
            name = f"encoder.layers.0.self_attn.{leaf}"
            assert torch.equal(filled.get_submodule(name).weight, means[f"vision_model.{name}.weight"])


@pytest.mark.parametrize("form", ["comfy_nvfp4", "fp8_scaled"])
def test_memory_is_the_files(form: str, tmp_path: Path) -> None:
    """The tensors held take at most 1.1 times what the file does."""
    folder = tmp_path / "wide"
    tiny.write_checkpoint(folder, **SIZES | {"num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 2})
    state = {name: one.bfloat16() for name, one in tensors(folder / "transformer", ORIGINAL).items()}
    file = comfy(folder, tmp_path, quantized(state, FORMS[form][0]))
    module = opened(file, dtype="bfloat16")
    kept = sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    assert kept <= 1.1 * file.stat().st_size


def test_layers_that_ask_for_exact_products(published: Path, tmp_path: Path) -> None:
    state = tensors(published / "transformer", ORIGINAL)
    made = quantized(state, forms.comfy_fp8)
    mark = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    made.tensors["blocks.0.ffn.0.comfy_quant"] = forms.mark_tensor(mark, padding=5)
    file = comfy(published, tmp_path, made)
    fast = {name: layer.weight.eight_bit for name, layer in held(opened(file, quantize="fp8"))}
    exact = [name for name, eight in fast.items() if not eight]
    assert [name for name in exact if name.startswith("blocks.")] == ["blocks.0.ffn.net.0.proj"]
    assert len(exact) > 1 and not any(eight for name, eight in fast.items() if not name.startswith("blocks."))
    assert not any(layer.weight.eight_bit for _, layer in held(opened(file)))


# ---------------------------------------------------------------- what is refused, by name

INT8 = {"a.weight": torch.ones(64, 64, dtype=torch.int8), "a.weight_scale": torch.ones(64, 1)}
FP8 = {"a.weight": torch.ones(64, 64).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}
UNREAD = {
    **{
        name: (INT8 | {"a.comfy_quant": forms.mark_tensor({"format": name})}, f"a is quantized as {name}, which is not")
        for name in ("convrot_w4a4", "asym_w4a8_int8", "svdquant_w4a4", "awq_w4a16", "int8_blockwise")
    },
    "fp8_blockwise": (
        FP8 | {"a.comfy_quant": forms.mark_tensor({"format": "float8_e4m3fn_blockwise"})},
        "a is quantized as float8_e4m3fn_blockwise.*read are float8_e4m3fn, .*nvfp4; take the fp8, int8",
    ),
    "no format": (INT8 | {"a.comfy_quant": forms.mark_tensor({"x": 1})}, r"a.comfy_quant names no format \(as INT8-F"),
    "no JSON": (INT8 | {"a.comfy_quant": torch.ones(9, dtype=torch.uint8)}, "a.comfy_quant is no JSON"),
    "no weight": ({"b.comfy_quant": forms.mark_tensor({"format": "nvfp4"})}, "b is marked as quantized, but has no"),
    "two marks": (INT8 | {"a.scale_weight": torch.ones(())}, "a has weight_scale and scale_weight; one of them"),
    "AWQ scales": (FP8 | {"a.pre_quant_scale": torch.ones(64)}, r"a.pre_quant_scale: quantized as nvfp4 with a scale"),
    "blocks": (INT8 | {"a.weight_scale": torch.ones(64, 2)}, r"a has a scale F32 \[64, 2\] for weights \[64, 64\]"),
    "DeepSeek": (FP8 | {"a.weight_scale_inv": torch.ones(1, 1)}, "quantized as fp8 in blocks of 128 x 128"),
    "a 16-bit layer": (
        {"a.weight": torch.ones(4, 4), "a.scale_weight": torch.ones(())},
        "a has a scale beside weights",
    ),
    "another type": (
        INT8 | {"a.comfy_quant": forms.mark_tensor({"format": "nvfp4"})},
        "as nvfp4, but its weights are I8",
    ),
    "no scale": (
        {"a.weight": INT8["a.weight"], "a.comfy_quant": forms.mark_tensor({"format": "int8_tensorwise"})},
        "a is marked as int8_tensorwise, but has no weight_scale",
    ),
    "ConvRot": (
        INT8 | {"a.comfy_quant": forms.mark_tensor({"format": "int8_tensorwise", "convrot": True})},
        "a is marked as int8_tensorwise with ConvRot in groups of 256 for 64 inputs",
    ),
    "mxfp4": (
        {"a.weight": torch.ones(64, 128, dtype=torch.uint8), "a.weight_scale": torch.ones(128, 8, dtype=torch.uint8)},
        "a is quantized as mxfp4, which is not read",
    ),
    "mxfp6": (
        {"a.weight": torch.ones(64, 1152, dtype=torch.uint8), "a.weight_scale": torch.ones(128, 48, dtype=torch.uint8)},
        "a is quantized as mxfp6, which is not read",
    ),
    "nvfp4 of ModelOpt": (
        {
            "a.weight": torch.ones(128, 64, dtype=torch.uint8),
            "a.weight_scale": torch.ones(128, 8).to(torch.float8_e4m3fn),
            "a.weight_scale_2": torch.ones(()),
        },
        "a has scales for blocks and no mark, so their order is not known",
    ),
    "mxfp8 of ModelOpt": (
        {
            "a.weight": torch.ones(128, 128).to(torch.float8_e4m3fn),
            "a.weight_scale": torch.ones(128, 4, dtype=torch.uint8),
        },
        "a has scales for blocks and no mark, so their order is not known",
    ),
    "scales of inputs": (INT8 | {"a.weight_scale": torch.ones(1, 64)}, r"a has a scale F32 \[1, 64\] for weights"),
    "quanto": ({"a.weight._data": torch.ones(4, dtype=torch.int8), "a.weight._scale": torch.ones(1)}, "as quanto"),
    "ModelOpt": ({"a.weight_quantizer._amax": torch.ones(1)}, "quantized as NVIDIA ModelOpt"),
    "Nunchaku": ({"a.qweight": torch.ones(4, dtype=torch.int8), "a.wscales": torch.ones(1)}, "Nunchaku"),
    "AutoRound": ({"a.qzeros": torch.ones(4, dtype=torch.int32)}, "quantized as GPTQ, AWQ or AutoRound"),
    "SDNQ": ({"a.weight": torch.ones(4, dtype=torch.int8), "a.svd_up": torch.ones(1)}, "quantized as SDNQ"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read(name: str, tmp_path: Path) -> None:
    state, match = UNREAD[name]
    file = write(tmp_path / "x.safetensors", {**state, "norm.weight": torch.ones(4)})
    with pytest.raises(CheckpointError, match=match):
        safetensors.read_headers([file])
