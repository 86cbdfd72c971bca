"""csrc/'s attention with 8-bit products: on the CPU, quantization and the kernel's own code over interpreted TMA,
mbarriers and wgmma, against the eager form and float64; on a GPU, the kernels. Results lie in the middle of NaN."""

from __future__ import annotations

import ctypes
import math
import random as chance
from functools import partial

import pytest
import torch
from attention_cases import (
    HALVES,
    assert_edges_untouched,
    error,
    make,
    numpy_attention,
    on_gpu,
    poisoned,
    random_blocks,
)
from attention_eight_host import attention_eight_host, eights, quantize_host
from attention_host import library
from compiled_host import CXX
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvid.benchmarks import attention_eight_reference as eager
from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.ops import attention, sparse
from fastvid.ops.dispatch import bind
from fastvid.ops.sparse import Blocks

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")
KINDS = ("fp8", "int8")
LAYOUTS = ("token-major", "head-major", "one of three")
LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from((1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 513)))
TILE_SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=4)
# Of random values, as products of 8-bit ones have them: fp32 attention is 1,000 times as good.
WORST = {"fp8": 0.06, "int8": 0.045}


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    blocks: Blocks | None = None,
    scale: float | None = None,
    grid: int = 3,
) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    (buffer, out), (edges, lse) = poisoned(q.shape, q.dtype), poisoned((B, H, N), torch.float32)
    attention_eight_host(q, k, v, out, lse, kind, blocks, scale, grid)
    assert_edges_untouched(buffer)
    assert_edges_untouched(edges)
    without = torch.empty_like(out)
    attention_eight_host(q, k, v, without, None, kind, blocks, scale, grid)
    torch.testing.assert_close(out, without, rtol=0, atol=0, equal_nan=True)
    return out, lse


def check_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    made: tuple[Tensor, Tensor],
    kind: str,
    blocks: Blocks | None = None,
    scale: float | None = None,
) -> None:
    """As the eager form, but for the result's own rounding and the few weights that e4m3 has rounded another way."""
    out, lse = eager.attention(q, k, v, scale=scale, return_lse=True, blocks=blocks, kind=kind)
    size = out.float().norm().item()
    assert (made[0].float() - out.float()).norm().item() <= 2 * torch.finfo(q.dtype).eps * size + 1e-30
    assert torch.equal(lse == -math.inf, made[1] == -math.inf)
    there = lse > -math.inf
    torch.testing.assert_close(made[1][there], lse[there], rtol=1e-5, atol=1e-4)


# To 8 bits


