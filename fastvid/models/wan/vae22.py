"""The Wan 2.2 video compression network (that of TI2V-5B): 16x16 in space, 4 in time, 48 channels.

It is the 2.1 network (see `fastvid.models.wan.vae`, also for the interface) with three changes: frames go in and come
out as patches of 2x2 pixels, the decoder is wider than the encoder, and every stage has a shortcut without weights that
averages pixels into channels on the way down and spreads channels over pixels on the way up. Parameter names are those
of diffusers' AutoencoderKLWan with is_residual.

Shapes: B batch, C and N channels, F pixel frames, T frames and H/W height and width at the stage in question.
Maths: Wan2.2 `wan/modules/vae2_2.py` (Apache-2.0); the shortcuts are those of Chen et al., "Deep Compression
Autoencoder for Efficient High-Resolution Diffusion Models", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.common.vae_stream import Stream
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import Decoder, Encoder, WanVAE
from fastvid.models.wan.vae_layers import Downsample, ResidualBlock, Upsample


def patchify(frames: Tensor, size: int) -> Tensor:
    """[B, C, F, H, W] -> [B, C * size**2, F, H / size, W / size]; C slowest, then x, then y within a patch."""
    patches = frames.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    return patches.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """The way back: [B, C * size**2, F, H, W] -> [B, C, F, size * H, size * W]."""
    frames = patches.unflatten(1, (-1, size, size)).permute(0, 1, 4, 5, 3, 6, 2)
    return frames.flatten(5, 6).flatten(3, 4)


def average_down(x: Tensor, channels: int, factor_t: int, factor_s: int) -> Tensor:
    """[B, C, T, H, W] -> new [B, channels, T / factor_t, H / factor_s, W / factor_s].

    The pixels of a block of factor_t x factor_s x factor_s become channels, C slowest, and every so many of these one
    mean. An odd number of frames is a stream's start: the first frame shares its block with zeros before it.
    """
    if lead := -x.shape[2] % factor_t:
        x = F.pad(x, (0, 0, 0, 0, lead, 0))
    blocks = x.unflatten(4, (-1, factor_s)).unflatten(3, (-1, factor_s)).unflatten(2, (-1, factor_t))
    blocks = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return blocks.unflatten(1, (channels, -1)).mean(dim=2)


def add_spread(out: Tensor, x: Tensor, factor_t: int, first: bool) -> Tensor:
    """Adds x [B, C, T, H, W], spread over blocks of factor_t x 2 x 2 pixels, to out [B, N, F, 2H, 2W] in place.

    Of the N * factor values that a pixel's C channels are repeated to, every `factor` go to the block of one channel.
    At a stream's start (first) the first pixel's block keeps only its last frame: F is factor_t * T less the others.
    """
    factor, groups = 4 * factor_t, x.shape[1] // out.shape[1]
    for place, (t, h, w) in enumerate(product(range(factor_t), range(2), range(2))):
        # A view for each place in the block, so that the spread x is never in memory.
        source = x[:, place * groups // factor :: groups]
        if first:
            t -= factor_t - 1
        if t < 0:
            source, t = source[:, :, 1:], t + factor_t
        out[:, :, t::factor_t, h::2, w::2].add_(source)
    return out


class ResidualDownBlock(nn.Module):
    """A stage on the way down: residual blocks, then half the size (and half the frames), and the shortcut."""

    def __init__(self, c_in: int, c_out: int, num_res_blocks: int, temporal: bool, spatial: bool, ops: Any) -> None:
        super().__init__()
        self.channels, self.factor_t, self.factor_s = c_out, 1 + temporal, 1 + spatial
        values = c_in * self.factor_t * self.factor_s**2
        if values % c_out:
            raise CheckpointError(f"vae/config.json: {values} values of a block in the encoder give no {c_out} means")
        blocks = [ResidualBlock(c_in if j == 0 else c_out, c_out, ops) for j in range(num_res_blocks)]
        self.resnets = nn.ModuleList(blocks)
        self.downsampler = Downsample(c_out, temporal, ops) if spatial else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        # First, because the residual blocks may overwrite x.
        shortcut = self._shortcut(x, stream)
        for resnet in self.resnets:
            x = resnet(x, stream)
        if self.downsampler is not None:
            x = self.downsampler(x, stream)
        return x + stream.delay(shortcut, x.shape[3])

    def _shortcut(self, x: Tensor, stream: Stream) -> Tensor:
        window = stream.window(x, grain=self.factor_s)
        if window is None:
            b, _, t, _, w = x.shape
            return x.new_empty(b, self.channels, -(-t // self.factor_t), 0, w // self.factor_s)
        return average_down(window.x, self.channels, self.factor_t, self.factor_s)


class ResidualUpBlock(nn.Module):
    """A stage on the way up: residual blocks; then, but in the last stage, twice the size, and the shortcut."""

    def __init__(self, c_in: int, c_out: int, num_res_blocks: int, temporal: bool, spatial: bool, ops: Any) -> None:
        super().__init__()
        self.factor_t = 1 + temporal
        if spatial and (c_in % c_out or 4 * self.factor_t % (c_in // c_out)):
            raise CheckpointError(f"vae/config.json: {c_in} channels in the decoder cannot be spread to {c_out}")
        blocks = [ResidualBlock(c_in if j == 0 else c_out, c_out, ops) for j in range(num_res_blocks + 1)]
        self.resnets = nn.ModuleList(blocks)
        self.upsampler = Upsample(c_out, c_out, temporal, ops) if spatial else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        # A residual block that keeps the width may overwrite x; a copy of x is small beside the shortcut made from it.
        kept = x.clone() if self.upsampler is not None and self.resnets[0].conv_shortcut is None else x
        for resnet in self.resnets:
            x = resnet(x, stream)
        if self.upsampler is None:
            return x
        out = self.upsampler(x, stream)
        return add_spread(out, stream.delay(kept, out.shape[3] // 2), self.factor_t, stream.first)


class PatchEncoder(Encoder):
    """2.1's encoder over patches, with stages of its own."""

    @staticmethod
    def make_blocks(config: WanVAEConfig, ops: Any) -> Iterator[nn.Module]:
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        for i, temporal in enumerate((*config.temperal_downsample, False)):
            spatial = i < len(config.temperal_downsample)
            yield ResidualDownBlock(dims[i], dims[i + 1], config.num_res_blocks, temporal, spatial, ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1) -> Tensor:
        return super().forward(patchify(x, self.config.patch_size), stream, stripes)


class PatchDecoder(Decoder):
    """2.1's decoder over patches, with stages of its own."""

    @staticmethod
    def make_blocks(config: WanVAEConfig, ops: Any) -> Iterator[nn.Module]:
        mults = config.dim_mult[::-1]
        dims = [config.decoder_dim * m for m in (mults[0], *mults)]
        for i, temporal in enumerate((*config.temperal_downsample[::-1], False)):
            spatial = i < len(config.temperal_downsample)
            yield ResidualUpBlock(dims[i], dims[i + 1], config.num_res_blocks, temporal, spatial, ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1, rgb: list[Tensor] | None = None) -> Tensor:
        frames = unpatchify(super().forward(x, stream, stripes), self.config.patch_size)
        if rgb is None:
            return frames
        rgb.append(frames.sum(dtype=torch.float32))
        # The last convolution makes patches, whose bytes would not be in the order of pixels.
        return torch.stack([self.ops.to_rgb(one) for one in frames]).permute(0, 4, 1, 2, 3)


class WanVAE22(WanVAE):
    """Encoder and decoder; `encode` and the ways to decode are those of WanVAE, with a spatial scale of 16."""

    encoder_type, decoder_type = PatchEncoder, PatchDecoder
