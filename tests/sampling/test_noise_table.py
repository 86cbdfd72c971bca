"""Noise tables as properties: every free column goes through every level once and in order, known ones through none,
windows are bounded, columns become clean from the left, and the engine hands each out once.

A visit is a row in which a column's level changes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvid.sampling import loop, noise_table
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import find_solver

LEVELS = st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True).map(
    lambda found: np.array(sorted(found, reverse=True)) / 1000
)
COLUMNS = st.integers(1, 24)


def visits(table: list[TableRow], columns: int) -> list[list[tuple[float, float]]]:
    """For each column the (level, next level) of its visits. Every row joins what a column's last row left."""
    found: list[list[tuple[float, float]]] = [[] for _ in range(columns)]
    at: dict[int, float] = {}
    for row in table:
        for column, now, after in zip(
            range(row.start, row.stop), row.sigma.tolist(), row.sigma_next.tolist(), strict=True
        ):
            assert 0 <= column < columns and at.get(column, now) == now and after <= now
            at[column] = after
            if after != now:
                found[column].append((now, after))
    assert set(at) == set(range(columns)) and not any(at.values())
    return found


def check(table: list[TableRow], sigmas: np.ndarray, known: torch.Tensor, largest: int) -> None:
    """What all tables have in common."""
    ladder = list(pairwise([*sigmas.tolist(), 0.0]))
    for column, found in enumerate(visits(table, len(known))):
        assert found == ([] if known[column] else ladder)
    clean, walk_on = known.clone(), 0
    for row in table:
        assert row.sigma.dtype == row.sigma_next.dtype == torch.float64 and len(row.sigma) <= largest
        assert row.refill or row.start >= walk_on
        walk_on = max(walk_on, row.start)
        assert bool(clean[: row.start].all())  # what a window has left behind is done
        clean[row.start : row.stop] |= row.sigma_next == 0


def handed_out(table: list[TableRow], columns: int, keep: int = 0) -> list[int]:
    """The columns in the order in which the engine hands them out; each latent is its column's number."""
    numbers = torch.arange(columns, dtype=torch.float32).view(1, 1, -1, 1, 1)

    def denoise(row: TableRow):
        def of(x, sigma):
            if row.refill:
                assert torch.equal(x.flatten(), numbers.flatten()[row.start : row.stop])
            return numbers[:, :, row.start : row.stop].expand_as(x)

        return of

    walked = loop.walk(table, torch.zeros(1, 1, columns, 1, 1) + numbers, find_solver("euler"), denoise, keep=keep)
    out: list[int] = []
    for step in walked:
        if step.clean is not None:
            assert step.start == len(out)
            out += step.clean.flatten().round().int().tolist()
    return out


# ---------------------------------------------------------------- windows


@given(COLUMNS, st.integers(1, 12), st.integers(0, 5), st.lists(st.integers(-2, 30), max_size=4))
def test_windows_cover_all_and_stop_at_cuts(columns: int, size: int, overlap: int, cuts: list[int]) -> None:
    overlap = min(overlap, size - 1)
    spans = noise_table.window_spans(columns, size, overlap, cuts)
    assert spans[0][0] == 0 and spans[-1][1] == columns
    assert all(0 <= start < stop and stop - start <= size for start, stop in spans)
    done = 0
    for start, stop in spans:
        assert start <= max(0, done - overlap) and stop > done  # it joins, and makes something
        assert not any(done < cut < stop for cut in cuts)  # of one prompt
        done = stop


@given(LEVELS, COLUMNS, st.integers(1, 8), st.integers(0, 4), st.lists(st.booleans(), min_size=24, max_size=24))
def test_windows_visit_what_is_free(sigmas, columns: int, size: int, overlap: int, flags: list[bool]) -> None:
    known = torch.tensor(flags[:columns])
    spans = noise_table.window_spans(columns, size, min(overlap, size - 1))
    table = list(noise_table.windows(sigmas, spans, known))
    check(table, sigmas, known, size)
    assert handed_out(table, columns) == list(range(columns))


