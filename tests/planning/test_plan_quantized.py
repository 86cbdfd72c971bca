"""Plans of quantized models: their weights' bytes, what products with them take, and which offloading follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_memory import LiveMemory
from torch import nn

import fastvid
from fastvid.errors import InvalidRequest
from fastvid.layers.quantized import Quantized
from fastvid.loaders import quantize
from fastvid.models.description import Checkpoint, Part
from fastvid.models.registry import build_empty, hold_quantized, target_dtype, weigh_part
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.variants import published_configs
from fastvid.ops.dispatch import bind
from fastvid.ops.quantized import Spec
from fastvid.planning import memory
from fastvid.planning.quantized import Workspace
from fastvid.requests.request import Request

GIB = 2**30
BF16 = torch.bfloat16


def planned(**options: Any) -> Any:
    return fastvid.blueprint("wan2.1-t2v-14b", **options).plan(size="832x480")


@pytest.mark.parametrize(
    ("options", "bits"),
    [({"quantize": "fp8"}, 8), ({"format": "q4_k"}, 4.5)],
)
def test_a_14b(options: dict[str, Any], bits: float) -> None:
    """13.9 of 14.3 billion weights are in attention and feed-forward of the blocks, and 4.6 of 5.7 in umT5's."""
    plan, plain = planned(device_memory=80 * GIB, **options), planned(device_memory=80 * GIB)
    saved = plain.bytes_weights - plan.bytes_weights
    assert saved == pytest.approx((16 - bits) / 8 * (13.9e9 + 4.63e9), rel=0.01)
    assert plan.bytes_device < plain.bytes_device and set(plan.quantized) == {"transformer", "text_encoder"}
    assert plan.quantized["transformer"].startswith("400 weights in ") and plain.quantized == {}


def test_offloading_follows_the_sizes_that_are_held() -> None:
    preset, configs = published_configs("wan2.1-t2v-14b")
    whole = Checkpoint(Path(), "", tuple(Part(name, one) for name, one in configs.items()), preset, (), None, ())
    request = Request.make(prompt="a", size="832x480").resolve(preset)
    q4, fp8 = quantize.in_format(whole, "q4_k_m").quantized, quantize.apply(whole, "fp8").quantized
    for held, expected in (({}, "blocks blocks blocks"), (q4, "text none none"), (fp8, "blocks text none")):
        chosen = [memory.choose_offload(configs, request, card * GIB, BF16, BF16, held) for card in (16, 23, 31)]
        assert " ".join(chosen) == expected


def test_mixtures_and_parts() -> None:
    _, configs = published_configs("wan2.1-t2v-1.3b")
    transformer = configs["transformer"]
    plain, mixed = (held(transformer, one) for one in ("q4_k", "q4_k_m"))
    assert plain.keys() == mixed.keys() and {one.format for one in plain.values()} == {"q4_k"}
    finer = {name for name, one in mixed.items() if one.format == "q6_k"}
    assert len(finer) == 3 * 30 and {name.split(".", 2)[2] for name in finer} == {
        "attn1.to_v.weight",
        "attn2.to_v.weight",
        "ffn.net.2.weight",
    }
    assert held(WanTransformerConfig(2, 24, ffn_dim=256), "q4_k").keys() == {
        f"blocks.{i}.ffn.net.2.weight" for i in range(40)
    }, "rows that are no multiple of 256 stay in 16 bits"
    plan = planned(device_memory=80 * GIB, format="transformer=q8_0", quantize="text_encoder=int8")
    assert plan.quantized["transformer"] == "400 weights in q8_0, exact products"
    assert plan.quantized["text_encoder"] == "168 weights in int8, exact products"


def held(config: WanTransformerConfig, format: str) -> dict[str, Spec]:
    return dict(quantize._held(Part("transformer", config), format).quantized)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "q4km"}, "format='q4km': .* the nearest is q4_k"),
        ({"format": "vae=q8_0"}, "format='vae'"),
        ({"format": "fp8_e4m3", "quantize": "int8"}, r"already \(fp8_e4m3\).* nearest is quantize='fp8'"),
        ({"model": "embedded", "format": "q8_0"}, "the files of embedded say how they are stored"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        fastvid.blueprint(**{"model": "wan2.1-t2v-14b", **options})


# ---------------------------------------------------------------- what a step really holds


def filled(config: WanTransformerConfig, specs: dict[str, Spec]) -> nn.Module:
    """A transformer of random weights in bf16, those of `specs` quantized."""
    module = build_empty("transformer", config, bind("auto", "auto", torch.device("cpu")))
    hold_quantized(module, specs, BF16, bind("auto", "auto", torch.device("cpu")))
    layers = {name for name, layer in module.named_modules() if isinstance(layer, Quantized)}
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if leaf.startswith("weight_") and not parameter.dtype.is_floating_point:
            made = torch.randint(0, 100, parameter.shape, dtype=parameter.dtype)
        else:
            scale = path in layers and leaf.startswith("weight_")
            kind = torch.float32 if scale else target_dtype(module, name, BF16)
            made = (torch.rand(parameter.shape) * 0.02).to(kind)
        setattr(module.get_submodule(path), leaf, nn.Parameter(made, requires_grad=False))
    return module.eval()


def peak_of_step(module: nn.Module, latents: torch.Tensor, text: torch.Tensor) -> int:
    with torch.inference_mode():
        context = module.prepare_context(text)  # type: ignore[operator]
        module(latents, torch.tensor([500.0]), context)
        with LiveMemory() as live:
            module(latents, torch.tensor([500.0]), context)
    return live.peak


@pytest.mark.parametrize("way", ["fp8 exact", "fp8", "int8 exact", "int8", "q8_0"])
def test_the_workspace_is_what_products_take(way: str) -> None:
    """A step holds at most bf16's activations and the planned workspace beside the weights, which are as planned."""
    config = WanTransformerConfig(4, 64, ffn_dim=1536, num_layers=1, text_dim=256)
    name, _, exact = way.partition(" ")
    if name == "q8_0":
        specs = held(config, "q8_0")
    else:
        specs = quantize.specs_of(Part("transformer", config), name, eight_bit=not exact)
    torch.manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 32, 32, dtype=BF16), torch.randn(1, 32, 256, dtype=BF16)
    plain, module = filled(config, {}), filled(config, specs)
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    assert nbytes == weigh_part("transformer", config, BF16, quantized=specs).total
    allowed = peak_of_step(plain, latents, text) + Workspace.of(specs.values(), 2).bytes(3 * 16 * 16)
    assert peak_of_step(module, latents, text) <= allowed
