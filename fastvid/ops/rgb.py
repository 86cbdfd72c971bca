"""Decoded frames to 8-bit RGB: [3, T, H, W] in [-1, 1], any strides -> uint8 [T, H, W, 3], contiguous.

    byte = rint((clamp(x, -1, 1) * 0.5 + 0.5) * 255), ties to even, NaN -> 0, in IEEE fp32

All back ends produce the same bytes: `reference`, `triton` (kernels/rgb.py) and `cuda` (csrc/rgb.cu).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(frames: Tensor) -> Tensor:
    """Eager PyTorch, one frame at a time to keep the fp32 copies small."""
    out = _empty(frames)
    for frame, rgb in zip(frames.detach().unbind(1), out, strict=True):
        unit = frame.float().nan_to_num(nan=-1.0).clamp_(-1, 1).mul_(0.5).add_(0.5)
        rgb.copy_(unit.mul_(255).round_().permute(1, 2, 0))
    return out


@torch.library.custom_op("fastvid::to_rgb_triton", mutates_args=())
def triton(frames: Tensor) -> Tensor:
    """The Triton kernel."""
    from fastvid.kernels.rgb import to_rgb

    out = _empty(frames)
    to_rgb(frames, out)
    return out


@torch.library.custom_op("fastvid::to_rgb_cuda", mutates_args=(), device_types="cuda")
def cuda(frames: Tensor) -> Tensor:
    """The CUDA C++ kernel, on the current stream of the frames' device."""
    from fastvid import _C  # type: ignore[attr-defined]

    out = _empty(frames)
    if out.numel():
        stream = torch.cuda.current_stream(frames.device)
        layout = (str(frames.dtype).removeprefix("torch."), tuple(frames.shape[1:]), frames.stride())
        _C.to_rgb(frames.data_ptr(), out.data_ptr(), *layout, frames.device.index, stream.cuda_stream)
        frames.record_stream(stream)  # the caller may free frames from another stream immediately
    return out


BACKENDS: Mapping[str, Callable[[Tensor], Tensor]] = {"reference": reference, "triton": triton, "cuda": cuda}


@triton.register_fake
@cuda.register_fake
def _empty(frames: Tensor) -> Tensor:
    """The uninitialized result."""
    check(frames)
    return torch.empty((*frames.shape[1:], 3), dtype=torch.uint8, device=frames.device)


def check(frames: Tensor) -> None:
    """Raises ValueError for frames of another shape or dtype."""
    if frames.ndim != 4 or frames.shape[0] != 3 or frames.dtype not in DTYPES:
        described = f"{frames.dtype} {tuple(frames.shape)}"
        raise ValueError(f"to_rgb takes frames [3, T, H, W] in float32, float16 or bfloat16, not {described}")
