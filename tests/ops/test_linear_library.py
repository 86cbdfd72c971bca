"""Linear layers by libraries: against float64, packed weights that follow their weight, and which GELU cuBLASLt has."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvid
from fastvid.errors import BackendUnavailable
from fastvid.ops import dispatch, linear_library, onednn, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_onednn = pytest.mark.skipif(not onednn.available(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    linear_library._proved.cache_clear()
    yield
    linear_library._proved.cache_clear()


def inputs(rows: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows)
    x, weight, added = (torch.randn(*shape, generator=generator) for shape in ((2, rows, 48), (100, 48), (100,)))
    return x.to(dtype), (weight / 7).to(dtype), added.to(dtype) if bias else None


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 33, 70])
@torch.no_grad()
def test_results(rows: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight, added = inputs(rows, dtype, bias)
    for op in ("linear", "linear_gelu_tanh"):
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        exact = F.gelu(exact, approximate="tanh") if "gelu" in op else exact
        errors = {}
        for name in ("aten", "onednn", "packed"):
            made = linear_library.BACKENDS[op][name](x, weight, added)
            assert made.shape == exact.shape and made.dtype == dtype
            errors[name] = ((made.double() - exact).norm() / exact.norm()).item()
        assert max(errors.values()) <= max(2.5 * errors["aten"], torch.finfo(dtype).eps / 2), errors


@torch.no_grad()
def test_the_reference_takes_onednn_where_it_did() -> None:
    x, weight, bias = inputs(70, torch.float32)
    expected = onednn.linear(x, weight, bias) if onednn.applies(x, weight) else F.linear(x, weight, bias)
    assert torch.equal(reference.linear(x, weight, bias), expected)
    few = x[:, :4]
    assert torch.equal(reference.linear(few, weight, bias), F.linear(few, weight, bias))


@needs_onednn
@torch.no_grad()
def test_bf16_is_rounded_once_after_gelu() -> None:
    x, weight, bias = inputs(70, torch.bfloat16)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")  # type: ignore[union-attr]
    rounded = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    ours, two = ((y - exact).norm().item() for y in (reference.linear_gelu_tanh(x, weight, bias), rounded))
    assert ours < 0.9 * two if onednn.fuses(x, weight) else ours == two


@needs_onednn
@torch.no_grad()
def test_packed_weights_follow_their_weight() -> None:
    kept = linear_library.Packed()
    layer = nn.Linear(48, 100)
    first = kept.of(layer.weight)
    assert kept.of(layer.weight) is first and kept.bytes() == 48 * 100 * 4
    x = torch.randn(70, 48)
    layer.weight.mul_(2)
    assert kept.of(layer.weight) is not first
    torch.testing.assert_close(onednn.linear(x, kept.of(layer.weight), layer.bias), layer(x), rtol=1e-5, atol=1e-5)
    layer.weight.data = torch.randn(100, 48)
    torch.testing.assert_close(onednn.linear(x, kept.of(layer.weight), layer.bias), layer(x), rtol=1e-5, atol=1e-5)
    del layer
    gc.collect()
    assert kept.bytes() == 0


def test_gradients_go_by_pytorch() -> None:
    x, weight, bias = inputs(33, torch.float32)
    weight.requires_grad_()
    for name in ("onednn", "packed", "cublaslt"):
        weight.grad = None
        linear_library.BACKENDS["linear_gelu_tanh"][name](x, weight, bias).sum().backward()
        assert weight.grad is not None


def test_the_erf_form_is_no_tanh() -> None:
    """What torch._addmm_activation computes on a CPU is found out by a run, and refused by name."""
    with pytest.raises(BackendUnavailable, match=r"another GELU here: off by 5e-04 in torch.float32, eager by \d"):
        dispatch.bind("linear_gelu_tanh=cublaslt")


def test_cublaslt_where_it_proves_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def tanh_form(bias: Tensor, rows: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
        calls.append(use_gelu)
        return F.gelu(torch.addmm(bias, rows, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", tanh_form)
    run = dispatch.bind("linear_gelu_tanh=cublaslt").linear_gelu_tanh
    assert calls == [True] * 3  # a proof for each type
    x, weight, bias = inputs(5, torch.float32)
    torch.testing.assert_close(run(x, weight, bias), reference.linear_gelu_tanh(x, weight, bias))
    torch.testing.assert_close(run(x, weight, None), reference.linear_gelu_tanh(x, weight, None))
    assert len(calls) == 4
    dispatch.bind("linear_gelu_tanh=cublaslt")
    assert len(calls) == 4

    monkeypatch.delattr(torch, "_addmm_activation")
    linear_library._proved.cache_clear()
    with pytest.raises(BackendUnavailable, match="has no _addmm_activation"):
        dispatch.bind("linear_gelu_tanh=cublaslt")


def test_cpu_choices_are_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = linear_library.BACKENDS["linear"]["packed"]
    assert packed.why_not(CUDA) == "it needs a CPU, and the device is cuda"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "no oneDNN routines" in packed.why_not(CPU)


@needs_onednn
def test_a_plan_counts_packed_weights() -> None:
    plain, packed = (fastvid.load(backend=backend) for backend in ("auto", "linear=packed,linear_gelu_tanh=packed"))
    experts = sum(one.total for one in plain._model.sizes.experts)
    found = [pipe.plan("a red circle").bytes_weights for pipe in (plain, packed)]
    assert found[1] - found[0] == experts
    before = linear_library.PACKED.bytes()
    packed.generate("a red circle", num_frames=1, num_inference_steps=1)
    assert experts / 2 < linear_library.PACKED.bytes() - before < experts


def test_names() -> None:
    table = dispatch.implementations()
    assert {"reference", "triton", "aten", "onednn", "packed"} == set(table["linear"])
    assert {"reference", "triton", "compiled", "aten", "onednn", "packed", "cublaslt"} == set(table["linear_gelu_tanh"])
    assert dispatch.bind("linear=aten").bound["linear"] == "aten" and dispatch.bind().bound["linear"] == "reference"
