"""Random weights of every quantized format, with every bit pattern that files may hold but no NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvid.ops import formats_gguf
from fastvid.ops.quantized import FORMATS, QuantizedTensor

# Odd numbers of rows and columns where a format allows them.
CASES = [
    *((name, (5, 37)) for name in ("fp8_e4m3", "fp8_e5m2", "int8")),
    *((name, (3, 2 * block.weights)) for name, block in formats_gguf.BLOCKS.items()),
    *(("mxfp8", (40, 70)), ("nvfp4", (37, 70)), ("nvfp4_low", (33, 48))),
    *((name, (7, 45)) for name in ("nf4", "nf4_double", "fp4", "fp4_double")),
]


def weight_of(
    format: str, shape: tuple[int, int], seed: int = 0, scales: int = 0, device: str = "cpu"
) -> QuantizedTensor:
    """A weight whose codes are random bytes. scales: 1 for one scale for the whole matrix."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for role, (dtype, size) in FORMATS[format].layout(shape).items():
        if dtype.is_floating_point:
            data[role] = torch.randn(size, generator=generator, dtype=dtype) / 8
        else:
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
            data[role] = torch.randint(low, high, size, generator=generator, dtype=torch.int64).to(dtype)
    if format in formats_gguf.BLOCKS:
        block = formats_gguf.BLOCKS[format]
        halves = data["codes"].view(-1, block.bytes).view(torch.float16)
        for word in block.halves:
            halves[:, word] = torch.randn(len(halves), generator=generator, dtype=torch.float32).half() / 64
    for role in ("codes", "scale"):
        if format.startswith("fp8") or format in ("mxfp8", "nvfp4", "nvfp4_low"):
            data[role] = _without_nan(data[role], format)
    if scales:
        data["scale"] = data["scale"][:1]
    assert FORMATS[format].finite(data)
    return QuantizedTensor(format, shape, {role: one.to(device) for role, one in data.items()}, torch.float32)


def _without_nan(codes: Tensor, format: str) -> Tensor:
    if codes.dtype != torch.uint8:
        return codes
    return torch.where(codes & 0x7C == 0x7C, codes & 0xBB, codes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
