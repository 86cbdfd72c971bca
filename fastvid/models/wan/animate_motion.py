"""How Wan-Animate sees a face: a motion encoder makes of each picture a vector (LIA's, of StyleGAN2's layers), a face
encoder makes of these the tokens of every latent frame. Parameter names are those of diffusers'
WanAnimateTransformer3DModel.

Shapes: B batch, F frames of the face video, S side of its pictures, T latent frames of it, d width of the transformer.
Maths: Wan2.2 `wan/modules/animate/motion_encoder.py` and `face_blocks.py` (Apache-2.0).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.layers.linear import Linear, normal_parameter
from fastvid.models.wan.animate_config import WanAnimateConfig

SLOPE = 0.2  # of the leaky ReLU, whose result is multiplied by sqrt(2)
BLUR = (1.0, 3.0, 3.0, 1.0)
KERNEL = 3  # of the face encoder's convolutions along time
NORM_EPS = 1e-6  # of the face encoder's norms, whatever the config's eps
NUDGE = 1e-8  # added to the directions of motion before they are made orthogonal


class Bias(nn.Module):
    """A bias for each channel and a leaky ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return F.leaky_relu(x + self.bias[:, None, None], SLOPE) * math.sqrt(2)


class ScaledConv(nn.Module):
    """A convolution whose weights are scaled by 1 / sqrt(fan in) when it runs. halves: it reads the blurred picture and
    makes one of half its height and width."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, halves: bool = False, activation: bool = True
    ) -> None:
        super().__init__()
        self.weight = normal_parameter(outputs, inputs, kernel, kernel, std=1.0)
        self.scale, self.halves = 1 / math.sqrt(inputs * kernel**2), halves
        self.padding = 0 if halves or not activation else kernel // 2
        self.act_fn = Bias(outputs) if activation else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        kernel = self.weight.shape[-1]
        stride = 2 if self.halves else 1
        if self.halves and kernel == 1:  # only every second blurred pixel is read
            x, stride = blur(x, kernel, stride=2), 1
        elif self.halves:
            x = blur(x, kernel)
        x = F.conv2d(x, self.weight * self.scale, stride=stride, padding=self.padding)
        return x if self.act_fn is None else self.act_fn(x)


def blur(x: Tensor, kernel: int, stride: int = 1) -> Tensor:
    """A picture [B, C, H, W] blurred, and padded for a convolution of this kernel and stride 2 after it."""
    row = torch.tensor(BLUR, dtype=torch.float32, device=x.device)
    weight = (row[None] * row[:, None] / row.sum() ** 2).to(x.dtype)
    pad = len(BLUR) - 2 + kernel - 1
    if pad % 2:
        x, pad = F.pad(x, ((pad + 1) // 2, pad // 2) * 2), 0
    channels = x.shape[1]
    weight = weight.expand(channels, 1, *weight.shape)
    return F.conv2d(x, weight, stride=stride, padding=pad // 2, groups=channels)


class MotionBlock(nn.Module):
    """Two convolutions, beside them a third; half as high and wide."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ScaledConv(inputs, inputs, 3)
        self.conv2 = ScaledConv(inputs, outputs, 3, halves=True)
        self.conv_skip = ScaledConv(inputs, outputs, 1, halves=True, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.conv_skip(x)) / math.sqrt(2)


class ScaledLinear(nn.Module):
    """A linear layer whose weights are scaled by 1 / sqrt(inputs) when it runs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = normal_parameter(outputs, inputs, std=1.0), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)


class MotionEncoder(nn.Module):
    """Pictures of a face to vectors of its motion."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        widths, style = config.widths, config.motion_style_dim
        self.size = config.motion_encoder_size
        self.conv_in = ScaledConv(3, widths[0], 1)
        self.res_blocks = nn.ModuleList([MotionBlock(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])
        self.conv_out = ScaledConv(widths[-1], style, 4, activation=False)
        sizes = (*(style,) * 5, config.motion_dim)
        self.motion_network = nn.ModuleList([ScaledLinear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)])
        self.motion_synthesis_weight = normal_parameter(config.motion_encoder_dim, config.motion_dim, std=1.0)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, motion_encoder_dim]: how far along each of the learned directions, which are
        orthogonal, a face has moved; summed."""
        x = self.conv_in(pictures.to(self.conv_in.weight.dtype))
        for block in self.res_blocks:
            x = block(x)
        x = self.conv_out(x).flatten(1)
        for layer in self.motion_network:
            x = layer(x)
        directions = torch.linalg.qr((self.motion_synthesis_weight + NUDGE).float())[0]
        return (x.float() @ directions.T).to(x.dtype)


class FaceEncoder(nn.Module):
    """Vectors of motion to the tokens of every latent frame, which see earlier frames alone."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        hidden, heads, dim = config.face_encoder_hidden_dim, config.face_encoder_num_heads, config.transformer.dim
        self.heads = heads
        self.conv1_local = nn.Conv1d(config.motion_encoder_dim, hidden * heads, KERNEL)
        self.conv2 = nn.Conv1d(hidden, hidden, KERNEL, stride=2)
        self.conv3 = nn.Conv1d(hidden, hidden, KERNEL, stride=2)
        self.out_proj = Linear(hidden, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, motion: Tensor) -> Tensor:
        """[B, F, motion_encoder_dim], F = 4 T - 3 -> [B, T, heads + 1, d]."""
        batch = len(motion)
        x = _earlier(self.conv1_local, motion.transpose(1, 2))
        x = _normed(x.unflatten(1, (self.heads, -1)).flatten(0, 1))  # [B * heads, hidden, F]
        x = _normed(_earlier(self.conv2, x))
        x = _normed(_earlier(self.conv3, x))
        tokens = self.out_proj(x.transpose(1, 2)).unflatten(0, (batch, -1)).transpose(1, 2)
        return torch.cat((tokens, self.padding_tokens.expand(*tokens.shape[:2], 1, -1)), dim=2)


def _earlier(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution along time of [B, C, F] that sees earlier frames; before the first stands the first."""
    return conv(F.pad(x, (KERNEL - 1, 0), mode="replicate"))


def _normed(x: Tensor) -> Tensor:
    """SiLU of the norm over C of [B, C, F]."""
    x = x.transpose(1, 2)
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)).transpose(1, 2)
