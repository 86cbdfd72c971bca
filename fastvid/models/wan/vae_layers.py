"""The layers of the Wan video compression networks: causal convolutions after a norm, residual blocks, attention within
frames, halves and doubles of size and frames. vae.py puts them together.

Shapes: B batch, C channels, T frames, H/W height and width at the stage in question.
Maths: Wan2.1 `wan/modules/vae.py` (Apache-2.0), rewritten as one causal network.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.models.common.vae_stream import Stream, Window, like, nothing
from fastvid.ops import vae


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
        self.ops, self.pad = ops, pad

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]  # all layers take the stream
        if self.kernel_size[0] == 1:
            return self.ops.vae_conv3d(x, self.weight, self.bias) if x.shape[3] else nothing(x, self.out_channels)
        window = stream.window(x, above=self.pad, below=self.pad, cached=True)
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
        inputs = (window.x, window.past, norm.gamma, self.weight, self.bias)
        out, kept = self.ops.vae_norm_silu_conv3d(*inputs, residual, window.edges, pixels)
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
        assert self.time_conv is not None
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
        conv = cast(nn.Conv2d, self.resample[1])
        if window is None:
            return nothing(x, conv.out_channels, scale=2)
        return self.ops.vae_upsample_conv2d(window.x, conv.weight, conv.bias, window.edges)

    def _double_after_first(self, x: Tensor, stream: Stream) -> Tensor:
        # The stream's first frame bypasses the temporal convolution and is not in its history either.
        if x.shape[2] == 1:
            if stream.window(x, cached=True) is not None:
                stream.keep(like(x, 2, x.shape[3]).zero_())
            return x
        return torch.cat((x[:, :, :1], self._double(x[:, :, 1:], stream)), dim=2)

    def _double(self, x: Tensor, stream: Stream) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T, H, W]."""
        window = stream.window(x, cached=True)
        if window is None:
            return nothing(x, x.shape[1]).repeat(1, 1, 2, 1, 1)
        conv = self.time_conv
        assert conv is not None
        out, kept = self.ops.vae_double_frames(window.x, window.past, conv.weight, conv.bias)
        stream.keep(kept)
        return out
