"""The VAEs' operations on GPUs: Triton for all dtypes, CUDA for 16-bit dtypes on sm_90a. `vae.py` defines them.
`BACKENDS` lists these beside those of vae.py and vae_library.py.

Each calls the two kernels of vae_kernels.py; the argument `kernels` selects Triton or CUDA. Results are channels-last,
so a network is channels-last from its first layer on. Triton reads inputs of any strides without a copy (except a
residual that is not channels-last). Weights are copied unless they are channels-last: call `channels_last` on a module.
Gradients are not supported.

Shapes as in `vae.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvid.ops import vae, vae_library
from fastvid.ops.vae_kernels import CUDA, CUDA_DTYPES, TRITON, Kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAST = torch.channels_last_3d


def channels_last(module: nn.Module) -> None:
    """Convert all convolution weights of a module to channels-last memory, which avoids copies."""
    for weight in module.parameters():
        if weight.ndim in (4, 5):
            order = LAST if weight.ndim == 5 else torch.channels_last
            weight.data = weight.data.contiguous(memory_format=order)


def rms_norm(x: Tensor, gamma: Tensor, *, kernels: Kernels = TRITON) -> Tensor:
    """vae.rms_norm of [B, C, H, W] or [B, C, T, H, W]."""
    if x.ndim not in (4, 5) or gamma.numel() != x.shape[1] or x.dtype not in DTYPES:
        raise ValueError(f"vae_rms_norm takes x [B, C, (T,) H, W] and gamma [C, 1, ...], not {_shapes(x, gamma)}")
    x5 = x if x.ndim == 5 else x[:, :, None]
    out = _empty(x5, *x5.shape)
    kernels.norm(x5, gamma.reshape(-1), *((None,) if kernels.on_load else ()), out, False)
    return out if x.ndim == 5 else out[:, :, 0]


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int] = (0, 0),
    stride_t: int = 1,
    *,
    kernels: Kernels = TRITON,
) -> Tensor:
    """vae.conv3d."""
    _check("vae_conv3d", x, weight, bias)
    kt, kh, kw = weight.shape[2:]
    if x.shape[2] < kt or stride_t not in (1, 2):
        raise ValueError(f"vae_conv3d takes at least {kt} frames and a stride of 1 or 2, not {x.shape[2]}, {stride_t}")
    size = (x.shape[3] + 2 * padding[0] - kh + 1, x.shape[4] + 2 * padding[1] - kw + 1)
    out = _empty(x, x.shape[0], weight.shape[0], (x.shape[2] - kt) // stride_t + 1, *size)
    return _run(kernels, x, None, weight, bias, out, pad=padding, stride_t=stride_t)


def causal_conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int],
    edges: tuple[int, int] = (0, 0),
    *,
    kernels: Kernels = TRITON,
) -> tuple[Tensor, Tensor]:
    """vae.causal_conv3d; reads `past` in place."""
    _check("vae_causal_conv3d", x, weight, bias, past)
    _check_edges("vae_causal_conv3d", x, edges)
    kt, kh, kw = weight.shape[2:]
    if kt < 2 or (kh, kw) != (2 * padding[0] + 1, 2 * padding[1] + 1):
        raise ValueError(f"vae_causal_conv3d takes a kernel that keeps the size, not {(kt, kh, kw)} with {padding}")
    out = _empty(x, x.shape[0], weight.shape[0], x.shape[2], x.shape[3] - sum(edges), x.shape[4])
    _run(kernels, x, past, weight, bias, out, kt - 1, pad=padding, top=edges[0])
    return out, _last_frames(x, past, kt - 1)


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
    kernels: Kernels = TRITON,
) -> tuple[Tensor, Tensor]:
    """vae.norm_silu_conv3d; the result overwrites a channels-last residual (with CUDA, of strides that are multiples of
    8). Triton normalizes x while loading it."""
    _check_normed("vae_norm_silu_conv3d", x, past, gamma, weight, bias, edges)
    size = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3] - sum(edges), x.shape[4])
    if residual is None:
        return _normed(kernels, x, past, gamma, weight, bias, _empty(x, *size), edges)
    if residual.shape != size or residual.dtype != x.dtype:
        raise ValueError(f"vae_norm_silu_conv3d takes a residual {x.dtype} {size}, not {_shapes(residual)}")
    out = residual if kernels.adds_to(residual) else _empty(x, *size).copy_(residual)
    return _normed(kernels, x, past, gamma, weight, bias, out, edges, add=True)


def norm_silu_conv3d_rgb(
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    edges: tuple[int, int] = (0, 0),
    pixels: int | None = None,
    to_rgb: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """vae.norm_silu_conv3d_rgb; the convolution converts to bytes itself, with the same result as to_rgb."""
    _check_normed("vae_norm_silu_conv3d_rgb", x, past, gamma, weight, bias, edges)
    if weight.shape[0] != 3:
        raise ValueError(f"vae_norm_silu_conv3d_rgb makes 3 channels, not {weight.shape[0]}")
    out = _empty(x, x.shape[0], 3, x.shape[2], x.shape[3] - sum(edges), x.shape[4], dtype=torch.uint8)
    return _normed(TRITON, x, past, gamma, weight, bias, out, edges)


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, edges: tuple[int, int] = (0, 0), *, kernels: Kernels = TRITON
) -> Tensor:
    """vae.upsample_conv2d as four 2x2 kernels, one for each combination of even and odd rows and columns."""
    _check("vae_upsample_conv2d", x, weight[:, :, None], bias, kernel=(1, 3, 3))
    _check_edges("vae_upsample_conv2d", x, edges)
    phases = vae_library.phase_weights(weight)[:, :, None]
    B, _, T, H, W = x.shape
    out = _empty(x, B, weight.shape[0], T, 2 * (H - sum(edges)), 2 * W)
    return _run(kernels, x, None, phases, bias, out, pad=(1, 1), top=edges[0], doubled=True)


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor, bottom: int = 0, *, kernels: Kernels = TRITON) -> Tensor:
    """vae.downsample_conv2d without a padded copy."""
    _check("vae_downsample_conv2d", x, weight[:, :, None], bias, kernel=(1, 3, 3))
    _check_edges("vae_downsample_conv2d", x, (0, bottom))
    B, _, T, H, W = x.shape
    out = _empty(x, B, weight.shape[0], T, (H - bottom) // 2, W // 2)
    return _run(kernels, x, None, weight[:, :, None], bias, out, stride=2)


def double_frames(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, *, kernels: Kernels = TRITON
) -> tuple[Tensor, Tensor]:
    """vae.double_frames; the kernel stores the frames interleaved."""
    _check("vae_double_frames", x, weight, bias, past, kernel=(3, 1, 1))
    if weight.shape[0] % 2:
        raise ValueError(f"vae_double_frames takes an even number of channels out, not {weight.shape[0]}")
    B, _, T, H, W = x.shape
    out = _empty(x, B, weight.shape[0] // 2, 2 * T, H, W)
    return _run(kernels, x, past, weight, bias, out, 2, interleaved=True), _last_frames(x, past, 2)


def halve_frames(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, *, kernels: Kernels = TRITON) -> Tensor:
    """vae.halve_frames; reads `past` in place."""
    _check("vae_halve_frames", x, weight, bias, past, kernel=(3, 1, 1), history=1)
    B, _, T, H, W = x.shape
    before = 0 if past is None else 1
    if T + before < 3:
        raise ValueError(f"vae_halve_frames takes 3 frames or more, with the past, not {T + before}")
    out = _empty(x, B, weight.shape[0], (T + before - 3) // 2 + 1, H, W)
    return _run(kernels, x, past, weight, bias, out, before, stride_t=2)


def _run(
    kernels: Kernels,
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    history: int = 0,
    norm: tuple[Tensor, Tensor] | None = None,
    pad: tuple[int, int] = (0, 0),
    top: int = 0,
    stride: int = 1,
    stride_t: int = 1,
    doubled: bool = False,
    interleaved: bool = False,
    add: bool = False,
) -> Tensor:
    """Run the convolution kernel into `out` and return it. norm: (statistics, gamma)."""
    weight = weight.contiguous(memory_format=LAST)
    how = (history, pad, top, stride, stride_t, doubled, interleaved, add)
    kernels.conv(x, past, *(norm or (None, None)), weight, bias, out, *how)
    return out


def _normed(
    kernels: Kernels,
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    edges: tuple[int, int],
    add: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run norm, SiLU and convolution into `out`. Returns it and the past of the next call, which the norm kernel
    writes: of the last frames if the convolution normalizes on load, else of all frames."""
    B, C, T, H, W = x.shape
    if not kernels.on_load:
        normalized = _empty(x, *x.shape)
        kernels.norm(x, gamma.reshape(-1), normalized, True)
        _run(kernels, normalized, past, weight, bias, out, 2, pad=(1, 1), top=edges[0], add=add)
        return out, _last_frames(normalized, past, 2).clone(memory_format=LAST)  # a copy, so that `normalized` is freed
    scale, kept = x.new_empty((B, T, H, W), dtype=torch.float32), _empty(x, B, C, 2, H, W)
    if T < 2:
        kept[:, :, :1] = 0 if past is None else past[:, :, -1:]
    gamma = gamma.reshape(-1)
    kernels.norm(x, gamma, scale, kept[:, :, 2 - min(T, 2) :], True)
    _run(kernels, x, past, weight, bias, out, 2, (scale, gamma), (1, 1), edges[0], add=add)
    return out, kept


