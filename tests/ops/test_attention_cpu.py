"""Attention in bf16 on CPUs by torch's block products, against float64 and PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import make
from torch import Tensor

from fastvid.errors import BackendUnavailable
from fastvid.ops import attention, attention_cpu, brgemm, dispatch

CPU = torch.device("cpu")
needs_products = pytest.mark.skipif(brgemm.why_not() is not None, reason=str(brgemm.why_not()))


def inputs(N: int, M: int, H: int, D: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (make((2, n, H, D), seed=i) for i, n in enumerate((N, M, M)))
    return (q * spread).bfloat16(), k.bfloat16(), v.bfloat16()


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp in float64."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def error(made: Tensor, right: Tensor) -> float:
    return ((made.double() - right).norm() / right.norm()).item()


@needs_products
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize(
    ("N", "M", "H", "D"), [(1, 1, 1, 2), (13, 1, 3, 8), (137, 512, 2, 128), (33, 131, 3, 81), (300, 77, 1, 64)]
)
@torch.no_grad()
def test_errors(N: int, M: int, H: int, D: int, spread: float) -> None:
    q, k, v = inputs(N, M, H, D, spread)
    right, right_lse = exact(q, k, v)
    out, lse = attention.DENSE["brgemm"](q, k, v, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert error(out, right) <= max(2 * error(attention.sdpa(q, k, v), right), 2**-9)  # type: ignore[arg-type]
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(attention.DENSE["brgemm"](q, k, v), out)


@needs_products
@torch.no_grad()
def test_rows_may_lie_anywhere() -> None:
    q, k, v = inputs(40, 50, 2, 16)
    plain = attention.DENSE["brgemm"](q, k, v, scale=0.5)
    assert error(plain, exact(q, k, v, 0.5)[0]) < 4e-3
    strange = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(attention.DENSE["brgemm"](*strange, scale=0.5), plain)
    fused = torch.cat([F.pad(x, (1, 0)) for x in (q, q, q)], -1)[..., 1:17]  # pairs that do not start at a word
    assert torch.equal(attention.DENSE["brgemm"](fused, k, v, scale=0.5), plain)


@needs_products
@torch.no_grad()
def test_neither_strips_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(700, 800, 1, 32)
    first = attention.DENSE["brgemm"](q, k, v)
    monkeypatch.setattr(attention_cpu, "ROWS", (48, 48))
    assert torch.equal(attention.DENSE["brgemm"](q, k, v), first)
    monkeypatch.setattr(attention_cpu, "PARTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(attention.DENSE["brgemm"](q, k, v), first)


@needs_products
def test_products_add_and_leave_gaps_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, even = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((9, 7), (7, 5), (6, 8)))
    a = F.pad(a, (0, 1))  # as `pack` adds a row of zeros
    room = torch.full((9, 8), 3.0)
    brgemm.matmul(a, brgemm.pack(b), room[:, :5], add=True)
    expected = F.pad(a[:, :7].double() @ b.double(), (0, 3)) + 3
    torch.testing.assert_close(room.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(brgemm.pack_transposed(b), brgemm.pack(b.t()))
    assert torch.equal(brgemm.pack_transposed(even), brgemm.pack(even.t()))


@torch.no_grad()
def test_the_default_takes_it_for_large_calls_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, None]:
        taken.append(q.dtype)
        return q, None

    monkeypatch.setattr(attention, "_preferred", lambda device: ("brgemm",))
    monkeypatch.setitem(attention.DENSE, "brgemm", attention.Dense(attention.Library("brgemm", run)))
    monkeypatch.setattr(attention_cpu, "WORTH", (100, 100))
    q, k, v = inputs(10, 10, 2, 8)
    attention.library(q, k, v)
    attention.library(q[:, :9], k, v)
    wide = [x.float() for x in (q, k, v)]
    assert taken == [torch.bfloat16]
    assert torch.equal(attention.library(*wide), attention.sdpa(*wide))  # type: ignore[arg-type]
    with torch.enable_grad():
        attention.library(q.requires_grad_(), k, v).sum().backward()  # type: ignore[union-attr]
    assert taken == [torch.bfloat16]


def test_by_name_it_works_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.float() for x in inputs(4, 4, 1, 8))
    with pytest.raises(ValueError, match="brgemm takes bf16, not float32"):
        attention.DENSE["brgemm"](q, k, v)
    monkeypatch.setattr(brgemm, "_lacking", lambda: "it needs Linux on a processor with AVX512-BF16")
    with pytest.raises(BackendUnavailable, match="AVX512-BF16"):
        dispatch.bind(attention="brgemm")
    assert "needs a CPU" in str(attention.DENSE["brgemm"].why_not(torch.device("cuda:0")))


@pytest.mark.parametrize("name", brgemm._LIMITS)
def test_limited_instructions_are_respected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where oneDNN may not use AVX512, the product would end the process."""
    monkeypatch.setenv(name, "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert name in str(brgemm._lacking.__wrapped__())


@needs_products
@pytest.mark.slow
def test_a_forked_process_has_its_own_threads() -> None:
    code = (
        "import os, torch; from fastvid.ops import brgemm; torch.set_num_threads(2); "
        "brgemm.spread(lambda i: None, 4); child = os.fork(); "
        "brgemm.spread(lambda i: None, 4); child and os._exit(os.waitpid(child, 0)[1]); os._exit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
