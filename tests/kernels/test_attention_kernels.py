"""Dense attention: the references against fp64 written a second time, the Triton kernel (in the interpreter, by
pointers and by descriptors) against both, merging of parts, and the call of flash-attn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import run_interpreted
from torch import Tensor

from fastvid.ops import attention, backends, eager_attention, reference

HALVES = (torch.float16, torch.bfloat16)
BLOCK = 16
SIZES = st.integers(1, 3 * BLOCK + 1)
HEAD_DIMS = st.sampled_from((1, 16, 24, 32, 40, 64, 96, 128))
LAYOUTS = ("token-major", "head-major", "one of three", "expanded", "aligned to nothing")


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, layout: str = "token-major"
) -> Tensor:
    """Random [B, tokens, H, D] in memory that is laid out in some way; the last dimension is contiguous."""
    B, N, H, D = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "head-major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one of three":
        return torch.stack((x, x + 1, x - 1), 2)[:, :, 0]
    if layout == "expanded":
        return x[:1].expand(B, -1, -1, -1)
    if layout == "aligned to nothing":
        return torch.nn.functional.pad(x, (1, 2))[..., 1 : D + 1]
    return x


def numpy_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """In fp64, a second time: out [B, N, H, D] and lse [B, H, N]."""
    q, k, v = (x.double().cpu().numpy() for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights / total, v), (np.log(total) + highest)[..., 0]


def error(x: Tensor, true: np.ndarray) -> float:
    """||x - true|| / ||true||."""
    return float(np.linalg.norm(x.double().cpu().numpy() - true) / np.linalg.norm(true))


def assert_as_good_as(x: Tensor, eager: Tensor, true: np.ndarray) -> None:
    """At most twice as far from the truth as eager PyTorch is, and one unit in the last place."""
    allowed = 2 * error(eager, true) + torch.finfo(eager.dtype).eps
    assert error(x, true) <= allowed, (error(x, true), allowed, x.dtype, tuple(x.shape))


def assert_log_as_good_as(lse: Tensor, eager: Tensor, true: np.ndarray) -> None:
    """The same of logarithms, in shares of themselves or of 1: where the sum is near 1 they are near 0."""
    off = [np.abs(x.double().cpu().numpy() - true) / np.maximum(np.abs(true), 1) for x in (lse, eager)]
    assert off[0].max() <= 2 * off[1].max() + 4 * torch.finfo(torch.float32).eps, [one.max() for one in off]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(buffer full of NaN, its middle as a contiguous tensor)."""
    buffer = torch.full((int(np.prod(shape)) + 64,), float("nan"), dtype=dtype)
    return buffer, buffer[32:-32].view(shape)


def assert_edges_untouched(buffer: Tensor) -> None:
    assert buffer[:32].isnan().all() and buffer[-32:].isnan().all()


# The references


