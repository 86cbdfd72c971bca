"""Patterns of sparsity: what every list must be, what each pattern promises, and the tiles that they are made of."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvid.ops import sparse
from fastvid.ops.sparse import Blocks, Triple

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 8))
TILES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def boxes(grid: Triple, tile: Triple) -> list[list[tuple[int, int, int]]]:
    """The tokens (t, h, w) of every tile, by loops."""
    axes = [[range(a, min(a + s, n)) for a in range(0, n, s)] for n, s in zip(grid, tile, strict=True)]
    return [list(product(*box)) for box in product(*axes)]


def row(blocks: Blocks, number: int) -> list[int]:
    return blocks.indices[blocks.rows[number] : blocks.rows[number + 1]].tolist()


def check(blocks: Blocks, grid: Triple, tile: Triple) -> None:
    """Sorted lists without repeats, each with its own tile, on the grid's tiles."""
    sizes = [len(tokens) for tokens in boxes(grid, tile)]
    assert blocks.query_tiles.dtype == blocks.key_tiles.dtype == blocks.indices.dtype == torch.int32
    assert blocks.rows.dtype == torch.int64 and blocks.rows[0] == 0 and blocks.rows[-1] == blocks.indices.numel()
    assert blocks.query_tiles.diff().tolist() == blocks.key_tiles.diff().tolist() == sizes
    assert blocks.largest == (max(sizes), max(sizes))
    for number in range(len(blocks.rows) - 1):
        listed = row(blocks, number)
        assert listed == sorted(set(listed)) and number % len(sizes) in listed
        assert listed[0] >= 0 and listed[-1] < len(sizes)


def place(number: int, counts: Triple) -> Triple:
    """(t, h, w) of a tile among tiles."""
    return number // (counts[1] * counts[2]), number // counts[2] % counts[1], number % counts[2]


# Tiles


@given(grid=GRIDS, tile=TILES)
def test_tile_order_is_that_of_boxes(grid: Triple, tile: Triple) -> None:
    flat = [(t * grid[1] + h) * grid[2] + w for tokens in boxes(grid, tile) for t, h, w in tokens]
    order = sparse.tile_order(grid, tile)
    assert order.tolist() == flat
    assert torch.equal(order[order.argsort()], torch.arange(math.prod(grid)))
    offsets = sparse.tile_offsets(grid, tile)
    assert offsets.tolist() == [0, *torch.tensor([len(tokens) for tokens in boxes(grid, tile)]).cumsum(0).tolist()]
    assert math.prod(sparse.tile_counts(grid, tile)) == len(offsets) - 1


@pytest.mark.parametrize(("grid", "tile"), [((0, 1, 1), (1, 1, 1)), ((1, 1, 1), (1, 0, 1)), ((1, 1), (1, 1, 1))])
def test_other_sizes_are_refused(grid: Triple, tile: Triple) -> None:
    with pytest.raises(ValueError, match="three numbers"):
        sparse.full(grid, tile)


# Patterns


@given(grid=GRIDS, tile=TILES)
def test_full_is_everything(grid: Triple, tile: Triple) -> None:
    blocks = sparse.full(grid, tile)
    check(blocks, grid, tile)
    assert sparse.share(blocks) == 1
    assert sparse.token_mask(blocks).all()


