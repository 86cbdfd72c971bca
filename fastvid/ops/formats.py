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
