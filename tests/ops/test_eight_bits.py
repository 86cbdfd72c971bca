"""Activations that are quantized by the norm or the GELU before an 8-bit product: codes and results are, bit for bit,
those of separate operations; a block quantizes once for queries, keys and values; LoRAs read what was not quantized."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_cases import EPS, row_arguments
from test_quantized_library import EIGHT, given, small, weight
from torch import Tensor, nn

from fastvid.errors import FastvidWarning
from fastvid.layers.branches import Branch, Change, LowRank
from fastvid.layers.linear import FeedForward, linear
from fastvid.layers.quantized import JoinedLinear, QuantizedLinear, coding_of, install, takes_rows
from fastvid.layers.residual import Stream
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import Block, Modulation
from fastvid.ops import attention, dispatch, eight_bits, formats_rows, quantized_cpu, quantized_gpu, reference
from fastvid.ops.quantized import QuantizedRows, Spec
from fastvid.tuning import calls
from fastvid.tuning import check as tuning_check

__all__ = ["small"]
FORMATS = ("int8", "fp8_e4m3")
CONFIG = WanTransformerConfig(2, 32, text_dim=24, freq_dim=16, ffn_dim=96, num_layers=1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def norms(dtype: torch.dtype, d: int = 64) -> dict[str, tuple[tuple[Any, ...], tuple[Tensor, Tensor]]]:
    """Arguments of `quantized_norm`, and what the norm alone gives."""
    cases = row_arguments(2, 12, 3, 2, d, dtype)
    (x, y, gate, shift, scale, index, _), (*_, weight, bias, _) = (
        cases[name] for name in ("gated_residual_norm", "gated_residual_layer_norm")
    )
    r = reference
    return {
        "modulated": ((x, None, None, shift, scale, index), (x, r.modulated_layer_norm(x, shift, scale, index, EPS))),
        "added": ((x, y, None, shift, scale, index), r.residual_norm(x, y, shift, scale, index, EPS)),
        "gated": ((x, y, gate, shift, scale, index), r.gated_residual_norm(x, y, gate, shift, scale, index, EPS)),
        "layer": ((x, y, gate, bias, weight, index), r.gated_residual_layer_norm(x, y, gate, index, weight, bias, EPS)),
        "alone": ((x, None, None, bias, weight, None), (x, r.layer_norm(x, weight, bias, EPS))),
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "library"])
def test_a_norm_gives_the_codes_of_what_it_gives_alone(
    format: str, dtype: torch.dtype, backend: str, small: None
) -> None:
    for args, (total, normed) in norms(dtype).values():
        made = eight_bits.BACKENDS["quantized_norm"][backend](*args, EPS, format)
        codes, scale = formats_rows.quantize(normed, format)
        assert torch.equal(made[0], total) and torch.equal(made[2], scale) and made[1].dtype == codes.dtype
        assert torch.equal(made[1].float(), codes.float())  # but for the sign of zero


def test_tables_need_an_index() -> None:
    (x, *_, shift, scale, _), _ = norms(torch.float32)["modulated"]
    with pytest.raises(ValueError, match="need an index"):
        reference.quantized_norm(x, None, None, shift, scale, None, EPS, "int8")


@pytest.mark.parametrize(("format", "options"), EIGHT)
@pytest.mark.parametrize("where", [reference.linear_quantized, quantized_cpu.linear, quantized_gpu.linear])
def test_products_of_rows_that_are_quantized_already(
    format: str, options: dict[str, Any], where: Any, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a result as the next product takes it. On a GPU's path products are those of the codes' values here."""
    of = weight(format, dtype=torch.bfloat16, eight_bit=True, **options)
    x, of, bias = given(of, 75, torch.bfloat16).values()
    rows = QuantizedRows.of(x, of)
    made = where(x, of, bias, True)
    assert torch.equal(where(rows, of, bias, True), made)
    again, (codes, scale) = where(rows, of, bias, True, "int8"), formats_rows.quantize(made, "int8")
    assert again.dtype == x.dtype and torch.equal(again.codes, codes) and torch.equal(again.scale, scale)
    monkeypatch.setattr(quantized_cpu, "SUMS", 2**21)
    assert torch.equal(where(x, of, bias, True), made), "whatever the size of strips"


