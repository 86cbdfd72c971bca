"""Operations of the VAEs in PyTorch.

Each has two implementations with the same result. The first is plain PyTorch, for any device and dtype, with autograd.
The second is for fp32 on the CPU without gradients, and for bf16 on processors with AVX512-BF16: it keeps tensors
channels-last, works in stripes of rows that fit into the cache, and calls oneDNN directly, as F.conv3d uses its own
loop, 5 to 10 times slower, for tensors of less than 20,480 rows. `channels_last` decides between the two, unless `how`
names one: "aten", "onednn", or "winograd" for normed convolutions. The latter two raise ValueError where they do not
apply.

A convolution may be split into parts of a frame's rows. `edges` is then the number of rows (0 or 1) at the top and at
the bottom of x that are only context: they are read but get no result. With 0 the frame ends there and is zero-padded.

Shapes: B batch, C and N channels in and out, T frames, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import brgemm, onednn, rgb, winograd, winograd_bf16

STRIPE = 2**21  # input elements per stripe of a direct convolution: 8 MB
WINOGRAD: Mapping[torch.dtype, Any] = {torch.float32: winograd, torch.bfloat16: winograd_bf16}


def channels_last(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the CPU implementation applies: fp32 or (with AVX512-BF16) bf16 on a CPU with oneDNN, no gradients."""
    tensors = (x, *parameters)
    return (
        x.dtype in WINOGRAD
        and all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and (onednn.available() if x.dtype == torch.float32 else _bf16())
    )


def _bf16() -> bool:
    return brgemm.why_not() is None and not torch.compiler.is_compiling()


def takes_onednn(how: str | None, x: Tensor, *parameters: Tensor) -> bool:
    """Whether the CPU implementation runs. Raises ValueError if it is asked for by name and does not apply."""
    applies = how != "aten" and channels_last(x, *parameters)
    if how not in (None, "aten") and not applies:
        takes = "float32 on a CPU with oneDNN, or bfloat16 with AVX512-BF16, without gradients"
        raise ValueError(f"{how} takes {takes}, not {x.dtype} on {x.device}")
    return applies


def why_not_onednn(device: torch.device) -> str | None:
    """Why "onednn" and "winograd" cannot run on a device; None if they can."""
    if device.type != "cpu":
        return f"it is for CPUs, and the device is {device}"
    return None if onednn.available() else "this torch has no oneDNN"


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int] = (0, 0),
    stride_t: int = 1,
    *,
    how: str | None = None,
) -> Tensor:
    """A convolution of [B, C, T, H, W] without padding in time. padding: of H and W."""
    stride, pad = (stride_t, 1, 1), (0, *padding)
    if takes_onednn(how, x, weight):
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, pad, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, pad)


def causal_conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int],
    edges: tuple[int, int] = (0, 0),
    *,
    how: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A convolution of `past` [B, C, kt - 1, H, W] (zeros if None) followed by x [B, C, T, H, W], kt >= 2.

    Returns [B, N, T, H - sum(edges), W] and the past of the next call, [B, C, kt - 1, H, W], which has all rows of x
    and may be a view of a larger tensor.
    """
    history = weight.shape[2] - 1
    if past is None and x.shape[2] == 1:
        # A single first frame: its history is zero, so only the last tap contributes.
        out = conv3d(x, weight[:, :, -1:], bias, padding, how=how)
        return _without(out, edges), F.pad(x, (0, 0, 0, 0, history - 1, 0))
    if past is None:
        past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, history, -1, -1)
    x = torch.cat((past, x), dim=2)
    return _without(conv3d(x, weight, bias, padding, how=how), edges), x[:, :, -history:]


def _without(out: Tensor, edges: tuple[int, int]) -> Tensor:
    """Drop the result rows of the edges, which were computed with zero padding."""
    return out[:, :, :, edges[0] : out.shape[3] - edges[1]]


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(||x||_2 over C, 1e-12) * sqrt(C) * gamma over dim 1, statistics in fp32 or fp64; gamma [C, 1, ...]."""
    # Needs one multiplication of the whole tensor less than F.normalize.
    norm = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
    return x * (x.shape[1] ** 0.5 / norm).to(x.dtype) * gamma.to(x.dtype)


