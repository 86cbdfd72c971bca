"""Norms, residuals and rotations: what is new against its formula in fp64; the Triton kernels against fp64, in the
interpreter and on a GPU, with at most twice the error of eager PyTorch in the same type.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import run_interpreted
from norm_cases import EPS, error, floor, formula, head_arguments, randn, results, row_arguments, turned
from torch import Tensor

from fastvid.ops import reference, sparse, transformer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = {name: of for name, of in transformer.BACKENDS.items() if "norm" in name or "residual" in name}
ROW_OPS = tuple(name for name in NORMS if "rope" not in name)
# Around one, two and three warps' accesses of 16 bytes, and around widths that are one power of two, or two.
WIDTHS = (1, 2, 13, 64, 100, 137, 255, 256, 257, 511, 513, 640, 767, 768, 769, 1151, 1536, 1537, 2049)
FAR = 2**30  # elements between two of three rows, the last of which lies 2^31 behind the first


def check_rows(name: str, args: tuple[Any, ...]) -> None:
    outs = {backend: results(f(*args)) for backend, f in NORMS[name].items()}
    truths = {backend: formula(name, args, out[0]) for backend, out in outs.items()}
    for i, (ours, eager) in enumerate(zip(outs["triton"], outs["reference"], strict=True)):
        assert ours.dtype == eager.dtype and ours.shape == eager.shape and ours.is_contiguous()
        found, allowed = error(ours, truths["triton"][i]), error(eager, truths["reference"][i])
        assert found <= max(2 * allowed, floor(ours.dtype)), (name, i, tuple(ours.shape), found, allowed)


def check_heads(args: tuple[Tensor, ...], order: Tensor | None) -> None:
    """The fused operation and the one of a single tensor."""
    qkv, weight_q, weight_k, cos, sin = args
    x = qkv.chunk(3, -1)
    truths = [
        turned(x[0], weight_q, cos, sin),
        turned(x[1], weight_k, cos, sin),
        x[2].unflatten(-1, (-1, cos.shape[1] * 2)),
    ]
    eager, ours = (NORMS["qkv_norm_rope"][name](*args, EPS, order) for name in ("reference", "triton"))
    for a, b, truth in zip(ours, eager, truths, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.transpose(1, 2).is_contiguous()
        truth = truth if order is None else truth[:, order.long()]
        assert error(a, truth.double()) <= max(2 * error(b, truth.double()), floor(a.dtype)), tuple(a.shape)
    assert torch.equal(ours[2], eager[2])
    for i, weight in enumerate((weight_q, weight_k)):
        a, b = (NORMS["rms_norm_rope"][name](x[i], weight, cos, sin, EPS) for name in ("reference", "triton"))
        assert a.dtype == b.dtype and a.shape == b.shape and b.is_contiguous()
        assert error(b, truths[i]) <= max(2 * error(a, truths[i]), floor(a.dtype)), tuple(a.shape)


# What is new in eager PyTorch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "G", "K", "d"), [(1, 1, 1, 8), (12, 3, 2, 100), (137, 137, 5, 64)])
@pytest.mark.parametrize("name", ["gated_residual_norm", "gated_residual_layer_norm", "residual_norm"])
def test_reference_is_the_formula(name: str, N: int, G: int, K: int, d: int, dtype: torch.dtype) -> None:
    args = row_arguments(2, N, G, K, d, dtype)[name]
    stream, normed = NORMS[name]["reference"](*args)
    for out, truth in zip((stream, normed), formula(name, args, stream), strict=True):
        assert out.dtype == dtype and out.shape == (2, N, d)
        assert error(out, truth) <= floor(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 2), (12, 3, 34), (30, 2, 128)])
@pytest.mark.parametrize("ordered", [False, True])
def test_reference_of_queries_keys_and_values(N: int, H: int, D: int, ordered: bool, dtype: torch.dtype) -> None:
    qkv, weight_q, weight_k, cos, sin = head_arguments(2, N, H, D, dtype)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)) if ordered else None
    q, k, v = reference.qkv_norm_rope(qkv, weight_q, weight_k, cos, sin, EPS, order)
    rows = torch.arange(N) if order is None else order
    for out, i, weight in ((q, 0, weight_q), (k, 1, weight_k)):
        truth = turned(qkv[..., i * H * D : (i + 1) * H * D], weight, cos, sin)[:, rows]
        assert out.dtype == dtype and out.shape == (2, N, H, D)
        assert error(out, truth) <= 2 * floor(dtype)  # rounded twice
    assert torch.equal(v.flatten(2), qkv[:, rows, 2 * H * D : 3 * H * D])
    assert ordered or v.data_ptr() == qkv[..., 2 * H * D :].data_ptr(), "there is nothing to copy"


# The kernels, interpreted


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@given(size=st.integers(1, 40000), least=st.sampled_from((1, 2, 16, 256)))
def test_pieces_hold_what_they_have_to(size: int, least: int) -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.row_norms import main_and_tail

    main, tail = main_and_tail(size, least)
    assert main & (main - 1) == 0 and tail & (tail - 1) == 0 and (tail == 0 or main > tail >= least)
    assert size <= main + tail < 2 * max(size, least)
    assert tail == 0 or main < size


@pytest.mark.interpret
@pytest.mark.parametrize("name", ROW_OPS)
@given(
    d=st.sampled_from(WIDTHS),
    B=st.integers(1, 2),
    G=st.integers(1, 3),
    group=st.integers(1, 2),
    K=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES[:2]),
)
def test_rows(name: str, d: int, B: int, G: int, group: int, K: int, dtype: torch.dtype) -> None:
    check_rows(name, row_arguments(B, G * group, G, K, d, dtype)[name])


@pytest.mark.interpret
@pytest.mark.parametrize("d", [3072, 5120, 16384])
def test_rows_of_large_models(d: int) -> None:
    check_rows("gated_residual_norm", row_arguments(1, 2, 1, 1, d, torch.float16)["gated_residual_norm"])


@pytest.mark.interpret
@given(
    H=st.integers(1, 13),
    D=st.sampled_from((2, 6, 16, 34, 64, 128, 130)),
    B=st.integers(1, 2),
    N=st.integers(1, 3),
    order=st.sampled_from((None, torch.int32, torch.int64)),
    dtype=st.sampled_from(DTYPES[:2]),
)
def test_queries_keys_and_values(H: int, D: int, B: int, N: int, order: torch.dtype | None, dtype: torch.dtype) -> None:
    permutation = torch.randperm(N, generator=torch.Generator().manual_seed(H))
    check_heads(head_arguments(B, N, H, D, dtype), None if order is None else permutation.to(order))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("d", [100, 1536])
def test_one_pass_gives_what_two_give(d: int, dtype: torch.dtype) -> None:
    check_one_pass(row_arguments(2, 4, 2, 3, d, dtype))


def check_one_pass(every: dict[str, tuple[Any, ...]]) -> None:
    """Bit for bit, so that fusing changes no video."""
    x, y, gate, shift, scale, index, _ = every["gated_residual_norm"]
    weight, bias = every["gated_residual_layer_norm"][4:6]
    stream = transformer.gated_residual_triton(x, y, gate, index)
    total, out = transformer.gated_residual_norm_triton(x, y, gate, shift, scale, index, EPS)
    assert torch.equal(total, stream)
    assert torch.equal(out, transformer.modulated_layer_norm_triton(stream, shift, scale, index, EPS))
    total, out = transformer.gated_residual_layer_norm_triton(x, y, gate, index, weight, bias, EPS)
    assert torch.equal(total, stream) and torch.equal(out, transformer.layer_norm_triton(stream, weight, bias, EPS))
    total, out = transformer.residual_norm_triton(x, y, shift, scale, index, EPS)
    assert torch.equal(total, x + y)
    assert torch.equal(out, transformer.modulated_layer_norm_triton(x + y, shift, scale, index, EPS))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a buffer of NaN, the view inside it that is to be written): rows and batches with gaps between them."""
    buffer = torch.full((*shape[:-2], shape[-2] + 2, shape[-1] + 32), float("nan"), dtype=dtype)
    return buffer, buffer[..., 1:-1, 16:-16]


