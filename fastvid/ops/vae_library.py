"""The VAEs' operations by library calls alone, channels-last from end to end: for GPUs without a proven kernel of ours.

Convolutions are cuDNN's, through PyTorch; products of pixels (1x1x1) are cuBLAS's. No layer changes the layout. A
convolution over time reads one buffer: its past is copied in front, and norm and SiLU write behind it, so that nothing
is concatenated. Bias and residual are added in place, or while frames and rows are interleaved.

In units of an activation of 4 frames in 16 bits: norm, SiLU, convolution and residual of vae.py move 26.5 on a GPU,
these 13.5 (norm 2, SiLU 2, past 1, convolution 2.5, bias 2, residual 3, new past 1), and 9.5 with the two pointwise
chains compiled. kt 2-d convolutions added up need no buffer, but move 9 for their results alone and round each of them;
so they only stand in for a 3-d convolution that torch keeps away from cuDNN (`without_3d`).

Works on any device and in any dtype; on a CPU only for tests and by name. Gradients are not supported. Each takes
`pointwise`, what runs between convolutions: None for `pointwise_for` the device. Shapes as in `vae.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid import notices
from fastvid.ops import compiling, rgb

LAST = torch.channels_last_3d


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """out = silu(vae.rms_norm(x)) over the last dimension: x, out [B, T, H, W, C], gamma [C]. Statistics in fp32."""
    torch.ops.aten.silu.out(_normalized(x, gamma), out=out)


def add(y: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """out = y + bias [C] (+ residual); all others [..., C]. out may be y."""
    torch.add(y, bias, out=out)
    if residual is not None:
        out.add_(residual)


@dataclass(frozen=True)
class Pointwise:
    """What runs between convolutions: see `norm_silu` and `add`."""

    norm_silu: Callable[[Tensor, Tensor, Tensor], None]
    add: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def compiled_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """`norm_silu` in one pass, where pixels lie one after the other."""
    if not (x.is_contiguous() and out.is_contiguous() and x.dtype in COMPILED_DTYPES):
        return norm_silu(x, gamma, out)
    rows = x.view(-1, x.shape[-1]), gamma, out.view(-1, x.shape[-1])
    return compiling.run(_norm_silu_rows, ("R.", ".", "R."), rows, (), lambda: norm_silu(x, gamma, out))


def compiled_add(y: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """`add` in one pass, in place, where pixels lie one after the other; without a residual it is one anyway."""
    if residual is None or y is not out or not (y.is_contiguous() and residual.is_contiguous()):
        return add(y, bias, residual, out)
    if y.dtype not in COMPILED_DTYPES:
        return add(y, bias, residual, out)
    rows = y.view(-1, y.shape[-1]), bias, residual.view(-1, y.shape[-1])
    return compiling.run(_add_rows, ("R.", ".", "R."), rows, (), lambda: add(y, bias, residual, out))


def _norm_silu_rows(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    y = x.float()
    norm = y.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()
    y = y * (x.shape[-1] ** 0.5 / norm) * gamma.float()
    out.copy_(y * torch.sigmoid(y))


def _add_rows(y: Tensor, bias: Tensor, residual: Tensor) -> None:
    y.copy_(y.float() + bias.float() + residual.float())


EAGER, COMPILED = Pointwise(norm_silu, add), Pointwise(compiled_norm_silu, compiled_add)
COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def pointwise_for(device: torch.device) -> Pointwise:
    """Compiled on a GPU for which torch.compile works, else eager."""
    return COMPILED if device.type == "cuda" and compiling.why_not(device) is None else EAGER


def rms_norm(x: Tensor, gamma: Tensor, *, pointwise: Pointwise | None = None) -> Tensor:
    """vae.rms_norm."""
    return _normalized(x.movedim(1, -1), gamma.reshape(-1)).movedim(-1, 1)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int] = (0, 0),
    stride_t: int = 1,
    *,
    pointwise: Pointwise | None = None,
) -> Tensor:
    """vae.conv3d; of single pixels, a product with the bias in its epilogue."""
    if weight[0, 0].numel() == 1 and stride_t == 1 and padding == (0, 0):
        return F.linear(_pixels(x), weight.flatten(1), bias).movedim(-1, 1)
    return _finished(pointwise, _convolve(_last(x), weight, padding, stride_t), bias)


def causal_conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int],
    edges: tuple[int, int] = (0, 0),
    *,
    pointwise: Pointwise | None = None,
) -> tuple[Tensor, Tensor]:
    """vae.causal_conv3d."""
    y, kept = _causal(x, past, weight, padding)
    return _finished(pointwise, y, bias, edges), kept


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
    pointwise: Pointwise | None = None,
) -> tuple[Tensor, Tensor]:
    """vae.norm_silu_conv3d. The residual stays as it is."""
    room, pointwise = _room(x, past, 2), pointwise or pointwise_for(x.device)
    pointwise.norm_silu(_pixels(x), gamma.reshape(-1), _pixels(room[:, :, 2:]))
    y = _convolve_room(room, weight, (1, 1), first=past is None)
    return _finished(pointwise, y, bias, edges, residual), room[:, :, -2:]


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
    pointwise: Pointwise | None = None,
) -> tuple[Tensor, Tensor]:
    """vae.norm_silu_conv3d_rgb."""
    out, kept = norm_silu_conv3d(x, past, gamma, weight, bias, None, edges, pixels, pointwise=pointwise)
    return torch.stack([to_rgb(frames) for frames in out]).permute(0, 4, 1, 2, 3), kept


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, edges: tuple[int, int] = (0, 0), *, pointwise: Pointwise | None = None
) -> Tensor:
    """vae.upsample_conv2d, as one convolution with a 2x2 kernel for each combination of even and odd rows and columns:
    4/9 of the products, and in units of x 7 moved instead of 15, since no enlarged x is written and read."""
    B, _, T, H, W = x.shape
    N, rows, pointwise = weight.shape[0], H - sum(edges), pointwise or pointwise_for(x.device)
    y = F.conv2d(_frames(x), phase_weights(weight), padding=1)
    phases = y.permute(0, 2, 3, 1).unflatten(-1, (2, 2, N)).unflatten(0, (B, T))
    out = _empty(x, B, N, T, 2 * rows, 2 * W)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        top = edges[0] + i
        phase = phases[:, :, top : top + rows, j : j + W, i, j]
        pointwise.add(phase, bias, None, _pixels(out)[:, :, i::2, j::2])
    return out


def downsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, bottom: int = 0, *, pointwise: Pointwise | None = None
) -> Tensor:
    """vae.downsample_conv2d. Padded by 2 on all sides and without its first row and column, so that nothing is padded
    in memory."""
    B, _, T, H, W = x.shape
    y = F.conv2d(_frames(x), weight, stride=2, padding=2).unflatten(0, (B, T)).transpose(1, 2)
    return _finished(pointwise, y[:, :, :, 1 : 1 + (H - bottom) // 2, 1 : 1 + W // 2], bias)


def double_frames(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, *, pointwise: Pointwise | None = None
) -> tuple[Tensor, Tensor]:
    """vae.double_frames; frames are interleaved as the bias is added."""
    y, kept = _causal(x, past, weight, (0, 0))
    pointwise = pointwise or pointwise_for(x.device)
    B, N, T, H, W = y.shape
    out = _empty(x, B, N // 2, 2 * T, H, W)
    for i, (half, its_bias) in enumerate(zip(y.chunk(2, dim=1), bias.chunk(2), strict=True)):
        pointwise.add(_pixels(half), its_bias, None, _pixels(out[:, :, i::2]))
    return out, kept


def halve_frames(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, *, pointwise: Pointwise | None = None
) -> Tensor:
    """vae.halve_frames."""
    if past is not None:
        room = _room(x, past, 1)
        room[:, :, 1:] = x
        x = room
    return _finished(pointwise, _convolve(_last(x), weight, (0, 0), stride_t=2), bias)


# ---------------------------------------------------------------- convolutions


def _causal(x: Tensor, past: Tensor | None, weight: Tensor, pad: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """causal_conv3d without its bias and with all rows, and the past of the next call."""
    history = weight.shape[2] - 1
    room = _room(x, past, history)
    room[:, :, history:] = x
    return _convolve_room(room, weight, pad, first=past is None), room[:, :, -history:]


def _room(x: Tensor, past: Tensor | None, history: int) -> Tensor:
    """Memory for the past, which is filled in, and for as many frames as x has."""
    B, C, T, H, W = x.shape
    room = _empty(x, B, C, history + T, H, W)
    if past is None:
        room[:, :, :history] = 0
    else:
        room[:, :, :history] = past
    return room


def _convolve_room(room: Tensor, weight: Tensor, pad: tuple[int, int], first: bool) -> Tensor:
    """The convolution of past and frames. first: the past is zeros, of which a single frame need not see anything."""
    history = weight.shape[2] - 1
    if first and room.shape[2] == history + 1:
        return _convolve(room[:, :, history:], weight[:, :, -1:], pad)
    return _convolve(room, weight, pad)


def _convolve(x: Tensor, weight: Tensor, pad: tuple[int, int], stride_t: int = 1) -> Tensor:
    """A convolution of channels-last x without padding in time and without a bias."""
    if weight.shape[2] > 1 and not without_3d(x.device, x.dtype):
        return F.conv3d(x, weight, None, (stride_t, 1, 1), (0, *pad))
    taps, B = weight.shape[2], x.shape[0]
    last = x.shape[2] - taps
    total: Tensor | None = None
    for tap in range(taps):
        frames = _frames(x[:, :, tap : tap + last + 1 : stride_t])
        part = F.conv2d(frames, weight[:, :, tap], padding=pad)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.unflatten(0, (B, -1)).transpose(1, 2)


def without_3d(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch keeps 3-d convolutions of 16 bits away from cuDNN: with cuDNN 9.8 to 9.14, which gives wrong sums
    of large ones, and torch 2.9.0 with any later. Its own then takes several times the memory and time."""
    return device.type == "cuda" and dtype.itemsize == 2 and torch.version.hip is None and _distrusted()


