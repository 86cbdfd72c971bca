"""Products with quantized weights by libraries: against double precision, and codes that are held packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastvid.layers.quantized import QuantizedLinear, logical_shapes
from fastvid.ops import dispatch, formats_rows, onednn, quantized_cpu, reference
from fastvid.ops.quantized import FORMATS, QuantizedTensor, Spec, hadamard, rotate
from fastvid.ops.quantized_library import library
from fastvid.tuning import calls, weights
from fastvid.tuning import check as tuning_check
from fastvid.tuning.check import error
from fastvid.tuning.truth import truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = [(name, {}) for name in FORMATS] + [("int8", {"rotation": 256}), ("int8", {"rotation": 16})]
EIGHT = [("int8", {}), ("int8", {"rotation": 256}), ("fp8_e4m3", {})]
needs_bytes = pytest.mark.skipif(quantized_cpu.why_not_bytes() is not None, reason="no exact products of bytes here")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def weight(
    format: str, N: int = 70, K: int = 512, dtype: torch.dtype = torch.float32, **rest: object
) -> QuantizedTensor:
    spec = Spec.of(format, (N, K), **rest)
    return QuantizedTensor(
        format, spec.shape, weights.draw(spec, torch.Generator().manual_seed(1)), dtype, spec.rotation, spec.eight_bit
    )


def given(of: QuantizedTensor, rows: int, dtype: torch.dtype, bias: bool = True) -> dict[str, object]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, rows, of.shape[1], generator=generator).to(dtype)
    added = {"bias": torch.randn(of.shape[0], generator=generator).to(dtype)} if bias else {}
    return {"x": x, "weight": of, **added}


def check(run: object, call: dict[str, object]) -> None:
    """At most twice as far from double precision as the reference, or two roundings. (oneDNN adds in other orders.)"""
    (exact,), eager, made = truth("linear_quantized", call), reference.linear_quantized(**call), run(**call)
    assert made.shape == eager.shape and made.dtype == eager.dtype
    limit = max(2 * error(eager, exact)[0], torch.finfo(made.dtype).eps * 0.6, 2e-6)
    assert error(made, exact)[0] <= limit, (error(made, exact), error(eager, exact))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips so small that there are several, with a rest."""
    for name, size in (
        ("PRODUCT", 64 * 512),
        ("FILL", 9 * 512),
        ("QUANTIZE", 3 * 512),
        ("SUMS", 64 * 70),
        ("ROWS", 50),
    ):
        monkeypatch.setattr(quantized_cpu, name, size)


