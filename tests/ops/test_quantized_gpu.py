"""8-bit products on GPUs, with PyTorch's routines played by double precision on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_quantized_library import DTYPES, EIGHT, check, given, weight
from torch import Tensor

from fastvid.ops import quantized_gpu
from fastvid.ops.formats_rows import E4M3, INT8
from fastvid.ops.quantized_gpu import PER_ROW, PER_TENSOR, Product, product_of

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """As torch documents its conditions."""
    if len(a) <= 16 or a.shape[1] % 8 or b.shape[1] % 8 or not b.t().is_contiguous():
        raise RuntimeError("self.size(0) needs to be greater than 16")
    return (a.double() @ b.double()).int()


def scaled_mm(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.shape[1] % 16 == b.shape[1] % 16 == 0
    assert b.t().is_contiguous()
    if scale_a.numel() > 1:
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1]) and out_dtype == torch.bfloat16
    return (a.double() @ b.double() * scale_a.double() * scale_b.double()).to(out_dtype)


@pytest.fixture(autouse=True)
def routines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    product_of.cache_clear()
    with torch.no_grad():
        yield
    product_of.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A device of this capability, whose tensors are here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    proved = quantized_gpu._proved
    monkeypatch.setattr(quantized_gpu, "_proved", lambda product, device: proved(product, CPU))


@pytest.mark.parametrize(
    ("capability", "form"), [((8, 9), PER_TENSOR), ((9, 0), PER_ROW), ((10, 0), PER_ROW), ((12, 0), PER_ROW)]
)
def test_what_a_device_multiplies(capability: tuple[int, int], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, capability)
    assert product_of(E4M3, CUDA) == Product(E4M3, form, fast=True) and product_of(INT8, CUDA) == Product(INT8)


def test_what_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, (8, 6))
    assert product_of(E4M3, CUDA) == "8-bit floats are multiplied from sm_89 on"
    assert "needs a CUDA device" in str(product_of(INT8, CPU))
    assert "multiples of 8" in str(quantized_gpu.why_not(weight("int8", 70), CUDA))
    assert quantized_gpu.why_not(weight("int8", 72), CUDA) is None
    assert "multiples of 16" in str(quantized_gpu.why_not(weight("fp8_e4m3", 72), CUDA))


def test_a_product_has_to_prove_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by row fail on some devices; fast sums may be too coarse."""
    on(monkeypatch, (9, 0))

    def coarse(a: Tensor, b: Tensor, *, use_fast_accum: bool, **rest: object) -> Tensor:
        return scaled_mm(a, b, use_fast_accum=use_fast_accum, **rest) * (1.01 if use_fast_accum else 1.0)

    def only_one_scale(a: Tensor, b: Tensor, *, scale_a: Tensor, **rest: object) -> Tensor:
        if scale_a.numel() > 1:
            raise RuntimeError("rowwise scaling is not supported\nmore")
        return coarse(a, b, scale_a=scale_a, **rest)

    monkeypatch.setattr(torch, "_scaled_mm", coarse)
    assert product_of(E4M3, CUDA) == Product(E4M3, PER_ROW, fast=False)
    product_of.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", only_one_scale)
    assert product_of(E4M3, CUDA) == Product(E4M3, PER_TENSOR, fast=False)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: int_mm(a, b) + 1)
    assert "its product is off by" in str(product_of(INT8, CUDA))
    product_of.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    assert "its product fails here" in str(product_of(INT8, CUDA))


@pytest.mark.parametrize(("format", "options"), EIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [PER_ROW, PER_TENSOR, "values"])
def test_products(
    format: str, options: dict[str, object], dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product(format, form if format == E4M3 else None)
    monkeypatch.setattr(quantized_gpu, "product_of", lambda *_: "not here" if form == "values" else product)
    monkeypatch.setattr(quantized_gpu, "SUMS", 50 * 512)
    of = weight(format, 80, dtype=dtype, eight_bit=True, **options)
    if form == PER_ROW and format == E4M3 and dtype != torch.bfloat16:
        return  # its result is bf16, which is for models in bf16
    for rows, more in ((67, {"gelu": True}), (1, {})):
        check(quantized_gpu.linear, {"bias": None, "gelu": False} | given(of, rows, dtype, bias=rows > 1) | more)


@pytest.mark.parametrize("format", ["int8", "fp8_e5m2", "q4_k", "nvfp4", "nf4"])
def test_dequantized_strips(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_gpu, "STRIP", 64 * 512)
    for dtype in DTYPES:
        check(quantized_gpu.linear, given(weight(format, dtype=dtype), 33, dtype) | {"gelu": True})