# ---------------------------------------------------------------- rollouts


@given(COLUMNS, st.integers(1, 8), st.integers(0, 6), st.lists(st.integers(0, 30), max_size=4))
def test_blocks_part_all_columns(columns: int, block: int, known: int, cuts: list[int]) -> None:
    known = min(known, columns)
    spans = noise_table.block_spans(columns, block, known, cuts)
    assert [column for start, stop in spans for column in range(start, stop)] == list(range(columns))
    for start, stop in spans:
        assert 0 < stop - start <= block
        assert not any(start < edge < stop for edge in (known, *(cut for cut in cuts if cut > known)))
    # No block is shorter than it has to be.
    ends = {known, columns, *cuts}
    assert all(stop - start == block or stop in ends for start, stop in spans)


@given(LEVELS, COLUMNS, st.integers(1, 5), st.integers(0, 4), st.booleans(), st.lists(st.integers(0, 30), max_size=3))
def test_rollouts_visit_block_after_block(sigmas, columns, block, known, alone, cuts) -> None:
    known, recent = min(known, columns), 4
    spans = noise_table.block_spans(columns, block, known if alone else 0, cuts)
    refills = {cut: max(0, cut - recent) for cut in cuts if 0 < cut < columns and cut in dict(spans)}
    table = list(noise_table.rollout(sigmas, spans, known, refills.get))
    check(table, sigmas, torch.arange(columns) < known, max(block, recent))
    assert handed_out(table, columns, keep=recent + 2) == list(range(columns))
    # One clean pass each, after all else of the block; before a new prompt what came last, once more.
    written = [(row.start, row.stop) for row in table if row.write_cache and not row.refill]
    assert written == spans
    assert {row.stop: row.start for row in table if row.refill} == refills
    for row, after in pairwise(table):
        assert not row.refill or after.start == row.stop
        assert row.refill or row.write_cache or (after.start, after.stop) == (row.start, row.stop)


def test_a_known_column_in_a_block_stays_at_zero() -> None:
    table = list(noise_table.rollout(np.array([1.0, 0.5]), [(0, 3), (3, 6)], known=1))
    assert [row.sigma.tolist() for row in table] == [[0, 1, 1], [0, 0.5, 0.5], [0] * 3, [1] * 3, [0.5] * 3, [0] * 3]


def test_a_walk_goes_on_from_a_position_before_a_refill() -> None:
    spans = noise_table.block_spans(6, 2)
    table = list(noise_table.rollout(np.array([1.0, 0.5]), spans, 0, {4: 1}.get))
    noise, seen = torch.randn(1, 2, 6, 2, 2), []

    def denoise(row: TableRow):
        def of(x, sigma):
            seen.append((row.start, row.refill, x.clone()))
            return x.tanh()

        return of

    whole = list(loop.walk(table, noise, find_solver("euler"), denoise, keep=3))
    wanted, number = list(seen), next(i for i, row in enumerate(table) if row.refill)
    seen.clear()
    rest = list(loop.walk(table, noise, find_solver("euler"), denoise, position=whole[number - 1].position, keep=3))
    assert [step.number for step in rest] == list(range(number, len(table)))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen, wanted[number:], strict=True)) and seen[0][1]


# ---------------------------------------------------------------- staggered