@pytest.mark.interpret
@pytest.mark.parametrize("d", [64, 100, 769, 1536])
def test_rows_are_written_whole_and_nothing_else(d: int) -> None:
    from fastvid.kernels.row_norms import row_norm

    x, y, gate, shift, scale, index, _ = row_arguments(2, 6, 3, 2, d, torch.float32)["gated_residual_norm"]
    (around, total), (beside, out) = poisoned((2, 6, d), x.dtype), poisoned((2, 6, d), x.dtype)
    row_norm(x, out, eps=EPS, weight=scale, bias=shift, y=y, gate=gate, total=total, index=index.int(), modulated=True)
    expected = reference.gated_residual_norm(x, y, gate, shift, scale, index, EPS)
    for buffer, written, truth in ((around, total, expected[0]), (beside, out, expected[1])):
        torch.testing.assert_close(written, truth)
        assert buffer.isnan().sum() == buffer.numel() - written.numel()


@pytest.mark.interpret
@pytest.mark.parametrize(("H", "D"), [(12, 128), (3, 34), (5, 16)])
def test_heads_are_written_whole_and_nothing_else(H: int, D: int) -> None:
    from fastvid.kernels.qk_norm_rope import qkv_norm_rope

    args = head_arguments(2, 3, H, D, torch.float32)
    buffers, outs = zip(*(poisoned((2, H, 3, D), torch.float32) for _ in range(3)), strict=True)
    qkv_norm_rope(*args, EPS, None, tuple(out.transpose(1, 2) for out in outs))
    for buffer, written, truth in zip(buffers, outs, reference.qkv_norm_rope(*args, EPS), strict=True):
        torch.testing.assert_close(written.transpose(1, 2), truth)
        assert buffer.isnan().sum() == buffer.numel() - written.numel()