def norm_silu_conv3d(
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    edges: tuple[int, int] = (0, 0),
    pixels: int | None = None,
    *,
    how: str | None = None,
) -> tuple[Tensor, Tensor]:
    """causal_conv3d(silu(rms_norm(x))), 3x3x3 with padding 1, plus a residual, which may be overwritten.

    pixels: of the whole chunk if x is a part of its rows. It selects the algorithm, so that parts and whole are
    computed in the same way.

    Returns [B, N, T, H - sum(edges), W] and the past of the next call: the last two frames of x after norm and SiLU,
    [B, C, 2, H, W].
    """
    if not takes_onednn(how, x, weight, gamma):
        out, kept = causal_conv3d(F.silu(rms_norm(x, gamma)), past, weight, bias, (1, 1), edges, how=how)
        return out if residual is None else out + residual, kept
    x = _channels_last(x)
    if residual is None:
        B, _, T, H, W = x.shape
        out = _empty(x, B, weight.shape[0], T, H - sum(edges), W)
    else:
        out = _channels_last(residual)
    way = WINOGRAD[x.dtype]
    tiled = how is None and way.worthwhile(x[0, 0].numel() if pixels is None else pixels, weight)
    run = way.norm_silu_conv3d if tiled or how == "winograd" else _direct
    return out, run(x, past, gamma, weight, bias, out, residual is not None, edges)


def row_grain(x: Tensor, gamma: Tensor, weight: Tensor, pixels: int) -> int:
    """The row multiple at which a chunk must be split so that norm_silu_conv3d gives bit-identical results."""
    way = WINOGRAD.get(x.dtype)
    return way.TILE if way and channels_last(x, weight, gamma) and way.worthwhile(pixels, weight) else 1


def _direct(
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    add: bool,
    edges: tuple[int, int],
) -> Tensor:
    """norm_silu_conv3d, written or added to `out` in stripes of rows, without a normalized copy of the whole chunk."""
    H = x.shape[3]
    rows = max(8, STRIPE * H // x.numel())
    kept = _empty(x, *x.shape[:2], 2, *x.shape[3:])
    for top in range(edges[0], H - edges[1], rows):
        bottom = min(top + rows, H - edges[1])
        a, b = max(top - 1, 0), min(bottom + 1, H)
        stripe = winograd.norm_silu(x[:, :, :, a:b].permute(0, 2, 3, 4, 1), gamma).permute(0, 4, 1, 2, 3)
        before = None if past is None else past[:, :, :, a:b]
        done, kept[:, :, :, a:b] = causal_conv3d(stripe, before, weight, bias, (1, 1), (top - a, b - bottom))
        target = out[:, :, :, top - edges[0] : bottom - edges[0]]
        target.add_(done) if add else target.copy_(done)
    return kept


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, edges: tuple[int, int] = (0, 0), *, how: str | None = None
) -> Tensor:
    """Nearest-neighbor upsampling by 2 in height and width, then a 3x3 convolution with padding 1.

    [B, C, T, H, W] -> [B, N, T, 2 * (H - sum(edges)), 2W], frame by frame.
    """
    B, C, T, H, W = x.shape
    N = weight.shape[0]
    if not takes_onednn(how, x, weight):
        frames = x.transpose(1, 2).reshape(B * T, C, H, W)
        frames = F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"), weight, bias, padding=1)
        frames = frames.reshape(B, T, N, 2 * H, 2 * W).transpose(1, 2)
        return _without(frames, (2 * edges[0], 2 * edges[1]))
    phases = phase_weights(weight)
    rows = H - sum(edges)
    out = _empty(x, B, N, T, 2 * rows, 2 * W)
    for b, t in ((b, t) for b in range(B) for t in range(T)):
        frame = F.conv2d(x[b : b + 1, :, t], phases, bias.repeat(4), padding=1)[0].view(2, 2, N, H + 1, W + 1)
        frame = frame[:, :, :, edges[0] :]
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[b, :, t, i::2, j::2] = frame[i, j, :, i : i + rows, j : j + W]
    return out


