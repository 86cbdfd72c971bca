"""How long a request takes, from what it computes and this machine's rates: the transformer's linear layers and
attention, and the VAE's convolutions. Norms, rotations and the reading of weights are left out, and so is the text
encoder, which sees a prompt once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.planning.speed import Rates

SIDE = 8  # of the latents on which a VAE's operations are counted


@dataclass(frozen=True)
class Calls:
    """So many calls of the transformer, each of `tokens` that attend to `keys`, and to `rows` of text."""

    count: int
    tokens: int
    keys: int
    rows: int


@dataclass(frozen=True)
class Convolutions:
    """What a VAE computes for each pixel of a frame: floating point operations, in so many convolutions a chunk."""

    flops: float
    count: int


def denoise_seconds(calls: Calls, config: WanTransformerConfig, control_layers: int, rates: Rates) -> float:
    """Of all of these calls."""
    d, n, layers = config.dim, calls.tokens, config.num_layers + control_layers
    linear = rates.seconds("linear", 2.0 * n * d * d, 6) + rates.seconds("linear", 2.0 * n * d * config.ffn_dim, 2)
    attention = rates.seconds("attention", 4.0 * n * calls.keys * d)
    attention += rates.seconds("attention", 4.0 * n * calls.rows * d)
    hints = rates.seconds("linear", 2.0 * n * d * d, control_layers + 1) if control_layers else 0.0
    return calls.count * (layers * (linear + attention) + hints)


def vae_seconds(work: Convolutions, pixels: int, chunk_pixels: int, rates: Rates) -> float:
    """Of decoding, or encoding, so many pixels, chunk_pixels at once."""
    each = work.flops * chunk_pixels / work.count
    return pixels / chunk_pixels * rates.seconds("convolution", each, work.count)


@torch.no_grad()
def count_vae(vae: WanVAE, decode: bool = True) -> Convolutions:
    """What decoding, or encoding, takes. vae: with weights or without."""
    config = vae.config
    with torch.device("meta"):
        empty = type(vae)(config)
    side, frames = SIDE * config.spatial_scale, config.temporal_scale
    counted = []
    for latents in (2, 3):  # the second and all that follow are alike
        with FlopCounterMode(display=False) as counter:
            if decode:
                empty.decode(torch.empty(1, config.z_dim, latents, SIDE, SIDE, device="meta"))
            else:
                empty.encode(torch.empty(1, 3, frames * (latents - 1) + 1, side, side, device="meta"))
        counted.append(counter.get_total_flops())
    half = empty.decoder if decode else empty.encoder
    count = sum(isinstance(module, nn.Conv2d | nn.Conv3d) for module in half.modules())
    return Convolutions((counted[1] - counted[0]) / (side**2 * frames), count)
