"""The Wan 2.1 video compression network: causal 3D convolutions, 8x8 in space and 4 in time.

`WanVAE.encode` and `WanVAE.decode` are each one function over chunks: they take what came before as a cache and
return the cache for what comes next, so a stream is decoded in constant memory and a whole sequence is just one
chunk. All chunk lengths give the same result. Parameter names are those of diffusers' AutoencoderKLWan.

Shapes: B batch, C channels, F pixel frames, T latent frames, H/W height and width at the stage in question.
Maths: Wan2.1 `wan/modules/vae.py` (Apache-2.0), rewritten as one causal network.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError

Cache = tuple[Tensor, ...]


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
    def from_dict(cls, config: dict[str, Any]) -> WanVAEConfig:
        """Reads a diffusers AutoencoderKLWan configuration.

        Raises:
            CheckpointError: the configuration asks for what this network cannot do (the 2.2 residual VAE).
        """
        if config.get("is_residual") or config.get("patch_size") not in (None, 1):
            raise CheckpointError("vae/config.json describes a Wan 2.2 VAE (is_residual); only the 2.1 VAE is supported")
        if config.get("attn_scales"):
            raise CheckpointError(f"vae/config.json has attn_scales={config['attn_scales']}; only [] is supported")
        known = {f.name for f in fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        vae = cls(**values)
        if len(vae.latents_mean) != vae.z_dim or len(vae.latents_std) != vae.z_dim:
            raise CheckpointError(f"vae/config.json: latents_mean and latents_std need z_dim={vae.z_dim} numbers each")
        return vae

    @property
    def spatial_scale(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_scale(self) -> int:
        return 2 ** sum(self.temperal_downsample)


class Stream:
    """Walks one chunk through the network: hands every causal layer its past and collects its new past.

    The layers run in a fixed order, so the cache is a plain tuple in that order; None means nothing came before.
    """

    def __init__(self, cache: Cache | None) -> None:
        self.first = cache is None
        self._past = iter(cache or ())
        self._next: list[Tensor] = []

    def past(self) -> Tensor | None:
        return None if self.first else next(self._past)

    def keep(self, frames: Tensor) -> None:
        # A clone, not a view: a view would keep the whole chunk's activation alive.
        self._next.append(frames if frames.requires_grad else frames.clone())

    def cache(self) -> Cache:
        return tuple(self._next)


class RMSNorm(nn.Module):
    """x / max(||x||_2 over C, 1e-12) * sqrt(C) * gamma, over dim 1."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))
        self.scale = channels**0.5

    def forward(self, x: Tensor) -> Tensor:
        # fp32 statistics, one multiplication of the whole tensor less than F.normalize.
        norm = x.float().square().sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
        return x * (self.scale / norm).to(x.dtype) * self.gamma.to(x.dtype)


class CausalConv3d(nn.Conv3d):
    """3D convolution that sees only the past: kt - 1 frames of history on the left (zeros at the start)."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], pad: int = 0, stride_t: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride=(stride_t, 1, 1), padding=(0, pad, pad))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        history = self.kernel_size[0] - 1
        if history == 0:
            return self._conv_forward(x, self.weight, self.bias)
        past = stream.past()
        if past is None and x.shape[2] == 1:
            # A lone first frame: its history is zeros, so only the last tap counts.
            stream.keep(F.pad(x, (0, 0, 0, 0, history - 1, 0)))
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])[:, :, None]
        if past is None:
            past = x.new_zeros(*x.shape[:2], history, *x.shape[3:])
        x = torch.cat((past, x), dim=2)
        stream.keep(x[:, :, -history:])
        return self._conv_forward(x, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c_in, 3)
        self.conv1 = CausalConv3d(c_in, c_out, (3, 3, 3), pad=1)
        self.norm2 = RMSNorm(c_out, 3)
        self.conv2 = CausalConv3d(c_out, c_out, (3, 3, 3), pad=1)
        self.conv_shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), stream)
        h = self.conv2(F.silu(self.norm2(h)), stream)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x, stream))


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(b * t, c, h, w)
        return x + self.proj(out).reshape(b, t, c, h, w).transpose(1, 2)


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, stream))
        return self.resnets[1](x, stream)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a 2D layer to every frame of x [B, C, T, H, W]."""
    b, c, t, h, w = x.shape
    out = layer(x.transpose(1, 2).reshape(b * t, c, h, w))
    return out.reshape(b, t, *out.shape[1:]).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width; with `temporal`, also the frames: the stream's first frame stands alone."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = stream.past()
        stream.keep(x[:, :, -1:])
        if past is not None:
            return self.time_conv(torch.cat((past, x), dim=2))
        return x if x.shape[2] == 1 else torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; with `temporal`, also doubles all but the first frame."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            # The stream's first frame bypasses the temporal convolution and is not in its history either.
            head, body = (x[:, :, :1], x[:, :, 1:]) if stream.first else (x[:, :, :0], x)
            x = torch.cat((head, self._double(body, stream)), dim=2)
        return per_frame(self.resample, x)

    def _double(self, x: Tensor, stream: Stream) -> Tensor:
        b, c, t, h, w = x.shape
        if t == 0:
            stream.keep(x.new_zeros(b, c, 2, h, w))
            return x
        x = self.time_conv(x, stream).reshape(b, 2, c, t, h, w)
        return x.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)


