"""Rows in registers to 8-bit codes with a scale for each row, for the kernels that quantize."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Codes(NamedTuple):
    """Where rows are written as codes [..., d], int8 or e4m3 as uint8, and their scales fp32 [..., 1]. Contiguous."""

    codes: Tensor
    scales: Tensor


@triton.jit
def scale_of(most, FLOATS: tl.constexpr):
    """The scale of a row whose largest value is `most`."""
    largest = 448.0 if FLOATS else 127.0
    return tl.div_rn(tl.maximum(most, 1e-12), largest)


@triton.jit
def codes_of(x, scale, FLOATS: tl.constexpr):
    """x in fp32 -> int8, or e4m3 as uint8."""
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    if FLOATS:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        far = tl.maximum(power, 0.015625) * 1572864.0  # numbers of this size are multiples of an eighth of the power
        bits = (((x + far) - far) * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
        return (((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F)).to(tl.uint8)
    else:
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)  # numbers of this size are whole