@cache
def _distrusted() -> bool:
    version = torch.backends.cudnn.version() or 0
    if version < 90800 or (version >= 91500 and not torch.__version__.startswith("2.9.0")):
        return False
    notices.warn(
        f"cuDNN {version} with torch {torch.__version__} has no 3-d convolution in 16 bits, so each of the VAE's runs "
        "as 2-d ones; torch 2.9.1 or later with nvidia-cudnn 9.15 or later is faster"
    )
    return True


def phase_weights(weight: Tensor) -> Tensor:
    """vae.phase_weights, summed in fp32 and rounded once, without a table that would have to be uploaded."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = _merged(_merged(exact))  # [i, p, j, q, N, C]
    phases = merged.permute(0, 2, 4, 5, 1, 3).flatten(0, 2)
    return phases.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _merged(taps: Tensor) -> Tensor:
    """[..., 3] -> [2, 2, ...]: the two taps of an even place, then those of an odd one."""
    a, b, c = taps.unbind(-1)
    return torch.stack((a, b + c, a + b, c)).unflatten(0, (2, 2))


# ---------------------------------------------------------------- pointwise parts and layouts


def _normalized(x: Tensor, gamma: Tensor) -> Tensor:
    """vae.rms_norm over the last dimension. Its floor under the norm, 1e-12, is added to the square here."""
    C = x.shape[-1]
    return F.rms_norm(x, (C,), gamma.to(x.dtype), 1e-24 / C)


def _finished(
    pointwise: Pointwise | None,
    y: Tensor,
    bias: Tensor,
    edges: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution's result y without the rows of the edges, plus bias and residual: in place if it is all of y."""
    pointwise = pointwise or pointwise_for(y.device)
    rows = y[:, :, :, edges[0] : y.shape[3] - edges[1]]
    out = rows if rows.is_contiguous(memory_format=LAST) else _empty(rows, *rows.shape)
    made = _pixels(out)
    given = made if out is rows else _pixels(rows)
    pointwise.add(given, bias, None if residual is None else _pixels(residual), made)
    return out


def _last(x: Tensor) -> Tensor:
    """x with contiguous channels: itself, but for what comes from outside of the network."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=LAST)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B, T, H, W, C]."""
    return x.permute(0, 2, 3, 4, 1)


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B * T, C, H, W]: a view, for one video."""
    return _last(x).transpose(1, 2).flatten(0, 1)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialized channels-last tensor [B, C, T, H, W]."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAST)


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    f"vae_{operation.__name__}": operation
    for operation in (
        rms_norm,
        conv3d,
        causal_conv3d,
        norm_silu_conv3d,
        norm_silu_conv3d_rgb,
        upsample_conv2d,
        downsample_conv2d,
        double_frames,
        halve_frames,
    )
}