def _last_frames(x: Tensor, past: Tensor | None, count: int) -> Tensor:
    """The last `count` frames of `past` (zeros if None) followed by x. A view of x if it has enough frames."""
    missing = count - x.shape[2]
    if missing <= 0:
        return x[:, :, -count:]
    before = torch.zeros_like(x[:, :, :1]).expand(-1, -1, missing, -1, -1) if past is None else past[:, :, -missing:]
    return torch.cat((before, x), dim=2)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized channels-last tensor [B, C, T, H, W]."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=LAST)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None = None,
    kernel: tuple[int, int, int] | None = None,
    history: int | None = None,
) -> None:
    """Raise ValueError unless everything fits. history: frames of the past, by default kt - 1."""
    tensors = [tensor for tensor in (x, weight, bias, past) if tensor is not None]
    fits = x.ndim == weight.ndim == 5 and x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1]
    fits = fits and x.dtype in DTYPES and len({tensor.dtype for tensor in tensors}) == 1
    if fits and past is not None:
        frames = weight.shape[2] - 1 if history is None else history
        fits = past.shape == (*x.shape[:2], frames, *x.shape[3:])
    if not fits or (kernel is not None and weight.shape[2:] != kernel):
        size = "kt, kh, kw" if kernel is None else ", ".join(map(str, kernel))
        raise ValueError(
            f"{op} takes x [B, C, T, H, W], weight [N, C, {size}], bias [N] and a past of x's size with "
            f"{'kt - 1' if history is None else history} frames, of one type, not {_shapes(*tensors)}"
        )


