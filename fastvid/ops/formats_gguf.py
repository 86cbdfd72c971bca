"""The block formats of GGUF files: rows of blocks of 32 or 256 weights, each with its own scales.

The values are those of the package gguf, bit for bit: the products and sums below are in its order. "codes" are the
bytes of the file, uint8 [N, bytes of a row]. Bits are taken apart in words of two bytes, which is faster than in
single ones; a strip of blocks at a time stays in the cache. Layout of the blocks:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastvid.ops.formats import Data, Format, Layout, Shape

STRIP = 2**20  # weights that are taken apart at once on a CPU: less is lost between calls than in a smaller cache
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4
EXPONENT = 0x7C00  # bits of an fp16 number, all set where it is not finite
NIBBLES, CRUMBS, BITS = 0x0F0F, 0x0303, 0x0101  # the lowest 4, 2 and 1 bits of both bytes of a word


@dataclass(frozen=True)
class Block:
    """A block: how many weights and bytes; where its fp16 factors are, in words; `values` writes the weights of some
    blocks, uint8 [n, bytes], to fp32 [n, weights]."""

    weights: int
    bytes: int
    halves: tuple[int, ...]
    values: Callable[[Tensor, Tensor], None]


def _half(blocks: Tensor, word: int) -> Tensor:
    """An fp16 factor of each block, as fp32 [n, 1]."""
    return blocks.view(torch.float16)[:, word : word + 1].float()


def _words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes start to stop - 1 as int16 [n, words]. Rows of few words are slow to compute on: `contiguous` them."""
    return blocks.view(torch.int16)[:, start // 2 : stop // 2]


def _columns(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes start to stop - 1 as uint8 [bytes, n]: numbers of which a block has few."""
    return blocks[:, start:stop].t().contiguous()


def _rows(columns: Tensor) -> Tensor:
    """Back to [n, numbers], in fp32."""
    return columns.t().float().contiguous()


def _bits(words: Tensor, place: int, mask: int) -> Tensor:
    """Bits from `place` on of every byte, moved to those of the mask, which says them for a word of two bytes."""
    move = place - ((mask & -mask).bit_length() - 1)
    if move == 0:
        return words & mask
    return (words >> move if move > 0 else words << -move).bitwise_and_(mask)


def _joined(low: Tensor, high: Tensor) -> Tensor:
    """Runs of 16 bytes of two tensors in turn, uint8 [n, 32]. As numbers of 16 bytes they are copied fastest."""
    made = torch.empty((low.numel() // 8, 2), dtype=torch.complex128, device=low.device)
    made[:, 0] = low.view(torch.complex128).view(-1)
    made[:, 1] = high.view(torch.complex128).view(-1)
    return made.view(torch.uint8)


def _scale(out: Tensor, scale: Tensor, less: Tensor | None = None) -> None:
    """out * scale - less, in place; scale and less [n, parts] belong to equal parts of a block."""
    parts = out.unflatten(1, (scale.shape[1], -1))
    parts.mul_(scale[..., None])
    if less is not None:
        parts.sub_(less[..., None])


# ---------------------------------------------------------------- blocks of 32


def _nibbles(blocks: Tensor, start: int) -> Tensor:
    """4-bit codes, uint8 [n, 32]."""
    words = _words(blocks, start, start + 16).contiguous()
    return _joined(_bits(words, 0, NIBBLES), _bits(words, 4, NIBBLES))


@cache
def _fifth_bits(device: torch.device) -> Tensor:
    """complex128 [65536]: bit i of a number as bit 4 of byte i."""
    places = torch.arange(16, dtype=torch.int32)
    made = (torch.arange(2**16, dtype=torch.int32)[:, None] >> places & 1) << 4
    return made.to(torch.uint8).view(torch.complex128)[:, 0].to(device)


def _fives(blocks: Tensor, start: int) -> Tensor:
    """5-bit codes, uint8 [n, 32]; the bytes of their fifth bits, then the others."""
    index = _words(blocks, start, start + 4).contiguous().view(-1).int().bitwise_and_(0xFFFF)
    made = _nibbles(blocks, start + 4).view(torch.int64)
    made.bitwise_or_(_fifth_bits(blocks.device).index_select(0, index).view(torch.int64).view(made.shape))
    return made.view(torch.uint8)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.int8)[:, 2:])
    out.mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(blocks, 2).view(torch.int8).sub_(8))
    out.mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(blocks, 4))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 1))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_fives(blocks, 2).view(torch.int8).sub_(16))
    out.mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_fives(blocks, 4))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 1))


@cache
def _pairs(device: torch.device) -> tuple[Tensor, Tensor]:
    """int16 [65536]: for two bytes the table's values of the low halves of both, and of the high ones, as int8."""
    both = torch.arange(2**16, dtype=torch.int32)[:, None] >> torch.tensor([0, 8, 4, 12], dtype=torch.int32)
    values = torch.tensor(TABLE, dtype=torch.int8)[both & 15].view(torch.int16)
    return values[:, 0].to(device).contiguous(), values[:, 1].to(device).contiguous()


def _looked_up(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Values of IQ4's table, int8 [runs, 32], of 4-bit codes in runs of 16 bytes."""
    index = _words(blocks, start, stop).int().view(-1).bitwise_and_(0xFFFF)
    low, high = (pairs.index_select(0, index) for pairs in _pairs(blocks.device))
    return _joined(low, high).view(torch.int8)


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_looked_up(blocks, 2, 18))
    out.mul_(_half(blocks, 0))


# ---------------------------------------------------------------- blocks of 256


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    words, codes = _words(blocks, 16, 80), out.view(-1, 2, 4, 32)
    for part in range(4):
        codes[:, :, part] = _bits(words, 2 * part, CRUMBS).view(torch.uint8).view(-1, 2, 32)
    scales = blocks[:, :16]
    _scale(out, (scales & 15).float().mul_(_half(blocks, 40)), (scales >> 4).float().mul_(_half(blocks, 41)))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    words, high, codes = _words(blocks, 32, 96), _words(blocks, 0, 32).contiguous(), out.view(-1, 2, 4, 32)
    for part in range(4):
        made = _bits(words, 2 * part, CRUMBS).view(-1, 2, 16)
        for half in range(2):
            made[:, half].bitwise_or_(_bits(high, 4 * half + part, 4 * BITS))
        codes[:, :, part] = made.view(torch.int8).sub_(4)
    low, top = _columns(blocks, 96, 104), _columns(blocks, 104, 108)
    scales = torch.cat([top & 3, top >> 2 & 3, top >> 4 & 3, top >> 6]) << 4 | torch.cat([low & 15, low >> 4])
    _scale(out, _rows(scales.view(torch.int8).sub_(32)).mul_(_half(blocks, 54)))


def _scale_by_six_bits(blocks: Tensor, out: Tensor) -> None:
    """With the scales and minima of eight sub-blocks of Q4_K and Q5_K: six bits each, in bytes 4 to 15."""
    scale, least, rest = _columns(blocks, 4, 16).view(3, 4, -1)
    scales = torch.cat([scale & 63, scale >> 6 << 4 | rest & 15])
    minima = torch.cat([least & 63, least >> 6 << 4 | rest >> 4])
    _scale(out, _rows(scales).mul_(_half(blocks, 0)), _rows(minima).mul_(_half(blocks, 1)))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    words, codes = _words(blocks, 16, 144), out.view(-1, 4, 2, 32)
    for part in range(2):
        codes[:, :, part] = _bits(words, 4 * part, NIBBLES).view(torch.uint8).view(-1, 4, 32)
    _scale_by_six_bits(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    words, high, codes = _words(blocks, 48, 176), _words(blocks, 16, 48).contiguous(), out.view(-1, 4, 2, 32)
    for part in range(2):
        made = _bits(words, 4 * part, NIBBLES).view(-1, 4, 16)
        for group in range(4):
            made[:, group].bitwise_or_(_bits(high, 2 * group + part, 16 * BITS))
        codes[:, :, part] = made.view(torch.uint8)
    _scale_by_six_bits(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    words, codes = _words(blocks, 0, 128), out.view(-1, 2, 2, 64)
    high = _words(blocks, 128, 192).contiguous().view(-1, 2, 16)
    for part in range(2):
        made = _bits(words, 4 * part, NIBBLES).view(-1, 2, 2, 16)
        for run in range(2):
            made[:, :, run].bitwise_or_(_bits(high, 4 * part + 2 * run, 16 * CRUMBS))
        codes[:, :, part] = made.view(torch.int8).sub_(32).view(-1, 2, 64)
    _scale(out, blocks.view(torch.int8)[:, 192:208].float().mul_(_half(blocks, 104)))


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_looked_up(blocks, 8, 136).view(out.shape))
    low, top = _columns(blocks, 4, 8), _columns(blocks, 2, 4)
    low = torch.stack([low & 15, low >> 4], 1).flatten(0, 1)
    top = torch.stack([top << 4 & 48, top << 2 & 48, top & 48, top >> 2 & 48], 1).flatten(0, 1)
    _scale(out, _rows((low | top).view(torch.int8).sub_(32)).mul_(_half(blocks, 0)))


# ---------------------------------------------------------------- the table

BLOCKS: Mapping[str, Block] = {
    "q8_0": Block(32, 34, (0,), _q8_0),
    "q4_0": Block(32, 18, (0,), _q4_0),
    "q4_1": Block(32, 20, (0, 1), _q4_1),
    "q5_0": Block(32, 22, (0,), _q5_0),
    "q5_1": Block(32, 24, (0, 1), _q5_1),
    "iq4_nl": Block(32, 18, (0,), _iq4_nl),
    "q2_k": Block(256, 84, (40, 41), _q2_k),
    "q3_k": Block(256, 110, (54,), _q3_k),
    "q4_k": Block(256, 144, (0, 1), _q4_k),
    "q5_k": Block(256, 176, (0, 1), _q5_k),
    "q6_k": Block(256, 210, (104,), _q6_k),
    "iq4_xs": Block(256, 136, (0,), _iq4_xs),
}


def _layout(block: Block, shape: Shape) -> Layout:
    return {"codes": (torch.uint8, (shape[0], shape[1] // block.weights * block.bytes))}


def _dequantize(block: Block, data: Data, shape: Shape, start: int, stop: int) -> Tensor:
    blocks = data["codes"][start:stop].reshape(-1, block.bytes)
    out = blocks.new_empty((len(blocks), block.weights), dtype=torch.float32)
    step = STRIP // block.weights if blocks.device.type == "cpu" else max(1, len(blocks))
    for first in range(0, len(blocks), step):
        block.values(blocks[first : first + step], out[first : first + step])
    return out.view(-1, shape[1])


def _finite(block: Block, data: Data) -> bool:
    words = data["codes"].reshape(-1, block.bytes).view(torch.int16)
    if not len(words):
        return True
    exponents = (words[:, word] & EXPONENT for word in block.halves)
    return all(int(exponent.max()) < EXPONENT for exponent in exponents)


def _format(name: str, block: Block) -> Format:
    return Format(
        name,
        8 * block.bytes / block.weights,
        32 if block.weights == 32 or name in ("q4_k", "q5_k", "iq4_xs") else 16,
        lambda shape: _layout(block, shape),
        lambda data, shape, start, stop: _dequantize(block, data, shape, start, stop),
        lambda data: _finite(block, data),
    )


FORMATS: Mapping[str, Format] = {name: _format(name, block) for name, block in BLOCKS.items()}
