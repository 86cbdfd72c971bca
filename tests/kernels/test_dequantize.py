"""csrc/dequantize.cu against the formats' own arithmetic, bit for bit: on the host through fastvid._C (skipped where it
is not built), on a GPU where there is one; its PTX is interpreted in tests/ptx."""

from __future__ import annotations

import pytest
import torch
from dequantize_cases import CASES, same_bits, weight_of

from fastvid.ops import dispatch, quantized_cuda
from fastvid.ops.quantized import FORMATS

needs_extension = pytest.mark.skipif(
    isinstance(dispatch.extension(), str), reason="fastvid._C is not built (FASTVID_BUILD_CUDA=1, where nvcc is)"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_every_format_has_a_number() -> None:
    assert set(quantized_cuda.NUMBERS) == set(FORMATS) == {name for name, _ in CASES}


@needs_extension
@pytest.mark.parametrize(("format", "shape"), CASES)
def test_on_the_host(format: str, shape: tuple[int, int]) -> None:
    weight = weight_of(format, shape, seed=3)
    for dtype in DTYPES:
        for start, stop in ((0, shape[0]), (1, shape[0] - 1)):
            made = quantized_cuda.dequantize_host(weight, start, stop, dtype)
            assert same_bits(made, weight.rows(start, stop, dtype)), (dtype, start)


@needs_extension
def test_one_scale_for_all_rows() -> None:
    weight = weight_of("fp8_e4m3", (5, 24), seed=1, scales=1)
    assert same_bits(quantized_cuda.dequantize_host(weight, 0, 5, torch.float32), weight.dequantize(torch.float32))


@needs_extension
def test_wrong_calls_are_refused() -> None:
    from fastvid import _C

    weight = weight_of("q4_k", (4, 256))
    out = torch.empty(4, 256, dtype=torch.float32)
    given = quantized_cuda.matrix_of(weight, 0, 4)
    for change, why in (({"columns": 200}, "whole blocks"), ({"codes": 0}, "codes"), ({"rows": -1}, "rows")):
        with pytest.raises(ValueError, match=why):
            _C.dequantize_host(11, given | change, out.data_ptr(), "float32")
    with pytest.raises(ValueError, match="no such format"):
        _C.dequantize_host(20, given, out.data_ptr(), "float32")
    with pytest.raises(ValueError, match="a scale is needed"):
        _C.dequantize_host(0, given, out.data_ptr(), "float32")


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "shape"), CASES)
def test_on_a_gpu(format: str, shape: tuple[int, int]) -> None:
    weight = weight_of(format, shape, seed=4, device="cuda")
    for dtype in DTYPES:
        made = quantized_cuda.dequantize(weight, 1, shape[0], dtype)
        assert same_bits(made, weight.rows(1, shape[0], dtype))
    x, bias = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((7, shape[1]), shape[:1]))
    exact = x.double() @ weight.dequantize(torch.float32).double().T + bias.double()
    assert (quantized_cuda.linear(x, weight, bias).double() - exact).norm() <= 1e-2 * exact.norm()
