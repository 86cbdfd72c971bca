"""Dense attention: the references against fp64 written a second time, the Triton kernel (in the interpreter, by
pointers and by descriptors) against both, and merging of parts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from attention_cases import (
    FAR,
    HALVES,
    LAYOUTS,
    assert_as_good_as,
    assert_edges_untouched,
    check,
    error,
    far_apart,
    make,
    numpy_attention,
    on_gpu,
    poisoned,
    random_blocks,
)
from hypothesis import given
from hypothesis import strategies as st
from interpreted import run_interpreted
from torch import Tensor

from fastvid.ops import attention, attention_gpu, dispatch

BLOCK = 16
SIZES = st.integers(1, 3 * BLOCK + 1)
HEAD_DIMS = st.sampled_from((1, 16, 24, 32, 40, 64, 96, 128))
with_lse = partial(attention.reference, return_lse=True)
triton = attention.BACKENDS["triton"]


# The reference


@given(n=SIZES, m=SIZES, head_dim=HEAD_DIMS, scale=st.sampled_from((None, 0.3)))
def test_reference_is_the_formula(n: int, m: int, head_dim: int, scale: float | None) -> None:
    q, k, v = (make((2, size, 3, head_dim), seed=i) for i, size in enumerate((n, m, m)))
    out, lse = numpy_attention(q, k, v, head_dim**-0.5 if scale is None else scale)
    made, total = with_lse(q.double(), k.double(), v.double(), scale=scale)
    assert made.dtype == total.dtype == torch.float64 and made.is_contiguous()
    np.testing.assert_allclose(made.numpy(), out, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(total.numpy(), lse, rtol=1e-11, atol=1e-13)
    made, total = with_lse(q, k, v, scale=scale)
    assert made.dtype == total.dtype == torch.float32
    assert error(made, out) < 1e-6
    np.testing.assert_allclose(total.numpy(), lse, rtol=1e-5, atol=1e-5)


def test_reference_in_slabs_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (make((2, 37, 3, 8), seed=i) for i in range(3))
    whole = with_lse(q, k, v)
    monkeypatch.setattr(attention, "SLAB", 2 * 3 * 37 * 5)
    for a, b in zip(with_lse(q, k, v), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@given(n=SIZES, cuts=st.lists(st.integers(1, 20), min_size=2, max_size=4))
def test_parts_merge_to_the_whole(n: int, cuts: list[int]) -> None:
    q, k, v = (make((2, size, 3, 8), torch.float64, i) for i, size in enumerate((n, sum(cuts), sum(cuts))))
    parts = list(zip(k.split(cuts, 1), v.split(cuts, 1), strict=True))
    out, lse = with_lse(q, *parts[0])
    for part in parts[1:]:
        out, lse = attention.merge(out, lse, *with_lse(q, *part))
    whole = with_lse(q, k, v)
    torch.testing.assert_close(out, whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole[1], rtol=1e-12, atol=1e-12)


def test_a_part_without_keys_merges_to_the_other() -> None:
    q, k, v = (make((1, 5, 2, 8), torch.float16, i) for i in range(3))
    out, lse = with_lse(q, k, v)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (attention.merge(out, lse, *nothing), attention.merge(*nothing, out, lse)):
        assert merged[0].dtype == torch.float16 and torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    neither = attention.merge(*nothing, *nothing)
    assert torch.equal(neither[0], nothing[0]) and torch.equal(neither[1], nothing[1])


@pytest.mark.parametrize("name", attention.BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_what_does_not_fit_is_refused(name: str, return_lse: bool) -> None:
    function = partial(attention.BACKENDS[name], return_lse=return_lse)
    q, k = make((2, 4, 2, 8)), make((2, 6, 2, 8))
    with pytest.raises(ValueError, match="there are no keys"):
        function(q, k[:, :0], k[:, :0])
    with pytest.raises(ValueError, match=r"q \[B, N, H, D\] and k, v \[B, M, H, D\]"):
        function(q, k[:, :, :1], k[:, :, :1])
    with pytest.raises(ValueError, match="one floating type"):
        function(q, k.half(), k.half())
    with pytest.raises(ValueError, match="blocks have 3 lists; 1, 2 or 4 fit"):
        function(q, k, k, blocks=random_blocks(([4], [3, 3]), 3, 0.5, 0))


def test_every_back_end_of_the_table_is_a_function() -> None:
    assert set(attention.BACKENDS) > {*dispatch.NAMES, *dispatch.APPROXIMATE}
    q, k, v = (make((1, 4, 2, 8), seed=i) for i in range(3))
    torch.testing.assert_close(attention.sdpa(q, k, v), with_lse(q, k, v)[0])
    scaled = (run(q, k, v, scale=0.3, return_lse=True) for run in (attention.sdpa, attention.reference))
    torch.testing.assert_close(*scaled)


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
    check(q, k, v, run_kernel(q, k, v, scale), scale)


@pytest.mark.interpret
@given(
    sizes=st.tuples(SIZES, SIZES),
    head_dim=HEAD_DIMS.filter(lambda d: d % 8 == 0),
    layout=st.sampled_from(LAYOUTS[:3]),
)
def test_triton_by_descriptor(sizes: tuple[int, int], head_dim: int, layout: str) -> None:
    n, m = sizes
    q, k, v = (make((1, size, 2, head_dim), torch.float16, i, layout) for i, size in enumerate((n, m, m)))
    check(q, k, v, run_kernel(q, k, v, tma=True))


@pytest.mark.interpret
@pytest.mark.parametrize("m", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_triton_beside_the_block(m: int) -> None:
    q, k, v = (make((1, size, 1, 16), seed=i) for i, size in enumerate((BLOCK + 1, m, m)))
    check(q, k, v, run_kernel(q, k, v))


@pytest.mark.interpret
def test_triton_of_scores_that_exponentials_cannot_hold() -> None:
    """Scores of several thousands, the highest in the last block: every step moves the maximum."""
    q, k, v = (make((1, 2 * BLOCK, 1, 16), seed=i) for i in range(3))
    q, k = q * 20, k.sort(dim=1).values * 20
    check(q, k, v, run_kernel(q, k, v, 10.0), 10.0)


@pytest.mark.interpret
def test_triton_gives_nan_only_where_it_belongs() -> None:
    q, k, v = (make((1, 2 * BLOCK, 2, 16), seed=i) for i in range(3))
    q[0, 3, 1] = float("nan")
    out, lse = run_kernel(q, k, v)
    where = torch.zeros(1, 2 * BLOCK, 2, dtype=torch.bool)
    where[0, 3, 1] = True
    assert torch.equal(out.isnan().all(-1), where) and torch.equal(out.isnan().any(-1), where)
    assert torch.equal(lse.isnan(), where.transpose(1, 2))


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
    for options in ((0.3, False), (None, True)):
        torch.library.opcheck(attention_gpu.attention_triton, (q, k, v, [], [], *options))
    torch.testing.assert_close(triton(q, k, v), attention.reference(q, k, v))
    made, true = (run(q, k, v, scale=0.3, return_lse=True) for run in (triton, attention.reference))
    for a, b in zip(made, true, strict=True):
        torch.testing.assert_close(a, b)
    assert triton(q[:, :0], k, v).shape == (1, 0, 2, 16)


def test_triton_refuses_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.attention import attention as launch

    q, k = make((1, 4, 2, 16)), make((1, 6, 2, 16))
    cases = {
        "the last dimension of k has stride 2": (q, make((1, 6, 2, 32))[..., ::2], k, q.clone()),
        "head_dim is 136; the kernel takes 1 to 128": [make((1, 4, 2, 136))] * 4,
        "are fp32, fp16 or bf16": [q.double()] * 4,
        "softmax_scale is -1.0": (q, k, k, q.clone(), None, -1.0),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            launch(*arguments)


def test_a_few_under_the_interpreter() -> None:
    """For all kernels, in the fast tier."""
    run_interpreted(__file__, "beside_the_block")


@pytest.mark.slow
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
            check(q, k, v, triton(q, k, v, return_lse=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_of_a_video_on_a_gpu(dtype: torch.dtype) -> None:
    """Some rows of 32,760 tokens: no eager attention holds all scores."""
    q, k, v = (torch.randn(1, 32760, 12, 128, device="cuda", dtype=dtype) for _ in range(3))
    out, lse = triton(q, k, v, return_lse=True)
    torch.testing.assert_close(triton(q, k, v), out)
    rows = torch.tensor([0, 127, 128, 16383, 32639, 32640, 32759], device="cuda")
    true, total = with_lse(q[:, rows].double(), k.double(), v.double())
    assert_as_good_as(out[:, rows], attention.reference(q[:, rows], k, v), true.cpu().numpy())
    torch.testing.assert_close(lse[:, :, rows], total.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu() -> None:
    N = 2**31 // (40 * 128) + 300
    q = torch.empty(1, N, 40, 128, device="cuda", dtype=torch.bfloat16).normal_()
    k, v = (torch.randn(1, 40, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = triton(q, k, v)
    tail = triton(q[:, -256:].clone(), k, v)
    assert torch.equal(out[:, -256:], tail)
    assert torch.equal(out[:, :256], triton(q[:, :256].clone(), k, v))


@pytest.mark.gpu
def test_operator_of_torch_on_a_gpu() -> None:
    q, k, v = (torch.randn(1, 137, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    for asked in (False, True):
        torch.library.opcheck(attention_gpu.attention_triton, (q, k, v, [], [], None, asked))