class Encoder(nn.Module):
    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, dims[0], (3, 3, 3), pad=1)
        blocks: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            for j in range(config.num_res_blocks):
                blocks.append(ResidualBlock(c_in if j == 0 else c_out, c_out))
            if i < len(config.temperal_downsample):
                blocks.append(Downsample(c_out, config.temperal_downsample[i]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3), pad=1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, num_res_blocks: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(c_in if j == 0 else c_out, c_out) for j in range(num_res_blocks + 1)]
        )
        if upsample is not None:
            self.upsamplers = nn.ModuleList([upsample])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream)
        return self.upsamplers[0](x, stream) if hasattr(self, "upsamplers") else x


class Decoder(nn.Module):
    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        mults = config.dim_mult[::-1]
        dims = [config.base_dim * m for m in (mults[0], *mults)]
        temporal = config.temperal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3), pad=1)
        self.mid_block = MidBlock(dims[0])
        blocks = []
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            # Every upsampler halves the channels, so all stages but the first start from half of the last width.
            up = Upsample(c_out, temporal[i]) if i < len(temporal) else None
            blocks.append(UpBlock(c_in if i == 0 else c_in // 2, c_out, config.num_res_blocks, up))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 3, (3, 3, 3), pad=1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.mid_block(self.conv_in(x, stream), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class WanVAE(nn.Module):
    """Encoder and decoder with the latents' normalisation; see the module docstring."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.config.latents_mean, device=like.device, dtype=like.dtype)
        std = torch.tensor(self.config.latents_std, device=like.device, dtype=like.dtype)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def encode(self, frames: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Encodes the next frames of a stream to the mean of their latents.

        Args:
            frames: [B, 3, F, H, W] in [-1, 1]; H and W multiples of 8. F is 4k + 1 where a stream starts
                (cache None) and 4k afterwards.
            cache: what the previous call returned, None at the start of a stream.

        Returns:
            Normalised latents [B, C, T, H/8, W/8] and the cache for the next chunk.

        Raises:
            ValueError: a size or a number of frames that the network cannot take.
        """
        self._check_frames(frames, first=cache is None)
        stream = Stream(cache)
        moments = self.quant_conv(self.encoder(frames, stream), stream)
        mean, std = self._statistics(moments)
        return (moments[:, : self.config.z_dim] - mean) / std, stream.cache()

    def decode(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Decodes the next latents of a stream.

        Args:
            latents: normalised, [B, C, T, h, w], any T >= 1.
            cache: what the previous call returned, None at the start of a stream.

        Returns:
            Frames [B, 3, F, 8h, 8w] clamped to [-1, 1], F = 4T - 3 at the start of a stream and 4T afterwards,
            and the cache for the next chunk.
        """
        frames, cache = self.decode_raw(latents, cache)
        return frames.clamp(-1.0, 1.0), cache

    def decode_raw(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """`decode` before the clamp: what training needs, since a clamp has no gradient outside."""
        mean, std = self._statistics(latents)
        stream = Stream(cache)
        return self.decoder(self.post_quant_conv(latents * std + mean, stream), stream), stream.cache()

    def _check_frames(self, frames: Tensor, first: bool) -> None:
        _, _, f, h, w = frames.shape
        space, time = self.config.spatial_scale, self.config.temporal_scale
        if h % space or w % space:
            raise ValueError(f"frames are {h}x{w}; height and width must be multiples of {space}")
        if f < 1 or (f - first) % time:
            want = f"{time}k+1 at the start of a stream" if first else f"{time}k after the start"
            raise ValueError(f"{f} frames given; the encoder takes {want}")