@given(LEVELS, COLUMNS, st.integers(1, 8), st.integers(1, 4), st.integers(0, 6))
def test_staggered_columns_rise_to_the_right(sigmas, columns: int, size: int, stride: int, known: int) -> None:
    known = min(known, columns - 1)
    busy = -(-len(sigmas) // stride)  # columns that are between noise and clean at once
    size = max(size, busy)
    table = list(noise_table.staggered(sigmas, columns, size, stride, known))
    check(table, sigmas, torch.arange(columns) < known, size)
    assert handed_out(table, columns) == list(range(columns))
    moving = [row for row in table if not row.write_cache]
    assert len(moving) == stride * (columns - known - 1) + len(sigmas)
    begun: dict[int, int] = {}
    for number, row in enumerate(moving):
        assert bool((row.sigma.diff() >= 0).all())
        for column in (row.start + (row.sigma != row.sigma_next).nonzero().flatten()).tolist():
            begun.setdefault(column, number)
    assert begun == {column: stride * (column - known) for column in range(known, columns)}


def test_one_staggered_column_is_a_whole_clip() -> None:
    sigmas = np.array([1.0, 0.7, 0.2])
    one = list(noise_table.staggered(sigmas, 1, 4, 1))
    for row, whole in zip(one, noise_table.whole_clip(sigmas, 1), strict=True):
        assert torch.equal(row.sigma, whole.sigma) and torch.equal(row.sigma_next, whole.sigma_next)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_staggered_columns_are_solved_as_each_alone(solver: str) -> None:
    """The denoiser here knows no neighbours: then a staggered walk gives what each column gives by itself."""
    sigmas, columns = np.array([0.999, 0.8, 0.6, 0.3]), 6
    noise = torch.randn(1, 2, columns, 2, 2, dtype=torch.float64)

    def denoise(row: TableRow):
        return lambda x, sigma: torch.tanh(x) * (1 - sigma.view(1, 1, -1, 1, 1))

    table = noise_table.staggered(sigmas, columns, 4, 2)
    made = [step.clean for step in loop.walk(table, noise, find_solver(solver), denoise) if step.clean is not None]
    for column in range(columns):
        alone = list(
            loop.walk(noise_table.whole_clip(sigmas, 1), noise[:, :, column : column + 1], find_solver(solver), denoise)
        )[-1].clean
        torch.testing.assert_close(torch.cat(made, dim=2)[:, :, column : column + 1], alone, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("lag", [0, 1, 4, 9])  # 9: more than there are steps
@pytest.mark.parametrize("known", [0, 1])
def test_blocks_begin_as_diffusers_has_it(block: int, lag: int, known: int) -> None:
    """known: blocks. Their matrix has whole timesteps, 999 for columns that wait; a mask says which step."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    times, columns = torch.tensor([999, 900, 700, 500, 200]), 12
    matrix, _, stepped, _ = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
        None, columns, times, columns, lag, known * block, block
    )
    ready = torch.arange(columns) < known * block
    made = list(noise_table.forced(times.numpy() / 1000, ready, block, lag))
    assert torch.equal((torch.stack([row.sigma for row in made]) * 1000).round().long(), matrix)
    assert torch.equal(torch.stack([row.sigma != row.sigma_next for row in made]), stepped)
    begun = list(noise_table.forced(times.numpy() / 1000, ready, block, lag, causal=True))
    for row, part in zip(made, begun, strict=True):
        stop = len(part.sigma)
        assert torch.equal(part.sigma, row.sigma[:stop]) and torch.equal(part.sigma_next, row.sigma_next[:stop])
        assert bool((row.sigma[stop:] == row.sigma_next[stop:]).all())
    assert lag == 0 or len(begun[0].sigma) == (known + 1) * block


def test_a_last_block_may_be_shorter_and_known_columns_in_a_block_stay() -> None:
    known = torch.tensor([True, False, False, False, False])
    rows = list(noise_table.forced(np.array([0.9, 0.5]), known, 2, 1))
    levels = [row.sigma.tolist() for row in rows]
    assert levels == [[0, 0.9, 0.9, 0.9, 0.9], [0, 0.5, 0.9, 0.9, 0.9], [0, 0, 0.5, 0.5, 0.9], [0, 0, 0, 0, 0.5]]
    assert rows[-1].sigma_next.tolist() == [0.0] * 5
