"""GGUF's blocks, against the package gguf: the same bits, on random blocks with bounded factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvid.ops import formats_gguf
from fastvid.ops.formats_gguf import BLOCKS
from fastvid.ops.quantized import FORMATS, QuantizedTensor, linear

gguf = pytest.importorskip("gguf")


def draw(name: str, N: int, K: int, seed: int = 0) -> Tensor:
    """Random rows: any bytes, but factors of about 0.01."""
    block, generator = BLOCKS[name], torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (N * K // block.weights, block.bytes), dtype=torch.uint8, generator=generator)
    for word in block.halves:
        codes.view(torch.float16)[:, word] = torch.randn(len(codes), generator=generator).mul(0.01).half()
    return codes.view(N, -1)


def oracle(name: str, codes: Tensor) -> Tensor:
    kind = gguf.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(gguf.quants.dequantize(codes.numpy(), kind))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_bits_as_gguf(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    N, K = 37, 1280
    codes, format = draw(name, N, K), FORMATS[name]
    assert format.layout((N, K)) == {"codes": (torch.uint8, tuple(codes.shape))}
    assert format.bits == codes.numel() * 8 / (N * K)
    want = oracle(name, codes)
    for strip in (formats_gguf.STRIP, 768):  # in one piece, and in several with a rest
        monkeypatch.setattr(formats_gguf, "STRIP", strip)
        for start, stop in ((0, N), (5, 23), (4, 4)):
            got = format.dequantize({"codes": codes}, (N, K), start, stop)
            assert got.view(torch.int32).equal(want[start:stop].view(torch.int32))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_bits_as_gguf_at_the_ends_of_fp16(name: str) -> None:
    """Factors that are zero, subnormal, of either sign, and the largest."""
    codes = draw(name, 16, 512, seed=1)
    halves = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 1.0, -1.0], dtype=torch.float16)
    for word in BLOCKS[name].halves:
        column = codes.view(-1, BLOCKS[name].bytes).view(torch.float16)[:, word]
        column.copy_(halves.repeat(len(column) // len(halves) + 1)[: len(column)])
    got = FORMATS[name].dequantize({"codes": codes}, (16, 512), 0, 16)
    assert got.view(torch.int32).equal(oracle(name, codes).view(torch.int32))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_factor_that_is_not_finite_is_seen(name: str) -> None:
    codes = draw(name, 8, 256)
    assert FORMATS[name].finite({"codes": codes})
    for word in BLOCKS[name].halves:
        for value in (float("inf"), float("-inf"), float("nan")):
            broken = codes.clone()
            broken.view(-1, BLOCKS[name].bytes).view(torch.float16)[-1, word] = value
            assert not FORMATS[name].finite({"codes": broken})


@pytest.mark.parametrize("name", ["q4_k", "q8_0"])
def test_the_product_is_that_of_the_dequantized_weight(name: str) -> None:
    codes, x, bias = draw(name, 48, 512), torch.randn(2, 5, 512), torch.randn(48)
    weight = QuantizedTensor(name, (48, 512), {"codes": codes}, torch.float32)
    want = x.double() @ oracle(name, codes).double().T + bias
    assert ((linear(x, weight, bias) - want).norm() / want.norm()).item() < 1e-6
