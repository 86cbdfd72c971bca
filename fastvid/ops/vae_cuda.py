"""The VAEs' operations on csrc/: `cuda`, for 16-bit types on sm_90 (not verified on a GPU yet, so by name alone).

`vae.py` has the meaning, `vae_kernels.py` the operations: here are only the two kernels that they run. The convolution
takes normalised values: RMS norm and SiLU are a pass of their own (csrc/conv.cu says why). Activations are read where
they lie if their channels lie side by side; others, or a number of channels that is no multiple of 8, as the first
layer of a network has, are copied. Nothing falls back: what it cannot take raises ValueError.

`vae_norm_silu_conv3d_rgb`, which makes 3 channels, has no form here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import vae_gpu

DTYPES = (torch.float16, torch.bfloat16)
LAST = torch.channels_last_3d
GROUP = 8  # channels, 16 bytes: what TMA counts strides in


def channel_groups(x: Tensor) -> Tensor:
    """x [B, C, ...], or a copy of it, with channels side by side and 0 to 7 of zeros added to make whole eights."""
    extra = -x.shape[1] % GROUP
    if extra:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, extra))
    return x if x.stride(1) == 1 else x.contiguous(memory_format=LAST)


def call_of(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    out: Tensor,
    history: int,
    pad: Sequence[int],
    top: int,
    stride: int,
    stride_t: int,
    doubled: bool,
    interleaved: bool,
    add: bool,
) -> dict[str, tuple[int, ...] | int]:
    """What the device code is told, `Call` in csrc/conv_call.h, in its order; checked for what it can't see.

    Raises ValueError for sizes that don't fit together.
    """
    B, C, T, H, W = x.shape
    step, halves = 1 + doubled, 1 + interleaved
    fits = weight.shape[:2] == (out.shape[1] * halves * step**2, C) and out.shape[0] == B
    fits = fits and not (out.shape[2] % halves or out.shape[3] % step or out.shape[4] % step)
    fits = fits and (out.shape[2] // halves - 1) * stride_t + weight.shape[2] - history <= T
    if not fits or (past is not None and past.shape != (B, C, history, H, W)) or out.stride(1) != 1:
        raise ValueError(
            f"out {tuple(out.shape)} with contiguous channels, from x {tuple(x.shape)} with weight "
            f"{tuple(weight.shape)} and a past of {history} frames, doubled {step} and interleaved {halves} times: "
            "sizes do not fit together"
        )
    return {
        "x": tuple(x.shape),
        "x_strides": _strides(x),
        "past_strides": (0, 0, 0, 0) if past is None else _strides(past),
        "out": tuple(out.shape),
        "out_strides": _strides(out),
        "kernel": tuple(weight.shape[2:]),
        "history": history,
        "past": int(past is not None),
        "pad": (int(pad[0]), int(pad[1])),
        "top": top,
        "stride": stride,
        "stride_t": stride_t,
        "doubled": int(doubled),
        "interleaved": int(interleaved),
        "add": int(add),
    }


@torch.library.custom_op("fastvid::vae_conv_cuda", mutates_args=("out",))
def conv_cuda(
    x: Tensor,
    past: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    history: int,
    pad: Sequence[int],
    top: int,
    stride: int,
    stride_t: int,
    doubled: bool,
    interleaved: bool,
    add: bool,
) -> None:
    """The CUDA kernel, into `out`; arguments as `vae_kernels.conv_triton` has them, without scale and gamma."""
    _check("vae_conv", x, *(one for one in (past, weight, bias, out) if one is not None))
    if scale is not None or gamma is not None or not weight.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError(
            "the CUDA convolution takes x normalised, and weight contiguous in the order (N, kt, kh, kw, C)"
        )
    if out.numel() == 0:
        return
    x, weight, bias = channel_groups(x), channel_groups(weight), bias.contiguous()
    past = None if past is None else channel_groups(past)
    how = (history, pad, top, stride, stride_t, doubled, interleaved, add)
    call = call_of(x, past, weight, out, *how)
    read = [one for one in (x, past, weight, bias) if one is not None]
    from fastvid import _C

    stream = torch.cuda.current_stream(x.device)
    pointers = (x.data_ptr(), 0 if past is None else past.data_ptr(), weight.data_ptr(), bias.data_ptr())
    _C.vae_conv(*pointers, out.data_ptr(), _dtype(x), call, x.device.index, stream.cuda_stream)
    for tensor in read:
        tensor.record_stream(stream)  # the caller may drop what came from another stream at once


@torch.library.custom_op("fastvid::vae_norm_cuda", mutates_args=("out",))
def norm_cuda(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    """The CUDA kernel, RMS norm of x [B, C, T, H, W] by gamma [C], then SiLU or not, into `out` of x's shape."""
    _check("vae_rms_norm", x, gamma, out)
    if gamma.shape != x.shape[1:2] or out.shape != x.shape or out.stride(1) != 1:
        raise ValueError(
            f"vae_rms_norm takes gamma [{x.shape[1]}] and writes {tuple(x.shape)} with contiguous channels, not "
            f"{tuple(gamma.shape)} and {tuple(out.shape)}"
        )
    if x.numel() == 0:
        return
    x, gamma = x if x.stride(1) == 1 else x.contiguous(memory_format=LAST), gamma.contiguous()
    from fastvid import _C

    B, C, T, H, W = x.shape
    layout = ((B, T, H, W), C, _strides(x), _strides(out), silu)
    stream = torch.cuda.current_stream(x.device)
    _C.vae_norm(x.data_ptr(), gamma.data_ptr(), out.data_ptr(), _dtype(x), *layout, x.device.index, stream.cuda_stream)
    for tensor in (x, gamma):
        tensor.record_stream(stream)


@conv_cuda.register_fake
@norm_cuda.register_fake
def _nothing(*args: Any) -> None:
    """What is written has been made by the caller."""


KERNELS = vae_gpu.Kernels(conv_cuda, norm_cuda, on_load=False)
OPERATIONS = (
    vae_gpu.rms_norm,
    vae_gpu.conv3d,
    vae_gpu.causal_conv3d,
    vae_gpu.norm_silu_conv3d,
    vae_gpu.upsample_conv2d,
    vae_gpu.downsample_conv2d,
    vae_gpu.double_frames,
    vae_gpu.halve_frames,
)


def _bound(operation: Callable[..., Any], kernels: vae_gpu.Kernels) -> Callable[..., Any]:
    function = partial(operation, kernels=kernels)
    function.needs = "90a"  # which of the architectures of fastvid._C; `backends.why_not` asks
    function.dtypes = DTYPES  # what benchmarks give it
    return function


BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    f"vae_{operation.__name__}": {"cuda": _bound(operation, KERNELS)} for operation in OPERATIONS
}


def _check(op: str, x: Tensor, *others: Tensor) -> None:
    given = ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in (x, *others))
    if x.ndim != 5 or x.dtype not in DTYPES or any(one.dtype != x.dtype for one in others):
        raise ValueError(f"{op} by cuda takes [B, C, T, H, W] in float16 or bfloat16, all of one type, not {given}")
    if x.device.type != "cuda" or any(one.device != x.device for one in others):
        raise ValueError(f"{op} by cuda takes tensors of one CUDA device, not {given}")


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of B, T, H and W."""
    return (x.stride(0), *x.stride()[2:])


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
