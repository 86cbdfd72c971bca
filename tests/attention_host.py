"""The CUDA attention on the CPU: csrc/'s own headers, compiled by the host compiler with
tests/csrc/attention_emulator.cpp in the place of the hardware."""

from __future__ import annotations

import ctypes
import functools

import torch
from compiled_host import compile_host
from torch import Tensor

from fastvid.ops.attention_gpu import exact_steps, prepare
from fastvid.ops.sparse import Blocks


@functools.cache
def library() -> ctypes.CDLL:
    lib = compile_host("attention_emulator.cpp")
    lib.attention_works.restype = ctypes.c_int64
    lib.sm90_descriptor.restype = lib.sm90_transposed.restype = ctypes.c_uint64
    lib.sm90_swizzled.restype = ctypes.c_uint32
    return lib


def words(call: dict[str, tuple[int, ...] | int]) -> ctypes.Array:
    """A call as the C++ struct has it."""
    flat = [number for value in call.values() for number in (value if isinstance(value, tuple) else (value,))]
    assert len(flat) == library().attention_call_words()
    return (ctypes.c_int64 * len(flat))(*flat)


def addresses(walked: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * 7)(*(x.data_ptr() for x in walked))


def attention_host(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    blocks: Blocks | None = None,
    scale: float | None = None,
    grid: int = 3,
    pairs: bool = False,
) -> None:
    """What the kernel writes into out and lse on a device of `grid` multiprocessors.

    Raises ValueError for what it refuses, and for what the hardware would not do or never end.
    """
    call, walked = prepare(q, k, v, blocks, [] if blocks is None else exact_steps(q, blocks))
    call["pairs"] = int(pairs)
    pointers = [ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in (q, k, v, out, lse)]
    why = ctypes.create_string_buffer(1000)
    factor = ctypes.c_float(q.shape[-1] ** -0.5 if scale is None else scale)
    bf16 = int(q.dtype == torch.bfloat16)
    if library().attention_emulate(words(call), addresses(walked), factor, *pointers, bf16, grid, why, len(why)):
        raise ValueError(why.value.decode())