def far_apart(shape: tuple[int, ...], axis: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Not filled in; along an axis of three FAR elements apart, so that the last lies 2^31 behind the first.

    The gigabytes between them are never touched, so the system never provides them. No stride is itself in
    2^31..2^32 - 1: Triton's interpreter reads such an argument wrongly.
    """
    assert shape[axis] == 3
    strides = list(torch.empty(shape, device="meta").stride())
    strides[axis] = FAR
    return torch.empty(2 * FAR + 2**16, dtype=dtype).as_strided(shape, strides)


@pytest.mark.interpret
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_have_64_bit_offsets(axis: int) -> None:
    from fastvid.kernels.row_norms import row_norm

    args = row_arguments(3, 3, 3, 3, 40, torch.float16)["gated_residual_norm"]
    x, y, gate, shift, scale, index, _ = args
    x, y = (far_apart(t.shape, axis).copy_(t) for t in (x, y))
    total, out = (far_apart(x.shape, axis).fill_(float("nan")) for _ in range(2))
    row_norm(x, out, eps=EPS, weight=scale, bias=shift, y=y, gate=gate, total=total, index=index, modulated=True)
    expected = transformer.gated_residual_norm_triton(*args)
    assert torch.equal(total, expected[0]) and torch.equal(out, expected[1])


@pytest.mark.interpret
def test_tables_have_64_bit_offsets() -> None:
    x, y, gate, shift, scale, index, _ = row_arguments(3, 2, 1, 3, 40, torch.float16)["gated_residual_norm"]
    index = torch.tensor([[2], [0], [1]])
    rows = far_apart((3, 3, 40), 0, torch.float32).copy_(torch.stack((gate, shift, scale), 1))
    given_far = transformer.gated_residual_norm_triton(x, y, *rows.unbind(1), index, EPS)
    for a, b in zip(
        given_far, transformer.gated_residual_norm_triton(x, y, gate, shift, scale, index, EPS), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.interpret
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_heads_have_64_bit_offsets(axis: int) -> None:
    from fastvid.kernels.qk_norm_rope import qkv_norm_rope

    args = head_arguments(3, 3, 3, 8, torch.float16)
    qkv = far_apart((3, 3, 72), min(axis, 1)).copy_(args[0])
    q, k, v = (far_apart((3, 3, 3, 8), axis).fill_(float("nan")) for _ in range(3))
    order = torch.tensor([2, 0, 1])
    qkv_norm_rope(qkv, *args[1:], EPS, order, (q, k, v))
    for out, truth in zip((q, k, v), transformer.qkv_norm_rope_triton(*args, EPS, order), strict=True):
        assert torch.equal(out, truth)


@pytest.mark.interpret
def test_rows_of_any_number_of_dimensions() -> None:
    weight, bias = randn(2, 40, seed=1).unbind(0)
    for x in (randn(40), randn(3, 40), randn(2, 3, 40), randn(2, 2, 3, 40), randn(2, 2, 3, 80)[..., :40]):
        torch.testing.assert_close(
            transformer.layer_norm_triton(x, weight, bias, EPS), reference.layer_norm(x, weight, bias, EPS)
        )
        torch.testing.assert_close(transformer.rms_norm_triton(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@pytest.mark.interpret
def test_nothing_gives_nothing() -> None:
    for name, args in row_arguments(2, 0, 1, 2, 40, torch.float32).items():
        assert all(out.shape == (2, 0, 40) for out in results(NORMS[name]["triton"](*args)))
    args = head_arguments(2, 0, 3, 8, torch.float32)
    assert all(out.shape == (2, 0, 3, 8) for out in transformer.qkv_norm_rope_triton(*args, EPS))


@pytest.mark.interpret
@pytest.mark.parametrize("name", NORMS)
def test_as_operators_of_torch(name: str) -> None:
    torch.library.opcheck(NORMS[name]["triton"], arguments(name))


def arguments(name: str, device: str = "cpu") -> tuple[Any, ...]:
    if name in ROW_OPS:
        return row_arguments(2, 4, 2, 3, 40, torch.float32, device=device)[name]
    qkv, weight_q, weight_k, cos, sin = head_arguments(2, 3, 3, 8, torch.float32, device=device)
    if name == "rms_norm_rope":
        return qkv[..., :24], weight_q, cos, sin, EPS
    return qkv, weight_q, weight_k, cos, sin, EPS, torch.tensor([2, 0, 1], device=device)


def wrong(name: str, place: int, change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    args = list(arguments(name))
    args[place] = change(args[place])
    return tuple(args)


REFUSED = {
    "x is.*float64": ("modulated_layer_norm", 0, lambda x: x.double()),
    "x is.*last stride": ("modulated_layer_norm", 0, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "shift is": ("modulated_layer_norm", 1, lambda shift: shift[:, :-1]),
    "scale is.*float16": ("modulated_layer_norm", 2, lambda scale: scale.half()),
    "index is.*divisor of 4": ("modulated_layer_norm", 3, lambda index: index[:, [0, 0, 0]]),
    "index is.*int32 or int64": ("gated_residual", 3, lambda index: index.float()),
    r"y is \[2, 3, 40\]": ("gated_residual", 1, lambda y: y[:, 1:]),
    "gate is.*float64": ("gated_residual", 2, lambda gate: gate.double()),
    r"weight is \[39\]": ("layer_norm", 1, lambda weight: weight[1:]),
    "at most 16384": ("rms_norm", 0, lambda x: randn(1, 1, 16385)),
    "not rows at even distances": ("rms_norm", 0, lambda x: randn(3, 2, 2, 40).transpose(0, 1)),
    "a single number": ("rms_norm", 0, lambda x: torch.tensor(1.0)),
    r"cos \[N, D // 2\] are needed": ("rms_norm_rope", 2, lambda cos: cos[:, :0]),
    r"cos is \[2, 4\]": ("rms_norm_rope", 2, lambda cos: cos[1:]),
    "sin is.*float16": ("rms_norm_rope", 3, lambda sin: sin.half()),
    r"qkv \[B, N, 3": ("qkv_norm_rope", 0, lambda qkv: qkv[..., 1:]),
    "weight is.*float64": ("qkv_norm_rope", 2, lambda weight: weight.double()),
    r"order is \[2\]": ("qkv_norm_rope", 6, lambda order: order[1:]),
    "order is.*int16": ("qkv_norm_rope", 6, lambda order: order.to(torch.int16)),
}


@pytest.mark.interpret
@pytest.mark.parametrize("message", REFUSED)
def test_what_kernels_cannot_take_is_refused(message: str) -> None:
    name = REFUSED[message][0]
    with pytest.raises(ValueError, match=message):
        NORMS[name]["triton"](*wrong(*REFUSED[message]))


@pytest.mark.interpret
def test_results_that_do_not_fit_are_refused() -> None:
    from fastvid.kernels.qk_norm_rope import norm_rope, qkv_norm_rope
    from fastvid.kernels.row_norms import row_norm

    x, weight, bias, _ = arguments("layer_norm")
    with pytest.raises(ValueError, match=r"out is \[2, 4, 41\]"):
        row_norm(x, torch.empty(2, 4, 41), eps=EPS, weight=weight, bias=bias)
    args = arguments("qkv_norm_rope")
    same = torch.empty(2, 3, 3, 8)
    with pytest.raises(ValueError, match="one is allowed"):
        qkv_norm_rope(*args, (same, same, same.transpose(1, 2)))
    with pytest.raises(ValueError, match="D has to be even"):
        norm_rope(x, weight, *randn(2, 4, 2), EPS, torch.empty(2, 4, 8, 5))


# The kernels, compiled for architectures that are not here


@pytest.mark.slow
@pytest.mark.parametrize("file", ["row_norms", "qk_norm_rope"])
def test_rows_are_read_and_written_in_16_bytes(file: str) -> None:
    triton = pytest.importorskip("triton")
    kernels = pytest.importorskip(f"fastvid.kernels.{file}")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = kernels.variants()[0]
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(variant.options)).asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    wide = [access for access in accesses if access.endswith("v4.b32")]
    assert len(accesses) - len(wide) <= 1, set(accesses)  # an entry of the index or the order
    assert len(re.findall(r"bar\.sync", ptx)) <= 3  # what a sum over warps takes, and no change of layout


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    for B, N, G, K, d in [(1, 1, 1, 1, 1), (2, 138, 6, 3, 100), (1, 137, 137, 5, 1537), (2, 31, 1, 2, 13)]:
        check_rows(name, row_arguments(B, N, G, K, d, dtype, device="cuda")[name])
    for d in (1536, 3072, 5120, 16384):
        check_rows(name, row_arguments(1, 1560, 3, 2, d, dtype, device="cuda")[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_gives_what_two_give_on_a_gpu(dtype: torch.dtype) -> None:
    for d in (100, 1536, 5120):
        check_one_pass(row_arguments(2, 156, 3, 3, d, dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_keys_and_values_on_a_gpu(dtype: torch.dtype) -> None:
    for H, D in [(1, 2), (3, 34), (5, 64), (7, 96), (12, 128), (24, 128), (40, 128)]:
        for grid in [(1, 1, 1), (3, 5, 7), (2, 30, 52)]:
            args = head_arguments(2, grid[0] * grid[1] * grid[2], H, D, dtype, device="cuda")
            check_heads(args, None)
            check_heads(args, sparse.tile_order(grid, (2, 8, 8)).to("cuda", torch.int32))


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu() -> None:
    d, N = 5120, 2**31 // 5120 + 100
    x = torch.empty((1, N, d), dtype=torch.bfloat16, device="cuda").normal_()
    shift, scale = randn(2, 1, d, device="cuda").unbind(0)
    index = torch.zeros((1, 1), dtype=torch.int64, device="cuda")
    out = transformer.modulated_layer_norm_triton(x, shift, scale, index, EPS)
    for part in (slice(0, 50), slice(N - 50, N)):
        expected = reference.modulated_layer_norm(x[:, part], shift, scale, index, EPS)
        torch.testing.assert_close(out[:, part], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NORMS)
def test_as_operators_of_torch_on_a_gpu(name: str) -> None:
    torch.library.opcheck(NORMS[name]["triton"], arguments(name, "cuda"))
