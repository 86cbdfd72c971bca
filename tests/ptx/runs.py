"""csrc's operations by their PTX: the arguments of the operators in fastvid/ops, through the launchers, interpreted.

seed: of the schedule. text: PTX in the place of the file's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from ptx.from_csrc import DTYPES, compile_source, interpret, numbers, pointer
from torch import Tensor

from fastvid.ops.attention_gpu import KEYS, exact_steps, padded_steps, prepare, quantized, source_of
from fastvid.ops.sparse import Blocks
from fastvid.ops.vae_kernels import call_of

PARTS = ("queries", "keys", "values")


@dataclass(frozen=True)
class How:
    """processors: of the device, at most as many blocks as which attention has."""

    seed: int = 0
    processors: int = 132
    text: str = ""


PLAIN = How()


def run(file: str, name: str, arguments: list[object], tensors: list[Tensor | None], how: How) -> None:
    """Raises Fault for what the hardware would not do, ValueError for what the launcher gives."""
    source = compile_source(file)
    interpret(source.record(name, arguments, how.processors, how.text), tensors, how.seed)


def dtype_of(x: Tensor) -> int:
    return DTYPES[str(x.dtype).removeprefix("torch.")]


def addresses(tensors: Sequence[Tensor | None], count: int) -> ctypes.Array:
    """Nulls behind the last."""
    return (ctypes.c_void_p * count)(*(0 if x is None else x.data_ptr() for x in tensors))


def scale_of(q: Tensor, scale: float | None) -> ctypes.c_float:
    return ctypes.c_float(q.shape[-1] ** -0.5 if scale is None else scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    blocks: Blocks | None = None,
    scale: float | None = None,
    how: How = PLAIN,
) -> None:
    call, walked = prepare(q, k, v, blocks, exact_steps)
    given = [numbers(call), addresses(walked, 6), scale_of(q, scale), *map(pointer, (q, k, v, out, lse))]
    run("attention", "attend", [*given, dtype_of(q), 0, None], [q, k, v, out, lse, *walked], how)


class Source(ctypes.Structure):
    """`Call` of csrc/quantize.h."""

    _fields_ = (("numbers", ctypes.c_int64 * 9), ("tiles", ctypes.c_void_p))


class Eights(ctypes.Structure):
    """The same of csrc/attention_eight_call.h, with its `Scales`."""

    _fields_ = (("tensors", ctypes.c_void_p * 3), ("scales", ctypes.c_void_p * 3), ("count", ctypes.c_int))


def quantize(
    part: str,
    x: Tensor,
    mean: Tensor | None,
    made: tuple[Tensor | None, ...],
    kind: str,
    blocks: Blocks | None = None,
    how: How = PLAIN,
) -> None:
    call, tiles = source_of(x, None if part == "queries" else blocks)
    source = Source((ctypes.c_int64 * 9)(*numbers(call)), 0 if tiles is None else tiles.data_ptr())
    given = [PARTS.index(part), ctypes.byref(source), int(kind == "int8"), *map(pointer, (x, mean, *made))]
    run("quantize", "quantize_part", [*given, dtype_of(x), 0, None], [x, mean, *made, tiles], how)


def attention_eight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kind: str,
    blocks: Blocks | None = None,
    how: How = PLAIN,
) -> None:
    call, walked = prepare(q, k, v, blocks, padded_steps)
    held, scales = quantized(
        q, k, v, blocks, lse is not None, lambda part, x, mean, made: quantize(part, x, mean, made, kind, blocks)
    )
    eights = Eights(addresses(held, 3), addresses(scales, 3), held[1].shape[2] // KEYS)
    given = [numbers(call), addresses(walked, 6), ctypes.byref(eights), scale_of(q, None), int(kind == "int8")]
    given += [pointer(out), pointer(lse), dtype_of(q), 0, None]
    run("attention_eight", "attend_eight", given, [*held, *scales, out, lse, *walked], how)


def conv(
    x: Tensor,
    past: Tensor | None,
    scale: None,
    gamma: None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *form: object,
    how: How = PLAIN,
) -> None:
    """Arguments of `vae_kernels.conv_cuda`."""
    assert scale is None and gamma is None and weight.permute(0, 2, 3, 4, 1).is_contiguous()
    if out.numel():
        call = numbers(call_of(x, past, weight, out, *form))  # type: ignore[arg-type]
        given = [call, *map(pointer, (x, past, weight, bias, out)), dtype_of(x), 0, None]
        run("conv", "vae_conv", given, [x, past, weight, bias, out], how)


def norm(x: Tensor, gamma: Tensor, out: Tensor, silu: bool, how: How = PLAIN) -> None:
    """The same of `vae_kernels.norm_cuda`."""
    B, C, T, H, W = x.shape
    strides = [number for one in (x, out) for number in (one.stride(0), *one.stride()[2:])]
    shape = (ctypes.c_int64 * 14)(B, T, H, W, C, *strides, int(silu))
    run("vae_norm", "vae_norm", [shape, *map(pointer, (x, gamma, out)), dtype_of(x), 0, None], [x, gamma, out], how)


def rgb(frames: Tensor, out: Tensor, how: How = PLAIN) -> None:
    """frames [3, T, H, W] into out, uint8 [T, H, W, 3]."""
    _, T, H, W = frames.shape
    shape = (ctypes.c_int64 * 7)(T, H, W, *frames.stride())
    run("rgb", "to_rgb", [pointer(frames), pointer(out), dtype_of(frames), shape, 0, None], [frames, out], how)
