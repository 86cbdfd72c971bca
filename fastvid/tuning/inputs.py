"""Random inputs for a recorded call, never zeros: every argument as its operation needs it, with the recorded strides.

awkward   the same call with large magnitudes; with few and uneven rows (`pieces`); after memory that was NaN
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import rgb
from fastvid.ops.quantized import QuantizedTensor
from fastvid.tuning import weights
from fastvid.tuning.calls import Call, Function, TensorLike
from fastvid.tuning.weights import WeightLike

Given = dict[str, Any]
"""Argument name -> value."""
ACTIVATIONS = ("x", "y", "q", "k", "v", "qkv", "latents", "frames", "cond", "uncond")
LARGE = {torch.float16: 50.0}  # fp16 ends at 65,504
LARGEST = 1000.0
SHARP = 30.0  # of queries and keys: beyond it, rounding scores decides between two keys
POISONS = 4  # tensors of NaN that are freed before a call


def make(call: Call, device: torch.device, seed: int = 0) -> Given:
    """The arguments of a call: tensors with values drawn for `seed`, on a device (what was on the host stays there)."""
    return {name: _value(name, value, call, device, seed) for name, value in call.given.items()}


def _value(name: str, value: Any, call: Call, device: torch.device, seed: int) -> Any:
    if isinstance(value, TensorLike):
        place = torch.device("cpu") if value.host and _stays(call.op, name) else device
        generator = torch.Generator(place).manual_seed(seed + zlib.crc32(_stream(name).encode()))
        return _strided(_draw(name, value, call, generator), value, call.op.startswith("vae_"))
    if isinstance(value, WeightLike):
        return weights.make(value, torch.Generator(device).manual_seed(seed))
    if isinstance(value, Function):
        return rgb.reference
    if isinstance(value, tuple) and any(isinstance(one, TensorLike) for one in value):
        return tuple(_value(f"{name}{i}", one, call, device, seed) for i, one in enumerate(value))
    return value


def _stays(op: str, name: str) -> bool:
    """Whether an argument is read on the host. (An index that was made there goes to the device.)"""
    return op == "solver_step" and name in ("sigma", "moves", "weights")


def _stream(name: str) -> str:
    return "angle" if name in ("cos", "sin") else name  # of the same angles


def _draw(name: str, like: TensorLike, call: Call, generator: torch.Generator) -> Tensor:
    """Values of an argument, contiguous."""
    shape, device = like.shape, generator.device

    def normal(mean: float = 0.0, std: float = 1.0) -> Tensor:
        # 16-bit values are drawn as such, since fp32 copies of the largest tensors would not fit.
        drawn = torch.empty(shape, device=device, dtype=like.dtype).normal_(generator=generator)
        return drawn if (mean, std) == (0.0, 1.0) else drawn.mul_(std).add_(mean)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape, device=device, dtype=like.dtype).uniform_(low, high, generator=generator)

    makers: Mapping[str, Callable[[], Tensor]] = {
        "index": lambda: torch.randint(0, _rows_of(call), shape, device=device, generator=generator),
        "order": lambda: torch.randperm(shape[0], device=device, generator=generator),
        "cos": lambda: uniform(-6, 6).cos_(),
        "sin": lambda: uniform(-6, 6).sin_(),
        "gamma": lambda: normal(1.0, 0.1),
        "bias": lambda: normal(0.0, 0.1),
        "sigma": lambda: uniform(0.1, 0.9),
        "moves": lambda: torch.arange(shape[0], device=device) != 1,  # one column stays, where there are several
        "frames": lambda: uniform(-1.2, 1.2),
    }
    if name in makers:
        return makers[name]().to(like.dtype)
    if name.startswith("weight") and name != "weights":
        return normal(0.0, math.prod(shape[1:]) ** -0.5) if len(shape) > 1 else normal(1.0, 0.1)
    return normal() if like.dtype.is_floating_point else torch.zeros(shape, device=device, dtype=like.dtype)


def _rows_of(call: Call) -> int:
    """How many rows an index chooses from."""
    tables = (call.given.get(name) for name in ("shift", "gate"))
    return next(one.shape[0] for one in tables if one is not None and len(one.shape) == 2)


def _strided(values: Tensor, like: TensorLike, vae: bool) -> Tensor:
    """The values with the strides that were recorded. Activations of the VAEs are channels-last, as in a real run."""
    if vae and values.ndim == 5:
        return values.contiguous(memory_format=torch.channels_last_3d)
    if values.stride() == like.stride:
        return values
    sizes = [1 if step == 0 else size for size, step in zip(like.shape, like.stride, strict=True)]
    out = torch.empty_strided(sizes, like.stride, dtype=values.dtype, device=values.device)
    out.copy_(values[tuple(slice(0, size) for size in sizes)])
    return out.expand(like.shape)


def large(given: Given) -> Given:
    """The same call with large activations."""
    return {name: _scaled(name, value) if name in ACTIVATIONS else value for name, value in given.items()}


def _scaled(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value * (SHARP if name in ("q", "k") else LARGE.get(value.dtype, LARGEST))
    return value


def to_float64(given: Given) -> Given:
    """The same call in double precision; what is on the host for control stays."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: torch.float64 if isinstance(value, torch.dtype) else convert(value) for name, value in given.items()}


def copied(given: Given) -> Given:
    """The same arguments in memory of their own, with the same strides."""

    def copy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copy, value))
        if isinstance(value, QuantizedTensor):
            return weights.copied(value)
        return value.clone() if isinstance(value, Tensor) else value

    return {name: copy(value) for name, value in given.items()}


def change(given: Given) -> None:
    """Puts other values into the same memory, but for angles, indices and what says how a step goes."""
    for name, value in given.items():
        if name in ("cos", "sin", "sigma", "weights"):
            continue
        if isinstance(value, QuantizedTensor):
            weights.change(value)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Tensor) and one.is_floating_point():
                one.mul_(-0.75)


def poison(size: int, device: torch.device) -> None:
    """Fills memory that the next call will probably get with NaN, so that what a kernel does not write shows."""
    with contextlib.suppress(RuntimeError):  # no memory: then there is none to fill
        made = [torch.full((max(1, size // 4),), torch.nan, device=device, dtype=torch.float32) for _ in range(POISONS)]
        del made
