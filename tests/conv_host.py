"""The CUDA convolution on the CPU: csrc/'s own headers, compiled by the host compiler with tests/csrc/conv_emulator.cpp
in the place of the hardware."""

from __future__ import annotations

import ctypes
import functools

import torch
from compiled_host import compile_host
from torch import Tensor

from fastvid.ops.vae_kernels import call_of


@functools.cache
def library() -> ctypes.CDLL:
    lib = compile_host("conv_emulator.cpp")
    lib.conv_tiles.restype = ctypes.c_int64
    lib.conv_descriptor.restype = ctypes.c_uint64
    lib.conv_swizzled.restype = ctypes.c_uint32
    lib.norm_silu.restype, lib.norm_silu.argtypes = ctypes.c_float, [ctypes.c_float] * 2
    return lib


def words(call: dict[str, tuple[int, ...] | int]) -> ctypes.Array:
    """A call as the C++ struct has it."""
    flat = [number for value in call.values() for number in (value if isinstance(value, tuple) else (value,))]
    assert len(flat) == library().conv_call_words()
    return (ctypes.c_int64 * len(flat))(*flat)


def conv_host(
    x: Tensor,
    past: Tensor | None,
    scale: None,
    gamma: None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *how: object,
    width: int = 0,
) -> None:
    """What the kernel writes into `out`; arguments of `vae_kernels.conv_cuda`. Raises ValueError for what it
    refuses."""
    assert scale is None and gamma is None and weight.permute(0, 2, 3, 4, 1).is_contiguous()
    if out.numel() == 0:
        return
    call = words(call_of(x, past, weight, out, *how))
    pointers = [ctypes.c_void_p(0 if one is None else one.data_ptr()) for one in (x, past, weight, bias, out)]
    why = ctypes.create_string_buffer(1000)
    bf16 = int(x.dtype == torch.bfloat16)
    if library().conv_emulate(call, *pointers, bf16, width, why, len(why)):
        raise ValueError(why.value.decode())


def norm_shape(x: Tensor, out: Tensor, silu: bool) -> ctypes.Array:
    """`Norm` of csrc/vae_norm.h, for [B, C, T, H, W]."""
    B, C, T, H, W = x.shape
    strides = [(one.stride(0), *one.stride()[2:]) for one in (x, out)]
    return (ctypes.c_int64 * 14)(B, T, H, W, C, *strides[0], *strides[1], int(silu))


def norm_host(x: Tensor, gamma: Tensor, out: Tensor, silu: bool, off: float = 0) -> None:
    """The same of `vae_kernels.norm_cuda`. off: how wrong the special function
    unit is, -1 to 1 of what its manual allows."""
    pointers = [ctypes.c_void_p(one.data_ptr()) for one in (x, gamma, out)]
    why = ctypes.create_string_buffer(1000)
    half = ctypes.c_int(x.dtype == torch.bfloat16)
    if library().norm_emulate(norm_shape(x, out, silu), *pointers, half, ctypes.c_float(off), why, len(why)):
        raise ValueError(why.value.decode())


class NormPlan(ctypes.Structure):
    """`Plan` of csrc/vae_norm.h."""

    _fields_ = (
        *((name, ctypes.c_int64 * 4) for name in ("size", "x", "out")),
        ("pixels", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("flat", "vectors", "log_lanes", "many", "wide")),
        ("each", ctypes.c_float),
    )


def norm_plan(x: Tensor, out: Tensor) -> NormPlan:
    plan = NormPlan()
    library().norm_plan(norm_shape(x, out, True), ctypes.byref(plan))
    return plan
