"""Attention by libraries: PyTorch's operators by their real schemas (fake tensors stand for those of a GPU), packages
by stand-ins with their published signatures, and which of them the default takes for a call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import assert_as_good_as, assert_log_as_good_as, make, numpy_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvid.ops import attention, attention_cpu, attention_library, dispatch, libraries, sparse

CUDA = torch.device("cuda:0")
ATEN = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention")


@contextmanager
def pretended(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), cudnn: int | None = 91501, hip: str = ""
) -> Iterator[None]:
    """A GPU of this capability, and tensors of it that hold no data."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", hip or None)
    attention._preferred.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        attention._preferred.cache_clear()


def inputs(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, keys: int = 7, device: str | torch.device = CUDA
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty(2, n, 3, head_dim, dtype=dtype, device=device) for n in (5, keys, keys))
    return q, k, v


@contextmanager
def called() -> Iterator[list[str]]:
    """The operators of aten for attention that are called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in function.name():
                names.append(function.name().removeprefix("aten::_scaled_dot_product_"))
            return function(*args, **(kwargs or {}))

    with Record():
        yield names


@pytest.mark.parametrize(
    ("capability", "cudnn", "taken"),
    [
        ((9, 0), 91501, "cudnn_attention"),
        ((10, 0), 91501, "cudnn_attention"),
        ((10, 3), 92200, "cudnn_attention"),
        ((9, 0), 91500, "flash_attention"),
        ((9, 0), None, "flash_attention"),
        ((8, 0), 91501, "flash_attention"),
        ((8, 9), 92000, "flash_attention"),
        ((12, 0), 92000, "flash_attention"),
    ],
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_default_follows_device_and_cudnn(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None, taken: str, return_lse: bool
) -> None:
    with pretended(monkeypatch, capability, cudnn), called() as names:
        q, k, v = inputs()
        made = attention.library(q, k, v, return_lse=return_lse)
        out, lse = made if return_lse else (made, None)
        assert names == [taken] and out.shape == q.shape and out.dtype == q.dtype
        assert not return_lse or (lse.shape == (2, 3, 5) and lse.dtype == torch.float32)
        name, reason = libraries.default("attention", CUDA)
        assert name == "library" and ("cuDNN" in reason) == (taken == "cudnn_attention")


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"head_dim": 136}, "flash_attention"),
        ({"head_dim": 120}, "cudnn_attention"),
        ({"dtype": torch.float16}, "cudnn_attention"),
        ({"keys": 1}, "flash_attention"),
    ],
)
def test_what_cudnn_cannot_take_goes_on(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], taken: str) -> None:
    with pretended(monkeypatch), called() as names:
        attention.library(*inputs(**changes))
        assert names == [taken]


def test_fp32_goes_to_the_efficient_operator_and_lists_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch), called() as names:
        q, k, v = inputs(torch.float32)
        with suppress(RuntimeError):  # a build of torch without CUDA cannot slice the result
            attention.library(q, k, v, return_lse=True)
        assert names == ["efficient_attention"]
    q, k, v = (make((1, 4, 2, 8), seed=i) for i in range(3))
    blocks = sparse.full((1, 2, 2), (1, 1, 2))
    torch.testing.assert_close(attention.library(q, k, v, blocks=blocks), attention.sdpa(q, k, v), rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_aligned_are_copied() -> None:
    third = torch.rand(2, 5, 3 * 3 * 128).chunk(3, -1)[2].unflatten(-1, (3, 128))
    odd = torch.rand(2, 5, 3, 131)[..., 1:129]
    kept, copied = attention_library._heads_first(third, odd)
    assert kept.data_ptr() == third.data_ptr() and torch.equal(kept, third.transpose(1, 2))
    assert copied.storage_offset() == 0 and torch.equal(copied, odd.transpose(1, 2))


def test_other_devices_keep_the_choice_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "preferred", lambda: False)
    assert libraries.default("attention", torch.device("cpu")) == ("sdpa", "PyTorch's own")
    q, k, v = (make((1, 4, 2, 8), seed=i) for i in range(3))
    assert torch.equal(attention.library(q, k, v), attention.sdpa(q, k, v))
    with pretended(monkeypatch, hip="6.4"):
        assert libraries.default("attention", CUDA) == ("sdpa", "PyTorch's own")
        assert "no cuDNN" in str(attention.DENSE["cudnn"].why_not(CUDA))
        assert attention.DENSE["aten_flash"].why_not(CUDA) is None


def test_an_operator_with_other_arguments_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ATEN:
        assert attention_library._other_arguments(name) is None
        monkeypatch.setitem(attention_library.OPERATORS, name, ("query", "new_argument"))
    attention_library._other_arguments.cache_clear()
    try:
        with pretended(monkeypatch):
            assert libraries.default("attention", CUDA)[0] == "sdpa"
            assert "another aten::_scaled_dot_product_cudnn" in str(attention.DENSE["cudnn"].why_not(CUDA))
    finally:
        attention_library._other_arguments.cache_clear()


@pytest.mark.parametrize(
    ("capability", "cudnn", "why"),
    [
        ((9, 0), 91002, r"cuDNN is 9.10.2, and its attention is used from 9.15.1 on"),
        ((7, 5), 92000, "it needs sm_80 or newer"),
        ((9, 0), None, "this build of torch has no cuDNN"),
    ],
)
def test_cudnn_by_name_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None, why: str
) -> None:
    with pretended(monkeypatch, capability, cudnn):
        assert attention.DENSE["cudnn"].why_not(CUDA) == why
    assert "it needs a CUDA device" in str(attention.DENSE["cudnn"].why_not(torch.device("cpu")))


# Packages


def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):  # noqa: ANN001, ANN201
    """flash-attn 2."""
    out, lse = attention.reference(q, k, v, scale=softmax_scale, return_lse=True)
    return (out, lse, None) if return_attn_probs else out


def flash3(q, k, v, softmax_scale=None, causal=False, num_splits=1, return_attn_probs=False):  # noqa: ANN001, ANN201
    """flash-attn 3."""
    out, lse = attention.reference(q, k, v, scale=softmax_scale, return_lse=True)
    return (out, lse) if return_attn_probs else out


def flash3_beta(q, k, v, softmax_scale=None, causal=False):  # noqa: ANN001, ANN201
    """flash-attn 3 before it could leave the log-sum-exp out."""
    return attention.reference(q, k, v, scale=softmax_scale, return_lse=True)


def flash4(q, k, v, softmax_scale=None, causal=False, return_lse=False):  # noqa: ANN001, ANN201
    """flash-attn 4: always a pair."""
    out, lse = attention.reference(q, k, v, scale=softmax_scale, return_lse=True)
    return out, (lse if return_lse else None)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):  # noqa: ANN001, ANN201
    """SageAttention 2: "HND" is heads before tokens. The log-sum-exp is [B, H, N] in both layouts."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention.reference(q, k, v, scale=sm_scale, return_lse=True)
    out = out.transpose(1, 2) if tensor_layout == "HND" else out
    return (out, lse) if return_lse else out