@given(grid=GRIDS, tile=TILES, size=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
def test_a_window_is_a_box_of_its_size_within_the_borders(grid: Triple, tile: Triple, size: Triple) -> None:
    blocks = sparse.window(grid, tile, size)
    check(blocks, grid, tile)
    counts = sparse.tile_counts(grid, tile)
    for number in range(math.prod(counts)):
        axes = list(zip(*(place(other, counts) for other in row(blocks, number)), strict=True))
        assert len(axes[0]) == math.prod(map(min, size, counts))
        for axis, own, n, wanted in zip(axes, place(number, counts), counts, size, strict=True):
            first, last = min(axis), max(axis)
            assert last - first + 1 == min(wanted, n)
            # In the middle where there is room, against the border where there is none.
            assert first == own - wanted // 2 or (first == 0 or last == n - 1)


@given(grid=GRIDS, tile=TILES, decay=st.sampled_from((1.0, 1.5, 2.0, 4.0)))
def test_radial_keeps_what_it_promises(grid: Triple, tile: Triple, decay: float) -> None:
    blocks = sparse.radial(grid, tile, decay)
    check(blocks, grid, tile)
    counts = sparse.tile_counts(grid, tile)
    places = counts[1] * counts[2]
    for number in range(math.prod(counts)):
        t, h, w = place(number, counts)
        listed = [place(other, counts) for other in row(blocks, number)]
        for frame in range(counts[0]):
            seen = [(b, c) for a, b, c in listed if a == frame]
            distance = abs(frame - t)
            wanted = places / decay ** (distance.bit_length() - 1 if distance else 0)
            if frame == 0:
                assert len(seen) == places
            elif wanted >= 1:
                assert len(seen) == math.ceil(wanted)
            else:
                assert len(seen) == (distance % math.ceil(1 / wanted) == 0)
            if seen:  # the nearest ones: nothing that is left out is nearer
                away = {(b, c): (b - h) ** 2 + (c - w) ** 2 for b, c in product(range(counts[1]), range(counts[2]))}
                left_out = [away[other] for other in away if other not in seen]
                assert max(away[other] for other in seen) <= min(left_out, default=math.inf)
    if decay == 1:
        assert sparse.share(blocks) == 1


def test_radial_density_falls_with_distance() -> None:
    shares = [sparse.share(sparse.radial((t, 16, 16), (1, 4, 4))) for t in (2, 8, 32, 64)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 0.2


def test_patterns_refuse_other_sizes() -> None:
    with pytest.raises(ValueError, match="size is"):
        sparse.window((8, 2, 2), (2, 1, 1), (1, 0, 1))
    with pytest.raises(ValueError, match="decay is 0.5"):
        sparse.radial((8, 2, 2), (2, 1, 1), 0.5)


def draw(grid: Triple, heads: int = 2, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn((2, batch, math.prod(grid), heads, 8), generator=generator)
    return q, k


@given(grid=GRIDS, tile=TILES, data=st.data())
def test_top_k_is_the_best_tiles_of_pooled_scores(grid: Triple, tile: Triple, data: st.DataObject) -> None:
    tiles = sparse.tile_offsets(grid, tile)
    n, largest = len(tiles) - 1, int(tiles.diff().max())
    count = data.draw(st.integers(1, n))
    q, k = draw(grid)
    blocks = sparse.top_k(q, k, tiles, largest, count)
    check(blocks, grid, tile)
    assert blocks.lists == 4 and blocks.rows.diff().eq(count).all()
    ranges = list(zip(tiles[:-1].tolist(), tiles[1:].tolist(), strict=True))
    b, h, own = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1)), data.draw(st.integers(0, n - 1))
    pooled = [[x[b, first:end, h].double().mean(0) for first, end in ranges] for x in (q, k)]
    scores = {other: float(pooled[0][own] @ pooled[1][other]) for other in range(n) if other != own}
    kept = set(row(blocks, (b * 2 + h) * n + own)) - {own}
    left_out = [scores[other] for other in scores if other not in kept]
    assert min((scores[other] for other in kept), default=math.inf) >= max(left_out, default=-math.inf) - 1e-5


def test_top_k_of_alike_tiles_is_that_of_ragged_ones() -> None:
    """Where no tile is cut off, means are taken without moving tokens; the way with cut tiles must agree."""
    grid, tile = (4, 4, 4), (2, 2, 2)
    tiles = sparse.tile_offsets(grid, tile)
    q, k = draw(grid)
    alike, ragged = sparse.top_k(q, k, tiles, 8, 3), sparse.top_k(q, k, tiles, 9, 3)
    assert torch.equal(alike.indices, ragged.indices)


def test_top_k_refuses() -> None:
    q, k = draw((2, 2, 2))
    tiles = sparse.tile_offsets((2, 2, 2), (1, 2, 2))
    with pytest.raises(ValueError, match="count is 3; there are 2 tiles"):
        sparse.top_k(q, k, tiles, 4, 3)
    with pytest.raises(ValueError, match="must be alike"):
        sparse.top_k(q, k[:, :4], tiles, 4, 1)


# What blocks say


@given(grid=GRIDS, tile=TILES, data=st.data())
def test_share_is_that_of_the_mask(grid: Triple, tile: Triple, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, math.prod(sparse.tile_counts(grid, tile))))
    tiles = sparse.tile_offsets(grid, tile)
    for blocks in (
        sparse.window(grid, tile, (1, 2, 3)),
        sparse.radial(grid, tile),
        sparse.top_k(*draw(grid), tiles, int(tiles.diff().max()), count),
    ):
        mask = sparse.token_mask(blocks)
        assert mask.shape == (blocks.lists, math.prod(grid), math.prod(grid))
        assert sparse.share(blocks) == pytest.approx(mask.double().mean().item(), rel=1e-12)


def test_blocks_move_to_a_device() -> None:
    moved = sparse.full((2, 2, 2), (1, 1, 1)).to("meta")
    assert moved.rows.is_meta and moved.indices.is_meta and moved.query_tiles.is_meta and moved.key_tiles.is_meta
    assert moved.largest == (1, 1)
