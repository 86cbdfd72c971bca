"""The VAEs' two kernels, a convolution and an RMS norm, as torch operators: Triton (kernels/) and CUDA (csrc/).

They write into tensors that the caller allocates. vae_gpu.py builds the VAEs' operations from them and checks shapes.
Nothing falls back: unsupported inputs raise ValueError.

Triton   any dtype and strides; the convolution normalizes while loading, with the statistics of the norm kernel.
CUDA     16-bit dtypes on sm_90a. RMS norm and SiLU run as a separate pass before the convolution (csrc/conv.cu says
         why). Activations are read in place if their channels are contiguous and a multiple of 8, else copied (as in
         the first layer of a network). Not verified on a GPU yet, so `auto` never selects it.

Shapes: x [B, C, T, H, W], weight [N, C, kt, kh, kw], gamma [C], statistics (`scale`) fp32 [B, T, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CUDA_DTYPES = (torch.float16, torch.bfloat16)
LAST = torch.channels_last_3d
GROUP = 8  # channels, 16 bytes: the unit of TMA's strides


@dataclass(frozen=True)
class Kernels:
    """A pair of kernels. on_load: the convolution normalizes its input while loading, with statistics from `norm`;
    otherwise `norm(x, gamma, out, silu)` writes the normalized input."""

    conv: Callable[..., None]
    norm: Callable[..., None]
    on_load: bool

    def adds_to(self, out: Tensor) -> bool:
        """Whether the convolution can add to [B, N, T, H, W] in place: contiguous channels, and for TMA (CUDA) pixels
        that begin at multiples of 16 bytes."""
        places = (out.storage_offset(), *(stride for dim, stride in enumerate(out.stride()) if dim != 1))
        return out.stride(1) == 1 and (self.on_load or not any(place % GROUP for place in places))


# Triton


@torch.library.custom_op("fastvid::vae_conv_triton", mutates_args=("out",))
def conv_triton(
    x: Tensor,
    past: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
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
    """The Triton kernel, into `out`; see `conv` and `Form` in kernels/vae_conv.py."""
    from fastvid.kernels.vae_conv import Form, conv

    form = Form((pad[0], pad[1]), top, stride, stride_t, doubled, interleaved, add)
    conv(x, past, scale, gamma, weight, bias, out, history, form)


@torch.library.custom_op("fastvid::vae_norm_triton", mutates_args=("scale", "out"))
def norm_triton(x: Tensor, gamma: Tensor, scale: Tensor | None, out: Tensor | None, silu: bool) -> None:
    """The Triton kernel, into `scale` and `out`; see `norm` in kernels/vae_norm.py."""
    from fastvid.kernels.vae_norm import norm

    norm(x, gamma, scale, out, silu)


# CUDA


def channel_groups(x: Tensor) -> Tensor:
    """x [B, C, ...] with contiguous channels, zero-padded to a multiple of 8; a copy only if needed."""
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
    """The fields of `Call` in csrc/conv_call.h, in order. Raises ValueError for sizes that do not fit together, which
    the device code can't check."""
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
    """The CUDA kernel, into `out`. Arguments as for `conv_triton`; scale and gamma must be None."""
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
    from fastvid import _C  # type: ignore[attr-defined]

    stream = torch.cuda.current_stream(x.device)
    pointers = (x.data_ptr(), 0 if past is None else past.data_ptr(), weight.data_ptr(), bias.data_ptr())
    _C.vae_conv(*pointers, out.data_ptr(), _dtype(x), call, x.device.index, stream.cuda_stream)
    for tensor in read:
        tensor.record_stream(stream)  # the caller may free tensors from another stream immediately


@torch.library.custom_op("fastvid::vae_norm_cuda", mutates_args=("out",))
def norm_cuda(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    """The CUDA kernel: RMS norm of x [B, C, T, H, W] with gamma [C], then SiLU if `silu`, into `out` of x's shape."""
    _check("vae_rms_norm", x, gamma, out)
    if gamma.shape != x.shape[1:2] or out.shape != x.shape or out.stride(1) != 1:
        raise ValueError(
            f"vae_rms_norm takes gamma [{x.shape[1]}] and writes {tuple(x.shape)} with contiguous channels, not "
            f"{tuple(gamma.shape)} and {tuple(out.shape)}"
        )
    if x.numel() == 0:
        return
    x, gamma = x if x.stride(1) == 1 else x.contiguous(memory_format=LAST), gamma.contiguous()
    from fastvid import _C  # type: ignore[attr-defined]

    B, C, T, H, W = x.shape
    layout = ((B, T, H, W), C, _strides(x), _strides(out), silu)
    stream = torch.cuda.current_stream(x.device)
    _C.vae_norm(x.data_ptr(), gamma.data_ptr(), out.data_ptr(), _dtype(x), *layout, x.device.index, stream.cuda_stream)
    for tensor in (x, gamma):
        tensor.record_stream(stream)


@conv_triton.register_fake
@norm_triton.register_fake
@conv_cuda.register_fake
@norm_cuda.register_fake
def _nothing(*args: Any) -> None:
    """Fake implementation: the kernels return nothing."""


def _check(op: str, x: Tensor, *others: Tensor) -> None:
    described = ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in (x, *others))
    if x.ndim != 5 or x.dtype not in CUDA_DTYPES or any(one.dtype != x.dtype for one in others):
        raise ValueError(f"{op} by cuda takes [B, C, T, H, W] in float16 or bfloat16, all of one type, not {described}")
    if x.device.type != "cuda" or any(one.device != x.device for one in others):
        raise ValueError(f"{op} by cuda takes tensors of one CUDA device, not {described}")


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of B, T, H and W."""
    b, _, t, h, w = x.stride()
    return b, t, h, w


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


TRITON = Kernels(conv_triton, norm_triton, on_load=True)
CUDA = Kernels(conv_cuda, norm_cuda, on_load=False)