def norm_silu_conv3d_rgb(
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    edges: tuple[int, int] = (0, 0),
    pixels: int | None = None,
    to_rgb: Callable[[Tensor], Tensor] = rgb.reference,
    *,
    how: str | None = None,
) -> tuple[Tensor, Tensor]:
    """to_rgb of norm_silu_conv3d with 3 output channels: uint8 [B, 3, T, H - sum(edges), W], channels-last, and the
    past.

    to_rgb: the operation of that name, [3, T, H, W] -> [T, H, W, 3]. Kernels that fuse it ignore the argument.
    """
    out, kept = norm_silu_conv3d(x, past, gamma, weight, bias, None, edges, pixels, how=how)
    return torch.stack([to_rgb(frames) for frames in out]).permute(0, 4, 1, 2, 3), kept


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor, bottom: int = 0) -> Tensor:
    """A 3x3 convolution with stride 2, zero-padded by one at the right and, unless `bottom` is 1, at the bottom.

    bottom: 1 if the last row of x is context from the next part, else 0.
    [B, C, T, H, W] -> [B, N, T, (H - bottom) / 2, W / 2], frame by frame.
    """
    B, C, T, H, W = x.shape
    frames = F.pad(x.transpose(1, 2).reshape(B * T, C, H, W), (0, 1, 0, 1 - bottom))
    frames = F.conv2d(frames, weight, bias, stride=2)
    return frames.reshape(B, T, *frames.shape[1:]).transpose(1, 2)


def double_frames(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, *, how: str | None = None
) -> tuple[Tensor, Tensor]:
    """causal_conv3d, 3x1x1, to twice the channels; the two halves become the even and the odd frames.

    [B, C, T, H, W] -> [B, N / 2, 2T, H, W], and the past of the next call.
    """
    out, kept = causal_conv3d(x, past, weight, bias, (0, 0), how=how)
    even, odd = out.chunk(2, dim=1)
    pairs = zip(even.split(1, dim=2), odd.split(1, dim=2), strict=True)
    return torch.cat([frame for pair in pairs for frame in pair], dim=2), kept


def halve_frames(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, *, how: str | None = None) -> Tensor:
    """conv3d, 3x1x1 with stride 2 in time, of `past` [B, C, 1, H, W] (if any) followed by x [B, C, T, H, W]."""
    return conv3d(x if past is None else torch.cat((past, x), dim=2), weight, bias, stride_t=2, how=how)


ON_CPU: Mapping[Callable[..., Any], tuple[str, ...]] = {
    conv3d: ("aten", "onednn"),
    causal_conv3d: ("aten", "onednn"),
    norm_silu_conv3d: ("aten", "onednn", "winograd"),
    norm_silu_conv3d_rgb: ("aten", "onednn", "winograd"),
    upsample_conv2d: ("aten", "onednn"),
    double_frames: ("aten", "onednn"),
    halve_frames: ("aten", "onednn"),
}
"""The operations with several implementations, and the values of `how`."""


def _channels_last(x: Tensor) -> Tensor:
    """x [B, C, T, H, W] if its channels are contiguous (it may be a view), else a channels-last copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last_3d)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialized channels-last tensor [B, C, T, H, W]."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def phase_weights(weight: Tensor) -> Tensor:
    """The four 2x2 kernels [4N, C, 2, 2] on the original pixels that equal a 3x3 kernel on upsampled pixels.

    An even output row reads the original rows (-1, 0) with weights (w0, w1 + w2), an odd one (0, 1) with (w0 + w1, w2):
    4 products instead of 9.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))  # bf16 is rounded once
    merge = exact.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    merged = torch.einsum("ipk,jql,nckl->ijncpq", merge, merge, exact).to(weight.dtype)
    return merged.flatten(0, 2).contiguous(memory_format=torch.channels_last)