@pytest.mark.parametrize(("format", "options"), EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_strips(format: str, options: dict[str, object], dtype: torch.dtype, small: None) -> None:
    of = weight(format, dtype=dtype, **options)
    for rows, more in ((37, {"gelu": True}), (1, {})):
        check(library, given(of, rows, dtype, bias=rows > 1) | more)


@pytest.mark.parametrize(("format", "options"), EIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bytes_", [True, False])
def test_eight_bits(
    format: str,
    options: dict[str, object],
    dtype: torch.dtype,
    bytes_: bool,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not bytes_:
        monkeypatch.setattr(quantized_cpu, "why_not_bytes", lambda: "not here")
    of = weight(format, dtype=dtype, eight_bit=True, **options)
    for rows, more in ((133, {"gelu": True}), (1, {})):
        check(library, given(of, rows, dtype, bias=rows > 1) | more)


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_the_codes_of_activations_are_those_of_the_reference(format: str, small: None) -> None:
    x = torch.randn(10, 512) * torch.logspace(-3, 3, 10)[:, None]
    x[3] = 0
    codes, scale = formats_rows.quantize(x, format)
    made, factors = torch.empty(10, 512), torch.empty(10, 1)
    quantized_cpu.quantize(x, format, 0, made, factors)
    assert torch.equal(made, codes.float()) and torch.equal(factors, scale)


def test_rounding_to_e4m3_is_that_of_pytorch() -> None:
    x = torch.cat([torch.arange(-448 * 512, 448 * 512 + 1) / 512, torch.randn(10_000) * 2**-8])
    assert torch.equal(quantized_cpu._to_e4m3(x.clone()), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("format", formats_rows.FLOATS)
def test_codes_as_numbers_are_those_of_pytorch(format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(formats_rows.FLOATS[format]).float()
    torch.testing.assert_close(formats_rows.values(format, codes), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
def test_rotation(group: int) -> None:
    x = torch.randn(3, 5, 2 * group, dtype=torch.float64)
    wanted = (x.view(-1, group) @ hadamard(group).double()).view(x.shape)
    torch.testing.assert_close(rotate(x, group), wanted)
    torch.testing.assert_close(rotate(rotate(x, group), group), x)


# ---------------------------------------------------------------- packed codes


def layer_of(
    format: str = "int8",
    N: int = 70,
    K: int = 512,
    backend: str = "auto",
    eight_bit: bool = True,
    keeps: bool = True,
) -> QuantizedLinear:
    layer = QuantizedLinear(Spec.of(format, (N, K), eight_bit=eight_bit), True, dispatch.bind(backend), torch.float32)
    layer.keeps = keeps
    layer.fill(weight(format, N, K).data, torch.device("cpu"))
    layer.bias = torch.nn.Parameter(torch.randn(N), requires_grad=False)
    return layer


@needs_bytes
def test_packed_codes_take_the_place_of_plain_ones() -> None:
    layer, x = layer_of(), torch.randn(130, 512)
    assert layer.weight_codes.is_mkldnn, "packed as it is filled"
    before, shapes, plain = weight("int8"), logical_shapes(layer), weight("int8").data["codes"]
    wanted = reference.linear_quantized(x, replace(before, eight_bit=True), layer.bias)
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    assert layer.weight_codes.nbytes == plain.nbytes and logical_shapes(layer) == shapes
    assert torch.equal(layer.weight.plain.data["codes"], plain)
    assert torch.equal(layer.weight.dequantize(), before.dequantize())
    assert torch.equal(reference.linear_quantized(x, layer.weight, layer.bias), wanted)
    assert [name for name, _ in layer.named_parameters()] == ["weight_codes", "weight_scale", "bias"]
    layer.fill({"codes": plain.flip(0), "scale": before.data["scale"].flip(0)}, torch.device("cpu"))
    torch.testing.assert_close(layer(x) - layer.bias, (first - layer.bias).flip(1))


def test_nothing_is_packed_for_other_back_ends_and_formats() -> None:
    x = torch.randn(3, 512)
    for layer in (layer_of(backend="reference"), layer_of("fp8_e4m3")):
        layer(x)
        assert not layer.weight_codes.is_mkldnn
    layer = layer_of(eight_bit=False)
    layer(x)
    assert not layer.weight_codes.is_mkldnn


@needs_bytes
def test_what_was_not_packed_as_it_was_filled_is_packed_by_the_first_call() -> None:
    layer, x = layer_of(keeps=False), torch.randn(130, 512)
    assert not layer.weight_codes.is_mkldnn, "it has a copy in host memory"
    wanted = layer(x)
    layer.keeps = True
    assert torch.equal(layer(x), wanted) and layer.weight_codes.is_mkldnn


@needs_bytes
def test_products_of_bytes_have_to_prove_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = quantized_cpu.multiply
    monkeypatch.setattr(quantized_cpu, "multiply", lambda *args: multiply(*args).clamp(-200_000, 1_500_000))
    assert quantized_cpu.why_not_bytes.__wrapped__() == "onednn::qlinear_pointwise is not exact here"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "has no onednn::qlinear_pointwise here" in quantized_cpu.why_not_bytes.__wrapped__()


def test_gradients_go_by_the_reference() -> None:
    with torch.enable_grad():
        x = torch.randn(3, 512, requires_grad=True)
        of = weight("int8")
        library(x, of).sum().backward()
    torch.testing.assert_close(x.grad, of.dequantize().sum(0).expand(3, -1))


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "available", lambda: False)
    for dtype in DTYPES:
        check(library, given(weight("q8_0", dtype=dtype), 20, dtype) | {"gelu": True})


@pytest.mark.parametrize(("format", "options"), [("int8", {"eight_bit": True, "rotation": 256}), ("q4_k", {})])
def test_tuning_finds_it_right(format: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_check, "REPEATS", 3)
    made = given(weight(format, dtype=torch.bfloat16, **options), 150, torch.bfloat16)
    args, kwargs = tuple(made.values()), {"gelu": True}
    likes = {name: calls.like(value) for name, value in calls.named("linear_quantized", args, kwargs).items()}
    call = calls.Call("linear_quantized", "bfloat16", "some", likes, 1, 1.0, 1.0)
    cases = [*tuning_check.small_cases(call, torch.device("cpu")), tuning_check.whole_case(call, torch.device("cpu"))]
    for case in cases:
        tuning_check.check(call.op, library, case)
    tuning_check.check_other_values(call.op, library, cases[0])

    def stale(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor, gelu: bool) -> torch.Tensor:
        kept.setdefault("weight", weights.copied(weight))
        return library(x, kept["weight"], bias, gelu)

    kept: dict[str, QuantizedTensor] = {}
    with pytest.raises(tuning_check.Wrong, match="other values in the same memory are not seen"):
        tuning_check.check_other_values(call.op, stale, cases[0])


def test_nothing() -> None:
    of = weight("int8", eight_bit=True)
    assert library(torch.empty(2, 0, 512), of).shape == (2, 0, 70)


def test_what_runs() -> None:
    bound = dispatch.bind()
    assert bound.bound["linear_quantized"] == "library" and "oneDNN" in bound.reasons["linear_quantized"]
    assert dispatch.bind("linear_quantized=reference").linear_quantized is reference.linear_quantized


def test_recording_on_the_meta_device() -> None:
    x, of = torch.empty(2, 5, 512, device="meta"), weight("q4_k")
    assert reference.linear_quantized(x, of).shape == (2, 5, 70)


@pytest.mark.parametrize("format", FORMATS)
def test_drawn_weights_are_finite_and_of_a_layers_size(format: str) -> None:
    made = weight(format)
    assert FORMATS[format].finite(made.data)
    whole = made.dequantize()
    assert bool(torch.isfinite(whole).all()) and 1e-3 < whole.std().item() < 3
