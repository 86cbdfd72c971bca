"""The Wan 2.2 video compression network (that of TI2V-5B): 16x16 in space, 4 in time, 48 channels.

It is the 2.1 network (see wan_vae.py, also for the interface: chunks and their cache) with three changes: frames go in
and come out as patches of 2x2 pixels, the decoder is wider than the encoder, and every stage has a shortcut without
weights that averages pixels into channels on the way down and spreads channels over pixels on the way up. Parameter
names are those of diffusers' AutoencoderKLWan with is_residual.

Shapes: B batch, C and N channels, F pixel frames, T frames and H/W height and width at the stage in question.
Maths: Wan2.2 `wan/modules/vae2_2.py` (Apache-2.0); the shortcuts are those of Chen et al., "Deep Compression
Autoencoder for Efficient High-Resolution Diffusion Models", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.common.config_reader import read_vae_config
from fastvid.models.common.vae_stream import Cache, Stream
from fastvid.models.wan.vae import Decoder, Encoder, WanVAE, WanVAEConfig
from fastvid.models.wan.vae_bands import Bands, band_of
from fastvid.models.wan.vae_layers import Downsample, ResidualBlock, Upsample

# Of the published latents, by Wan2.2 `wan/modules/vae2_2.py`.
# fmt: off
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class WanVAE22Config:
    """What `vae/config.json` says; the defaults are the published ones. Channel widths are base_dim * dim_mult in the
    encoder and decoder_base_dim * dim_mult in the decoder; temporal scale is 2 per True.
    """

    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanVAE22Config:
        """Reads a diffusers AutoencoderKLWan configuration with is_residual.

        Raises:
            CheckpointError: the configuration asks for what this network cannot do.
        """
        if not config.get("is_residual"):
            raise CheckpointError("vae/config.json describes a Wan 2.1 VAE (no is_residual): read it as WanVAEConfig")
        defaults = {"patch_size": 1, "decoder_base_dim": config.get("base_dim", cls.base_dim)}
        unset = {key: value for key, value in defaults.items() if config.get(key) is None}
        vae = read_vae_config(cls, {**config, **unset})
        vae._check(config)
        return vae

    def _check(self, config: Mapping[str, Any]) -> None:
        for key in ("in_channels", "out_channels"):
            if config.get(key, 3) != self.frame_channels:
                raise CheckpointError(
                    f"vae/config.json has {key}={config.get(key, 3)}; RGB in patches of patch_size={self.patch_size} "
                    f"needs {self.frame_channels}"
                )

    @property
    def frame_channels(self) -> int:
        """Channels of the frames as the network's first layer sees them."""
        return 3 * self.patch_size**2

    @property
    def widest(self) -> int:
        """Values that the widest activation, the last upsampler's, holds for each pixel of a frame."""
        return self.decoder_base_dim * self.dim_mult[:2][-1] // self.patch_size**2

    @property
    def spatial_scale(self) -> int:
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_scale(self) -> int:
        return 2 ** sum(self.temperal_downsample)


VAEConfig = WanVAEConfig | WanVAE22Config


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

    def __init__(self, config: WanVAE22Config, ops: Any) -> None:
        super().__init__(config, ops)
        self.patch_size = config.patch_size

    @staticmethod
    def make_blocks(config: WanVAE22Config, ops: Any) -> Iterator[nn.Module]:
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        for i, temporal in enumerate((*config.temperal_downsample, False)):
            spatial = i < len(config.temperal_downsample)
            yield ResidualDownBlock(dims[i], dims[i + 1], config.num_res_blocks, temporal, spatial, ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1) -> Tensor:
        return super().forward(patchify(x, self.patch_size), stream, stripes)


class PatchDecoder(Decoder):
    """2.1's decoder over patches, with stages of its own."""

    def __init__(self, config: WanVAE22Config, ops: Any) -> None:
        super().__init__(config, ops)
        self.patch_size = config.patch_size

    @staticmethod
    def make_blocks(config: WanVAE22Config, ops: Any) -> Iterator[nn.Module]:
        mults = config.dim_mult[::-1]
        dims = [config.decoder_base_dim * m for m in (mults[0], *mults)]
        for i, temporal in enumerate((*config.temperal_downsample[::-1], False)):
            spatial = i < len(config.temperal_downsample)
            yield ResidualUpBlock(dims[i], dims[i + 1], config.num_res_blocks, temporal, spatial, ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1) -> Tensor:
        return unpatchify(super().forward(x, stream, stripes), self.patch_size)


class WanVAE22(WanVAE):
    """Encoder and decoder; `encode`, `decode` and `decode_raw` are those of WanVAE, with a spatial scale of 16."""

    encoder_type, decoder_type = PatchEncoder, PatchDecoder

    def decode_rgb(
        self,
        latents: Tensor,
        cache: Cache | None = None,
        stripes: int = 1,
        reuse_cache: bool = False,
        bands: Bands | None = None,
    ) -> tuple[Tensor, Cache]:
        """See WanVAE.decode_rgb. The last convolution makes patches, whose bytes are not yet in their order."""
        band = band_of(bands, latents.shape[3], stripes)
        frames, cache = self._decode(self.decoder, latents, cache, stripes, reuse_cache, band)
        if frames.shape[3]:
            made = torch.stack([self.ops.to_rgb(one) for one in frames])
        else:  # a rank that holds no rows
            made = frames.permute(0, 2, 3, 4, 1).to(torch.uint8)
        return made if band is None else band.join(made, 2, self.config.spatial_scale), cache
