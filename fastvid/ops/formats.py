"""What a format of quantized weights is: how its bytes are laid out, and which numbers they mean.

A weight is a matrix [N, K] (outputs, inputs). Its data are tensors under names of their own: "codes" (integers: 8-bit
floats as uint8), "scale" and, in some formats, more. The formats stand in the tables of formats_rows.py,
formats_blocks.py and formats_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Data = Mapping[str, Tensor]
"""Role -> tensor."""
Shape = tuple[int, int]
"""Outputs N, inputs K."""
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Role -> dtype and shape."""

PIECE = 2**19  # codes


@dataclass(frozen=True)
class Format:
    """A format of quantized weights.

    bits: of a weight with its share of the scales. group: weights along K that share a scale; 0: the whole row.
    layout(shape): the tensors of a matrix. dequantize(data, shape, start, stop): rows start to stop - 1, in fp32.
    finite(data): no code or scale is NaN or infinite. by_rows: a tensor with N rows has a row for each output.
    """

    name: str
    bits: float
    group: int
    layout: Callable[[Shape], Layout]
    dequantize: Callable[[Data, Shape, int, int], Tensor]
    finite: Callable[[Data], bool]
    by_rows: bool = True


def largest_code(codes: Tensor) -> int:
    """The largest code of 8-bit floats without their signs. In pieces that stay in the cache, and by a maximum: whether
    all of a tensor's values are true is found over ten times slower (torch 2.13, a CPU)."""
    pieces = codes.flatten().split(PIECE)
    return max((int((piece << 1).max()) >> 1 for piece in pieces if piece.numel()), default=0)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not values.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))
