"""The Wan 2.1 video compression network: causal 3D convolutions, 8x8 in space and 4 in time.

`WanVAE.encode` and `WanVAE.decode` are functions over chunks: they take the cache of the chunk before and return that
for the next, so a stream is decoded in constant memory and a whole sequence is one chunk. Any chunk lengths give the
same result. Where a frame is too large for memory, the stages at its full size work on it in stripes of rows
(`fastvid.models.common.vae_stream`), with the same result; the middle, whose attention sees the whole frame, is small
and never divided. Parameter names are those of diffusers' AutoencoderKLWan. The fast code is in `fastvid.ops.vae` (CPU)
and `fastvid.ops.vae_gpu`; here the parts are connected. The 2.2 network (vae22.py) puts other blocks into the same
Encoder and Decoder.

Shapes: B batch, C channels, F pixel frames, T latent frames, H/W height and width at the stage in question.
Maths: Wan2.1 `wan/modules/vae.py` (Apache-2.0), rewritten as one causal network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvid.models.common.vae_stream import Cache, Layers, Stream
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae_bands import Band, Bands, band_of, stream_of
from fastvid.models.wan.vae_layers import CausalConv3d, Downsample, MidBlock, ResidualBlock, RMSNorm, Upsample
from fastvid.ops import reference, vae
from fastvid.ops.upload import upload

# Values of the widest activation that one step on a CPU may make: 64 MB, or one latent frame if that is more.
CPU_CHUNK = 2**24


class Encoder(nn.Module):
    """Frames to the means and variances of their latents, 2 * z_dim channels."""

    def __init__(self, config: WanVAEConfig, ops: Any) -> None:
        super().__init__()
        self.config = config
        first, last = config.base_dim, config.base_dim * config.dim_mult[-1]
        self.conv_in = CausalConv3d(config.frame_channels, first, (3, 3, 3), ops, pad=1)
        self.down_blocks = nn.ModuleList(self.make_blocks(config, ops))
        self.mid_block = MidBlock(last, ops)
        self.norm_out = RMSNorm(last, 3, ops)
        self.conv_out = CausalConv3d(last, 2 * config.z_dim, (3, 3, 3), ops, pad=1)

    @staticmethod
    def make_blocks(config: WanVAEConfig, ops: Any) -> Iterator[nn.Module]:
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            for j in range(config.num_res_blocks):
                yield ResidualBlock(c_in if j == 0 else c_out, c_out, ops)
            if i < len(config.temperal_downsample):
                yield Downsample(c_out, config.temperal_downsample[i], ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1) -> Tensor:
        x = stream.in_stripes(self._down, x, stripes)
        x = self.mid_block(x, stream)
        return self.conv_out.after(self.norm_out, x, stream)

    def _down(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        return x


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, num_res_blocks: int, upsample: Upsample | None, ops: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(c_in if j == 0 else c_out, c_out, ops) for j in range(num_res_blocks + 1)]
        )
        if upsample is not None:
            self.upsamplers = nn.ModuleList([upsample])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream)
        return self.upsamplers[0](x, stream) if hasattr(self, "upsamplers") else x


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, config: WanVAEConfig, ops: Any) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        first, last = (config.decoder_dim * config.dim_mult[i] for i in (-1, 0))
        self.conv_in = CausalConv3d(config.z_dim, first, (3, 3, 3), ops, pad=1)
        self.mid_block = MidBlock(first, ops)
        self.up_blocks = nn.ModuleList(self.make_blocks(config, ops))
        self.norm_out = RMSNorm(last, 3, ops)
        self.conv_out = CausalConv3d(last, config.frame_channels, (3, 3, 3), ops, pad=1)

    @staticmethod
    def make_blocks(config: WanVAEConfig, ops: Any) -> Iterator[nn.Module]:
        mults = config.dim_mult[::-1]
        dims = [config.decoder_dim * m for m in (mults[0], *mults)]
        temporal = config.temperal_downsample[::-1]
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            # Every upsampler halves the channels, so all stages but the first start from half of the last width.
            up = Upsample(c_out, c_out // 2, temporal[i], ops) if i < len(temporal) else None
            yield UpBlock(c_in if i == 0 else c_in // 2, c_out, config.num_res_blocks, up, ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1, rgb: list[Tensor] | None = None) -> Tensor:
        """Frames, or with `rgb` their 8-bit values, which do not show NaN: the sums of what they are made of, which do,
        are appended to `rgb`."""
        stream.begin(x)
        x = self.mid_block(self.conv_in(x, stream), stream)
        return stream.in_stripes(partial(self._up, rgb=rgb), x, stripes)

    def _up(self, x: Tensor, stream: Stream, rgb: list[Tensor] | None = None) -> Tensor:
        for block in self.up_blocks:
            x = block(x, stream)
        if rgb is None:
            return self.conv_out.after(self.norm_out, x, stream)
        rgb.append(x.sum(dtype=torch.float32))
        return self.conv_out.rgb_after(self.norm_out, x, stream)


class WanVAE(nn.Module):
    """Encoder and decoder with the latents' normalisation; see the module docstring.

    ops: an object with the functions `vae_...` and `to_rgb` of `fastvid.ops.reference`.
    """

    encoder_type: type[Encoder] = Encoder
    decoder_type: type[Decoder] = Decoder

    def __init__(self, config: WanVAEConfig, ops: Any = reference) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.encoder = self.encoder_type(config, ops)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), ops)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1), ops)
        self.decoder = self.decoder_type(config, ops)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, on like's device in fp32 or fp64."""
        kind = torch.promote_types(like.dtype, torch.float32)
        mean, std = (
            upload(torch.tensor(values, dtype=kind, device="cpu"), like.device).view(1, -1, 1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std

    def encode(
        self, x: Tensor, cache: Cache | None = None, stripes: int = 1, reuse: bool = False, bands: Bands | None = None
    ) -> tuple[Tensor, Cache]:
        """Encodes the next frames of a stream to the mean of their latents.

        Args:
            x: frames [B, 3, F, H, W] in [-1, 1]; H and W multiples of the spatial scale (8). F is 4k + 1 where a stream
                starts (cache None) and 4k afterwards.
            cache: what the previous call returned, None at the start of a stream.
            stripes: in how many parts the rows are worked on, 1 to H/8: memory falls, the result and the cache do not
                change. Any number for any chunk of a stream.
            reuse: the given cache's memory becomes that of the new cache, so that there is only one; the given one is
                worthless then.
            bands: ranks that share the rows; all of them call this alike, with stripes of 1, and each gets the whole
                result and a cache of its own part.

        Returns:
            Normalised latents [B, C, T, H/8, W/8], in fp32 if the weights are in 16 bits, and the cache for the next
            chunk.

        Raises:
            ValueError: a size, a number of frames or of stripes that the network cannot take.
        """
        self._check_frames(x, first=cache is None)
        x, scale = x.to(self.quant_conv.weight.dtype), self.config.spatial_scale
        band = band_of(bands, x.shape[3] // scale, stripes)

        def means(part: Tensor, stream: Stream) -> Tensor:
            return self.quant_conv(self.encoder(part, stream, stripes), stream)[:, : self.config.z_dim]

        def no_rows(part: Tensor, first: bool) -> Tensor:
            count = -(-part.shape[2] // self.config.temporal_scale)
            return part.new_empty(len(part), self.config.z_dim, count, 0, part.shape[4] // scale)

        made, cache = _run(means, no_rows, self._steps(x, cache is None), cache, reuse, band, scale)
        mean, std = self._statistics(x)
        made = (made - mean) / std
        return made if band is None else band.join(made, 3), cache

    def decode(
        self, z: Tensor, cache: Cache | None = None, stripes: int = 1, reuse: bool = False, bands: Bands | None = None
    ) -> tuple[Tensor, Cache]:
        """Decodes the next latents of a stream.

        Args:
            z: normalised latents [B, C, T, h, w], any T >= 1.
            cache: what the previous call returned, None at the start of a stream.
            stripes: in how many parts the rows are worked on, 1 to h; see encode.
            reuse, bands: see encode.

        Returns:
            Frames [B, 3, F, 8h, 8w] clamped to [-1, 1], F = 4T - 3 at the start of a stream and 4T afterwards,
            and the cache for the next chunk.

        Raises:
            ValueError: a number of stripes that the network cannot take.
        """
        frames, cache = self.decode_raw(z, cache, stripes, reuse, bands)
        return frames.clamp(-1.0, 1.0), cache

    def decode_raw(
        self, z: Tensor, cache: Cache | None = None, stripes: int = 1, reuse: bool = False, bands: Bands | None = None
    ) -> tuple[Tensor, Cache]:
        """`decode` before the clamp: what training needs, since a clamp has no gradient outside."""
        band = band_of(bands, z.shape[3], stripes)
        frames, cache = self._decode(partial(self.decoder, stripes=stripes), z, cache, reuse, band)
        return frames if band is None else band.join(frames, 3, self.config.spatial_scale), cache

    def decode_rgb(
        self, z: Tensor, cache: Cache | None = None, stripes: int = 1, reuse: bool = False, bands: Bands | None = None
    ) -> tuple[Tensor, Cache]:
        """`decode` to 8-bit RGB, uint8 [B, F, 8h, 8w, 3]: what ops.to_rgb makes of the frames.

        Raises FloatingPointError, on all ranks, if NaN or infinity come out. Waits for the device.
        """
        band, sums = band_of(bands, z.shape[3], stripes), list[Tensor]()
        frames, cache = self._decode(partial(self.decoder, stripes=stripes, rgb=sums), z, cache, reuse, band)
        frames = frames.permute(0, 2, 3, 4, 1).to(torch.uint8)  # of a rank that holds no rows there are none
        finite = all(map(math.isfinite, torch.stack(sums).tolist())) if sums and not z.is_meta else True
        if not (finite if band is None else band.agree(finite)):
            raise FloatingPointError("the decoder made NaN or infinity")
        return frames if band is None else band.join(frames, 2, self.config.spatial_scale), cache

    def _decode(
        self, decoder: Callable[..., Tensor], z: Tensor, cache: Cache | None, reuse: bool, band: Band | None
    ) -> tuple[Tensor, Cache]:
        """What `decoder` makes of the latents; of a rank's rows, its rows of that."""
        mean, std = self._statistics(z)
        z = (z * std + mean).to(self.quant_conv.weight.dtype)  # rounded once, where weights are 16 bits
        scale, time = self.config.spatial_scale, self.config.temporal_scale
        parts = z.split(self._latents_at_once(z, z[:, 0, 0].numel() * scale**2), dim=2)

        def no_rows(part: Tensor, first: bool) -> Tensor:
            return part.new_empty(len(part), 3, time * part.shape[2] - first * (time - 1), 0, part.shape[4] * scale)

        return _run(
            lambda x, stream: decoder(self.post_quant_conv(x, stream), stream), no_rows, parts, cache, reuse, band
        )

    def _steps(self, frames: Tensor, first: bool) -> list[Tensor]:
        time = self.config.temporal_scale
        step = time * self._latents_at_once(frames, frames[:, 0, 0].numel())
        lead = step - time + 1 if first else step
        rest = frames[:, :, lead:]
        return [frames[:, :, :lead], *(rest.split(step, dim=2) if rest.shape[2] else ())]

    def _latents_at_once(self, x: Tensor, pixels: int) -> int:
        """How many latent frames one step takes: all that are given, but on a CPU only what its caches like."""
        if not vae.channels_last(x, self.quant_conv.weight):
            return max(1, x.shape[2])
        return max(1, CPU_CHUNK // (pixels * self.config.widest * self.config.temporal_scale))

    def _check_frames(self, frames: Tensor, first: bool) -> None:
        _, _, f, h, w = frames.shape
        space, time = self.config.spatial_scale, self.config.temporal_scale
        if h % space or w % space:
            raise ValueError(f"frames are {h}x{w}; height and width must be multiples of {space}")
        if f < 1 or (f - first) % time:
            want = f"{time}k+1 at the start of a stream" if first else f"{time}k after the start"
            raise ValueError(f"{f} frames given; the encoder takes {want}")


def _run(
    network: Layers,
    no_rows: Callable[[Tensor, bool], Tensor],
    parts: Iterable[Tensor],
    cache: Cache | None,
    reuse: bool,
    band: Band | None,
    scale: int = 1,
) -> tuple[Tensor, Cache]:
    """network(part, stream) of one part after another, joined in time; on a rank that shares rows, of its own.

    no_rows: (part, whether it starts the stream) -> the result of a rank that holds none. scale: rows of a part for
    each of the latents'.
    """
    made = []
    for part in parts:
        if band is not None and not band.rows:
            made.append(no_rows(part, cache is None))
            cache = ()
            continue
        stream, cache = stream_of(cache, reuse, band), None
        made.append(network(part if band is None else band.cut(part, scale), stream))
        cache, reuse = stream.cache(), True
    assert cache is not None, "no parts"
    return made[0] if len(made) == 1 else torch.cat(made, dim=2), cache
