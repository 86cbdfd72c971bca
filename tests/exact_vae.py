"""The meanings of the VAEs' operations in float64, written a second time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_conv(
    x: Tensor,
    past: Tensor | int | None,
    weight: Tensor,
    bias: Tensor,
    pad: tuple[int, int] = (0, 0),
    edges: tuple[int, int] = (0, 0),
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """In float64, tap by tap. past: frames, or how many of zeros."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if isinstance(past, int):
        past = x.new_zeros(*x.shape[:2], past, *x.shape[3:])
    x = x if past is None else torch.cat((past.double(), x), 2)
    x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]))
    kt, kh, kw = weight.shape[2:]
    T, H, W = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], weight.shape[2:], stride, strict=True))
    out = bias.view(1, -1, 1, 1, 1).repeat(len(x), 1, T, H, W)
    for i in range(kt):
        for j in range(kh):
            for k in range(kw):
                seen = x[:, :, i :: stride[0], j :: stride[1], k :: stride[2]][:, :, :T, :H, :W]
                out += torch.einsum("nc,bcthw->bnthw", weight[:, :, i, j, k], seen)
    return out[:, :, :, edges[0] : H - edges[1]]


def exact_norm(x: Tensor, gamma: Tensor, silu: bool = True) -> Tensor:
    x = x.double()
    y = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) * x.shape[1] ** 0.5 * gamma.double().view(-1, 1, 1, 1)
    return y * torch.sigmoid(y) if silu else y


def exact_upsample(x: Tensor, weight: Tensor, bias: Tensor, edges: tuple[int, int] = (0, 0)) -> Tensor:
    doubled = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    return exact_conv(doubled, None, weight[:, :, None], bias, (1, 1), (2 * edges[0], 2 * edges[1]))


def exact_downsample(x: Tensor, weight: Tensor, bias: Tensor, bottom: int = 0) -> Tensor:
    return exact_conv(F.pad(x, (0, 1, 0, 1 - bottom)), None, weight[:, :, None], bias, stride=(1, 2, 2))


def exact_double(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    made = exact_conv(x, 2 if past is None else past, weight, bias)
    return made.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