@given(n=SIZES, m=SIZES, head_dim=HEAD_DIMS, scale=st.sampled_from((None, 0.3)))
def test_reference_is_the_formula(n: int, m: int, head_dim: int, scale: float | None) -> None:
    q, k, v = (make((2, size, 3, head_dim), seed=i) for i, size in enumerate((n, m, m)))
    out, lse = numpy_attention(q, k, v, head_dim**-0.5 if scale is None else scale)
    made, total = attention.reference_lse(q.double(), k.double(), v.double(), softmax_scale=scale)
    assert made.dtype == total.dtype == torch.float64 and made.is_contiguous()
    np.testing.assert_allclose(made.numpy(), out, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(total.numpy(), lse, rtol=1e-11, atol=1e-13)
    made, total = attention.reference_lse(q, k, v, softmax_scale=scale)
    assert made.dtype == total.dtype == torch.float32
    assert error(made, out) < 1e-6
    np.testing.assert_allclose(total.numpy(), lse, rtol=1e-5, atol=1e-5)


def test_reference_in_slabs_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (make((2, 37, 3, 8), seed=i) for i in range(3))
    whole = attention.reference_lse(q, k, v)
    monkeypatch.setattr(eager_attention, "SLAB", 2 * 3 * 37 * 5)
    for a, b in zip(attention.reference_lse(q, k, v), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@given(n=SIZES, cuts=st.lists(st.integers(1, 20), min_size=2, max_size=4))
def test_parts_merge_to_the_whole(n: int, cuts: list[int]) -> None:
    q, k, v = (make((2, size, 3, 8), torch.float64, i) for i, size in enumerate((n, sum(cuts), sum(cuts))))
    parts = list(zip(k.split(cuts, 1), v.split(cuts, 1), strict=True))
    out, lse = attention.reference_lse(q, *parts[0])
    for part in parts[1:]:
        out, lse = attention.merge(out, lse, *attention.reference_lse(q, *part))
    whole = attention.reference_lse(q, k, v)
    torch.testing.assert_close(out, whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole[1], rtol=1e-12, atol=1e-12)


def test_a_part_without_keys_merges_to_the_other() -> None:
    q, k, v = (make((1, 5, 2, 8), torch.float16, i) for i in range(3))
    out, lse = attention.reference_lse(q, k, v)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (attention.merge(out, lse, *nothing), attention.merge(*nothing, out, lse)):
        assert merged[0].dtype == torch.float16 and torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    neither = attention.merge(*nothing, *nothing)
    assert torch.equal(neither[0], nothing[0]) and torch.equal(neither[1], nothing[1])


@pytest.mark.parametrize("function", [attention.reference_lse, attention.triton, attention.triton_lse])
def test_what_does_not_fit_is_refused(function: Callable[..., object]) -> None:
    q, k = make((1, 4, 2, 8)), make((1, 6, 2, 8))
    with pytest.raises(ValueError, match="there are no keys"):
        function(q, k[:, :0], k[:, :0])
    with pytest.raises(ValueError, match=r"q \[B, N, H, D\] and k, v \[B, M, H, D\]"):
        function(q, k[:, :, :1], k[:, :, :1])
    with pytest.raises(ValueError, match="one floating type"):
        function(q, k.half(), k.half())


def test_every_back_end_of_the_table_is_a_function() -> None:
    assert set(attention.BACKENDS) == {*backends.NAMES, *backends.DENSE_ATTENTION}
    assert set(attention.SPARSE_BACKENDS) == {*backends.NAMES, *backends.APPROXIMATE}
    q, k, v = (make((1, 4, 2, 8), seed=i) for i in range(3))
    torch.testing.assert_close(attention.BACKENDS["sdpa"](q, k, v), attention.LSE_BACKENDS["reference"](q, k, v)[0])
    scaled = (attention.LSE_BACKENDS[name](q, k, v, softmax_scale=0.3) for name in ("sdpa", "reference"))
    torch.testing.assert_close(*scaled)


# flash-attn


def test_flash_gets_tokens_before_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Tensor:
        """As flash-attn's own takes them: [batch, tokens, heads, head_dim]."""
        seen.update(q=q, k=k, v=v, softmax_scale=softmax_scale)
        return reference.attention(q, k, v, softmax_scale=softmax_scale)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q, k, v = (make((2, size, 3, 8), torch.float16, i) for i, size in enumerate((5, 7, 7)))
    out = attention.flash(q, k, v, softmax_scale=0.3)
    assert seen["q"] is q and seen["k"] is k and seen["v"] is v and seen["softmax_scale"] == 0.3
    assert out.shape == (2, 5, 3, 8)
    assert_as_good_as(out, reference.attention(q, k, v, softmax_scale=0.3), numpy_attention(q, k, v, 0.3)[0])
    with pytest.raises(ValueError, match="takes fp16 and bf16, not torch.float32"):
        attention.flash(q.float(), k.float(), v.float())


# Triton


def run_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, block: int = BLOCK, tma: bool = False
) -> tuple[Tensor, Tensor]:
    from fastvid.kernels.attention import Config
    from fastvid.kernels.attention import attention as launch

    B, N, H, _ = q.shape
    (buffer, out), (edges, lse) = poisoned(q.shape, q.dtype), poisoned((B, H, N), torch.float32)
    launch(q, k, v, out, lse, scale, Config(block, block, 4, 1), tma)
    assert_edges_untouched(buffer)
    assert_edges_untouched(edges)
    return out, lse


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, made: tuple[Tensor, Tensor]) -> None:
    true, total = numpy_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    assert_as_good_as(made[0], reference.attention(q, k, v, softmax_scale=scale), true)
    assert_log_as_good_as(made[1], attention.reference_lse(q, k, v, softmax_scale=scale)[1], total)