FAKES = [
    ("flash", "flash_attn", "flash_attn_func", flash2),
    ("flash3", "flash_attn_interface", "flash_attn_func", flash3),
    ("flash3", "flash_attn_interface", "flash_attn_func", flash3_beta),
    ("flash4", "flash_attn.cute", "flash_attn_func", flash4),
    ("sage", "sageattention", "sageattn", sageattn),
]


def installed(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Callable[..., Any]) -> None:
    for part in ("flash_attn", module) if "." in module else (module,):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    setattr(sys.modules[module], name, function)


@pytest.mark.parametrize(("backend", "module", "name", "function"), FAKES, ids=lambda one: getattr(one, "__name__", ""))
@pytest.mark.parametrize("layout", ["token-major", "head-major", "one of three", "aligned to nothing"])
def test_a_package_gives_what_the_reference_gives(
    monkeypatch: pytest.MonkeyPatch, backend: str, module: str, name: str, function: Callable[..., Any], layout: str
) -> None:
    installed(monkeypatch, module, name, function)
    q, k, v = (make((2, size, 3, 8), torch.float16, i, layout) for i, size in enumerate((5, 7, 7)))
    for scale in (None, 0.3):
        true = numpy_attention(q, k, v, scale or 8**-0.5)
        eager = attention.reference(q, k, v, scale=scale, return_lse=True)
        out = attention.BACKENDS[backend](q, k, v, scale=scale)
        pair = attention.BACKENDS[backend](q, k, v, scale=scale, return_lse=True)
        for one in (out, pair[0]):
            assert isinstance(one, Tensor) and one.shape == q.shape and one.dtype == q.dtype
            assert_as_good_as(one, eager[0], true[0])
        assert pair[1].shape == (2, 3, 5) and pair[1].dtype == torch.float32
        assert_log_as_good_as(pair[1], eager[1], true[1])


