"""What `quantize=` costs: error of the velocity and PSNR of the frames, by layers, format and products.

python benchmarks/bench_quantize.py [--prompts 4] [--steps 20]

On the embedded model, whose weights are trained, against itself in fp32: the relative error of the velocity at four
noise levels of each prompt's own video, and the PSNR of the frames. On four blocks of the 1.3B's shape with random
weights, the error alone. "rule" is what `quantize=` does (see fastvid/loaders/quantize.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import save
from torch import Tensor, nn

import fastvid
from fastvid.device.offload import Resident
from fastvid.layers.quantized import Quantized
from fastvid.loaders import quantize
from fastvid.models.common.experts import Experts
from fastvid.models.loaded import Model
from fastvid.models.registry import build_empty, hold_quantized
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.ops.dispatch import bind
from fastvid.ops.formats_rows import FLOATS, INT8, LARGEST, quantize_weight
from fastvid.ops.quantized import Spec

PROMPTS = (
    "a red circle moving right on a white background",
    "a blue square growing on a gray background",
    "a green star moving left on a black background",
    "a yellow circle shrinking on a white background",
)
LEVELS = (0.95, 0.7, 0.4, 0.1)
PRODUCTS = {"exact": False, "8-bit": True}
EXACT = ("rule", "rule, one scale a matrix", "rule but the last block", "every linear layer")
"""What is measured with exact products too."""
Choices = Mapping[str, Sequence[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = {"embedded": of_embedded(PROMPTS[: args.prompts], args.steps), "blocks of the 1.3B": of_random_blocks()}
    print(save("quantize", [], "cpu", prompts=args.prompts, steps=args.steps, **made))


# ---------------------------------------------------------------- the trained model


def of_embedded(prompts: Sequence[str], steps: int) -> list[dict[str, Any]]:
    pipe = fastvid.load("embedded", device="cpu", dtype="float32")
    model, plain = pipe._model, pipe._model.transformer
    texts = [model.embed(prompt) for prompt in prompts]
    videos = [pipe.generate(prompt, seed=i, num_inference_steps=steps) for i, prompt in enumerate(prompts)]
    clean = [torch.as_tensor(video.latents).float() for video in videos]

    def velocities(module: nn.Module) -> list[Tensor]:
        made = []
        with torch.inference_mode():
            for seed, (text, latents) in enumerate(zip(texts, clean, strict=True)):
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
                for level in LEVELS:
                    noisy = (1 - level) * latents + level * noise
                    made.append(module(noisy, torch.tensor([1000 * level]), text))
        return made

    def frames(changed: Model) -> list[float]:
        other = fastvid.Pipeline(changed, 1)
        again = (other.generate(prompt, seed=i, num_inference_steps=steps) for i, prompt in enumerate(prompts))
        return [psnr(a.frames, b.frames) for a, b in zip(again, videos, strict=True)]

    wanted, rows = velocities(plain), []
    for name, layers, format, eight_bit, whole in cases(choices(plain)):
        module = quantized("transformer", plain, layers, format, eight_bit, model.ops, whole)
        row = described(name, format, eight_bit, errors(velocities(module), wanted))
        modules = replace(model.modules, experts=Experts([module], None))
        rows.append(row | {"psnr": mean(frames(replace(model, modules=modules)))})
        show(rows[-1])
    layers = quantize.weights_of(model.text_encoder)
    for format in quantize.FORMATS.values():
        for eight_bit in PRODUCTS.values():
            module = quantized("text_encoder", model.text_encoder, layers, format, eight_bit)
            changed = replace(model, modules=replace(model.modules, encoders=Resident([module])))
            off = errors([changed.embed(prompt) for prompt in prompts], texts)
            rows.append(described("text encoder", format, eight_bit, off) | {"psnr": mean(frames(changed))})
            show(rows[-1])
    return rows


def choices(module: nn.Module) -> Choices:
    """Sets of layers: the rule's, with some left out, and with others."""
    rule, every, count = quantize.weights_of(module), quantize.linear_weights(module), len(module.blocks)
    first, last = "blocks.0.", f"blocks.{count - 1}."
    parts = ("proj_out", "time_proj", "time_embedder", "text_embedder")
    return {
        "rule": rule,
        "rule, one scale a matrix": rule,
        "rule but the first block": [name for name in rule if not name.startswith(first)],
        "rule but the last block": [name for name in rule if not name.startswith(last)],
        "rule but both": [name for name in rule if not name.startswith((first, last))],
        "attention alone": [name for name in rule if ".attn" in name],
        "feed-forward alone": [name for name in rule if ".ffn" in name],
        **{f"rule and {part}": [*rule, *(name for name in every if part in name)] for part in parts},
        "every linear layer": every,
    }


