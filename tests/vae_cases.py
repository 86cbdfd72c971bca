"""Small networks of both Wan VAEs: diffusers' with drawn weights, ours with the same, and what both make."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fastvid.models.common.vae_stream import Cache
from fastvid.models.registry import build_vae
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE

STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [0.5, 1.5, 2.0, 1.0]}
SMALL: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, **STATISTICS}
# Wide enough for the Winograd form of the convolutions.
WIDE: dict[str, Any] = {**SMALL, "base_dim": 64, "dim_mult": [1, 1, 1, 1]}
SMALL_22: dict[str, Any] = {
    **SMALL,
    "decoder_base_dim": 16,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
WIDE_22: dict[str, Any] = {**SMALL_22, "base_dim": 64, "decoder_base_dim": 64, "dim_mult": [1, 1, 1, 1]}
# No patches, one width for both, other stages: groups of 8 and 1 on the way down, 4 channels to one on the way up.
OTHER_22: dict[str, Any] = {
    **SMALL_22,
    "decoder_base_dim": None,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "dim_mult": [1, 1, 4, 4],
    "temperal_downsample": [True, False, False],
}


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def diffusers_vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """diffusers' network with every weight drawn, also those that start as ones or zeros; few frames are clamped."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    vae.decoder.conv_out.weight.mul_(0.3 if config.get("is_residual") else 0.2)
    return vae


def ours(theirs: AutoencoderKLWan) -> WanVAE:
    vae = build_vae(WanVAEConfig.from_dict(dict(theirs.config)))
    vae.load_state_dict(theirs.state_dict())
    return vae.eval().requires_grad_(False)


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    dtype = next(vae.parameters()).dtype
    values = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(v, dtype=dtype).view(1, -1, 1, 1, 1) for v in values)
    return mean, std


def their_encoding(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    mean, std = statistics(vae)
    return (vae.encode(frames).latent_dist.mode() - mean) / std


def their_decoding(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = statistics(vae)
    return vae.decode(latents * std + mean).sample


def draw_frames(t: int, h: int, w: int, batch: int = 1, scale: int = 8) -> Tensor:
    """Frames of t latent frames of h x w."""
    generator = torch.Generator().manual_seed(t * 100 + h * 10 + w)
    return torch.rand(batch, 3, 4 * t - 3, scale * h, scale * w, generator=generator) * 2 - 1


def draw_latents(t: int, h: int, w: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, t, h, w, generator=torch.Generator().manual_seed(t * 100 + h * 10 + w))


def in_chunks(step: Any, x: Tensor, lengths: list[int]) -> Tensor:
    """The results of one chunk after another."""
    out, cache = [], None
    for part in x.split(lengths, dim=2):
        done, cache = step(part, cache)
        out.append(done)
    return torch.cat(out, dim=2)


def nbytes(cache: Cache) -> int:
    """Memory that a cache keeps alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache}.values())


@dataclass(frozen=True)
class Network:
    """One of the two VAEs. scale: pixels a latent, along height and width."""

    small: dict[str, Any]
    wide: dict[str, Any]
    scale: int

    @cached_property
    def theirs(self) -> AutoencoderKLWan:
        return diffusers_vae(self.small)

    @cached_property
    def vae(self) -> WanVAE:
        return ours(self.theirs)

    @cached_property
    def their_wide(self) -> AutoencoderKLWan:
        return diffusers_vae(self.wide)

    @cached_property
    def wide_vae(self) -> WanVAE:
        return ours(self.their_wide)

    def frames(self, t: int, h: int, w: int, batch: int = 1) -> Tensor:
        return draw_frames(t, h, w, batch, self.scale)


NETWORKS = {"2.1": Network(SMALL, WIDE, 8), "2.2": Network(SMALL_22, WIDE_22, 16)}
