"""Block-sparse attention: the reference against fp64 written a second time, tile by tile; the lists of blocks of keys
that the kernel walks over; the Triton kernel in the interpreter, by pointers and by descriptors."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from attention_cases import (
    HALVES,
    assert_as_good_as,
    assert_edges_untouched,
    check,
    far_apart,
    make,
    numpy_attention,
    on_gpu,
    poisoned,
    random_blocks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run_interpreted
from torch import Tensor

from fastvid.ops import attention, attention_gpu, sparse
from fastvid.ops.sparse import Blocks, Triple

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
TILES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4))
with_lse = partial(attention.reference, return_lse=True)
triton = attention.BACKENDS["triton"]


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
    out, lse = with_lse(q, k, v, blocks=blocks)
    true, total = numpy_attention(q, k, v, 8**-0.5, blocks)
    np.testing.assert_allclose(out.numpy(), true, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), total, rtol=1e-11, atol=1e-13)
    assert torch.equal(attention.reference(q, k, v, blocks=blocks), out)


@given(grid=GRIDS, tile=TILES)
def test_full_blocks_are_dense_attention(grid: Triple, tile: Triple) -> None:
    q, k, v = (make((2, math.prod(grid), 3, 8), seed=i) for i in range(3))
    dense = with_lse(q, k, v)
    for a, b in zip(with_lse(q, k, v, blocks=sparse.full(grid, tile)), dense, strict=True):
        torch.testing.assert_close(a, b)


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
    from fastvid.kernels.sparse_attention import schedule, sparse_attention

    B, N, H, _ = q.shape
    lists = blocks.key_tiles, blocks.rows, blocks.indices
    listed = schedule(*lists, blocks.largest[1], block)
    (buffer, out), (edges, lse) = poisoned(q.shape, q.dtype), poisoned((B, H, N), torch.float32)
    config = Config(block, block, 4, 1)
    sparse_attention(q, k, v, out, blocks.query_tiles, listed, blocks.largest[0], lse, scale, config, tma)
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
    check(q, k, v, run_kernel(q, k, v, blocks, scale, tma), scale, blocks)


@pytest.mark.interpret
@pytest.mark.parametrize("tma", [False, True])
def test_triton_with_the_patterns_of_a_video(tma: bool) -> None:
    grid, tile = (3, 5, 4), (1, 3, 4)
    tiles = sparse.tile_offsets(grid, tile)
    q, k, v = (make((1, math.prod(grid), 2, 16), torch.float16, i) for i in range(3))
    for blocks in (
        sparse.window(grid, tile, (1, 2, 1)),
        sparse.radial(grid, tile),
        sparse.top_k(q, k, tiles, 12, 2),
    ):
        check(q, k, v, run_kernel(q, k, v, blocks, tma=tma), None, blocks)


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
    for options in ((0.3, False), (None, True)):
        lists = blocks.tensors + attention_gpu.triton_steps(q, blocks)
        torch.library.opcheck(attention_gpu.attention_triton, (q, k, v, lists, blocks.largest, *options))
    for run in (triton, attention.reference):
        out, lse = run(q, k, v, blocks=blocks, scale=0.3, return_lse=True)
        assert torch.equal(run(q, k, v, blocks=blocks, scale=0.3), out)
        check(q, k, v, (out, lse), 0.3, blocks)
    assert triton(q[:, :0], k, v, blocks=blocks).shape == (1, 0, 2, 16)


def test_triton_refuses_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
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
        for steps in (attention_gpu.triton_steps, attention_gpu.exact_steps, attention_gpu.padded_steps):
            with pytest.raises(ValueError, match=message):
                steps(q, wrong)


def test_programs_are_cut_by_the_largest_tile() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.sparse_attention import _block_m

    assert [_block_m(n) for n in (1, 64, 65, 128, 168, 192, 256, 384, 390)] == [64, 64, 128, 128, 64, 64, 128, 128, 128]


@pytest.mark.slow
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
            sparse.top_k(q, k, tiles, math.prod(tile), 2),
        ):
            check(q, k, v, triton(q, k, v, return_lse=True, blocks=blocks), None, blocks)


@pytest.mark.gpu
def test_of_a_video_on_a_gpu() -> None:
    """480p: full lists give what dense attention gives, and a window what its keys alone give."""
    grid, tile = (21, 30, 52), (4, 8, 8)
    q, k, v = (torch.randn(1, math.prod(grid), 12, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    dense = triton(q, k, v)
    full = triton(q, k, v, blocks=sparse.full(grid, tile).to("cuda"))
    torch.testing.assert_close(full, dense, rtol=2e-2, atol=1e-3)
    blocks = sparse.window(grid, tile, (3, 3, 3))
    out = triton(q, k, v, blocks=blocks.to("cuda"))
    mask = sparse.tile_mask(blocks)[0]
    for number in (0, 57, len(mask) - 1):
        own = slice(*blocks.query_tiles[number : number + 2].tolist())
        kept = mask[number].repeat_interleave(blocks.key_tiles.diff()).cuda()
        true, _ = with_lse(*(x.double() for x in (q[:, own], k[:, kept], v[:, kept])))
        eager = with_lse(q[:, own], k[:, kept], v[:, kept])[0]
        assert_as_good_as(out[:, own], eager, true.cpu().numpy())


@pytest.mark.gpu
def test_a_capture_of_top_k_replays() -> None:
    """Neither the choice of tiles nor the lists of blocks waits for the device, so that a CUDA graph can hold both."""
    grid, tile = (4, 16, 16), (2, 8, 8)
    tiles = sparse.tile_offsets(grid, tile).cuda()
    q, k, v = (torch.randn(1, math.prod(grid), 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))

    def run() -> Tensor:
        return triton(q, k, v, blocks=sparse.top_k(q, k, tiles, math.prod(tile), 3))

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
    for with_lse in (False, True):
        lists = blocks.tensors + attention_gpu.triton_steps(q, blocks)
        arguments = (q, k, v, lists, blocks.largest, None, with_lse)
        torch.library.opcheck(attention_gpu.attention_triton, arguments)