def _check_normed(
    op: str, x: Tensor, past: Tensor | None, gamma: Tensor, weight: Tensor, bias: Tensor, edges: tuple[int, int]
) -> None:
    _check(op, x, weight, bias, past, kernel=(3, 3, 3))
    _check_edges(op, x, edges)
    if gamma.numel() != x.shape[1]:
        raise ValueError(f"{op} takes gamma [{x.shape[1]}, 1, ...], not {_shapes(gamma)}")


def _check_edges(op: str, x: Tensor, edges: tuple[int, int]) -> None:
    if len(edges) != 2 or any(edge not in (0, 1) for edge in edges) or sum(edges) > x.shape[3]:
        raise ValueError(f"{op} takes edges of 0 or 1 row each, of {x.shape[3]} rows, not {edges}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)


def _backends(operation: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """All back ends of an operation."""
    reference = getattr(vae, operation.__name__)
    functions = {"reference": reference, "triton": operation}
    functions["channels_last"] = vae_library.OPERATIONS[f"vae_{operation.__name__}"]
    for name in vae.ON_CPU.get(reference, ()):
        functions[name] = partial(reference, how=name)
        vars(functions[name])["why_not"] = vae.why_not_onednn if name != "aten" else lambda device: None
    if operation is not norm_silu_conv3d_rgb:  # the CUDA convolution does not support 3 output channels
        functions["cuda"] = partial(operation, kernels=CUDA)
        functions["cuda"].needs = "90a"  # the required architecture, for `dispatch.lacks`
        functions["cuda"].dtypes = CUDA_DTYPES  # supported dtypes, for benchmarks
    return functions


OPERATIONS = (
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
BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    f"vae_{operation.__name__}": _backends(operation) for operation in OPERATIONS
}