def cases(sets: Choices) -> list[tuple[str, Sequence[str], str, bool, bool]]:
    return [
        (name, layers, format, eight_bit, "one scale" in name)
        for format in quantize.FORMATS.values()
        for eight_bit in PRODUCTS.values()
        for name, layers in sets.items()
        if eight_bit or name in EXACT
    ]


def quantized(
    part: str,
    plain: nn.Module,
    layers: Sequence[str],
    format: str,
    eight_bit: bool,
    ops: Any = None,
    whole: bool = False,
) -> nn.Module:
    """A module with some of its layers quantized. whole: with one scale for each matrix."""
    state, config = plain.state_dict(), plain.config
    module = build_empty(part, config, *([ops] if ops else []))
    specs = {name: Spec.of(format, (len(state[name]), state[name].shape[1]), eight_bit=eight_bit) for name in layers}
    hold_quantized(module, specs, torch.float32, *([ops] if ops else []))
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        layer = module.get_submodule(path)
        if name in specs:
            assert isinstance(layer, Quantized)
            layer.fill((one_scale if whole else quantize_weight)(tensor, format), torch.device("cpu"))
        else:
            layer.load_state_dict({leaf: tensor}, strict=False, assign=True)
    return module.eval().requires_grad_(False)


def one_scale(weight: Tensor, format: str) -> dict[str, Tensor]:
    scale = weight.abs().amax() / LARGEST[format]
    codes = weight / scale
    codes = codes.round().to(torch.int8) if format == INT8 else codes.to(FLOATS[format]).view(torch.uint8)
    return {"codes": codes, "scale": scale.expand(len(weight)).clone()}


# ---------------------------------------------------------------- random weights


def of_random_blocks() -> list[dict[str, Any]]:
    """Weights of N(0, 1 / K), so that activations keep their size."""
    config, ops = WanTransformerConfig(12, 128, ffn_dim=8960, num_layers=4), bind(device=torch.device("cpu"))
    plain = build_empty("transformer", config, ops).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in plain.state_dict().items():
        if tensor.ndim == 1:
            tensor.fill_(float(name.endswith("weight")))
        else:
            tensor.normal_(0, math.prod(tensor.shape[1:]) ** -0.5, generator=generator)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 3, 16, 16), (1, 64, 4096)))

    def velocities(module: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [module(latents, torch.tensor([1000 * level]), text) for level in LEVELS[::2]]

    wanted, rows = velocities(plain), []
    sets = choices(plain)
    named = ("rule", "rule but the first block", "rule but the last block", "every linear layer")
    for name, layers, format, eight_bit, _ in cases({name: sets[name] for name in named}):
        module = quantized("transformer", plain, layers, format, eight_bit, ops)
        rows.append(described(name, format, eight_bit, errors(velocities(module), wanted)))
        show(rows[-1])
    return rows


# ---------------------------------------------------------------- numbers


def errors(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(made, wanted, strict=True)]


def described(name: str, format: str, eight_bit: bool, off: Sequence[float]) -> dict[str, Any]:
    products = next(key for key, value in PRODUCTS.items() if value == eight_bit)
    return {"layers": name, "format": format, "products": products, "error": mean(off), "largest": max(off)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(np.square(a.astype(float) - b).mean()), 1e-9))


def show(row: Mapping[str, Any]) -> None:
    rate = f"{row['psnr']:6.1f} dB" if "psnr" in row else ""
    text = f"{row['error']:8.2%} (at most {row['largest']:.2%}) {rate}"
    print(f"{row['format']:<9} {row['products']:<6} {row['layers']:<26} {text}", flush=True)


if __name__ == "__main__":
    main()
