"""Block-sparse attention: the reference against fp64 written a second time, tile by tile; the lists of blocks of keys
that the kernel walks over; the Triton kernel in the interpreter, by pointers and by descriptors."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run_interpreted
from test_attention_kernels import (
    HALVES,
    assert_as_good_as,
    assert_edges_untouched,
    assert_log_as_good_as,
    far_apart,
    make,
    numpy_attention,
    on_gpu,
    poisoned,
)
from torch import Tensor

from fastvid.ops import attention, sparse
from fastvid.ops.sparse import Blocks, Triple

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
TILES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4))


def random_blocks(sizes: tuple[list[int], list[int]], lists: int, density: float, seed: int) -> Blocks:
    """Any tiles may be listed, or none at all; tiles of all sizes."""
    query_tiles, key_tiles = (torch.tensor([0, *size]).cumsum(0).int() for size in sizes)
    mask = torch.rand(lists * len(sizes[0]), len(sizes[1]), generator=torch.Generator().manual_seed(seed)) < density
    rows = torch.cat((torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)))
    return Blocks(query_tiles, key_tiles, rows, mask.nonzero()[:, 1].int(), (max(sizes[0]), max(sizes[1])))


def numpy_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """In fp64, each tile with the keys of its list alone: out [B, N, H, D] and lse [B, H, N]."""
    B, N, H, _ = q.shape
    out, lse = np.zeros(q.shape), np.full((B, H, N), -np.inf)
    queries, keys, rows, indices = (
        x.tolist() for x in (blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices)
    )
    for b, h, tile in product(range(B), range(H), range(len(queries) - 1)):
        number = (b * H + h) % blocks.lists * (len(queries) - 1) + tile
        listed = indices[rows[number] : rows[number + 1]]
        tokens = [token for key in listed for token in range(keys[key], keys[key + 1])]
        if tokens:
            own = slice(queries[tile], queries[tile + 1])
            parts = q[b : b + 1, own, h : h + 1], *(x[b : b + 1, tokens, h : h + 1] for x in (k, v))
            made, total = numpy_attention(*parts, scale)
            out[b, own, h], lse[b, h, own] = made[0, :, 0], total[0, 0]
    return out, lse


def check(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, made: tuple[Tensor, Tensor], scale: float | None) -> None:
    """As near to the truth as the reference is; zero and -inf where nothing is attended to."""
    true, total = numpy_sparse(q, k, v, blocks, q.shape[-1] ** -0.5 if scale is None else scale)
    eager, eager_lse = attention.reference_sparse_lse(q, k, v, blocks, softmax_scale=scale)
    nothing = torch.from_numpy(np.isneginf(total)).to(made[0].device)
    assert torch.equal(made[1] == -torch.inf, nothing) and torch.equal(eager_lse == -torch.inf, nothing)
    assert (made[0].transpose(1, 2)[nothing] == 0).all() and (eager.transpose(1, 2)[nothing] == 0).all()
    if not nothing.all():
        assert_as_good_as(made[0], eager, true)
        assert_log_as_good_as(made[1][~nothing], eager_lse[~nothing], total[~nothing.cpu().numpy()])


TILE_SIZES = st.lists(st.integers(1, 37), min_size=1, max_size=5)


# The reference


@given(
    sizes=st.tuples(TILE_SIZES, TILE_SIZES), lists=st.sampled_from((1, 2, 4)), density=st.sampled_from((0.0, 0.4, 1.0))
)
def test_reference_is_dense_attention_to_what_is_listed(
    sizes: tuple[list[int], list[int]], lists: int, density: float
) -> None:
    blocks = random_blocks(sizes, lists, density, 0)
    q, k, v = (make((2, sum(sizes[i > 0]), 2, 8), torch.float64, i) for i in range(3))
    out, lse = attention.reference_sparse_lse(q, k, v, blocks)
    true, total = numpy_sparse(q, k, v, blocks, 8**-0.5)
    np.testing.assert_allclose(out.numpy(), true, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), total, rtol=1e-11, atol=1e-13)
    assert torch.equal(attention.reference_sparse(q, k, v, blocks), out)


@given(grid=GRIDS, tile=TILES)
def test_full_blocks_are_dense_attention(grid: Triple, tile: Triple) -> None:
    q, k, v = (make((2, math.prod(grid), 3, 8), seed=i) for i in range(3))
    dense = attention.reference_lse(q, k, v)
    for a, b in zip(attention.reference_sparse_lse(q, k, v, sparse.full(grid, tile)), dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_lists_that_do_not_fit_are_refused(name: str) -> None:
    blocks = random_blocks(([4, 2], [3, 3]), 3, 0.5, 0)
    q, k = make((2, 6, 2, 8)), make((2, 6, 2, 8))
    for table in (attention.SPARSE_BACKENDS, attention.SPARSE_LSE_BACKENDS):
        with pytest.raises(ValueError, match="blocks have 3 lists; 1, 2 or 4 fit"):
            table[name](q, k, k, blocks)


# What the kernel walks over


@settings(max_examples=100)
@given(
    sizes=st.tuples(TILE_SIZES, TILE_SIZES),
    lists=st.integers(1, 3),
    density=st.sampled_from((0.0, 0.3, 0.7, 1.0)),
    block=st.sampled_from((1, 4, 16, 32)),
    seed=st.integers(0, 9),
)
def test_the_schedule_holds_every_listed_key_once(
    sizes: tuple[list[int], list[int]], lists: int, density: float, block: int, seed: int
) -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.sparse_attention import schedule

    blocks = random_blocks(sizes, lists, density, seed)
    made = schedule(blocks.key_tiles, blocks.rows, blocks.indices, blocks.largest[1], block)
    ends = blocks.key_tiles.tolist()
    for number in range(len(blocks.rows) - 1):
        listed = blocks.indices[blocks.rows[number] : blocks.rows[number + 1]].tolist()
        wanted = [token for tile in listed for token in range(ends[tile], ends[tile + 1])]
        full = made.full_starts[made.full_rows[number] : made.full_rows[number + 1]].tolist()
        part = slice(made.part_rows[number], made.part_rows[number + 1])
        parts = list(zip(made.part_starts[part].tolist(), made.part_ends[part].tolist(), strict=True))
        assert all(0 < end - start < block for start, end in parts)
        tokens = [token for start in full for token in range(start, start + block)]
        tokens += [token for start, end in parts for token in range(start, end)]
        assert sorted(tokens) == wanted
        runs = sum(tile - 1 not in listed for tile in listed)
        assert len(parts) <= runs  # tiles that follow one another are cut as one


# Triton


def run_kernel(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float | None = None, tma: bool = False, block: int = 16
) -> tuple[Tensor, Tensor]:
    from fastvid.kernels.attention import Config
    from fastvid.kernels.sparse_attention import sparse_attention

    B, N, H, _ = q.shape
    (buffer, out), (edges, lse) = poisoned(q.shape, q.dtype), poisoned((B, H, N), torch.float32)
    lists = blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices, blocks.largest
    sparse_attention(q, k, v, out, *lists, lse, scale, Config(block, block, 4, 1), tma)
    assert_edges_untouched(buffer)
    assert_edges_untouched(edges)
    return out, lse


@pytest.mark.interpret
@given(
    sizes=st.tuples(TILE_SIZES.filter(lambda x: sum(x) < 60), TILE_SIZES.filter(lambda x: sum(x) < 60)),
    heads=st.sampled_from(((1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 1, 2))),
    density=st.sampled_from((0.0, 0.4, 0.8, 1.0)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    head_dim=st.sampled_from((16, 40, 128)),
    layout=st.sampled_from(("token-major", "head-major", "one of three")),
    scale=st.sampled_from((None, 0.3)),
    tma=st.booleans(),
)
def test_triton(
    sizes: tuple[list[int], list[int]],
    heads: tuple[int, int, int],
    density: float,
    dtype: torch.dtype,
    head_dim: int,
    layout: str,
    scale: float | None,
    tma: bool,
) -> None:
    B, H, lists = heads
    blocks = random_blocks(sizes, lists, density, 1)
    q, k, v = (make((B, sum(sizes[i > 0]), H, head_dim), dtype, i, layout) for i in range(3))
    check(q, k, v, blocks, run_kernel(q, k, v, blocks, scale, tma), scale)


@pytest.mark.interpret
@pytest.mark.parametrize("tma", [False, True])
def test_triton_with_the_patterns_of_a_video(tma: bool) -> None:
    grid, tile = (3, 5, 4), (1, 3, 4)
    tiles = sparse.tile_offsets(grid, tile)
    q, k, v = (make((1, math.prod(grid), 2, 16), torch.float16, i) for i in range(3))
    for blocks in (
        sparse.window(grid, tile, (1, 2, 1)),
        sparse.radial(grid, tile),
        sparse.causal(grid, tile, 1, 1, 1),
        sparse.top_k(q, k, tiles, 12, 2),
    ):
        check(q, k, v, blocks, run_kernel(q, k, v, blocks, tma=tma), None)


@pytest.mark.interpret
@pytest.mark.parametrize("tma", [False, True])
def test_triton_reads_nothing_that_is_not_listed(tma: bool) -> None:
    """Infinite keys and values of other tiles stay out, also where they stand right behind a part of a block."""
    blocks = random_blocks(([20, 5], [7, 9, 20, 6]), 1, 1.0, 0)
    blocks = replace(blocks, rows=torch.tensor([0, 2, 4]), indices=torch.tensor([0, 2, 0, 2]).int())
    q, k, v = (make((1, sum(size), 1, 16), seed=i) for i, size in enumerate(([25], [42], [42])))
    wanted = run_kernel(q, k, v, blocks, tma=tma)
    for x in (k, v):
        x[:, 7:16], x[:, 36:] = float("inf"), float("nan")
    for a, b in zip(run_kernel(q, k, v, blocks, tma=tma), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpret
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("strides", [(16, 2**27, 16), (16, 16, 2**30 + 16)])
def test_triton_has_64_bit_offsets(strides: tuple[int, int, int], tma: bool) -> None:
    shape = (1, 18, 1, 16) if strides[1] > 16 else (1, 18, 3, 16)
    blocks = random_blocks(([18], [1, 17]), 1, 1.0, 0)
    near = [make(shape, torch.float16, i) for i in range(3)]
    far = [far_apart(x, strides) for x in near]
    for a, b in zip(run_kernel(*far, blocks, tma=tma), run_kernel(*near, blocks, tma=tma), strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpret
def test_triton_as_an_operator_of_torch() -> None:
    blocks = random_blocks(([3, 4], [5, 2]), 2, 0.7, 0)
    q, k, v = (make((1, 7, 2, 16), seed=i) for i in range(3))
    arguments = (q, k, v, *attention._lists(blocks))
    torch.library.opcheck(attention._sparse, arguments, {"softmax_scale": 0.3})
    torch.library.opcheck(attention._sparse_lse, arguments)
    for name in ("triton", "reference"):
        out, lse = attention.SPARSE_LSE_BACKENDS[name](q, k, v, blocks, softmax_scale=0.3)
        assert torch.equal(attention.SPARSE_BACKENDS[name](q, k, v, blocks, softmax_scale=0.3), out)
        check(q, k, v, blocks, (out, lse), 0.3)
    assert attention.triton_sparse(q[:, :0], k, v, blocks).shape == (1, 0, 2, 16)


def test_triton_refuses_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.sparse_attention import sparse_attention

    blocks = random_blocks(([3, 4], [5, 2]), 1, 1.0, 0)
    q = make((2, 7, 2, 16))
    for message, changed in {
        "rows is torch.int32": {"rows": blocks.rows.int()},
        "indices is torch.int64": {"indices": blocks.indices.long()},
        "query_tiles is torch.int32": {"query_tiles": blocks.query_tiles[::2]},
        "key_tiles is torch.int32": {"key_tiles": blocks.key_tiles[None]},
        "at least 1 is needed": {"largest": (4, 0)},
        "rows has 6 entries": {"rows": torch.arange(6)},
    }.items():
        wrong = replace(blocks, **changed)
        with pytest.raises(ValueError, match=message):
            lists = wrong.query_tiles, wrong.key_tiles, wrong.rows, wrong.indices, wrong.largest
            sparse_attention(q, q, q, q.clone(), *lists)
    with pytest.raises(ValueError, match="out must be contiguous"):
        sparse_attention(q, q, q, q.clone()[:, ::2], *lists)


def test_programs_are_cut_by_the_largest_tile() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.sparse_attention import _block_m

    assert [_block_m(n) for n in (1, 64, 65, 128, 168, 192, 256, 384, 390)] == [64, 64, 128, 128, 64, 64, 128, 128, 128]


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("tile", [(2, 4, 8), (3, 8, 8), (4, 8, 8)])
def test_on_a_gpu(dtype: torch.dtype, head_dim: int, tile: Triple) -> None:
    grid = (5, 13, 18)
    tiles = sparse.tile_offsets(grid, tile).cuda()
    for layout in ("token-major", "head-major", "one of three"):
        q, k, v = (on_gpu(make((2, math.prod(grid), 2, head_dim), dtype, i, layout)) for i in range(3))
        for blocks in (
            sparse.full(grid, tile).to("cuda"),
            sparse.window(grid, tile, (1, 3, 1)).to("cuda"),
            sparse.causal(grid, tile, tile[0], 1, 0).to("cuda"),
            sparse.top_k(q, k, tiles, math.prod(tile), 2),
        ):
            check(q, k, v, blocks, attention.triton_sparse_lse(q, k, v, blocks), None)


@pytest.mark.gpu
def test_of_a_video_on_a_gpu() -> None:
    """480p: full lists give what dense attention gives, and a window what its keys alone give."""
    grid, tile = (21, 30, 52), (4, 8, 8)
    q, k, v = (torch.randn(1, math.prod(grid), 12, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    dense = attention.triton(q, k, v)
    full = attention.triton_sparse(q, k, v, sparse.full(grid, tile).to("cuda"))
    torch.testing.assert_close(full, dense, rtol=2e-2, atol=1e-3)
    blocks = sparse.window(grid, tile, (3, 3, 3))
    out = attention.triton_sparse(q, k, v, blocks.to("cuda"))
    mask = sparse.tile_mask(blocks)[0]
    for number in (0, 57, len(mask) - 1):
        own = slice(*blocks.query_tiles[number : number + 2].tolist())
        kept = mask[number].repeat_interleave(blocks.key_tiles.diff()).cuda()
        true, _ = attention.reference_lse(*(x.double() for x in (q[:, own], k[:, kept], v[:, kept])))
        eager = attention.reference_lse(q[:, own], k[:, kept], v[:, kept])[0]
        assert_as_good_as(out[:, own], eager, true.cpu().numpy())


@pytest.mark.gpu
def test_a_capture_of_top_k_replays() -> None:
    """Neither the choice of tiles nor the lists of blocks waits for the device, so that a CUDA graph can hold both."""
    grid, tile = (4, 16, 16), (2, 8, 8)
    tiles = sparse.tile_offsets(grid, tile).cuda()
    q, k, v = (torch.randn(1, math.prod(grid), 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))

    def run() -> Tensor:
        return attention.triton_sparse(q, k, v, sparse.top_k(q, k, tiles, math.prod(tile), 3))

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(2):
        graph.replay()
        assert torch.equal(out, wanted)
        q.copy_(q.flip(1))
        wanted = run()


@pytest.mark.gpu
def test_operator_of_torch_on_a_gpu() -> None:
    blocks = random_blocks(([130, 40], [50, 120]), 2, 0.7, 0).to("cuda")
    q, k, v = (torch.randn(1, 170, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    torch.library.opcheck(attention._sparse, (q, k, v, *attention._lists(blocks)))
    torch.library.opcheck(attention._sparse_lse, (q, k, v, *attention._lists(blocks)))
