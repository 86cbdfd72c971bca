"""The Wan 2.1 video compression network: causal 3D convolutions, 8x8 in space and 4 in time.

`WanVAE.encode` and `WanVAE.decode` are each one function over chunks: they take what came before as a cache and
return the cache for what comes next, so a stream is decoded in constant memory and a whole sequence is just one
chunk. All chunk lengths give the same result. Where a frame is too large for memory, the stages that work at its full
size take it in stripes of rows (vae_stream.py), again with the same result; the middle, whose attention sees the whole
frame, is small and never divided. Parameter names are those of diffusers' AutoencoderKLWan. What is fast is in
fastvid/ops/vae.py (on a CPU) and vae_kernels.py (on a GPU); here is only how the parts connect. The 2.2 network
(wan_vae22.py) puts other blocks into the same Encoder and Decoder.

Shapes: B batch, C channels, F pixel frames, T latent frames, H/W height and width at the stage in question.
Maths: Wan2.1 `wan/modules/vae.py` (Apache-2.0), rewritten as one causal network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.configs import read_vae_config
from fastvid.models.vae_bands import Band, Bands, band_of, stream_of
from fastvid.models.vae_stream import Cache, Stream, Window, nothing
from fastvid.ops import reference, vae

if TYPE_CHECKING:
    from fastvid.models.wan_vae22 import VAEConfig

# Values of the widest activation that one step on a CPU may make: 64 MB, or one latent frame if that is more.
CPU_CHUNK = 2**24


@dataclass(frozen=True)
class WanVAEConfig:
    """What `vae/config.json` says. Channel widths are base_dim * dim_mult; temporal scale is 2 per True."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanVAEConfig:
        """Reads a diffusers AutoencoderKLWan configuration.

        Raises:
            CheckpointError: the configuration asks for what this network cannot do.
        """
        if config.get("is_residual"):
            raise CheckpointError("vae/config.json describes a Wan 2.2 VAE (is_residual): read it as WanVAE22Config")
        if config.get("patch_size") not in (None, 1):
            raise CheckpointError(
                f"vae/config.json has patch_size={config['patch_size']}; only the Wan 2.2 VAE (is_residual) has patches"
            )
        return read_vae_config(cls, config)

    @property
    def decoder_base_dim(self) -> int:
        return self.base_dim

    @property
    def frame_channels(self) -> int:
        """Channels of the frames as the network's first layer sees them."""
        return 3

    @property
    def widest(self) -> int:
        """Values that the widest activation holds for each pixel of a frame."""
        return self.base_dim

    @property
    def spatial_scale(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_scale(self) -> int:
        return 2 ** sum(self.temperal_downsample)


class RMSNorm(nn.Module):
    """ops.vae_rms_norm with its gamma [C, 1, ...]."""

    def __init__(self, channels: int, spatial_dims: int, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.vae_rms_norm(x, self.gamma)


class CausalConv3d(nn.Conv3d):
    """3D convolution that sees only the past: kt - 1 frames of history on the left (zeros at the start)."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], ops: Any, pad: int = 0) -> None:
        super().__init__(c_in, c_out, kernel, padding=(0, pad, pad))
        self.ops = ops

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.kernel_size[0] == 1:
            return self.ops.vae_conv3d(x, self.weight, self.bias) if x.shape[3] else nothing(x, self.out_channels)
        pad = self.padding[1]
        window = stream.window(x, above=pad, below=pad, cached=True)
        if window is None:
            return nothing(x, self.out_channels)
        given = (window.x, window.past, self.weight, self.bias)
        out, kept = self.ops.vae_causal_conv3d(*given, self.padding[1:], window.edges)
        stream.keep(kept)
        return out

    def after(self, norm: RMSNorm, x: Tensor, stream: Stream, residual: Tensor | None = None) -> Tensor:
        """residual + self(silu(norm(x))), for a 3x3x3 kernel; may overwrite the residual."""
        window, pixels = self._normed_window(norm, x, stream)
        if residual is not None:
            residual = stream.delay(residual, window.rows if window else 0)
        if window is None:
            return nothing(x, self.out_channels)
        given = (window.x, window.past, norm.gamma, self.weight, self.bias)
        out, kept = self.ops.vae_norm_silu_conv3d(*given, residual, window.edges, pixels)
        stream.keep(kept)
        return out

    def rgb_after(self, norm: RMSNorm, x: Tensor, stream: Stream) -> Tensor:
        """The same as 8-bit values, for 3 channels out."""
        window, pixels = self._normed_window(norm, x, stream)
        if window is None:
            return nothing(x, self.out_channels).byte()
        given = (window.x, window.past, norm.gamma, self.weight, self.bias)
        out, kept = self.ops.vae_norm_silu_conv3d_rgb(*given, window.edges, pixels, self.ops.to_rgb)
        stream.keep(kept)
        return out

    def _normed_window(self, norm: RMSNorm, x: Tensor, stream: Stream) -> tuple[Window | None, int]:
        """The rows to be worked on, and pixels of the whole chunk."""
        pixels = x.shape[2] * stream.height * x.shape[4]
        grain = vae.row_grain(x, norm.gamma, self.weight, pixels)
        return stream.window(x, above=1, below=1, grain=grain, cached=True), pixels


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input."""

    def __init__(self, c_in: int, c_out: int, ops: Any) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c_in, 3, ops)
        self.conv1 = CausalConv3d(c_in, c_out, (3, 3, 3), ops, pad=1)
        self.norm2 = RMSNorm(c_out, 3, ops)
        self.conv2 = CausalConv3d(c_out, c_out, (3, 3, 3), ops, pad=1)
        self.conv_shortcut = CausalConv3d(c_in, c_out, (1, 1, 1), ops) if c_in != c_out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = self.conv1.after(self.norm1, x, stream)
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x, stream)
        return self.conv2.after(self.norm2, h, stream, residual)


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame, residual."""

    def __init__(self, channels: int, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        self.norm = RMSNorm(channels, 2, ops)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        b, c, t, h, w = x.shape
        normed = self.ops.vae_rms_norm(x, self.norm.gamma[..., None])
        qkv = self._linear(self.to_qkv, normed).permute(0, 2, 3, 4, 1).reshape(b * t, 1, h * w, 3 * c)
        q, k, v = qkv[..., :c], *stream.whole(qkv[..., c:], 2).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        return x + self._linear(self.proj, out)

    def _linear(self, of: nn.Conv2d, x: Tensor) -> Tensor:
        """`of`, a 1x1 convolution as the checkpoints have it, of every pixel of x [B, C, T, H, W]."""
        return self.ops.vae_conv3d(x, of.weight[:, :, None], of.bias)


class MidBlock(nn.Module):
    def __init__(self, channels: int, ops: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, ops) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, ops)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, stream), stream)
        return self.resnets[1](x, stream)


class Downsample(nn.Module):
    """Halves height and width; with `temporal`, also the frames: the stream's first frame stands alone."""

    def __init__(self, channels: int, temporal: bool, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self._halve_rows(x, stream)
        if self.time_conv is None:
            return x
        window = stream.window(x, cached=True)
        if window is None:
            return x[:, :, : (x.shape[2] + 1) // 2]
        # A copy in any case: the block that takes x next may overwrite it.
        last = x[:, :, -1:].clone()
        if window.past is not None:
            x = self._halve_frames(x, window.past)
        elif x.shape[2] > 1:
            x = torch.cat((x[:, :, :1], self._halve_frames(x, None)), dim=2)
        stream.keep(last)
        return x

    def _halve_rows(self, x: Tensor, stream: Stream) -> Tensor:
        # A row sees two rows from its own on and the one below them.
        window = stream.window(x, below=1, grain=2)
        stream.height //= 2
        if window is None:
            return nothing(x, x.shape[1])[..., : x.shape[4] // 2]
        conv = self.resample[1]
        return self.ops.vae_downsample_conv2d(window.x, conv.weight, conv.bias, window.edges[1])

    def _halve_frames(self, x: Tensor, past: Tensor | None) -> Tensor:
        return self.ops.vae_halve_frames(x, past, self.time_conv.weight, self.time_conv.bias)


class Upsample(nn.Module):
    """Doubles height and width, c_in channels to c_out; with `temporal`, also doubles all but the first frame."""

    def __init__(self, c_in: int, c_out: int, temporal: bool, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        # An index of its own before the convolution, as in diffusers, whose names have resample.1.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time_conv = CausalConv3d(c_in, 2 * c_in, (3, 1, 1), ops) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            x = self._double_after_first(x, stream) if stream.first else self._double(x, stream)
        window = stream.window(x, above=1, below=1)
        stream.height *= 2
        conv = self.resample[1]
        if window is None:
            return nothing(x, conv.out_channels, scale=2)
        return self.ops.vae_upsample_conv2d(window.x, conv.weight, conv.bias, window.edges)

    def _double_after_first(self, x: Tensor, stream: Stream) -> Tensor:
        # The stream's first frame bypasses the temporal convolution and is not in its history either.
        if x.shape[2] == 1:
            if stream.window(x, cached=True) is not None:
                # By cat, which keeps the order of x's memory.
                stream.keep(torch.cat([torch.zeros_like(x)] * 2, dim=2))
            return x
        return torch.cat((x[:, :, :1], self._double(x[:, :, 1:], stream)), dim=2)

    def _double(self, x: Tensor, stream: Stream) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T, H, W]."""
        window = stream.window(x, cached=True)
        if window is None:
            return nothing(x, x.shape[1]).repeat(1, 1, 2, 1, 1)
        conv = self.time_conv
        out, kept = self.ops.vae_double_frames(window.x, window.past, conv.weight, conv.bias)
        stream.keep(kept)
        return out


class Encoder(nn.Module):
    """Frames to the means and variances of their latents, 2 * z_dim channels."""

    def __init__(self, config: VAEConfig, ops: Any) -> None:
        super().__init__()
        first, last = config.base_dim, config.base_dim * config.dim_mult[-1]
        self.conv_in = CausalConv3d(config.frame_channels, first, (3, 3, 3), ops, pad=1)
        self.down_blocks = nn.ModuleList(self.make_blocks(config, ops))
        self.mid_block = MidBlock(last, ops)
        self.norm_out = RMSNorm(last, 3, ops)
        self.conv_out = CausalConv3d(last, 2 * config.z_dim, (3, 3, 3), ops, pad=1)

    @staticmethod
    def make_blocks(config: VAEConfig, ops: Any) -> Iterator[nn.Module]:
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

    def __init__(self, config: VAEConfig, ops: Any) -> None:
        super().__init__()
        first, last = (config.decoder_base_dim * config.dim_mult[i] for i in (-1, 0))
        self.conv_in = CausalConv3d(config.z_dim, first, (3, 3, 3), ops, pad=1)
        self.mid_block = MidBlock(first, ops)
        self.up_blocks = nn.ModuleList(self.make_blocks(config, ops))
        self.norm_out = RMSNorm(last, 3, ops)
        self.conv_out = CausalConv3d(last, config.frame_channels, (3, 3, 3), ops, pad=1)

    @staticmethod
    def make_blocks(config: VAEConfig, ops: Any) -> Iterator[nn.Module]:
        mults = config.dim_mult[::-1]
        dims = [config.decoder_base_dim * m for m in (mults[0], *mults)]
        temporal = config.temperal_downsample[::-1]
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            # Every upsampler halves the channels, so all stages but the first start from half of the last width.
            up = Upsample(c_out, c_out // 2, temporal[i], ops) if i < len(temporal) else None
            yield UpBlock(c_in if i == 0 else c_in // 2, c_out, config.num_res_blocks, up, ops)

    def forward(self, x: Tensor, stream: Stream, stripes: int = 1, rgb: bool = False) -> Tensor:
        """Frames, or with `rgb` their 8-bit values."""
        stream.begin(x)
        x = self.mid_block(self.conv_in(x, stream), stream)
        return stream.in_stripes(self._up_to_rgb if rgb else self._up, x, stripes)

    def _up(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv_out.after(self.norm_out, self._blocks(x, stream), stream)

    def _up_to_rgb(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv_out.rgb_after(self.norm_out, self._blocks(x, stream), stream)

    def _blocks(self, x: Tensor, stream: Stream) -> Tensor:
        for block in self.up_blocks:
            x = block(x, stream)
        return x


class WanVAE(nn.Module):
    """Encoder and decoder with the latents' normalisation; see the module docstring.

    ops: an object with the functions `vae_...` and `to_rgb` of `fastvid.ops.reference`.
    """

    encoder_type, decoder_type = Encoder, Decoder

    def __init__(self, config: VAEConfig, ops: Any = reference) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.encoder = self.encoder_type(config, ops)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), ops)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1), ops)
        self.decoder = self.decoder_type(config, ops)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(like.dtype, torch.float32)
        mean = torch.tensor(self.config.latents_mean, device=like.device, dtype=kind)
        std = torch.tensor(self.config.latents_std, device=like.device, dtype=kind)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def encode(
        self,
        frames: Tensor,
        cache: Cache | None = None,
        stripes: int = 1,
        reuse_cache: bool = False,
        bands: Bands | None = None,
    ) -> tuple[Tensor, Cache]:
        """Encodes the next frames of a stream to the mean of their latents.

        Args:
            frames: [B, 3, F, H, W] in [-1, 1]; H and W multiples of the spatial scale (8). F is 4k + 1 where a stream
                starts (cache None) and 4k afterwards.
            cache: what the previous call returned, None at the start of a stream.
            stripes: in how many parts the rows are worked on, 1 to H/8: memory falls, the result and the cache do not
                change. Any number for any chunk of a stream.
            reuse_cache: the given cache's memory becomes that of the new cache, so that there is only one; the given
                one is worthless then.
            bands: ranks that share the rows; all of them call this alike, with stripes of 1, and each gets the whole
                result and a cache of its own part.

        Returns:
            Normalised latents [B, C, T, H/8, W/8], in fp32 if the weights are in 16 bits, and the cache for the next
            chunk.

        Raises:
            ValueError: a size, a number of frames or of stripes that the network cannot take.
        """
        self._check_frames(frames, first=cache is None)
        frames = frames.to(self.quant_conv.weight.dtype)
        scale, rows = self.config.spatial_scale, frames.shape[3] // self.config.spatial_scale
        band = band_of(bands, rows, stripes)
        latents, first = [], cache is None
        for part in self._steps(frames, first):
            if band is not None and not band.rows:
                count = (part.shape[2] + self.config.temporal_scale - 1) // self.config.temporal_scale
                latents.append(part.new_empty(len(part), self.config.z_dim, count, 0, frames.shape[4] // scale))
                cache = ()
                continue
            stream, cache = stream_of(cache, reuse_cache, band), None
            part = part if band is None else band.cut(part, scale)
            moments = self.quant_conv(self.encoder(part, stream, stripes), stream)
            latents.append(moments[:, : self.config.z_dim])
            cache, reuse_cache = stream.cache(), True
        mean, std = self._statistics(frames)
        made = (torch.cat(latents, dim=2) - mean) / std
        return made if band is None else band.join(made, 3), cache

    def decode(
        self,
        latents: Tensor,
        cache: Cache | None = None,
        stripes: int = 1,
        reuse_cache: bool = False,
        bands: Bands | None = None,
    ) -> tuple[Tensor, Cache]:
        """Decodes the next latents of a stream.

        Args:
            latents: normalised, [B, C, T, h, w], any T >= 1.
            cache: what the previous call returned, None at the start of a stream.
            stripes: in how many parts the rows are worked on, 1 to h; see encode.
            reuse_cache, bands: see encode.

        Returns:
            Frames [B, 3, F, 8h, 8w] clamped to [-1, 1], F = 4T - 3 at the start of a stream and 4T afterwards,
            and the cache for the next chunk.

        Raises:
            ValueError: a number of stripes that the network cannot take.
        """
        frames, cache = self.decode_raw(latents, cache, stripes, reuse_cache, bands)
        return frames.clamp(-1.0, 1.0), cache

    def decode_raw(
        self,
        latents: Tensor,
        cache: Cache | None = None,
        stripes: int = 1,
        reuse_cache: bool = False,
        bands: Bands | None = None,
    ) -> tuple[Tensor, Cache]:
        """`decode` before the clamp: what training needs, since a clamp has no gradient outside."""
        band = band_of(bands, latents.shape[3], stripes)
        frames, cache = self._decode(self.decoder, latents, cache, stripes, reuse_cache, band)
        return frames if band is None else band.join(frames, 3, self.config.spatial_scale), cache

    def decode_rgb(
        self,
        latents: Tensor,
        cache: Cache | None = None,
        stripes: int = 1,
        reuse_cache: bool = False,
        bands: Bands | None = None,
    ) -> tuple[Tensor, Cache]:
        """`decode` to 8-bit RGB, uint8 [B, F, 8h, 8w, 3]: what ops.to_rgb makes of the frames."""
        band = band_of(bands, latents.shape[3], stripes)
        frames, cache = self._decode(partial(self.decoder, rgb=True), latents, cache, stripes, reuse_cache, band)
        frames = frames.permute(0, 2, 3, 4, 1).to(torch.uint8)  # of a rank that holds no rows there are none
        return frames if band is None else band.join(frames, 2, self.config.spatial_scale), cache

    def _decode(
        self,
        decoder: Callable[..., Tensor],
        latents: Tensor,
        cache: Cache | None,
        stripes: int,
        reuse_cache: bool,
        band: Band | None,
    ) -> tuple[Tensor, Cache]:
        """What `decoder` makes of the latents; of a rank's rows, its rows of that."""
        mean, std = self._statistics(latents)
        latents = (latents * std + mean).to(self.quant_conv.weight.dtype)  # rounded once, where weights are 16 bits
        scale = self.config.spatial_scale
        at_once = self._latents_at_once(latents, latents[:, 0, 0].numel() * scale**2)
        if band is not None and not band.rows:
            count = self.config.temporal_scale * latents.shape[2] - (cache is None) * (self.config.temporal_scale - 1)
            return latents.new_empty(len(latents), 3, count, 0, latents.shape[4] * scale), ()
        latents, frames = latents if band is None else band.cut(latents), []
        for part in latents.split(at_once, dim=2):
            stream, cache = stream_of(cache, reuse_cache, band), None
            frames.append(decoder(self.post_quant_conv(part, stream), stream, stripes))
            cache, reuse_cache = stream.cache(), True
        return torch.cat(frames, dim=2), cache

    def _steps(self, frames: Tensor, first: bool) -> list[Tensor]:
        """The frames of one step after another."""
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
