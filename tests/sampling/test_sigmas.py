"""Noise tables: equal to those the original Wan code uses, and what a caller may give in their place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvid import checks
from fastvid.errors import InvalidRequest
from fastvid.sampling.sigmas import find_solver, make_sigmas, shift_sigmas, timesteps
from fastvid.sampling.solvers import SOLVERS

WAN_UNIPC_SHIFT_5_STEPS_50 = """
    999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843
    833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172  92"""
solvers = st.sampled_from(sorted(SOLVERS))
steps = st.integers(1, 1000)
shifts = st.floats(0.01, 100)


def test_unipc_table_is_wans() -> None:
    table = timesteps(make_sigmas(50, 5, "unipc"), "unipc")
    assert table.dtype == np.int64
    assert table.tolist() == [int(number) for number in WAN_UNIPC_SHIFT_5_STEPS_50.split()]


def test_unipc_starts_from_the_float32_number() -> None:
    # 0.999 itself would give 665 554 443 332 ... once cut to integers.
    expected = [999, 888, 777, 666, 555, 444, 333, 222, 111]
    assert timesteps(make_sigmas(9, 1, "unipc"), "unipc").tolist() == expected


@pytest.mark.parametrize(("shift", "boundary", "high_noise_steps"), [(12, 875, 26), (5, 900, 15)])
def test_steps_above_the_expert_boundary(shift: float, boundary: int, high_noise_steps: int) -> None:
    assert (timesteps(make_sigmas(40, shift, "unipc"), "unipc") >= boundary).sum() == high_noise_steps


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_other_tables_start_from_pure_noise(solver: str) -> None:
    sigmas = make_sigmas(4, 3, solver)
    assert sigmas.tolist() == pytest.approx([1, 9 / 10, 3 / 4, 1 / 2], rel=1e-15)
    assert timesteps(sigmas, solver)[0] == 1000


def test_four_steps_as_distilled() -> None:
    """lightx2v's steps 1000, 750, 500, 250 on the table that is shifted by 5, as Self-Forcing's."""
    table = timesteps(make_sigmas(4, 5, "euler"), "euler")
    assert table.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-15)


def test_dpmpp_timesteps_are_cut_and_eulers_are_not() -> None:
    sigmas = np.array([[1.0, 0.9876], [0.5, 0.0]])
    assert timesteps(sigmas, "dpm++").tolist() == [[1000, 987], [500, 0]]
    assert timesteps(sigmas, "euler").tolist() == [[1000.0, 987.6], [500.0, 0.0]]


@given(steps, shifts, solvers)
def test_tables_descend_within_the_range(count: int, shift: float, solver: str) -> None:
    sigmas = make_sigmas(count, shift, solver)
    assert sigmas.shape == (count,) and sigmas.dtype == np.float64
    assert np.all(np.diff(sigmas) < 0) and sigmas[0] <= 1 and sigmas[-1] > 0
    times = timesteps(sigmas, solver)
    assert np.all(np.diff(times) <= 0) and times[0] <= 1000 and times[-1] >= 0
    assert checks.sigmas("sigmas", sigmas) == tuple(sigmas)


@given(steps, shifts, shifts)
def test_shifts_compose_by_multiplication(count: int, first: float, second: float) -> None:
    sigmas = np.linspace(1, 0, count + 1)
    both = shift_sigmas(shift_sigmas(sigmas, first), second)
    np.testing.assert_allclose(both, shift_sigmas(sigmas, first * second), rtol=1e-12)


@pytest.mark.parametrize("count", [0, -1, 1001, 2**63, True, 2.5, math.nan, math.inf, "20", None])
def test_refused_step_counts(count: object) -> None:
    with pytest.raises(InvalidRequest, match="whole number from 1 to 1000"):
        make_sigmas(count, 5, "unipc")


@pytest.mark.parametrize("shift", [0, -1.0, math.nan, math.inf])
def test_refused_shifts(shift: object) -> None:
    with pytest.raises(InvalidRequest, match="positive finite number"):
        make_sigmas(20, shift, "unipc")


@pytest.mark.parametrize("shift", [1e18, 5e-324])
def test_refused_extreme_shifts(shift: float) -> None:
    with pytest.raises(InvalidRequest, match="too extreme for 20 steps"):
        make_sigmas(20, shift, "euler")


@pytest.mark.parametrize(("name", "nearest"), [("uni-pc", "unipc"), ("Euler", "euler"), ("dpm", "dpm\\+\\+"), (3, "")])
def test_unknown_solver_names_the_nearest(name: object, nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=f"Nearest: '{nearest}"):
        find_solver(name)