def test_the_gpu_route_makes_codes_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its product played by whole numbers in double precision."""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())
    monkeypatch.setattr(quantized_gpu, "product_of", lambda *_: quantized_gpu.Product("int8"))
    monkeypatch.setattr(quantized_gpu, "SUMS", 50 * 512)
    of = weight("int8", 80, dtype=torch.bfloat16, eight_bit=True)
    x, of, bias = given(of, 33, torch.bfloat16).values()
    made = formats_rows.quantize(quantized_gpu.linear(x, of, bias, True), "fp8_e4m3")
    rows = quantized_gpu.linear(QuantizedRows.of(x, of), of, bias, True, "fp8_e4m3")
    assert rows.shape == (2, 33, 80) and rows.scale.shape == (2, 33, 1)
    assert torch.equal(rows.codes.float(), made[0].float()) and torch.equal(rows.scale, made[1])


def test_rows_of_another_format_are_refused() -> None:
    x, of = torch.randn(3, 512), weight("int8", eight_bit=True)
    rows = QuantizedRows.of(x, of)
    for other in (weight("fp8_e4m3", eight_bit=True), weight("int8", eight_bit=True, rotation=16), weight("int8")):
        for run in (reference.linear_quantized, quantized_cpu.linear, quantized_gpu.linear):
            with pytest.raises(ValueError, match="rows in int8 in groups of 0 for a weight in"):
                run(rows, other, None, False)


# ---------------------------------------------------------------- layers


class Counted:
    """Operations that are counted."""

    def __init__(self) -> None:
        self._ops, self.calls = dispatch.bind(), dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(self._ops, name)


def block(format: str = "int8", eight_bit: bool = True, **options: Any) -> Block:
    torch.manual_seed(0)
    made = Block(CONFIG, Counted())
    state = made.state_dict().items()
    chosen = {name: one.clone() for name, one in state if one.ndim == 2 and name.endswith("weight")}
    specs = {name: Spec.of(format, tuple(one.shape), eight_bit=eight_bit, **options) for name, one in chosen.items()}
    install(made, specs, made.ops, lambda name: torch.float32)
    for name, one in chosen.items():
        layer = made.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, QuantizedLinear)
        layer.fill(formats_rows.quantize_weight(one, format), torch.device("cpu"))
        layer.bias = nn.Parameter(torch.randn(len(one)) * 0.1, requires_grad=False)
    return made


def run(of: Block) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((1, 30, 64), (1, 30, 64), (1, 6, 64), (1, 64))
    x, y, rows, gate = (torch.randn(*size, generator=generator) for size in sizes)
    context = tuple(torch.randn(1, 7, 2, 32, generator=generator) for _ in range(2))
    angles = torch.randn(30, 16, generator=generator)
    modulation = Modulation(rows * 0.1, torch.zeros(1, 1, dtype=torch.int64))
    return tuple(of(Stream(x, y, gate), modulation, context, (angles.cos(), angles.sin())).take()[:2])  # type: ignore[return-value]


def test_a_block_quantizes_in_its_norms_and_in_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = block()
    made = run(fused)
    assert fused.ops.calls["quantized_norm"] == 3 and "quantize_rows" not in fused.ops.calls
    assert not {"gated_residual_norm", "gated_residual_layer_norm", "residual_norm"} & fused.ops.calls.keys()
    apart = block()
    monkeypatch.setattr("fastvid.layers.norms.takes_rows", lambda *_: None)
    monkeypatch.setattr("fastvid.layers.linear.takes_rows", lambda *_: None)
    other = run(apart)
    assert "quantized_norm" not in apart.ops.calls and apart.ops.calls["quantize_rows"] == 1, "for q, k and v at once"
    assert all(torch.equal(a, b) for a, b in zip(made, other, strict=True))
    monkeypatch.setattr("fastvid.layers.quantized.coding_of", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(made, run(block()), strict=True))


@pytest.mark.parametrize("options", [{"format": "fp8_e4m3"}, {"rotation": 16}, {"eight_bit": False}])
def test_what_is_not_joined(options: dict[str, Any]) -> None:
    """e4m3 on a CPU, whose conversion takes longer than it saves, rotated weights, and exact products."""
    of = block(**options)
    run(of)
    assert "quantized_norm" not in of.ops.calls
    assert of.ops.calls.get("quantize_rows", 0) == ("rotation" in options)


def test_loras_read_what_was_not_quantized() -> None:
    """A branch beside queries adds the product with the norm's own result; no other layer changes."""
    of, x = block(), torch.randn(2, 9, 64)
    joined, layer = of.attn1.to_qkv, of.attn1.to_k
    assert isinstance(joined, JoinedLinear) and takes_rows(joined, x) == "int8"
    plain = linear(of.ops, joined, x)
    up, down = torch.randn(64, 3), torch.randn(3, 64)
    layer.branch = Branch([Change(slice(0, 64), LowRank(up, down), 0.5)])
    assert takes_rows(joined, x) is None and takes_rows(of.attn2.to_q, x) == "int8"
    changed = linear(of.ops, joined, x)
    q, k, v = (changed - plain).chunk(3, -1)
    assert not q.any() and not v.any()
    torch.testing.assert_close(k, 0.5 * x @ down.T @ up.T, rtol=1e-4, atol=1e-4)
    before = of.ops.calls.get("quantized_norm", 0)
    run(of)
    assert of.ops.calls["quantized_norm"] == before + 2


