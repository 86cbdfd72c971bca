"""`convert --dtype` and `--quantize`: loading what is written gives the bits that quantizing on load gives, in both
layouts; ComfyUI's own reader gives the same weights; quantized files become 16-bit ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvid
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.quantized import Quantized
from fastvid.loaders import quantize
from fastvid.loaders.checkpoint import load_part, open_checkpoint
from fastvid.loaders.convert import convert
from fastvid.models.registry import build_empty
from fastvid.ops.formats_rows import E4M3, INT8, quantize_weight
from fastvid.ops.quantized import QuantizedTensor

EMBEDDED = Path(fastvid.__file__).parent / "embedded"
STEM = "diffusion_pytorch_model.safetensors"


def quantized_in(module: torch.nn.Module) -> dict[str, QuantizedTensor]:
    return {name: layer.weight for name, layer in module.named_modules() if isinstance(layer, Quantized)}


def assert_equal(module: torch.nn.Module, wanted: torch.nn.Module) -> None:
    made, held = quantized_in(module), quantized_in(wanted)
    assert made.keys() == held.keys() and len(held) > 10
    for name, weight in held.items():
        mine = made[name]
        assert (mine.format, mine.rotation, mine.eight_bit) == (weight.format, weight.rotation, weight.eight_bit)
        assert all(torch.equal(mine.data[role], tensor) for role, tensor in weight.data.items())
    state, other = module.state_dict(), wanted.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


@pytest.mark.parametrize(("choice", "to"), [("fp8", "diffusers"), ("int8", "original")])
def test_a_converted_model_is_the_model_quantized_on_load(choice: str, to: str, tmp_path: Path) -> None:
    convert(EMBEDDED, tmp_path / "made", to, quantize=choice)
    checkpoint = open_checkpoint(tmp_path / "made").check()
    plain = quantize.apply(open_checkpoint(EMBEDDED).check(), choice)
    for part in ("transformer", "text_encoder"):
        assert not any(spec.eight_bit for spec in checkpoint.part(part).quantized.values()), "as files are: exact"
        assert_equal(load_part(quantize.apply(checkpoint, choice), part), load_part(plain, part))
    sizes = [one.part("transformer").bytes for one in (checkpoint, plain)]
    held = {part: {spec.exact for spec in checkpoint.part(part).quantized.values()} for part in checkpoint.quantized}
    assert held == {"transformer": {False}, "text_encoder": {True}}, "exact for other programs too"
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(("choice", "format", "kind"), [("fp8", E4M3, "F8_E4M3"), ("int8", INT8, "I8")])
def test_comfy_reads_it(choice: str, format: str, kind: str, tmp_path: Path) -> None:
    ck = pytest.importorskip("comfy_kitchen")
    source = load_file(EMBEDDED / "transformer" / STEM)
    made = tmp_path / "made.safetensors"
    convert(EMBEDDED / "transformer", made, "original", quantize=choice)
    state = load_file(made)
    marks = {
        name.removesuffix(".comfy_quant"): tensor for name, tensor in state.items() if name.endswith("comfy_quant")
    }
    assert len(marks) == 60 and "blocks.5.cross_attn.v" in marks and "head.head" not in marks
    weight, scale = state["blocks.2.ffn.0.weight"], state["blocks.2.ffn.0.weight_scale"]
    assert weight.dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[choice] and scale.shape == (len(weight), 1)
    mark = json.loads(bytes(marks["blocks.2.ffn.0"].tolist()))
    assert mark == {"format": {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}[choice]}
    read = ck.dequantize_per_tensor_fp8(weight, scale, torch.float32) if choice == "fp8" else weight.float() * scale
    plain = source["blocks.2.ffn.net.0.proj.weight"]
    data = quantize_weight(plain, format)
    assert torch.equal(read, QuantizedTensor(format, tuple(plain.shape), data, torch.float32).dequantize())  # type: ignore[arg-type]
    assert torch.equal(state["head.head.weight"], source["proj_out.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_file_becomes_16_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """It loads as the quantized one does with its weights dequantized; what is computed in fp32 stays fp32."""
    convert(EMBEDDED / "transformer", tmp_path / "fp8.safetensors", "original", quantize="fp8")
    with pytest.raises(InvalidRequest, match=r"fp8.safetensors is quantized \(fp8_e4m3\); give dtype='bfloat16'"):
        convert(tmp_path / "fp8.safetensors", tmp_path / "no")
    convert(tmp_path / "fp8.safetensors", tmp_path / "made", dtype=dtype)
    made, source = load_file(tmp_path / "made" / STEM), load_file(EMBEDDED / "transformer" / STEM)
    rule = rule_of("transformer")
    assert made.keys() == source.keys()
    for name, tensor in source.items():
        fp32 = any(part in name for part in ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"))
        assert made[name].dtype == (tensor.dtype if fp32 else dtype)
        wanted = tensor
        if name in rule:
            data = quantize_weight(tensor, E4M3)
            wanted = QuantizedTensor(E4M3, tuple(tensor.shape), data, torch.float32).dequantize()  # type: ignore[arg-type]
        assert torch.equal(made[name], wanted.to(made[name].dtype)), name


def test_weights_of_the_format_are_kept(tmp_path: Path) -> None:
    """Scales for the whole matrix and rotations too; what is quantized otherwise is quantized anew."""
    source = load_file(EMBEDDED / "transformer" / STEM)
    name, plain = "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"
    codes = torch.randint(-127, 128, source[f"{name}.weight"].shape, dtype=torch.int8)
    mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    layer = {f"{name}.weight": codes, f"{name}.weight_scale": torch.full((len(codes), 1), 0.01)}
    layer[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    state: dict[str, Tensor] = {**source, **layer}
    (tmp_path / "given").mkdir()
    save_file(state, tmp_path / "given" / STEM)
    (tmp_path / "given/config.json").write_text((EMBEDDED / "transformer/config.json").read_text())
    convert(tmp_path / "given", tmp_path / "made", quantize="int8")
    made = load_file(tmp_path / "made" / STEM)
    assert torch.equal(made[f"{name}.weight"], codes) and torch.equal(
        made[f"{plain}.weight"], source[f"{plain}.weight"]
    )
    assert json.loads(bytes(made[f"{name}.comfy_quant"].tolist())) == mark
    convert(tmp_path / "given", tmp_path / "other", quantize="fp8")
    other = load_file(tmp_path / "other" / STEM)
    assert {other[f"{one}.weight"].dtype for one in (name, plain)} == {torch.float8_e4m3fn}


def test_shards_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    convert(EMBEDDED / "transformer", made, quantize="int8", shard_bytes=300_000)
    files = sorted(made.glob("*.safetensors"))
    assert len(files) > 10
    state: dict[str, Any] = {name: tensor for file in files for name, tensor in load_file(file).items()}
    words = [
        "convert",
        str(EMBEDDED / "transformer"),
        str(tmp_path / "one.safetensors"),
        "--quantize",
        "int8",
        "--quiet",
    ]
    assert main(words) == 0
    whole = load_file(tmp_path / "one.safetensors")
    assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    assert main([*words[:2], str(tmp_path / "two.safetensors"), "--quantize", "fp7"]) == 2
    assert "quantize='fp7'" in capsys.readouterr().err


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="of transformer, transformer_2, text_encoder none is here"):
        convert(EMBEDDED / "vae", tmp_path / "made", quantize="fp8")
    lora = {f"transformer.blocks.0.attn1.to_q.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(InvalidRequest, match="is a LoRA"):
        convert(tmp_path / "lora.safetensors", tmp_path / "made.safetensors", dtype="bf16")
    state = load_file(EMBEDDED / "transformer" / STEM)
    state["blocks.0.ffn.net.2.weight"][3, 5] = torch.inf
    (tmp_path / "given").mkdir()
    save_file(state, tmp_path / "given" / STEM)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        convert(tmp_path / "given", tmp_path / "made", quantize="int8")
    assert not (tmp_path / "made").exists()


def test_quantized_weights_that_a_dtype_does_not_hold(tmp_path: Path) -> None:
    convert(EMBEDDED / "transformer", tmp_path / "given.safetensors", quantize="fp8")
    state = load_file(tmp_path / "given.safetensors")
    state["blocks.2.ffn.net.2.weight_scale"] *= 1e9
    save_file(state, tmp_path / "given.safetensors")
    with pytest.raises(CheckpointError, match="blocks.2.ffn.net.2.weight holds .*, which overflows in float16"):
        convert(tmp_path / "given.safetensors", tmp_path / "made.safetensors", dtype="float16")
    assert not (tmp_path / "made.safetensors").exists()


def test_gguf_files(tmp_path: Path) -> None:
    """To 16 bits: what the file is worth, rounded once. To 8 bits: what that quantizes to."""
    pytest.importorskip("gguf")
    import gguf_files

    source = load_file(EMBEDDED / "transformer" / STEM)
    rule = rule_of("transformer")
    kinds = {name: "q4_k" if ".ffn." in name else "q8_0" for name in rule} | {"proj_out.weight": "bf16"}
    worth = gguf_files.write(tmp_path / "given.gguf", source, kinds)
    convert(tmp_path / "given.gguf", tmp_path / "made.safetensors", dtype="bf16")
    made = load_file(tmp_path / "made.safetensors")
    assert made.keys() == worth.keys()
    assert all(torch.equal(made[name], worth[name].to(made[name].dtype)) for name in worth)
    assert {made[name].dtype for name in rule} == {torch.bfloat16} and made["proj_out.weight"].dtype == torch.bfloat16
    assert made["scale_shift_table"].dtype == torch.float32, "is computed in fp32, and stored so"
    convert(tmp_path / "given.gguf", tmp_path / "int8.safetensors", quantize="int8")
    eight = load_file(tmp_path / "int8.safetensors")
    assert all(torch.equal(eight[name], quantize_weight(worth[name], INT8)["codes"]) for name in rule)
    assert eight["condition_embedder.time_proj.weight"].dtype == torch.float32, "as the file has it"


def rule_of(part: str) -> list[str]:
    config = open_checkpoint(EMBEDDED).part(part).config
    assert config is not None
    return quantize.weights_of(build_empty(part, config))