@pytest.mark.interpret
@given(
    sizes=st.tuples(SIZES, SIZES),
    heads=st.integers(1, 2),
    head_dim=HEAD_DIMS,
    dtype=st.sampled_from((torch.float32, torch.float16)),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((None, 0.3)),
)
def test_triton(
    sizes: tuple[int, int], heads: int, head_dim: int, dtype: torch.dtype, layout: str, scale: float | None
) -> None:
    n, m = sizes
    batch = 2 if heads == 1 else 1
    q, k, v = (make((batch, size, heads, head_dim), dtype, i, layout) for i, size in enumerate((n, m, m)))
    check(q, k, v, scale, run_kernel(q, k, v, scale))


@pytest.mark.interpret
@given(
    sizes=st.tuples(SIZES, SIZES),
    head_dim=HEAD_DIMS.filter(lambda d: d % 8 == 0),
    layout=st.sampled_from(LAYOUTS[:3]),
)
def test_triton_by_descriptor(sizes: tuple[int, int], head_dim: int, layout: str) -> None:
    n, m = sizes
    q, k, v = (make((1, size, 2, head_dim), torch.float16, i, layout) for i, size in enumerate((n, m, m)))
    check(q, k, v, None, run_kernel(q, k, v, tma=True))


@pytest.mark.interpret
@pytest.mark.parametrize("m", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_triton_beside_the_block(m: int) -> None:
    q, k, v = (make((1, size, 1, 16), seed=i) for i, size in enumerate((BLOCK + 1, m, m)))
    check(q, k, v, None, run_kernel(q, k, v))


@pytest.mark.interpret
def test_triton_of_scores_that_exponentials_cannot_hold() -> None:
    """Scores of several thousands, the highest in the last block: every step moves the maximum."""
    q, k, v = (make((1, 2 * BLOCK, 1, 16), seed=i) for i in range(3))
    q, k = q * 20, k.sort(dim=1).values * 20
    check(q, k, v, 10.0, run_kernel(q, k, v, 10.0))


@pytest.mark.interpret
def test_triton_gives_nan_only_where_it_belongs() -> None:
    q, k, v = (make((1, 2 * BLOCK, 2, 16), seed=i) for i in range(3))
    q[0, 3, 1] = float("nan")
    out, lse = run_kernel(q, k, v)
    where = torch.zeros(1, 2 * BLOCK, 2, dtype=torch.bool)
    where[0, 3, 1] = True
    assert torch.equal(out.isnan().all(-1), where) and torch.equal(out.isnan().any(-1), where)
    assert torch.equal(lse.isnan(), where.transpose(1, 2))


# Shape and strides of tensors whose last element lies 2^31 elements or more behind the first. No stride is itself in
# 2^31..2^32 - 1: Triton's interpreter reads such an argument wrongly.
FAR = {
    "samples": ((3, 17, 1, 16), (2**30 + 16, 16, 16)),
    "tokens": ((1, 18, 1, 16), (16, 2**27, 16)),
    "heads": ((1, 17, 3, 16), (16, 16, 2**30 + 16)),
}


def far_apart(x: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """The same numbers in memory with gaps that are never touched, so that the system never provides them."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1), strict=True)) + 1
    assert size > 2**31
    return torch.empty(size, dtype=x.dtype).as_strided(x.shape, (*strides, 1)).copy_(x)


@pytest.mark.interpret
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("axis", FAR)
def test_triton_has_64_bit_offsets(axis: str, tma: bool) -> None:
    shape, strides = FAR[axis]
    near = [make(shape, torch.float16, i) for i in range(3)]
    far = [far_apart(x, strides) for x in near]
    for a, b in zip(run_kernel(*far, tma=tma), run_kernel(*near, tma=tma), strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpret
def test_triton_as_an_operator_of_torch() -> None:
    q, k, v = (make((1, size, 2, 16), seed=i) for i, size in enumerate((5, 7, 7)))
    torch.library.opcheck(attention.triton, (q, k, v), {"softmax_scale": 0.3})
    torch.library.opcheck(attention.triton_lse, (q, k, v))
    torch.testing.assert_close(attention.triton(q, k, v), reference.attention(q, k, v))
    out, lse = attention.triton_lse(q, k, v, softmax_scale=0.3)
    true, total = attention.reference_lse(q, k, v, softmax_scale=0.3)
    torch.testing.assert_close(out, true)
    torch.testing.assert_close(lse, total)
    assert attention.triton(q[:, :0], k, v).shape == (1, 0, 2, 16)


def test_triton_refuses_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.attention import attention as launch

    q, k = make((1, 4, 2, 16)), make((1, 6, 2, 16))
    cases = {
        "the last dimension of k has stride 2": (q, make((1, 6, 2, 32))[..., ::2], k, q.clone()),
        "head_dim is 136; the kernel takes 1 to 128": [make((1, 4, 2, 136))] * 4,
        "in fp32, fp16 or bf16": [q.double()] * 4,
        "all of one type": (q, k.half(), k.half(), q.clone()),
        r"\[B, M, H, D\] are needed": (q, k, k[:, :5], q.clone()),
        "out must be contiguous": (q, k, k, torch.empty(1, 2, 4, 16).transpose(1, 2)),
        "there are no keys": (q, k[:, :0], k[:, :0], q.clone()),
        "lse must be contiguous float32": (q, k, k, q.clone(), torch.empty(1, 4, 2)),
        "softmax_scale is -1.0": (q, k, k, q.clone(), None, -1.0),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            launch(*arguments)


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 128])
def test_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    for n, m in ((1, 1), (137, 512), (1151, 257), (1024, 1024), (128, 129)):
        for layout in LAYOUTS:
            q, k, v = (on_gpu(make((2, size, 3, head_dim), dtype, i, layout)) for i, size in enumerate((n, m, m)))
            check(q, k, v, None, attention.triton_lse(q, k, v))


def on_gpu(x: Tensor) -> Tensor:
    """On the GPU with the strides that it has here."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    flat = x.as_strided((size,), (1,)).cuda()
    return flat.as_strided(x.shape, x.stride())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_of_a_video_on_a_gpu(dtype: torch.dtype) -> None:
    """Some rows of 32,760 tokens: no eager attention holds all scores."""
    q, k, v = (torch.randn(1, 32760, 12, 128, device="cuda", dtype=dtype) for _ in range(3))
    out, lse = attention.triton_lse(q, k, v)
    torch.testing.assert_close(attention.triton(q, k, v), out)
    rows = torch.tensor([0, 127, 128, 16383, 32639, 32640, 32759], device="cuda")
    true, total = attention.reference_lse(q[:, rows].double(), k.double(), v.double())
    assert_as_good_as(out[:, rows], reference.attention(q[:, rows], k, v), true.cpu().numpy())
    torch.testing.assert_close(lse[:, :, rows], total.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu() -> None:
    N = 2**31 // (40 * 128) + 300
    q = torch.empty(1, N, 40, 128, device="cuda", dtype=torch.bfloat16).normal_()
    k, v = (torch.randn(1, 40, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = attention.triton(q, k, v)
    tail = attention.triton(q[:, -256:].clone(), k, v)
    assert torch.equal(out[:, -256:], tail)
    assert torch.equal(out[:, :256], attention.triton(q[:, :256].clone(), k, v))


@pytest.mark.gpu
def test_operator_of_torch_on_a_gpu() -> None:
    q, k, v = (torch.randn(1, 137, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    torch.library.opcheck(attention.triton, (q, k, v))
    torch.library.opcheck(attention.triton_lse, (q, k, v))
