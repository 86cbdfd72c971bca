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


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Activations as 8-bit products take them, quantized once for all that read them.

    codes [..., K]: int8, or e4m3 as such. scale: fp32 [..., 1]. dtype: of the activations, and of products with them.
    rotation: as of the weights, size of the groups that were rotated before.
    """

    format: str
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    rotation: int = 0

    @classmethod
    def of(cls, x: Activations, weight: QuantizedTensor) -> QuantizedRows:
        """Activations for 8-bit products with a weight. Raises ValueError for those that are quantized otherwise."""
        if not isinstance(x, QuantizedRows):
            return cls(weight.format, *quantize_rows(x, weight.format, weight.rotation), x.dtype, weight.rotation)
        x.check(weight)
        return x

    def check(self, weight: QuantizedTensor) -> None:
        """Raises ValueError unless they are what 8-bit products with this weight take."""
        if not weight.eight_bit or (self.format, self.rotation) != (weight.format, weight.rotation):
            raise ValueError(
                f"rows in {self.format} in groups of {self.rotation} for a weight in {weight.format} in groups of "
                f"{weight.rotation}{'' if weight.eight_bit else ', which is multiplied exactly'}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_meta(self) -> bool:
        return self.codes.is_meta

    @property
    def requires_grad(self) -> bool:
        return False

    def numel(self) -> int:
        return self.codes.numel()

    def flat(self) -> tuple[Tensor, Tensor]:
        """Codes [M, K] and scale [M, 1]."""
        return self.codes.reshape(-1, self.shape[-1]), self.scale.reshape(-1, 1)


Activations = Tensor | QuantizedRows


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


def linear(
    x: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> Activations:
    """x [..., K] @ weight.T + bias -> [..., N] in x's dtype; with gelu its tanh GELU.

    weight.eight_bit: rows of x (rotated if the weight is) are quantized as `formats_rows.quantize` does, unless they
    are already, codes are multiplied, and the sums take both scales. rows: a format in which the result's rows are
    quantized.
    """
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    if not x.is_meta:
        _write(x, weight.plain, bias, gelu, y)
    return y if rows is None else QuantizedRows(rows, *quantize_rows(y, rows), y.dtype)


def _write(x: Activations, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, y: Tensor) -> None:
    N, K = weight.shape
    strip = max(1, STRIP // K)
    if weight.eight_bit or isinstance(x, QuantizedRows):
        x = QuantizedRows.of(x, weight)
    for start in range(0, N, strip):
        stop = min(start + strip, N)
        if isinstance(x, QuantizedRows):
            part = _eight_bit(x, weight, start, stop)
        else:
            part = F.linear(x, weight.rows(start, stop, x.dtype))
        if bias is not None:
            part = part + bias[start:stop]
        y[..., start:stop] = F.gelu(part, approximate="tanh") if gelu else part


def quantize_rows(x: Tensor, format: str, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """(codes [..., K], scale [..., 1]) of activations for an 8-bit product; see `QuantizedRows`."""
    x = x.float()
    return formats_rows.quantize(rotate(x, rotation) if rotation else x, format)


def _eight_bit(x: QuantizedRows, weight: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Sums in double precision, which holds those of whole numbers exactly."""
    own = weight.data["scale"].double()
    own = own if len(own) == 1 else own[start:stop]
    values = formats_rows.values(weight.format, weight.data["codes"][start:stop])
    return (x.codes.double() @ values.double().T * x.scale.double() * own).float()