@pytest.mark.parametrize("name", [name for name in attention.DENSE if name != "brgemm"])
def test_a_library_refuses_what_it_cannot_take(name: str) -> None:
    run = attention.DENSE[name]
    q, k, v = (make((1, 4, 2, 8), torch.float16, i) for i in range(3))
    with pytest.raises(ValueError, match="takes fp16 and bf16, not float32"):
        run(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="no block-sparse attention; load with attention='auto' or 'triton'"):
        run(q, k, v, blocks=sparse.full((1, 2, 2), (1, 1, 2)))
    wide = [make((1, 4, 2, 264), torch.float16, i) for i in range(3)]
    with pytest.raises(ValueError, match="up to (128|256), not a head dimension of 264"):
        run(*wide)
    with pytest.raises(ValueError, match="at least one query"):
        run(q[:, :0], k, v)


def test_an_old_flash4_that_gives_no_log_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attn.cute", "flash_attn_func", lambda q, k, v, softmax_scale=None: (q, None))
    q, k, v = (make((1, 4, 2, 8), torch.float16, i) for i in range(3))
    assert attention.DENSE["flash4"](q, k, v) is q
    with pytest.raises(ValueError, match="gives no log-sum-exp, which several ranks need: install a newer one"):
        attention.DENSE["flash4"](q, k, v, return_lse=True)


@pytest.mark.parametrize("name", attention_library.PACKAGES)
def test_a_missing_package_is_named(name: str) -> None:
    assert attention.DENSE[name].why_not(CUDA) == f"the package {attention_library.PACKAGES[name][1]} is not installed"


def test_an_approximation_is_never_chosen() -> None:
    assert "sage" in dispatch.APPROXIMATE
    assert "sage" not in attention_library.preferred(torch.device("cpu"))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["library", *attention.DENSE])
@pytest.mark.parametrize("tokens", [(130, 130), (257, 77), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(name: str, tokens: tuple[int, int], dtype: torch.dtype) -> None:
    """Against float64, in slices of a fused projection, with a length that no tile divides."""
    run = attention.BACKENDS[name]
    q, k, v = (make((2, tokens[i > 0], 3, 128), dtype, i, "one of three").cuda() for i in range(3))
    if isinstance(run, attention.Dense) and (reason := run.why_not(q.device) or run.library.refuses(q, k)):
        pytest.skip(reason)
    out, lse = run(q, k, v, return_lse=True)
    true = numpy_attention(q, k, v, 128**-0.5)
    if name in dispatch.APPROXIMATE:
        assert np.linalg.norm(out.double().cpu().numpy() - true[0]) < 0.1 * np.linalg.norm(true[0])
        return
    eager = attention.reference(q, k, v, return_lse=True)
    assert_as_good_as(out, eager[0], true[0])
    assert_log_as_good_as(lse, eager[1], true[1])
    assert torch.equal(run(q, k, v), out) and torch.equal(run(q, k, v), out)
