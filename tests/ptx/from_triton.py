"""Kernels as Triton compiles them for sm_90, ready to be interpreted. Their results on the hardware are known."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ptx.machine import Launch
from ptx.parse import Kernel, kernels_of, parse
from ptx.tma import Map
from torch import Tensor

from fastvid.kernels.ahead import Variant, compiled

SWIZZLES = (0, 32, 64, 128)


@dataclass(frozen=True)
class Compiled:
    """The PTX of a kernel, and what its launcher goes by."""

    variant: Variant
    text: str
    shared: int
    warps: int
    boxes: tuple[Mapping[str, object], ...]  # of its tensor maps, in their order

    def kernel(self) -> Kernel:
        return parse(self.text, kernels_of(self.text)[0])


def compile_variant(variant: Variant) -> Compiled:
    made = compiled(variant, 90)
    return Compiled(
        variant, made.asm["ptx"], made.metadata.shared, made.metadata.num_warps, tuple(made.metadata.tensordesc_meta)
    )


def launch(made: Compiled, values: Mapping[str, object], grid: int, kernel: Kernel | None = None) -> Launch:
    """values: tensors of the shape that a map has, pointers' tensors, and numbers, by the names of arguments. kernel:
    in the place of what Triton compiled."""
    kernel = kernel or made.kernel()
    arguments: list[bytes] = []
    boxes = iter(made.boxes)
    for name in made.variant.kernel.arg_names:
        kind = made.variant.types.get(name)
        if kind is not None:
            arguments += pack(kind, values[name], boxes)
    arguments += [bytes(8)] * (len(kernel.params) - len(arguments))  # scratch memory, which they do not have
    params = bytearray(max(param.offset + param.size for param in kernel.params.values()))
    for param, data in zip(kernel.params.values(), arguments, strict=True):
        assert len(data) == param.size, (param, data)
        params[param.offset : param.offset + param.size] = data
    return Launch(kernel, (grid, 1, 1), (32 * made.warps, 1, 1), made.shared, bytes(params))


def pack(kind: str, value: object, boxes: object) -> list[bytes]:
    if kind.startswith("tensordesc"):
        assert isinstance(value, Tensor)
        tensor_map = map_of(value, next(boxes))  # type: ignore[call-overload]
        shape, strides = value.shape, value.stride()
        return [tensor_map.encode(), *(struct.pack("<i", n) for n in shape), *(struct.pack("<q", n) for n in strides)]
    if kind.startswith("*"):
        return [struct.pack("<Q", value.data_ptr() if isinstance(value, Tensor) else 0)]
    return [struct.pack({"i32": "<i", "i64": "<q", "fp32": "<f"}[kind], value)]


def map_of(tensor: Tensor, box: Mapping[str, object]) -> Map:
    size = tensor.element_size()
    return Map(
        base=tensor.data_ptr(),
        size=size,
        swizzle=SWIZZLES[box["swizzle"]],  # type: ignore[index]
        extent=tuple(reversed(tensor.shape)),
        stride=tuple(stride * size for stride in reversed(tensor.stride()[:-1])),
        box=tuple(reversed(box["block_size"])),  # type: ignore[call-overload]
        every=(1,) * tensor.dim(),
    )
