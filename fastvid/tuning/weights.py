"""Quantized weights in recorded calls: without their values, and with random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import formats_gguf
from fastvid.ops.formats_rows import INT8
from fastvid.ops.quantized import QuantizedTensor, Spec

LARGEST_E4M3 = 0x7E  # the codes above it, sign aside, are NaN


@dataclass(frozen=True)
class WeightLike:
    """A QuantizedTensor without its data. data: (role, dtype, shape) of each of its tensors."""

    format: str
    shape: tuple[int, int]
    data: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    dtype: torch.dtype
    rotation: int = 0
    eight_bit: bool = False

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * kind.itemsize for _, kind, shape in self.data)


def like(weight: QuantizedTensor) -> WeightLike:
    data = tuple((role, one.dtype, tuple(one.shape)) for role, one in weight.plain.data.items())
    return WeightLike(weight.format, weight.shape, data, weight.dtype, weight.rotation, weight.eight_bit)


def to_json(weight: WeightLike) -> dict[str, Any]:
    fields = {name: getattr(weight, name) for name in ("format", "shape", "rotation", "eight_bit")}
    data = [(role, _name(kind), shape) for role, kind, shape in weight.data]
    return {"weight": {**fields, "data": data, "dtype": _name(weight.dtype)}}


def from_json(fields: Mapping[str, Any]) -> WeightLike:
    data = tuple((role, getattr(torch, kind), tuple(shape)) for role, kind, shape in fields["data"])
    N, K = fields["shape"]
    return WeightLike(**{**fields, "shape": (N, K), "data": data, "dtype": getattr(torch, fields["dtype"])})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make(weight: WeightLike, generator: torch.Generator) -> QuantizedTensor:
    """Random values, on the generator's device."""
    data = {role: (kind, shape) for role, kind, shape in weight.data}
    spec = Spec(weight.format, weight.shape, data, weight.rotation, weight.eight_bit)
    return QuantizedTensor(
        weight.format, weight.shape, draw(spec, generator), weight.dtype, weight.rotation, weight.eight_bit
    )


def draw(spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random data of a weight, all finite. Its values are of about the size that those of a layer have."""
    made = {role: _role(spec, role, generator) for role in spec.data}
    block = formats_gguf.BLOCKS.get(spec.format)
    if block is not None:
        halves = made["codes"].view(-1, block.bytes).view(torch.float16)
        for word in block.halves:
            drawn = torch.randn(len(halves), generator=generator, device=generator.device, dtype=torch.float32)
            halves[:, word] = drawn.mul_(0.01 / 16).half()
    return made


def _role(spec: Spec, role: str, generator: torch.Generator) -> Tensor:
    kind, shape = spec.data[role]
    if kind.is_floating_point:
        drawn = torch.empty(shape, dtype=kind, device=generator.device).uniform_(0.5, 1.0, generator=generator)
        return drawn.sort().values if role.endswith("map") else drawn.mul_(_factor(spec, role))
    low, high = (-127, 128) if spec.format == INT8 else (0, 256)
    if role == "scale" and spec.format == "mxfp8":
        low, high = 110, 118  # exponents: 2^-17 to 2^-10
    codes = torch.randint(low, high, shape, dtype=kind, generator=generator, device=generator.device)
    is_e4m3 = role == "codes" and spec.format in ("fp8_e4m3", "mxfp8") or role == "scale" and "nvfp4" in spec.format
    if is_e4m3 or spec.format == "fp8_e5m2":
        top = LARGEST_E4M3 if is_e4m3 else 0x7B
        codes = (codes & 0x80) | (codes & 0x7F).clamp_(max=top)
    return codes


def _factor(spec: Spec, role: str) -> float:
    """What makes values of codes about K^-1/2 in size."""
    largest = {INT8: 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}.get(spec.format, 448.0 * 6.0)
    return 1.0 if role.startswith("nested") or "map" in spec.data else spec.shape[1] ** -0.5 / largest


# ---------------------------------------------------------------- what checks do with arguments


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument: of a weight its data, of a tuple its parts."""
    if isinstance(value, QuantizedTensor):
        return list(value.data.values())
    parts = value if isinstance(value, tuple) else (value,)
    return [one for one in parts if isinstance(one, Tensor)]


def copied(weight: QuantizedTensor) -> QuantizedTensor:
    return replace(weight, data={role: one.clone() for role, one in weight.data.items()})


def change(weight: QuantizedTensor) -> None:
    """Puts other values into the same memory: those of other rows."""
    for one in weight.data.values():
        one.copy_(one.roll(1, 0))