@pytest.mark.slow
def test_rounding_to_e4m3() -> None:
    """As torch rounds, for every 16-bit float, and back again."""
    lib = library()
    lib.narrow_e4m3.restype, lib.narrow_e4m3.argtypes = ctypes.c_uint8, [ctypes.c_float]
    lib.widen_e4m3.restype, lib.widen_e4m3.argtypes = ctypes.c_float, [ctypes.c_uint8]
    bits = torch.arange(256, dtype=torch.uint8)
    known = bits.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(
        torch.tensor([lib.widen_e4m3(i) for i in range(256)]), known, equal_nan=True, atol=0, rtol=0
    )
    x = torch.arange(-(2**15), 2**15, 3, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[x.isfinite()]
    mine = torch.tensor([lib.narrow_e4m3(value) for value in x.tolist()], dtype=torch.uint8)
    assert torch.equal(mine.view(torch.float8_e4m3fn).float(), eager.round_e4m3(x))


def test_keys_in_the_order_of_registers() -> None:
    """A thread's four keys in a register are two of one eight of scores and two of the next: its own ones."""
    order = [library().key_of_slot8(slot) for slot in range(128)]
    assert sorted(order) == list(range(128))
    for slot, key in enumerate(order):
        assert slot // 16 == key // 16
        quad = slot % 16 // 4  # of the four threads of a row, by wgmma's table of left matrices with 8-bit values
        assert key % 8 // 2 == quad  # and by its table of results


def decode(x: Tensor, kind: str) -> Tensor:
    return x.view(torch.int8).float() if kind == "int8" else x.view(torch.float8_e4m3fn).float()


@pytest.mark.slow
@given(
    n=LENGTHS,
    heads=st.sampled_from(((1, 1), (2, 3))),
    head_dim=st.sampled_from((64, 128)),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(KINDS),
)
def test_quantized_as_the_eager_form(
    n: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, layout: str, kind: str
) -> None:
    B, H = heads
    q, k, v = (make((B, n, H, head_dim), dtype, chance.randrange(2**31), layout) for _ in range(3))
    k, v = k + 1, v * torch.logspace(-3, 3, n, 2)[None, :, None, None].to(dtype)
    (q8, k8, v8), (scales, shifts, block_scales) = eights(q, k, v, kind, None, True)
    mean = k.mean(1, dtype=torch.float32)
    true, true_scale = eager.quantize_queries(q, kind)
    assert torch.equal(decode(q8, kind), true.transpose(1, 2))
    assert torch.equal(scales, true_scale[..., 0].transpose(1, 2))
    torch.testing.assert_close(shifts, torch.einsum("bnhd,bhd->bhn", q.float(), mean), rtol=1e-5, atol=1e-4)
    order = torch.tensor([library().key_of_slot8(slot) for slot in range(128)])
    for block in range(-(-n // 128)):
        part = slice(block * 128, block * 128 + 128)
        true, true_scale = eager.quantize_keys(k[:, part], kind, mean)
        filled = torch.nn.functional.pad(true.transpose(1, 2), (0, 0, 0, 128 - true.shape[1]))
        assert torch.equal(decode(k8[:, :, part], kind), filled)
        assert torch.equal(block_scales[:, :, block, 0], true_scale[:, 0, :, 0])
        true, exponent = eager.quantize_values(v[:, part])
        filled = torch.nn.functional.pad(true.transpose(1, 2), (0, 0, 0, 128 - true.shape[1]))
        assert torch.equal(decode(v8[:, :, block], "fp8"), filled[:, :, order].transpose(2, 3))
        assert torch.equal(block_scales[:, :, block, 1], exponent[:, 0, :, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_begin_at_blocks(kind: str) -> None:
    """Keys of uneven tiles, some of them empty: each in its own blocks, with its own scales, zeros behind them."""
    sizes = [130, 1, 128, 0, 300]
    tiles = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    k, v = (make((1, sum(sizes), 2, 64), torch.float16, i) for i in range(2))
    blocks = Blocks(tiles, tiles, torch.tensor([0, 0]), torch.tensor([], dtype=torch.int32), (300, 300))
    (_, k8, v8), (_, _, block_scales) = eights(k, k, v, kind, blocks, False)
    assert k8.shape == (1, 2, len(sizes) * 3 * 128, 64) and v8.shape == (1, 2, len(sizes) * 3, 64, 128)
    mean = k.mean(1, dtype=torch.float32)
    for tile, size in enumerate(sizes):
        for i in range(3):
            count = min(max(size - i * 128, 0), 128)
            block, first = tile * 3 + i, tiles[tile] + i * 128
            got = decode(k8[:, :, block * 128 : block * 128 + 128], kind)
            assert not got[:, :, count:].any()
            if count:
                true, scale = eager.quantize_keys(k[:, first : first + count], kind, mean)
                assert torch.equal(got[:, :, :count], true.transpose(1, 2))
                assert torch.equal(block_scales[:, :, block, 0], scale[:, 0, :, 0])
                assert torch.equal(
                    block_scales[:, :, block, 1], eager.quantize_values(v[:, first : first + count])[1][:, 0, :, 0]
                )
            else:
                assert not v8[:, :, block].any()


# The kernel, interpreted


@pytest.mark.slow
@given(
    n=LENGTHS,
    m=LENGTHS,
    heads=st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2))),
    head_dim=st.sampled_from((64, 128)),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((None, 0.3)),
    kind=st.sampled_from(KINDS),
    grid=st.sampled_from((1, 2, 3, 132)),
)
def test_dense(
    n: int,
    m: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    layout: str,
    scale: float | None,
    kind: str,
    grid: int,
) -> None:
    B, H = heads
    seed = chance.randrange(2**31)
    q, k, v = (make((B, size, H, head_dim), dtype, seed + i, layout) for i, size in enumerate((n, m, m)))
    check_eager(q, k, v, run(q, k, v, kind, scale=scale, grid=grid), kind, scale=scale)


@pytest.mark.slow
@given(
    sizes=st.tuples(TILE_SIZES, TILE_SIZES),
    heads=st.sampled_from(((1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 1, 2), (2, 2, 4))),
    density=st.sampled_from((0.0, 0.4, 0.8, 1.0)),
    head_dim=st.sampled_from((64, 128)),
    dtype=st.sampled_from(HALVES),
    kind=st.sampled_from(KINDS),
    grid=st.sampled_from((1, 4, 132)),
)
def test_sparse(
    sizes: tuple[list[int], list[int]],
    heads: tuple[int, int, int],
    density: float,
    head_dim: int,
    dtype: torch.dtype,
    kind: str,
    grid: int,
) -> None:
    pytest.importorskip("triton")
    B, H, lists = heads
    seed = chance.randrange(2**31)
    blocks = random_blocks(sizes, lists, density, seed)
    q, k, v = (make((B, sum(sizes[i > 0]), H, head_dim), dtype, seed + i) for i in range(3))
    check_eager(q, k, v, run(q, k, v, kind, blocks, grid=grid), kind, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_patterns_of_a_video(kind: str) -> None:
    pytest.importorskip("triton")
    grid, tile = (3, 6, 11), (2, 4, 4)
    tiles = sparse.tile_offsets(grid, tile)
    q, k, v = (make((1, math.prod(grid), 2, 64), torch.bfloat16, chance.randrange(99)) for _ in range(3))
    for blocks in (
        sparse.full(grid, tile),
        sparse.window(grid, tile, (1, 2, 1)),
        sparse.radial(grid, tile),
        sparse.top_k(q, k, tiles, math.prod(tile), 3),
    ):
        check_eager(q, k, v, run(q, k, v, kind, blocks), kind, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_rings_go_round_many_times(kind: str, head_dim: int) -> None:
    pytest.importorskip("triton")
    q, k, v = (make((2, n, 2, head_dim), torch.float16, i) for i, n in enumerate((400, 2000, 2000)))
    made = run(q, k, v, kind, grid=2)
    check_eager(q, k, v, made, kind)
    blocks = random_blocks(([130, 20, 250], [300, 7, 128, 565, 1000]), 4, 0.6, chance.randrange(99))
    check_eager(q, k, v, run(q, k, v, kind, blocks, grid=2), kind, blocks)
    # Against the truth: what the approximation costs.
    true, total = numpy_attention(q, k, v, head_dim**-0.5)
    assert error(made[0], true) <= WORST[kind]
    assert abs(made[1].double().numpy() - total).max() <= 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_keys_with_a_common_part_lose_nothing(kind: str) -> None:
    """Keys far from 0, all in the same way, as those of real models are: as good as without it, log-sum-exp too."""
    q, k, v = (make((1, 300, 2, 64), torch.float16, i) for i in range(3))
    far = k + 20 * make((1, 1, 2, 64), torch.float16, 9)
    far = far.to(torch.float16)
    true, total = numpy_attention(q, far, v, 0.125)
    out, lse = run(q, far, v, kind)
    assert error(out, true) <= WORST[kind]
    assert abs(lse.double().numpy() - total).max() <= 0.05
    # Without the mean taken off, the same products are far worse.
    q8, s = eager.quantize_queries(q, kind)
    k8, t = eager.quantize_keys(far[:, :128], kind, torch.zeros(1, 2, 64))
    rough = torch.einsum("bnhd,bmhd->bnhm", q8 * s, k8 * t)
    exact = torch.einsum("bnhd,bmhd->bnhm", q.float(), far[:, :128].float())
    assert (rough - exact).abs().max() > 5 * 8 * 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_very_different_size(kind: str) -> None:
    """Blocks of values 2^20 apart, and one of zeros: powers of two go into the weights and out again."""
    q, k, v = (make((1, n, 1, 64), torch.bfloat16, i) for i, n in enumerate((130, 700, 700)))
    sizes = torch.tensor([1.0, 2.0**-20, 0.0, 2.0**15, 2.0**-100, 3.0]).repeat_interleave(128)[:700]
    for order in (sizes, sizes.flip(0)):
        scaled = (v.float() * order[None, :, None, None]).to(torch.bfloat16)
        check_eager(q, k, scaled, run(q, k, scaled, kind), kind)
    zeros = torch.zeros_like(v)
    assert not run(q, k, zeros, kind)[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_look_at_small_values_alone_are_as_good(kind: str) -> None:
    """Values of two tiles 2^60 apart: queries that list the small ones, and those whose weights are all there."""
    pytest.importorskip("triton")
    q, k, v = (make((1, n, 1, 64), torch.bfloat16, i) for i, n in enumerate((200, 400, 400)))
    v[:, 256:] = (v[:, 256:].float() * 2.0**-60).to(torch.bfloat16)
    tiles, keys = torch.tensor([0, 100, 200]).int(), torch.tensor([0, 256, 400]).int()
    blocks = Blocks(tiles, keys, torch.tensor([0, 1, 2]), torch.tensor([0, 1]).int(), (100, 256))
    made = run(q, k, v, kind, blocks)
    check_eager(q, k, v, made, kind, blocks)
    true, _ = numpy_attention(q[:, 100:], k[:, 256:], v[:, 256:], 0.125)
    assert error(made[0][:, 100:], true) <= WORST[kind]
    q[..., 0], k[:, :256, :, 0], k[:, 256:, :, 0] = 20, -40, 40
    made = run(q, k, v, kind)
    check_eager(q, k, v, made, kind)
    true, _ = numpy_attention(q, k, v, 0.125)
    # Keys of 40 beside those of 1 leave integers few bits.
    assert error(made[0], true) <= {"fp8": WORST["fp8"], "int8": 0.3}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_far_apart(kind: str) -> None:
    q, k, v = (torch.zeros(1, n, 1, 64, dtype=torch.float16) for n in (130, 400, 400))
    q[0, 0, 0, 0], q[0, 1, 0, 0], k[0, :, 0, 0] = 8, -8, torch.linspace(-60, 60, 400)
    q[0, 2:, 0, 1:] = torch.randn(128, 63)
    k[0, :, 0, 1:] = torch.randn(400, 63) * 10
    v.normal_()
    check_eager(q, k, v, run(q, k, v, kind), kind)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows(kind: str, bad: float) -> None:
    """In a query: its own row. In a key or a value: every row of the head. Nowhere a number that is made up."""
    for which in range(3):
        tensors = [make((1, 200, 2, 64), torch.bfloat16, i) for i in range(3)]
        tensors[which][0, 17, 1, 5] = bad
        out, lse = run(*tensors, kind)
        wrong = torch.zeros(1, 200, 2, dtype=torch.bool)
        wrong[0, 17 if which == 0 else slice(None), 1] = True
        assert torch.equal(out.isnan().all(-1), wrong) and torch.equal(out.isnan().any(-1), wrong)
        assert torch.equal(lse.isnan(), wrong.transpose(1, 2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_shared_memory(head_dim: int) -> None:
    lib = library()
    told, tile = (128, head_dim, 1), 128 * head_dim
    stages = lib.attention_stages(*told)
    assert stages == 4 and lib.attention_barriers_at(*told) == (1 + 2 * stages) * tile
    assert lib.attention_barriers_at(*told) + 8 * 6 * stages <= lib.attention_smem(*told) <= 227 * 1024


# What is refused


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused(kind: str) -> None:
    q = make((1, 20, 3, 64), torch.float16)
    for scale in (0.0, -1.0, 1e-7, 1e7, math.nan):
        with pytest.raises(ValueError, match="softmax_scale is .* 1e-6 to 1e6"):
            run(q, q, q, kind, scale=scale)
    with pytest.raises(ValueError, match=r"head_dim is 96; .*\(nearest: 64\)"):
        run(*[make((1, 20, 3, 96), torch.float16)] * 3, kind)
    padded = torch.nn.functional.pad(q, (0, 4))[..., :64]
    with pytest.raises(ValueError, match="multiples of 8"):
        run(q, padded, q, kind)
    shifted = torch.nn.functional.pad(q, (1, 7))[..., 1:65]
    with pytest.raises(ValueError, match="16 bytes"):
        quantize_host("queries", shifted, None, (None, None, None), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_by_name_alone(kind: str) -> None:
    name = f"cuda_{kind}"
    with pytest.raises(BackendUnavailable, match=r"CUDA device|not built"):
        bind(f"attention={name}")
    with pytest.raises(BackendUnavailable, match=r"CUDA device|not built"):
        bind(attention=name)
    with pytest.raises(InvalidRequest, match="back end of rms_norm"):
        bind(f"rms_norm={name}")
    with pytest.raises(InvalidRequest, match="the nearest is cuda_fp8"):
        bind(attention="cuda_fp4")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (127, 129), (1000, 512), (2049, 4111), (256, 128)])
def test_on_a_gpu(n: int, m: int, layout: str, head_dim: int, dtype: torch.dtype, kind: str) -> None:
    q, k, v = (on_gpu(make((2, size, 3, head_dim), dtype, chance.randrange(2**31), layout)) for size in (n, m, m))
    function = attention.BACKENDS[f"cuda_{kind}"]
    made = function(q, k, v, return_lse=True)
    check_eager(q, k, v, made, kind)
    assert torch.equal(function(q, k, v), made[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lists", [1, 3, 6])
def test_sparse_on_a_gpu(lists: int, head_dim: int, kind: str) -> None:
    for density in (0.0, 0.3, 1.0):
        sizes = tuple([chance.randint(1, 400) for _ in range(7)] for _ in range(2))
        blocks = random_blocks(sizes, lists, density, chance.randrange(2**31)).to("cuda")
        q, k, v = (make((2, sum(sizes[i > 0]), 3, head_dim), torch.bfloat16, i).cuda() for i in range(3))
        made = attention.BACKENDS[f"cuda_{kind}"](q, k, v, return_lse=True, blocks=blocks)
        check_eager(q, k, v, made, kind, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_runs_give_the_same_bits(kind: str) -> None:
    q, k, v = (make((1, n, 4, 128), torch.bfloat16, i).cuda() for i, n in enumerate((3000, 2500, 2500)))
    function = partial(attention.BACKENDS[f"cuda_{kind}"], return_lse=True)
    first, lse = function(q, k, v)
    true = attention.reference(q, k, v)
    assert (first.float() - true.float()).norm() <= WORST[kind] * true.float().norm()
    for _ in range(1000):
        again = function(q, k, v)
        assert torch.equal(first, again[0]) and torch.equal(lse, again[1])
