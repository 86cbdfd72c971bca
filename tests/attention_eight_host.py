"""The CUDA attention of 8-bit values on the CPU: quantization by csrc/'s own arithmetic, attention by its block code
over tests/csrc/attention_emulator.cpp."""

from __future__ import annotations

import ctypes

import torch
from attention_host import addresses, library, words
from torch import Tensor

from fastvid.ops.attention_gpu import KEYS, padded_steps, prepare, quantized, source_of
from fastvid.ops.sparse import Blocks

PARTS = ("queries", "keys", "values")


class Source(ctypes.Structure):
    """`Call` of csrc/quantize.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim")),
        ("strides", ctypes.c_int64 * 3),
        ("count", ctypes.c_int64),
        ("each", ctypes.c_int64),
        ("tiles", ctypes.c_void_p),
    )


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def quantize_host(
    part: str,
    x: Tensor,
    mean: Tensor | None,
    made: tuple[Tensor | None, ...],
    kind: str,
    blocks: Blocks | None = None,
) -> None:
    """What the kernels of csrc/quantize.cu write. Raises ValueError for what they refuse."""
    call, tiles = source_of(x, None if part == "queries" else blocks)
    source = Source(*(tuple(v) if isinstance(v, tuple) else v for v in call.values()), pointer(tiles))
    why = ctypes.create_string_buffer(1000)
    pointers = [pointer(t) for t in (x, mean, *made)]
    bf16, int8 = int(x.dtype == torch.bfloat16), int(kind == "int8")
    if library().quantize_emulate(PARTS.index(part), ctypes.byref(source), int8, *pointers, bf16, why, len(why)):
        raise ValueError(why.value.decode())


def eights(q: Tensor, k: Tensor, v: Tensor, kind: str, blocks: Blocks | None, with_lse: bool):
    """What `quantized` gives, made by the host."""
    return quantized(
        q, k, v, blocks, with_lse, lambda part, x, mean, made: quantize_host(part, x, mean, made, kind, blocks)
    )


def attention_eight_host(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kind: str,
    blocks: Blocks | None = None,
    scale: float | None = None,
    grid: int = 3,
) -> None:
    """What the kernels write into out and lse on a device of `grid` multiprocessors; see attention_host."""
    call, walked = prepare(q, k, v, blocks, [] if blocks is None else padded_steps(q, blocks))
    tensors, scales = eights(q, k, v, kind, blocks, lse is not None)
    why = ctypes.create_string_buffer(1000)
    factor = ctypes.c_float(q.shape[-1] ** -0.5 if scale is None else scale)
    bf16, int8 = int(q.dtype == torch.bfloat16), int(kind == "int8")
    held = (ctypes.c_void_p * 3)(*(x.data_ptr() for x in tensors))
    factors = (ctypes.c_void_p * 3)(*(0 if x is None else x.data_ptr() for x in scales))
    count = tensors[1].shape[2] // KEYS
    if library().attention_eight_emulate(
        words(call), addresses(walked), factor, held, factors, count, int8, pointer(out), pointer(lse), bf16, grid, why,
        len(why),
    ):  # fmt: skip
        raise ValueError(why.value.decode())