def test_a_feed_forward_with_a_lora_in_its_second_layer() -> None:
    of, x = block().ffn, torch.randn(2, 9, 64)
    assert isinstance(of, FeedForward)
    plain, last = of(x), of.net[2]
    up, down = torch.randn(64, 3), torch.randn(3, 96)
    last.branch = Branch([Change(slice(0, 64), LowRank(up, down), 1.0)])
    inner = of.first.gelu_tanh(x)
    torch.testing.assert_close(of(x) - plain, inner @ down.T @ up.T, rtol=1e-4, atol=1e-3)


def test_gradients_go_by_single_operations() -> None:
    layers = [block().attn1.to_q]
    with torch.enable_grad():
        assert coding_of(layers, torch.randn(2, 64, requires_grad=True)) is None
        assert coding_of(layers, torch.randn(2, 64)) == ("int8", 0)


# ---------------------------------------------------------------- tuning


@pytest.mark.parametrize("format", FORMATS)
def test_tuning_finds_them_right(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_check, "REPEATS", 2)
    device = torch.device("cpu")
    found = [("quantized_norm", (*args, EPS, format)) for args, _ in norms(torch.bfloat16).values()]
    found.append(("quantize_rows", (torch.randn(2, 30, 64).bfloat16(), format)))
    for op, args in found:
        likes = {name: calls.like(value) for name, value in calls.named(op, args, {}).items()}
        call = calls.Call(op, "bfloat16", "some", likes, 1, 1.0, 1.0)
        for case in (*tuning_check.small_cases(call, device), tuning_check.whole_case(call, device)):
            tuning_check.check(op, eight_bits.BACKENDS[op]["library"], case)

            def off(*given: Any, op: str = op) -> Any:
                *rest, codes, scale = eight_bits.BACKENDS[op]["library"](*given)
                return *rest, codes, scale * 1.01

            with pytest.raises(tuning_check.Wrong):
                tuning_check.check(op, off, case)


def test_recorded_calls_take_rows_for_tensors() -> None:
    of = weight("int8", eight_bit=True)
    rows = QuantizedRows.of(torch.randn(2, 5, 512).bfloat16(), of)
    like = calls.like(rows)
    assert isinstance(like, calls.TensorLike) and like.shape == (2, 5, 512) and like.dtype == torch.bfloat16


# ---------------------------------------------------------------- 8-bit attention


def test_8_bit_attention_says_when_it_goes_beyond_what_was_measured() -> None:
    """For each kind, from one key more on; the limit is the longest row of the benchmark's result."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    rows = json.loads((folder / "eight-bits-lengths-cpu-amd-epyc.json").read_text())["relative_error"]
    longest = {int(name.split()[1]) for row in rows.values() for name in row}
    assert max(longest) == attention.EIGHT_BIT_KEYS

    def nothing(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q, q

    q = torch.zeros(1, 1, 1, 1)
    for name in ("cuda_int8", "cuda_fp8"):
        kernel = replace(attention.BACKENDS[name], operator=nothing)
        k = torch.zeros(1, 1, 1, 1).expand(1, attention.EIGHT_BIT_KEYS + 1, 1, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernel(q, k[:, 1:], k[:, 1:])
        with pytest.warns(FastvidWarning, match=f"attention={name} attends to 131,073 keys, .* up to 131,072"):
            kernel(q, k, k)
