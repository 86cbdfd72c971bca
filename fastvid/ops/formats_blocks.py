"""Formats with a scale for each block of weights: those of Blackwell's tensor cores, and bitsandbytes'.

    mxfp8         e4m3 * 2^(e - 127), e for 32 along K                        codes [N, K], scale [N', C], K/32 wide
    nvfp4         4-bit floats * (scale_2 * e4m3), one for 16 along K         codes [N, K/2], scale [N', C], scale_2 [1]
    nvfp4_low     the same; the first of two weights is in the low half of its byte
    nf4, fp4      map[code] * scale, for 64 of the matrix read row by row     codes [N K/2], map [16], scale
    nf4_double, fp4_double    scale = nested_map[scale] * nested_scale + nested_offset, one nested_scale for 256

mxfp8 and nvfp4: N and K are rounded up to 32 and 16, and the bytes of scales stand in tiles of 128 rows and 4 columns,
as the tensor cores take them; see `unswizzle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from fastvid.ops.formats import Data, Format, Layout, Shape, all_finite, largest_code

MXFP8, NVFP4, NVFP4_LOW = "mxfp8", "nvfp4", "nvfp4_low"
NESTED = 256  # scales that share a scale of their own
BLOCK = 64  # weights of nf4 that share a scale, if nothing else is said
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of 4-bit floats with two bits of exponent, bit 3 the sign


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------- scales in tiles


def tiles(rows: int, blocks: int) -> tuple[int, int]:
    """The shape of the scales of `rows` rows with so many blocks each, in whole tiles."""
    return round_up(rows, 128), round_up(blocks, 4)


def unswizzle(scale: Tensor, blocks: int, start: int, stop: int) -> Tensor:
    """The scales [stop - start, blocks] of rows start to stop - 1, from bytes in tiles.

    A tile is 512 bytes: byte (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4 is that of row r and column c.
    """
    r = torch.arange(start, stop, dtype=torch.int64, device=scale.device)[:, None]
    c = torch.arange(blocks, dtype=torch.int64, device=scale.device)
    tile = r // 128 * -(-blocks // 4) + c // 4
    return scale.flatten()[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4]


def _float8(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


# ---------------------------------------------------------------- mxfp8


def _mx_layout(shape: Shape) -> Layout:
    N, K = (round_up(size, 32) for size in shape)
    return {"codes": (torch.uint8, (N, K)), "scale": (torch.uint8, tiles(N, K // 32))}


def _mx_dequantize(data: Data, shape: Shape, start: int, stop: int) -> Tensor:
    codes = data["codes"][start:stop]
    exponents = unswizzle(data["scale"], codes.shape[1] // 32, start, stop)
    powers = _powers(codes.device)[exponents.int()]
    made = _float8(codes).unflatten(1, (-1, 32)) * powers[..., None]
    return made.flatten(1)[:, : shape[1]]


@cache
def _powers(device: torch.device) -> Tensor:
    """The scale of each exponent, fp32 [256]. 0 stands for 0, as comfy-kitchen has it."""
    powers = [0.0, *(2.0 ** (exponent - 127) for exponent in range(1, 255)), float("nan")]
    return torch.tensor(powers, dtype=torch.float32, device=device)


def _mx_finite(data: Data) -> bool:
    return largest_code(data["codes"]) < 0x7F and bool(data["scale"].max() < 0xFF)


# ---------------------------------------------------------------- nvfp4


def _nv_layout(shape: Shape) -> Layout:
    N, K = (round_up(size, 16) for size in shape)
    return {
        "codes": (torch.uint8, (N, K // 2)),
        "scale": (torch.uint8, tiles(N, K // 16)),
        "scale_2": (torch.float32, (1,)),
    }


def _nv_dequantize(data: Data, shape: Shape, start: int, stop: int, first_is_low: bool) -> Tensor:
    codes = data["codes"][start:stop]
    values = _pairs(codes.device, first_is_low)[codes.int()].flatten(1).unflatten(1, (-1, 16))
    scale = data["scale_2"] * _float8(unswizzle(data["scale"], values.shape[1], start, stop))
    return (values * scale[..., None]).flatten(1)[:, : shape[1]]


def _nv_finite(data: Data) -> bool:
    return largest_code(data["scale"]) < 0x7F and all_finite(data["scale_2"])


@cache
def _pairs(device: torch.device, first_is_low: bool) -> Tensor:
    """The two numbers of each byte, fp32 [256, 2]."""
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float32, device=device)
    return halves(torch.arange(256, dtype=torch.uint8, device=device), values, first_is_low)


def halves(codes: Tensor, values: Tensor, first_is_low: bool = False) -> Tensor:
    """The values [..., 2] of the two 4-bit codes in each byte."""
    high, low = codes >> 4, codes & 15
    return values[torch.stack([low, high] if first_is_low else [high, low], -1).int()]


# ---------------------------------------------------------------- bitsandbytes


def bitsandbytes_layout(shape: Shape, double: bool, block: int = BLOCK) -> Layout:
    """double: scales are quantized themselves. block: weights that share a scale."""
    blocks = -(-math.prod(shape) // block)
    layout: Layout = {
        "codes": (torch.uint8, (-(-math.prod(shape) // 2),)),
        "map": (torch.float32, (16,)),
        "scale": (torch.uint8 if double else torch.float32, (blocks,)),
    }
    if double:
        layout["nested_map"] = (torch.float32, (256,))
        layout["nested_scale"] = (torch.float32, (-(-blocks // NESTED),))
        layout["nested_offset"] = (torch.float32, (1,))
    return layout


def block_of(data: Data, shape: Shape) -> int:
    """The weights that share a scale: a power of two, which the number of scales tells."""
    return 1 << max(0, math.ceil(math.prod(shape) / data["scale"].numel()) - 1).bit_length()


def _bnb_dequantize(data: Data, shape: Shape, start: int, stop: int) -> Tensor:
    first, last, block = start * shape[1], stop * shape[1], block_of(data, shape)
    codes = data["codes"].flatten()[first // 2 : -(-last // 2)]
    values = halves(codes, data["map"]).flatten()[first % 2 :][: last - first]
    scale = _bnb_scales(data, first // block, -(-last // block))
    return (values * scale.repeat_interleave(block)[first % block :][: last - first]).unflatten(0, (-1, shape[1]))


def _bnb_scales(data: Data, start: int, stop: int) -> Tensor:
    """Scales number start to stop - 1, fp32."""
    scale = data["scale"][start:stop]
    if "nested_map" not in data:
        return scale
    over = data["nested_scale"][start // NESTED : -(-stop // NESTED)].repeat_interleave(NESTED)
    return data["nested_map"][scale.int()] * over[start % NESTED :][: stop - start] + data["nested_offset"]


def _bnb_finite(data: Data) -> bool:
    return all(all_finite(tensor) for tensor in data.values() if tensor.is_floating_point())


# ---------------------------------------------------------------- the table


def _nvfp4(name: str, first_is_low: bool) -> Format:
    def dequantize(data: Data, shape: Shape, start: int, stop: int) -> Tensor:
        return _nv_dequantize(data, shape, start, stop, first_is_low)

    return Format(name, 4.5, 16, _nv_layout, dequantize, _nv_finite, by_rows=False)


def _bitsandbytes(name: str, double: bool) -> Format:
    layout: Callable[[Shape], Layout] = lambda shape: bitsandbytes_layout(shape, double)  # noqa: E731
    return Format(name, 4.127 if double else 4.5, BLOCK, layout, _bnb_dequantize, _bnb_finite, by_rows=False)


FORMATS: Mapping[str, Format] = {
    MXFP8: Format(MXFP8, 8.25, 32, _mx_layout, _mx_dequantize, _mx_finite, by_rows=False),
    NVFP4: _nvfp4(NVFP4, False),
    NVFP4_LOW: _nvfp4(NVFP4_LOW, True),
    **{name: _bitsandbytes(name, False) for name in ("nf4", "fp4")},
    **{name: _bitsandbytes(name, True) for name in ("nf4_double", "fp4_double")},
}
