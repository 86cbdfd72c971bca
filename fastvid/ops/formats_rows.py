"""Formats with a scale for each row, or one for the whole matrix: 8-bit floats and whole numbers.

weight[n, k] = codes[n, k] * scale[n]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastvid.ops.formats import PIECE, Data, Format, Layout, Shape, all_finite, largest_code

E4M3, E5M2, INT8 = "fp8_e4m3", "fp8_e5m2", "int8"
FLOATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
LARGEST = {E4M3: 448.0, INT8: 127.0}
SMALLEST = 1e-12  # of a scale: rows of zeros stay zeros


def values(format: str, codes: Tensor) -> Tensor:
    """The codes as fp32 numbers."""
    if format not in FLOATS or codes.device.type != "cpu":
        return (codes.view(FLOATS[format]) if format in FLOATS else codes).float()
    # Bits moved to where fp16 has them: PyTorch's own conversion takes 5 times as long on a CPU.
    bits = codes.view(torch.int8).to(torch.int16)
    if format == E5M2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    nan = (bits & 0x7F).add_(1).bitwise_and_(0x80).mul_(0xF8)  # the exponent of NaN where all seven bits are set
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).bitwise_or_(nan)
    return bits.view(torch.float16).float().mul_(2.0**8)  # e4m3's exponent starts at -7, fp16's at -15


def _dequantize(format: str, data: Data, start: int, stop: int) -> Tensor:
    scale = data["scale"]
    return values(format, data["codes"][start:stop]).mul_(scale if len(scale) == 1 else scale[start:stop, None])


def _layout(format: str, shape: Shape) -> Layout:
    kind = torch.int8 if format == INT8 else torch.uint8
    return {"codes": (kind, shape), "scale": (torch.float32, (shape[0],))}


def _finite(format: str, data: Data) -> bool:
    if not all_finite(data["scale"]):
        return False
    if format == INT8:
        return True
    return largest_code(data["codes"]) < (0x7F if format == E4M3 else 0x7C)


def _format(name: str) -> Format:
    return Format(
        name,
        8.0,
        0,
        lambda shape: _layout(name, shape),
        lambda data, shape, start, stop: _dequantize(name, data, start, stop),
        lambda data: _finite(name, data),
    )


FORMATS: Mapping[str, Format] = {name: _format(name) for name in (E4M3, E5M2, INT8)}


def quantize(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) of the rows of x [..., K]: int8, or e4m3 as such; scale fp32 [..., 1], its largest value to 127
    or 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST) / LARGEST[format]
    x = x / scale
    return (x.round_().to(torch.int8) if format == INT8 else x.to(FLOATS[format])), scale


def quantize_weight(weight: Tensor, format: str) -> dict[str, Tensor]:
    """The data of a matrix [N, K] with a scale for each row. Some rows at a time, which stay in the cache."""
    codes = torch.empty(weight.shape, dtype=torch.int8 if format == INT8 else FLOATS[format], device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        codes[rows], found = quantize(weight[rows], format)
        scale[rows] = found[:, 0]
    return {"codes": codes if format == INT8 else codes.view(torch.uint8), "scale": scale}
