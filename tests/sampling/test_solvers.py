"""Solvers: the same as diffusers' schedulers, of the order they claim, and column by column."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvid.sampling.guidance import velocity_to_x0
from fastvid.sampling.sigmas import make_sigmas
from fastvid.sampling.solvers import SOLVERS, SolverState, _langevin

NAMES = sorted(SOLVERS.keys() - {"redraw"})  # which needs a source of noise, and has tests of its own
MULTISTEP = ["dpm++", "unipc"]
UNIPC_CONFIG = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def column(values: object) -> Tensor:
    return torch.as_tensor(np.array(values), dtype=torch.float64)


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear stand-in for a model; columns do not mix."""
    sigma = sigma.to(x.dtype).view(1, 1, -1, 1, 1)
    return torch.tanh(1.7 * (1 - sigma) * x.roll(1, -1) + 0.8 * x) + sigma * torch.sin(3 * x) + 0.3


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return velocity_to_x0(x, velocity(x, sigma), sigma)


def start(columns: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, columns, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample(name: str, table: Tensor, x: Tensor, model: Callable[[Tensor, Tensor], Tensor] = denoise) -> Tensor:
    """Walks `table`, [rows] for all columns alike or [rows, T]."""
    solver, table = SOLVERS[name], table if table.ndim == 2 else table[:, None].expand(-1, x.shape[2])
    state = solver.init()
    for sigma, sigma_next in zip(table[:-1], table[1:], strict=True):
        x, state = solver.step(x, model(x, sigma), sigma, sigma_next, state)
    return x


def relative_error(a: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


# The same as diffusers -------------------------------------------------------------------------------------------


def diffusers_scheduler(name: str, sigmas: np.ndarray) -> object:
    diffusers = pytest.importorskip("diffusers")
    if name == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    elif name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(**UNIPC_CONFIG)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**UNIPC_CONFIG, algorithm_type="dpmsolver++")
        scheduler.set_timesteps(len(sigmas))  # takes no table, so it is put in its place below
        scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
        return scheduler
    scheduler.set_timesteps(sigmas=sigmas.copy())
    return scheduler


def sample_with_diffusers(scheduler: object, x: Tensor) -> Tensor:
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        v = velocity(x, sigma.expand(x.shape[2]))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 14, 15, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_whole_runs_equal_diffusers(name: str, steps: int, shift: float) -> None:
    scheduler = diffusers_scheduler(name, make_sigmas(steps, shift, name))
    expected = sample_with_diffusers(scheduler, start())
    ours = sample(name, scheduler.sigmas.double(), start())
    assert relative_error(ours, expected) < 1e-6


@pytest.mark.parametrize("steps", [2, 3, 20])
def test_unipc_is_the_same_formula(steps: int) -> None:
    """In float64, where diffusers lets UniPC be run so, nothing but rounding is left."""
    scheduler = diffusers_scheduler("unipc", make_sigmas(steps, 5.0, "unipc"))
    scheduler.sigmas = scheduler.sigmas.double()
    expected = sample_with_diffusers(scheduler, start(dtype=torch.float64))
    assert relative_error(sample("unipc", scheduler.sigmas, start(dtype=torch.float64)), expected) < 1e-13


def test_the_correctors_series_meets_its_closed_form() -> None:
    u = torch.linspace(0.005, 0.03, 26, dtype=torch.float64)
    torch.testing.assert_close(_langevin(u), 1 / torch.tanh(u) - 1 / u, rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_unipc_from_pure_noise_equals_diffusers(steps: int) -> None:
    """diffusers moves a first sigma of 1 to 1 - 1e-6; ours takes 1 itself."""
    sigmas = make_sigmas(steps, 3.0, "euler")
    expected = sample_with_diffusers(diffusers_scheduler("unipc", sigmas), start())
    assert relative_error(sample("unipc", column([*sigmas, 0.0]), start()), expected) < 1e-5


# Their order -----------------------------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.4


def gaussian_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] where the data are normal: dx/dsigma then has the solution below."""
    sigma = sigma.view(1, 1, -1, 1, 1)
    gain = SPREAD**2 * (1 - sigma) / gaussian_spread(sigma) ** 2
    return MEAN + gain * (x - (1 - sigma) * MEAN)


def gaussian_spread(sigma: Tensor) -> Tensor:
    return torch.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def gaussian_path(z: Tensor, sigma: Tensor) -> Tensor:
    return (1 - sigma) * MEAN + gaussian_spread(sigma) * z


@pytest.mark.parametrize(("name", "least", "most"), [("euler", 0.9, 1.15), ("dpm++", 1.85, 2.3), ("unipc", 1.85, 3.3)])
def test_order_of_convergence(name: str, least: float, most: float) -> None:
    z, errors = start(dtype=torch.float64), []
    for steps in (40, 80, 160, 320):
        table = torch.sigmoid(-torch.linspace(-3, 3, steps + 1, dtype=torch.float64))  # even in lambda
        end = sample(name, table, gaussian_path(z, table[0]), gaussian_denoise)
        errors.append(relative_error(end, gaussian_path(z, table[-1])))
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
    assert all(least < order < most for order in orders), orders


# Column by column ------------------------------------------------------------------------------------------------


@st.composite
def staggered_tables(draw: st.DrawFn) -> Tensor:
    """[rows, T]: every column goes down to 0 by its own levels, waiting at some rows."""
    rows, columns = draw(st.integers(2, 7)), draw(st.integers(1, 5))
    levels = st.sets(st.integers(1, 100), min_size=1, max_size=rows - 1)
    table = []
    for _ in range(columns):
        path = [number / 100 for number in sorted(draw(levels), reverse=True)] + [0.0]
        moves = set(draw(st.permutations(range(1, rows)))[: len(path) - 1])
        place = np.cumsum([row in moves for row in range(rows)])
        table.append([path[at] for at in place])
    return column(table).T


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(table=staggered_tables())
def test_columns_do_as_they_would_alone(name: str, table: Tensor) -> None:
    x = start(columns=table.shape[1])
    together = sample(name, table, x)
    for t, levels in enumerate(table.T):
        assert torch.equal(together[:, :, t : t + 1], sample(name, levels[:, None], x[:, :, t : t + 1]))
        without_waiting = torch.unique(levels).flip(0)
        assert torch.equal(together[:, :, t : t + 1], sample(name, without_waiting, x[:, :, t : t + 1]))


@pytest.mark.parametrize("name", NAMES)
def test_waiting_columns_and_their_history_are_untouched(name: str) -> None:
    solver, x, nan = SOLVERS[name], start(), torch.full((2, 4, 1, 3, 5), math.nan)
    before = column([0.9, 0.9, 0.0])
    x0 = torch.cat([denoise(x, before)[:, :, :1], nan, nan], dim=2)  # what a waiting column's x0 is has no say
    x, state = solver.step(x, x0, before, column([0.7, 0.9, 0.0]), solver.init())
    now, after = column([0.7, 0.9, 0.0]), column([0.5, 0.9, 0.0])
    waiting = x.clone()
    waiting[:, :, 2] = math.nan  # bit for bit, whatever is in it
    x0 = torch.cat([denoise(x, now)[:, :, :1], nan, nan], dim=2)
    stepped, later = solver.step(waiting, x0, now, after, state)
    assert torch.equal(stepped[:, :, 1:].view(torch.int32), waiting[:, :, 1:].view(torch.int32))
    assert not torch.equal(stepped[:, :, 0], x[:, :, 0]) and torch.isfinite(stepped[:, :, :2]).all()
    for ours, theirs in zip(tensors(later), tensors(state), strict=True):
        axis = 0 if ours.ndim == 1 else 2
        assert torch.equal(ours.narrow(axis, 1, 2), theirs.narrow(axis, 1, 2))
    last, _ = solver.step(stepped, stepped * 0.5, column([0.5, 0.9, 0.0]), column([0.4, 0.3, 0.0]), later)
    assert torch.isfinite(last[:, :, :2]).all()


def tensors(state: SolverState) -> list[Tensor]:
    fields = [state.order, *state.sigmas, *state.x0s, state.x]
    return [field for field in fields if field is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_moves_nothing_returns_what_it_was_given(name: str) -> None:
    x, sigma = start(), column([1.0, 0.5, 0.0])
    stepped, state = SOLVERS[name].step(x, torch.full_like(x, math.nan), sigma, sigma, SolverState())
    assert torch.equal(stepped, x) and not tensors(state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [1.0, 0.6])
def test_a_column_that_reaches_zero_is_x0(name: str, first: float) -> None:
    solver, state, x = SOLVERS[name], SOLVERS[name].init(), start()
    for sigma, sigma_next in [(first, 0.4), (0.4, 0.1), (0.1, 0.0)]:
        x0 = denoise(x, column([sigma] * 3))
        x, state = solver.step(x, x0, column([sigma] * 3), column([sigma_next] * 3), state)
    assert torch.equal(x, x0)


@pytest.mark.parametrize("name", MULTISTEP)
def test_order_is_one_at_both_ends(name: str) -> None:
    x, state, orders = start(columns=1), SOLVERS[name].init(), []
    for sigma, sigma_next in [(1.0, 0.9), (0.9, 0.5), (0.5, 0.2), (0.2, 0.0)]:
        x, state = SOLVERS[name].step(x, denoise(x, column([sigma])), column([sigma]), column([sigma_next]), state)
        orders.append(state.order.item())
    assert orders == [1, 2, 2, 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "levels",
    [[1.0, 1 - 1e-15, 1 - 2e-15, 0.5, 0.3, 0.0], [1.0, 1e-30, 1e-300, 0.0], [0.5, 0.5 - 1e-15, 0.5 - 2e-15, 0.0]],
)
def test_extreme_tables_stay_finite(name: str, levels: list[float]) -> None:
    end = sample(name, column(levels), start(dtype=torch.float64))
    assert torch.isfinite(end).all() and end.abs().max() < 100


# Pure functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_pure(name: str, dtype: torch.dtype) -> None:
    """Inputs stay as they were, and a state can be stepped from twice."""
    solver, x, sigma, sigma_next = SOLVERS[name], start(dtype=dtype), column([0.8] * 3), column([0.5, 0.8, 0.0])
    x, state = solver.step(x, denoise(x, column([0.9] * 3)), column([0.9] * 3), sigma, solver.init())
    x0 = denoise(x, sigma)
    kept = [tensor.clone() for tensor in (x, x0, sigma, sigma_next, *tensors(state))]
    first, later = solver.step(x, x0, sigma, sigma_next, state)
    second, _ = solver.step(x, x0, sigma, sigma_next, state)
    assert torch.equal(first, second) and first.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, x0, sigma, sigma_next, *tensors(state)), strict=True))
    assert all(tensor.dtype == dtype for tensor in tensors(later) if tensor.ndim == 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        later.x = None


@pytest.mark.parametrize("name", NAMES)
def test_float32_steps_agree_with_float64(name: str) -> None:
    table = column([*make_sigmas(20, 5, name), 0.0])
    x = start()
    assert relative_error(sample(name, table, x).double(), sample(name, table, x.double())) < 1e-6


@pytest.mark.parametrize(
    ("sigma", "sigma_next"),
    [([0.5] * 2, [0.4] * 2), ([0.5] * 3, [0.6] * 3), ([1.5] * 3, [0.5] * 3), ([math.nan] * 3,) * 2],
)
def test_levels_that_make_no_sense_are_caught(sigma: list[float], sigma_next: list[float]) -> None:
    with pytest.raises(AssertionError):
        SOLVERS["euler"].step(start(), start(), column(sigma), column(sigma_next), SolverState())


# New noise in between --------------------------------------------------------------------------------------------


def drawn(draws: Tensor) -> Tensor:
    """Noise that shows which draw it is of: 10 and 20 and so on, by column."""
    return (10.0 * draws).view(1, 1, -1, 1, 1).expand(2, 4, -1, 3, 5)


def test_redraw_mixes_x0_with_the_next_draw_of_each_column() -> None:
    solver, x, x0 = SOLVERS["redraw"], start(), start(seed=1)
    state = solver.init(drawn)
    sigma, middle = column([1.0, 1.0, 0.7]), column([0.75, 1.0, 0.7])
    once, state = solver.step(x, x0, sigma, middle, state)
    assert torch.allclose(once[:, :, 0], 0.25 * x0[:, :, 0] + 0.75 * 10) and torch.equal(once[:, :, 1:], x[:, :, 1:])
    twice, state = solver.step(once, x0, middle, column([0.5, 0.5, 0.0]), state)
    assert torch.allclose(twice[:, :, 0], 0.5 * x0[:, :, 0] + 0.5 * 20)
    assert torch.allclose(twice[:, :, 1], 0.5 * x0[:, :, 1] + 0.5 * 10) and torch.equal(twice[:, :, 2], x0[:, :, 2])
    assert state.order.tolist() == [2, 1, 1]


def test_redraw_draws_nothing_on_the_way_to_zero_and_says_what_it_needs() -> None:
    solver, x, x0 = SOLVERS["redraw"], start(), start(seed=1)
    clean, _ = solver.step(x, x0, column([0.5] * 3), column([0.0] * 3), solver.init(lambda draws: pytest.fail("drawn")))
    assert torch.equal(clean, x0)
    with pytest.raises(AssertionError, match="source of noise"):
        solver.step(x, x0, column([0.5] * 3), column([0.2] * 3), solver.init())


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_a_window_that_moves_on_keeps_what_its_columns_remember(name: str) -> None:
    """Columns 1 and 2 of three, in a window that then takes in a new one, become what they become on their own."""
    levels = [column([0.9] * 3), column([0.6] * 3), column([0.3] * 3), column([0.0] * 3)]
    solver, x = SOLVERS[name], start()
    x, state = solver.step(x, denoise(x, levels[0]), levels[0], levels[1], solver.init(drawn))
    alone, _ = solver.step(x, denoise(x, levels[1]), levels[1], levels[2], state)
    window = torch.cat((x[:, :, 1:], start(columns=1, seed=7)), dim=2)
    sigma, sigma_next = column([0.6, 0.6, 0.9]), column([0.3, 0.3, 0.6])
    moved, _ = solver.step(window, denoise(window, sigma), sigma, sigma_next, state.moved(1, 1))
    assert torch.allclose(moved[:, :, :2], alone[:, :, 1:], atol=1e-6)
    fresh, _ = solver.step(
        window[:, :, 2:], denoise(window, sigma)[:, :, 2:], sigma[2:], sigma_next[2:], solver.init(drawn)
    )
    assert torch.allclose(moved[:, :, 2:], fresh, atol=1e-6)
