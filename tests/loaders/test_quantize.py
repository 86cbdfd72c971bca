"""`quantize=`: which weights are held in 8 bits, that they are what the file's weights quantize to, what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_memory import LiveMemory
from safetensors.torch import save_file

import fastvid
from fastvid import api
from fastvid.errors import InvalidRequest
from fastvid.layers.quantized import Quantized, QuantizedLinear
from fastvid.loaders import quantize
from fastvid.loaders.checkpoint import fill, load_part, open_checkpoint
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.registry import Config, build_empty, hold_quantized
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
from fastvid.ops.formats_rows import E4M3, E5M2, INT8, quantize_weight
from fastvid.ops.quantized import Spec

PROMPT = "a red circle moving right on a white background"
SMALL = WanTransformerConfig(2, 8, ffn_dim=32, num_layers=3, image_dim=16, added_kv_proj_dim=16)
ATTENTION = {f"attn{n}.{x}" for n in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")}
BLOCK = ATTENTION | {"attn2.add_k_proj", "attn2.add_v_proj", "ffn.net.0.proj", "ffn.net.2"}
UMT5_BLOCK = {f"layer.0.SelfAttention.{x}" for x in "qkvo"} | {
    f"layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")
}


def named(lists: dict[str, int], layers: set[str]) -> set[str]:
    return {f"{name}.{i}.{layer}.weight" for name, count in lists.items() for i in range(count) for layer in layers}


@pytest.mark.parametrize(
    ("part", "config", "expected"),
    [
        ("transformer", SMALL, named({"blocks": 3}, BLOCK)),
        ("transformer", WanVACEConfig(SMALL, (0, 2)), named({"blocks": 3, "vace_blocks": 2}, BLOCK)),
        ("text_encoder", UMT5Config(64, 16, 4, 32, 2, 4), named({"encoder.block": 2}, UMT5_BLOCK)),
    ],
)
def test_the_rule(part: str, config: Config, expected: set[str]) -> None:
    assert set(quantize.weights_of(build_empty(part, config))) == expected


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("fp8", "fp8"),
        ("none", None),
        ({"text_encoder": "int8", "transformer": "fp8"}, "transformer=fp8,text_encoder=int8"),
        ("text_encoder = int8, transformer=fp8", "transformer=fp8,text_encoder=int8"),
        ({"transformer": "fp8", "transformer_2": None}, "transformer=fp8,transformer_2=none"),
    ],
)
def test_the_argument(given: Any, made: str | None) -> None:
    assert quantize.check("quantize", given) == made
    assert made is None or quantize.check("quantize", made) == made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fp4", "quantize='fp4': .* the nearest is fp8"),
        ({"vae": "fp8"}, "quantize='vae': .* the nearest is transformer"),
        ({"transformer": 8}, "quantize transformer=8: allowed is fp8, int8"),
        ({}, "allowed is fp8"),
        ("transformer=fp8,transformer=int8", "allowed is each part once"),
        ({"transformer_2": "fp8"}, "this model has no transformer_2; the nearest is transformer"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        api.inspect("embedded", quantize=given)


def test_a_choice_for_the_transformer_is_for_both_experts() -> None:
    parts = ("transformer", "transformer_2", "text_encoder", "vae")
    assert [quantize.choice_of("int8", part) for part in parts] == ["int8", "int8", "int8", "none"]
    assert [quantize.choice_of("transformer=fp8", part) for part in parts] == ["fp8", "fp8", "none", "none"]
    assert [quantize.choice_of("transformer=fp8,transformer_2=none", part) for part in parts[:2]] == ["fp8", "none"]


@pytest.mark.parametrize(("choice", "format", "least"), [("fp8", E4M3, 34.0), ("int8", INT8, 38.0)])
def test_a_model_is_quantized_while_it_is_loaded(choice: str, format: str, least: float) -> None:
    """PSNR of the frames: 43.3 and 48.8 dB (see benchmarks/results)."""
    plain, pipe = (fastvid.load("embedded", device="cpu", quantize=one) for one in (None, choice))
    model, stored = pipe._model, plain._model
    seen = 0
    for module, whole in ((model.transformer, stored.transformer), (model.text_encoder, stored.text_encoder)):
        state, chosen = whole.state_dict(), set(quantize.weights_of(whole))
        layers = {f"{name}.weight": one for name, one in module.named_modules() if isinstance(one, Quantized)}
        assert layers.keys() == chosen
        for name, layer in layers.items():
            weight, wanted = layer.weight.plain, quantize_weight(state[name], format)
            assert weight.format == format and weight.eight_bit == (module is model.transformer)
            assert weight.data.keys() == wanted.keys()
            assert all(torch.equal(weight.data[role], wanted[role]) for role in wanted)
            seen += 1
        assert all(torch.equal(one, state[name]) for name, one in module.state_dict().items() if name in state)
    assert seen > 60
    held = sum(p.nbytes for p in model.transformer.parameters())
    assert held < 0.45 * sum(p.nbytes for p in stored.transformer.parameters()), "time_proj and the head stay in fp32"
    assert pipe.describe()["quantize"] == choice
    planned = fastvid.blueprint("embedded", device="cpu", quantize=choice).plan(PROMPT)
    made = pipe.plan(PROMPT)
    assert planned.bytes_device == made.bytes_device and planned.bytes_weights == made.bytes_weights == model.bytes_held
    videos = [one.generate(PROMPT, seed=0, num_inference_steps=8) for one in (plain, pipe)]
    assert videos[1].recipe["settings"]["quantize"] == choice and "quantize" not in videos[0].recipe["settings"]
    assert least < psnr(videos[0].frames, videos[1].frames) < 70


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / float(np.square(a.astype(float) - b).mean()))


def test_loras_stay_beside(tmp_path: Path) -> None:
    name = "blocks.1.attn1.to_k"
    checkpoint = open_checkpoint("embedded")
    width = checkpoint.configs["transformer"].dim
    file = tmp_path / "lora.safetensors"
    save_file({f"transformer.{name}.lora_{x}.weight": torch.ones(4, width) for x in "A"}
              | {f"transformer.{name}.lora_B.weight": torch.ones(width, 4)}, file)  # fmt: skip
    plain = load_part(checkpoint, "transformer").state_dict()[f"{name}.weight"]
    pipe = fastvid.load("embedded", device="cpu", quantize="int8", loras=[file])
    for loras in ([file], []):
        layer = pipe._model.transformer.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.weight.plain.data["codes"], quantize_weight(plain, INT8)["codes"])
        assert [set(one.layers) for one in pipe._model.branches] == ([{name}] if loras else [])
        pipe.set_loras([])


def test_a_quantized_file_keeps_its_weights() -> None:
    """Products change where the format allows it; another format is refused by name."""
    checkpoint = open_checkpoint("embedded")
    specs = quantize.specs_of(checkpoint.part("transformer"), "int8", eight_bit=False)
    first = next(iter(specs))

    def holding(part: str, made: dict[str, Spec]) -> Any:
        parts = (replace(one, quantized=made) if one.name == part else one for one in checkpoint.parts)
        return replace(checkpoint, parts=tuple(parts))

    kept = quantize.apply(holding("transformer", {first: specs[first]}), "int8").part("transformer").quantized
    assert kept == {first: replace(specs[first], eight_bit=True)}
    beyond = {"condition_embedder.time_proj.weight": specs[first], "proj_out.weight": specs[first]}
    kept = quantize.apply(holding("transformer", beyond | {first: specs[first]}), "int8").part("transformer").quantized
    assert kept == beyond | {first: replace(specs[first], eight_bit=True)}, (
        "layers that the rule leaves alone stay exact"
    )
    with pytest.raises(InvalidRequest, match=r"transformer is quantized already \(int8\).* quantize='int8'"):
        quantize.apply(holding("transformer", specs), "fp8")
    other = {first: Spec.of(E5M2, specs[first].shape)}
    with pytest.raises(InvalidRequest, match=r"quantized already \(fp8_e5m2\).* quantize='none'"):
        quantize.apply(holding("transformer", other), "fp8")
    text = quantize.specs_of(checkpoint.part("text_encoder"), "int8", eight_bit=False)
    assert quantize.apply(holding("text_encoder", text), "fp8").part("text_encoder").quantized == text
    with pytest.raises(InvalidRequest, match="text_encoder is quantized already"):
        quantize.apply(holding("text_encoder", text), "text_encoder=fp8")


@pytest.mark.parametrize("choice", ["fp8", "int8"])
def test_one_tensor_is_held_beside_the_model(choice: str) -> None:
    """As stored, in fp32 and scaled, and its codes."""
    part = quantize.apply(open_checkpoint("embedded"), choice).part("transformer")
    assert part.config is not None
    module = build_empty("transformer", part.config)
    hold_quantized(module, part.quantized, torch.bfloat16)
    largest = max(math.prod(spec.shape) for spec in part.quantized.values())
    with LiveMemory() as live:
        fill(module, part, "cpu", torch.bfloat16)
    held = sum(parameter.nbytes for parameter in module.parameters())
    assert held <= live.peak <= held + (4 + 4 + 4 + 1) * largest
