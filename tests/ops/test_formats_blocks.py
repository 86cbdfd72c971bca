"""Formats of quantized weights against the packages that define them: bits, strips of rows, and mistakes that keep the
range of values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quantized_files import bitsandbytes, kitchen, plain_bitsandbytes
from torch import Tensor

from fastvid.ops import formats_blocks, formats_rows
from fastvid.ops.formats import Data
from fastvid.ops.formats_blocks import block_of, tiles, unswizzle
from fastvid.ops.quantized import FORMATS, QuantizedTensor, linear

SHAPES = [(128, 128), (96, 160), (40, 80), (200, 96)]
"""Whole tiles, parts of tiles, rows and inputs that are filled up to 16 or 32."""


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Values that spread over several powers of two along K, so that each block has a scale of its own."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-3, 0, shape[1], 2) ** 2


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def by_kitchen(name: str, weight: Tensor) -> tuple[Data, Tensor]:
    layout = getattr(kitchen(), {"mxfp8": "TensorCoreMXFP8Layout"}.get(name, "TensorCoreNVFP4Layout"))
    codes, params = layout.quantize(weight)
    truth = layout.dequantize(codes, params)[: len(weight), : weight.shape[1]]
    if name == "mxfp8":
        return {"codes": raw(codes), "scale": raw(params.scale)}, truth
    codes = codes >> 4 | codes << 4 if name == "nvfp4_low" else codes
    return {"codes": codes, "scale": raw(params.block_scale), "scale_2": params.scale.reshape(1)}, truth


def by_bitsandbytes(name: str, weight: Tensor) -> tuple[Data, Tensor]:
    kind, _, double = name.partition("_")
    codes, state = bitsandbytes().quantize_4bit(weight, quant_type=kind, compress_statistics=bool(double))
    truth = plain_bitsandbytes(codes, state)
    if weight.shape[1] % 64 == 0:
        assert torch.equal(truth, bitsandbytes().dequantize_4bit(codes, state))
    data = {"codes": codes.flatten(), "map": state.code, "scale": state.absmax}
    if double:
        data |= {"nested_map": state.state2.code, "nested_scale": state.state2.absmax}
        data["nested_offset"] = state.offset.reshape(1)
    return data, truth


def made(name: str, shape: tuple[int, int]) -> tuple[QuantizedTensor, Tensor]:
    by = by_kitchen if name in ("mxfp8", "nvfp4", "nvfp4_low") else by_bitsandbytes
    data, truth = by(name, weight_of(shape))
    return QuantizedTensor(name, shape, data, torch.float32), truth


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", formats_blocks.FORMATS)
def test_bits(name: str, shape: tuple[int, int]) -> None:
    weight, truth = made(name, shape)
    assert torch.equal(weight.dequantize(), truth)
    for start, stop in ((0, 1), (7, 39), (33, 40), (shape[0] - 3, shape[0])):
        assert torch.equal(weight.rows(start, stop), truth[start:stop])
    layout = FORMATS[name].layout(shape)
    assert {role: (one.dtype, math.prod(one.shape)) for role, one in weight.data.items()} == {
        role: (kind, math.prod(size)) for role, (kind, size) in layout.items()
    }
    assert FORMATS[name].finite(weight.data)
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(linear(x, weight), x @ truth.T, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_blocks(block: int) -> None:
    weight = weight_of((96, 160))
    codes, state = bitsandbytes().quantize_4bit(weight, blocksize=block, quant_type="nf4")
    data = {"codes": codes.flatten(), "map": state.code, "scale": state.absmax}
    assert block_of(data, (96, 160)) == block
    found = QuantizedTensor("nf4", (96, 160), data, torch.float32).rows(5, 50)
    assert torch.equal(found, plain_bitsandbytes(codes, state)[5:50])


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def swapped(data: Data, role: str, by: Any) -> Data:
    return {**data, role: by(data[role])}


def test_mistakes_are_seen() -> None:
    """Another order of nibbles, of scales or of rotated values keeps all magnitudes, and little else."""
    shape = (256, 256)
    for name, other in (("nvfp4", "nvfp4_low"), ("nvfp4_low", "nvfp4")):
        weight, truth = made(name, shape)
        wrong = QuantizedTensor(other, shape, weight.data, torch.float32).dequantize()
        assert correlation(weight.dequantize(), truth) > 0.999 and abs(correlation(wrong, truth)) < 0.1
    for name in ("mxfp8", "nvfp4"):
        weight, truth = made(name, shape)
        blocks = weight.data["scale"].shape[1]
        plain = swapped(weight.data, "scale", lambda scale, blocks=blocks: unswizzle(scale, blocks, 0, shape[0]))
        wrong = QuantizedTensor(name, shape, plain, torch.float32).dequantize()
        assert wrong.shape == truth.shape and correlation(wrong, truth) < 0.9
    weight, truth = made("nf4", shape)
    data = swapped(weight.data, "codes", lambda codes: codes >> 4 | codes << 4)
    assert abs(correlation(QuantizedTensor("nf4", shape, data, torch.float32).dequantize(), truth)) < 0.1


def test_tiles() -> None:
    scale = torch.arange(256 * 8, dtype=torch.int32).reshape(tiles(130, 6))
    assert scale.shape == (256, 8)
    found = unswizzle(scale, 6, 0, 130)
    assert found[0, :5].tolist() == [0, 1, 2, 3, 512]
    assert found[1, 0] == 16 and found[32, 0] == 4 and found[129, 5] == 1024 + 512 + 16 + 1
    assert torch.equal(unswizzle(scale, 6, 37, 129), found[37:129])


@pytest.mark.parametrize("name", formats_blocks.FORMATS)
def test_what_is_not_finite_is_seen(name: str) -> None:
    weight, _ = made(name, (32, 64))
    bad = {"mxfp8": ("scale", 255), "nvfp4": ("scale", 0x7F), "nvfp4_low": ("scale_2", float("nan"))}
    role, value = bad.get(name, ("nested_scale" if "double" in name else "scale", float("inf")))
    data = {**weight.data, role: weight.data[role].clone().flatten()}
    data[role][0] = value
    assert not FORMATS[name].finite({**data, role: data[role].reshape(weight.data[role].shape)})


# ---------------------------------------------------------------- ConvRot


@pytest.mark.parametrize("group", [16, 256])
@pytest.mark.parametrize("shape", [(96, 512), (1024, 256)])
def test_rotated_weights(group: int, shape: tuple[int, int]) -> None:
    weight, layout = weight_of(shape), kitchen().TensorWiseINT8Layout
    codes, params = layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=group)
    truth = layout.dequantize(codes, params)
    data = {"codes": codes, "scale": params.scale.flatten()}
    found = QuantizedTensor("int8", shape, data, torch.float32, rotation=group)
    assert torch.equal(found.dequantize(), truth)
    torch.testing.assert_close(found.rows(5, 50), truth[5:50], atol=1e-6, rtol=1e-6)
    unrotated = QuantizedTensor("int8", shape, data, torch.float32).dequantize()
    assert correlation(found.dequantize(), weight) > 0.99 and abs(correlation(unrotated, weight)) < 0.5


@pytest.mark.parametrize("group", [0, 256])
def test_eight_bit_products(group: int) -> None:
    """As comfy-kitchen's, of which the sums are whole numbers too; it rounds products of scales to fp32."""
    weight, layout = weight_of((96, 512)), kitchen().TensorWiseINT8Layout
    import comfy_kitchen as ck

    turned = {"convrot": True, "convrot_groupsize": group} if group else {}
    codes, params = layout.quantize(weight, per_channel=True, **turned)
    x, bias = torch.randn(7, 512, generator=torch.Generator().manual_seed(1)), torch.randn(96)
    truth = ck.int8_linear(x, codes, params.scale, bias, torch.float32, **turned)
    data = {"codes": codes, "scale": params.scale.flatten()}
    held = QuantizedTensor("int8", (96, 512), data, torch.float32, group, eight_bit=True)
    torch.testing.assert_close(linear(x, held, bias), truth, atol=1e-5, rtol=1e-5)
    exact = torch.nn.functional.linear(x, held.dequantize(), bias)
    rms = (truth - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-3 < rms < 2e-2, "eight bits are seen"


def test_bitsandbytes_int8() -> None:
    """bitsandbytes multiplies by the scale and then by 1/127, we by their product: both round twice."""
    bitsandbytes()
    weight = weight_of((96, 160))
    codes, scb, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)
    truth = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, scb)
    data = {"codes": codes, "scale": scb * 7.874015718698502e-3}
    found = formats_rows.FORMATS["int8"].dequantize(data, (96, 160), 0, 96)
    torch.testing.assert_close(found, truth, atol=0, rtol=2.4e-7)
