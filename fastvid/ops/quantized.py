"""Quantized weights as they are in their files, and the product with them.

    weight = QuantizedTensor("fp8_e4m3", (N, K), {"codes": ..., "scale": ...}, torch.bfloat16)
    y = linear(x, weight, bias)

The formats: formats_rows.py, formats_blocks.py, formats_gguf.py. ConvRot: a weight may be stored rotated along K by a
Hadamard matrix, in groups; see `rotate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import formats_blocks, formats_gguf, formats_rows
from fastvid.ops.formats import Data, Format, Shape

FORMATS: Mapping[str, Format] = {**formats_rows.FORMATS, **formats_blocks.FORMATS, **formats_gguf.FORMATS}
EIGHT_BIT = (formats_rows.INT8, formats_rows.E4M3)
"""Formats whose products can be computed in 8 bits."""
STRIP = 2**22  # weights that are dequantized at once


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight matrix [N, K] as its file stores it.

    format: a key of FORMATS. data: role -> tensor. dtype: what its layer computes in. rotation: size of the rotated
    groups along K, 0 without. eight_bit: products are computed in 8 bits, with activations quantized row by row; else
    they are those of the dequantized weight. keep(role, tensor): a back end gives the weight's layer another form of
    some data (`quantized_cpu.pack`), to have at the next call.
    """

    format: str
    shape: Shape
    data: Data
    dtype: torch.dtype
    rotation: int = 0
    eight_bit: bool = False
    keep: Callable[[str, Tensor], None] | None = None

    @property
    def plain(self) -> QuantizedTensor:
        """The same with the data as in the file."""
        codes = self.data["codes"]
        if not codes.is_mkldnn:
            return self
        return replace(self, data={**self.data, "codes": codes.to_dense().t().contiguous()}, keep=None)

    @property
    def device(self) -> torch.device:
        return self.data["codes"].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.data.values())

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start to stop - 1 of the matrix: computed in fp32, rounded once to dtype (by default its own)."""
        made = FORMATS[self.format].dequantize(self.plain.data, self.shape, start, stop)
        return (rotate_whole(made, self.rotation) if self.rotation else made).to(dtype or self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K]."""
        return self.rows(0, self.shape[0], dtype)


@dataclass(frozen=True)
class Spec:
    """A QuantizedTensor without its memory, to build and to plan with. data: role -> dtype and shape. exact: the
    file says that products in 8 bits are not good enough for this weight."""

    format: str
    shape: Shape
    data: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    rotation: int = 0
    eight_bit: bool = False
    exact: bool = False

    @classmethod
    def of(cls, format: str, shape: Shape, **rest: Any) -> Spec:
        """With the layout that the format has without optional tensors."""
        return cls(format, shape, FORMATS[format].layout(shape), **rest)


Weight = Tensor | QuantizedTensor


def dense(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """A weight as a plain tensor, for operations that need one."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight


# ---------------------------------------------------------------- rotation


@cache
def hadamard(group: int) -> Tensor:
    """ConvRot's matrix [group, group], fp32: the Kronecker power of [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] over
    sqrt(group), which is symmetric and its own inverse. group: a power of 4."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    made = torch.ones(1, 1, dtype=torch.float32)
    while len(made) < group:
        made = torch.kron(made, four)
    if len(made) != group:
        raise ValueError(f"a rotation of {group}: groups are powers of 4")
    return made / group**0.5


def rotate(x: Tensor, group: int) -> Tensor:
    """Each group along the last dimension times `hadamard(group)`; in x's dtype."""
    if group < 256 or x.device.type != "cpu":
        return rotate_whole(x, group)
    # The matrix is the Kronecker product of two small ones: a quarter of the time on a CPU.
    small = _hadamard_of(16, x)
    rows = (x.reshape(-1, 16) @ small).view(-1, group // 16, 16)
    return (_hadamard_of(group // 16, x) @ rows).view(x.shape)


def rotate_whole(x: Tensor, group: int) -> Tensor:
    """The same as one product, whose sums have the bits of comfy-kitchen's."""
    return (x.unflatten(-1, (-1, group)) @ _hadamard_of(group, x)).flatten(-2)


def _hadamard_of(group: int, x: Tensor) -> Tensor:
    return hadamard(group).to(device=x.device, dtype=x.dtype)


# ---------------------------------------------------------------- the product


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x [..., K] @ weight.T + bias -> [..., N] in x's dtype; with gelu its tanh GELU.

    weight.eight_bit: rows of x (rotated if the weight is) are quantized as `formats_rows.quantize` does, codes are
    multiplied, and the sums take both scales.
    """
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    if x.is_meta:
        return y
    strip = max(1, STRIP // K)
    weight = weight.plain
    factors = quantized_rows(x, weight) if weight.eight_bit else None
    for start in range(0, N, strip):
        stop = min(start + strip, N)
        if factors is None:
            part = F.linear(x, weight.rows(start, stop, x.dtype))
        else:
            part = _eight_bit(*factors, weight, start, stop)
        if bias is not None:
            part = part + bias[start:stop]
        y[..., start:stop] = F.gelu(part, approximate="tanh") if gelu else part
    return y


def quantized_rows(x: Tensor, weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """(codes, scale [..., 1]) of activations for an 8-bit product."""
    x = x.float()
    return formats_rows.quantize(rotate(x, weight.rotation) if weight.rotation else x, weight.format)


def _eight_bit(codes: Tensor, scale: Tensor, weight: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Sums in double precision, which holds those of whole numbers exactly."""
    own = weight.data["scale"].double()
    own = own if len(own) == 1 else own[start:stop]
    values = formats_rows.values(weight.format, weight.data["codes"][start:stop])
    return (codes.double() @ values.double().T * scale.double() * own).float()
