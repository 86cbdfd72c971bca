"""How far frames that a VAE decodes in bf16 are from its frames in fp32, in 8-bit levels.

python benchmarks/bench_vae_bf16.py

bf16 runs on the CPU in the arithmetic of GPUs, products of bf16 with fp32 sums, by the operations that are the default
there (ops/vae_library.py) and by those of ops/vae.py. Three networks: the embedded model's, on latents of two of its
videos; Wan 2.1's and 2.2's at the published widths with random weights, on random latents, the last layer scaled so
that frames have the spread of real ones (a quarter of the range). All decode in two chunks: the cache is in bf16 too.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from harness import save
from torch import Tensor

import fastvid
from fastvid.models.registry import build_vae
from fastvid.models.wan.config import WAN22_VAE, WanVAEConfig
from fastvid.ops import reference, rgb, vae_library

PROMPTS = ("a red circle moving right on a white background", "a green triangle moving down on a black background")
SPREAD = 0.5  # standard deviation of frames in [-1, 1]
LATENTS = (5, 12, 20)  # T, h, w of random latents


OPS = {
    "channels_last": SimpleNamespace(**vae_library.OPERATIONS, to_rgb=rgb.reference),
    "reference": reference,
}


@torch.no_grad()
def main() -> None:
    config, weights, videos = embedded()
    rows = {"embedded": compare(config, weights, videos)}
    for name, published in (("wan2.1, 96 wide", WanVAEConfig()), ("wan2.2, 256 wide", WAN22_VAE)):
        rows[name] = compare(published, *random(published))
    for name, ways in rows.items():
        for way, row in ways.items():
            print(f"{name:<18}{way:<15}", ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(save("vae-bf16", [], "cpu", networks=rows, latents=LATENTS))


def embedded() -> tuple[WanVAEConfig, dict[str, Tensor], list[Tensor]]:
    """The embedded model's VAE, and latents that the model made."""
    pipe = fastvid.load("embedded", device="cpu")
    options = {"seed": 5, "num_frames": 17, "num_inference_steps": 8}
    latents = [pipe.generate(prompt, **options).latents for prompt in PROMPTS]
    vae = pipe._model.vae
    return vae.config, vae.state_dict(), latents


def random(config: WanVAEConfig) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Random weights and latents."""
    torch.manual_seed(0)
    vae: Any = build_vae(config).eval().requires_grad_(False)
    T, h, w = LATENTS
    latents = torch.randn(1, config.z_dim, T, h, w * 8 // config.spatial_scale)
    out, frames = vae.decoder.conv_out, vae.decode_raw(latents[:, :, :1])[0]
    out.bias.sub_(frames.mean()).mul_(SPREAD / frames.std())
    out.weight.mul_(SPREAD / frames.std())
    return vae.state_dict(), [latents]


def compare(config: WanVAEConfig, weights: dict[str, Tensor], latents: list[Tensor]) -> dict[str, dict[str, float]]:
    """Each way of computing in bf16 against fp32."""

    def frames(ops: Any, dtype: torch.dtype) -> Tensor:
        vae: Any = build_vae(config, ops).eval().requires_grad_(False)
        vae.load_state_dict(weights, assign=True)
        return torch.cat([decoded(vae.to(dtype), one) for one in latents])

    wanted = frames(reference, torch.float32)
    return {name: compared(wanted, frames(ops, torch.bfloat16)) for name, ops in OPS.items()}


def decoded(vae: Any, latents: Tensor) -> Tensor:
    first, cache = vae.decode_rgb(latents[:, :, :2])
    return torch.cat((first, vae.decode_rgb(latents[:, :, 2:], cache)[0]), dim=1)


def compared(wanted: Tensor, made: Tensor) -> dict[str, float]:
    """8-bit frames: PSNR in dB, the largest and the mean difference, and the share of values within one level."""
    apart = (made.float() - wanted.float()).abs()
    return {
        "psnr_db": 10 * math.log10(255**2 / float(apart.square().mean())),
        "max": float(apart.max()),
        "mean": float(apart.mean()),
        "within_1": float((apart <= 1).float().mean()),
    }


if __name__ == "__main__":
    main()
