"""Products with quantized weights in Triton, beside float64: in the interpreter with blocks so small that a few make a
case, in fp32 and fp16 (its bf16 is wrong); on a GPU in every type, at the sizes of the models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import run_interpreted
from kernel_cases import NAN, apart, check, random
from norm_cases import results, row_arguments
from torch import Tensor

from fastvid.errors import BackendUnavailable
from fastvid.ops import eight_bits, quantized_library, reference, transformer
from fastvid.ops import quantized as quantized_ops
from fastvid.ops.quantized import QuantizedRows, QuantizedTensor, Spec
from fastvid.tuning.truth import truth
from fastvid.tuning.weights import draw

HALVES = (torch.float32, torch.float16)
DTYPES = (*HALVES, torch.bfloat16)
FORMATS = ("int8", "fp8_e4m3", "fp8_e5m2", "q8_0", "q4_k", "q6_k", "nf4", "fp4")
EIGHT = [("int8", 0), ("int8", 16), ("int8", 256), ("fp8_e4m3", 0)]


def weight(format: str, N: int, K: int, device: str = "cpu", **rest: Any) -> QuantizedTensor:
    spec = Spec.of(format, (N, K), **rest)
    data = draw(spec, torch.Generator(device).manual_seed(1))
    return QuantizedTensor(format, (N, K), data, torch.float32, spec.rotation, spec.eight_bit)


def exact(x: Tensor, of: QuantizedTensor, bias: Tensor | None, gelu: bool) -> Tensor:
    given = {"x": x, "weight": of, "gelu": gelu} | ({} if bias is None else {"bias": bias})
    return truth("linear_quantized", given)[0]


@pytest.mark.interpret
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "M", "N", "K", "gelu"), [(torch.float32, 19, 21, 512, True), (torch.float16, 1, 16, 256, False)]
)
def test_weights_as_they_are(format: str, dtype: torch.dtype, M: int, N: int, K: int, gelu: bool) -> None:
    from fastvid.kernels.linear_quantized import Config, linear

    x, of = random(M, K, dtype=dtype), weight(format, N, K)
    bias = random(N, dtype=dtype, seed=2) if gelu else None
    out = torch.full((M, N), NAN, dtype=dtype)
    linear(x, format, of.data, bias, out, gelu, Config(16, 16, 32, 4, 2))
    check(out, reference.linear_quantized(x, of, bias, gelu), exact(x, of, bias, gelu))


@pytest.mark.interpret
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3", "fp8_e5m2", "nf4"])
def test_inputs_that_fill_no_block(format: str) -> None:
    from fastvid.kernels.linear_quantized import Config, linear

    x, of = random(5, 42), weight(format, 9, 42)
    one = QuantizedTensor(format, (9, 42), {**of.data, "scale": of.data["scale"][:1]}, torch.float32)
    for each in (of, one) if format != "nf4" else (of,):
        out = torch.full((5, 9), NAN)
        linear(x, format, each.data, None, out, False, Config(16, 16, 32, 4, 2))
        torch.testing.assert_close(out, reference.linear_quantized(x, each), rtol=1e-5, atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize(("format", "rotation"), EIGHT)
@pytest.mark.parametrize("dtype", HALVES)
def test_eight_bits(format: str, rotation: int, dtype: torch.dtype) -> None:
    from fastvid.kernels.linear_eight import linear_eight, quantize_rows
    from fastvid.kernels.linear_quantized import Config

    x, of = random(19, 512, dtype=dtype), weight(format, 21, 512, eight_bit=True, rotation=rotation)
    x[3] = 0
    codes, factors = quantize_rows(x, format, rotation)
    wanted, scales = quantized_ops.quantize_rows(x, format, rotation)
    torch.testing.assert_close(factors, scales[:, 0])
    assert (codes.view(torch.uint8) != wanted.view(torch.uint8)).float().mean() <= (0.001 if rotation else 0)
    bias, out = random(21, dtype=dtype, seed=2), torch.full((19, 21), NAN, dtype=dtype)
    linear_eight(x, format, of.data, rotation, bias, out, True, Config(16, 16, 32, 4, 2))
    eager = reference.linear_quantized(x, of, bias, True)
    torch.testing.assert_close(out, eager, rtol=2e-3, atol=2e-4 if rotation else 2e-5)


def check_norms(d: int, dtype: torch.dtype, format: str, device: str = "cpu") -> None:
    """The codes are those of what the norm's kernel writes alone, but for the sign of zero."""
    args = {name: [one.to(device) if isinstance(one, Tensor) else one for one in of] for name, of in
            row_arguments(2, 6, 3, 2, d, dtype).items()}  # fmt: skip
    x, y, gate, shift, scale, index, eps = args["gated_residual_norm"]
    weight, bias = args["gated_residual_layer_norm"][4:6]
    cases = {
        "modulated_layer_norm": ((x, shift, scale, index), (x, None, None, shift, scale, index)),
        "residual_norm": ((x, y, shift, scale, index), (x, y, None, shift, scale, index)),
        "gated_residual_norm": ((x, y, gate, shift, scale, index), (x, y, gate, shift, scale, index)),
        "gated_residual_layer_norm": ((x, y, gate, index, weight, bias), (x, y, gate, bias, weight, index)),
        "layer_norm": ((x, weight, bias), (x, None, None, bias, weight, None)),
    }
    for name, (alone, fused) in cases.items():
        *total, normed = results(transformer.TRITON[name](*alone, eps))
        codes, factors = reference.quantize_rows(normed, format)
        made = eight_bits.quantized_norm_triton(*fused, eps, format)
        assert torch.equal(made[0], total[0] if total else x), name
        assert made[1].dtype == codes.dtype and torch.equal(made[1].float(), codes.float()), name
        assert torch.equal(made[2], factors), name


@pytest.mark.interpret
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize(("d", "dtype"), [(1, torch.float32), (100, torch.float16), (768, torch.float32)])
def test_norms_to_codes(d: int, dtype: torch.dtype, format: str) -> None:
    check_norms(d, dtype, format)


@pytest.mark.interpret
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_rows_that_are_quantized_already(format: str) -> None:
    x, of, bias = random(2, 5, 256), weight(format, 24, 256, eight_bit=True), random(24, seed=2)
    codes, scale = eight_bits.quantize_rows_triton(x, format)
    assert scale.shape == (2, 5, 1) and torch.equal(scale, reference.quantize_rows(x, format)[1])
    rows = QuantizedRows(format, codes, scale, x.dtype)
    made = quantized_library.triton(x, of, bias, True)
    assert torch.equal(quantized_library.triton(rows, of, bias, True), made)
    again = quantized_library.triton(rows, of, bias, True, format)
    whole = eight_bits.quantize_rows_triton(made, format)
    assert torch.equal(again.codes.view(torch.uint8), whole[0].view(torch.uint8)) and torch.equal(again.scale, whole[1])
    with pytest.raises(ValueError, match="are multiplied into"):
        quantized_library.triton(QuantizedRows(format, codes, scale[:1], x.dtype), of)


@pytest.mark.interpret
@pytest.mark.parametrize("which", ["x", "out"])
def test_64_bit_offsets(which: str) -> None:
    from fastvid.kernels.linear_quantized import Config, linear

    far, x, of = 2**30 + 8, random(3, 32, dtype=torch.float16), weight("int8", 5, 32)
    wanted = reference.linear_quantized(x, of)
    x = apart((3, 32), (far, 1)).copy_(x) if which == "x" else x
    out = apart((3, 5), (far, 1)) if which == "out" else torch.full((3, 5), NAN, dtype=torch.float16)
    linear(x, "int8", of.data, None, out, False, Config(16, 16, 32, 4, 2))
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.interpret
def test_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = random(2, 3, 256), random(6, seed=2)
    for of in (weight("q4_k", 6, 256), weight("int8", 6, 256, eight_bit=True, rotation=256)):
        made = quantized_library.triton(x, of, bias, True)
        torch.testing.assert_close(made, reference.linear_quantized(x, of, bias, True), rtol=1e-4, atol=1e-5)
        assert quantized_library.triton(x[:0], of).shape == (0, 3, 6)


@pytest.mark.interpret
def test_what_is_not_taken() -> None:
    from fastvid.kernels.linear_eight import quantize_rows
    from fastvid.kernels.linear_quantized import linear

    x = random(3, 256)
    for of in (weight("iq4_xs", 6, 256), weight("int8", 6, 256, rotation=256)):
        with pytest.raises(BackendUnavailable, match="Triton has no kernel for .*: ask for linear_quantized=library"):
            quantized_library.triton(x, of)
    with pytest.raises(ValueError, match="there are kernels for"):
        linear(x, "q2_k", {}, None, torch.empty(3, 6), False)
    with pytest.raises(ValueError, match="must be contiguous"):
        linear(x.T.contiguous().T, "int8", {}, None, torch.empty(3, 6), False)
    with pytest.raises(ValueError, match="rows of up to 16384 values"):
        quantize_rows(random(1, 16400), "int8", 0)
    with pytest.raises(ValueError, match="in groups of 512"):
        quantize_rows(random(1, 1024), "int8", 512)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 16, 256), (2049, 1536, 1536), (513, 8960, 1536), (300, 5120, 13824)])
def test_weights_on_a_gpu(format: str, dtype: torch.dtype, M: int, N: int, K: int) -> None:
    x, bias = random(M, K, dtype=dtype, device="cuda"), random(N, dtype=dtype, seed=2, device="cuda")
    of = weight(format, N, K, "cuda")
    made, eager = (run(x, of, bias, True) for run in (quantized_library.triton, reference.linear_quantized))
    check(made, eager, exact(x, of, bias, True))


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "rotation"), EIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 16, 256), (2049, 1536, 8960), (300, 5120, 13824)])
@pytest.mark.parametrize("backend", ["triton", "library"])
def test_eight_bits_on_a_gpu(
    format: str, rotation: int, dtype: torch.dtype, M: int, N: int, K: int, backend: str
) -> None:
    x, bias = random(M, K, dtype=dtype, device="cuda"), random(N, dtype=dtype, seed=2, device="cuda")
    of = weight(format, N, K, "cuda", eight_bit=True, rotation=rotation)
    made, eager = (run(x, of, bias, True) for run in (getattr(quantized_library, backend), reference.linear_quantized))
    error = (made.double() - eager.double()).norm() / eager.double().norm()
    assert error < {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [100, 1536, 5120])
def test_norms_to_codes_on_a_gpu(d: int, dtype: torch.dtype, format: str) -> None:
    check_norms(d, dtype, format, "cuda")
