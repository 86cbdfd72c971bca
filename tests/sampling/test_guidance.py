"""Guidance and the wrappers around a denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvid.sampling.guidance import Denoiser, Guided, Switched, combine, keep_known, velocity_to_x0
from fastvid.sampling.solvers import SOLVERS

X = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
SIGMA = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("called")


def test_combine() -> None:
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [combine(cond, uncond, scale).item() for scale in (0, 1, 5, -1)] == [1, 3, 11, -1]


def test_guided_calls_both_with_the_same_input() -> None:
    velocity = Guided(lambda x, sigma: 2 * x, lambda x, sigma: x + sigma.sum().float(), 4.0)
    torch.testing.assert_close(velocity(X, SIGMA), 5 * X - 4.5)


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_one_skips_the_unconditional_call(scale: float) -> None:
    cond = Guided(lambda x, sigma: x * 2, never, scale)
    assert torch.equal(cond(X, SIGMA), X * 2)


def test_scale_zero_keeps_the_unconditional_velocity_alone() -> None:
    assert torch.equal(Guided(lambda x, sigma: x * 2, lambda x, sigma: x * 3, 0.0)(X, SIGMA), X * 3)


def test_switched_calls_the_one_that_is_chosen_alone() -> None:
    velocity = Switched([lambda x, sigma: 2 * x, never], lambda sigma: int(sigma.max() < 0.5))
    assert torch.equal(velocity(X, SIGMA), 2 * X)
    with pytest.raises(AssertionError, match="called"):
        velocity(X, SIGMA / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_to_x0_column_by_column(dtype: torch.dtype) -> None:
    x0, noise = torch.randn_like(X), torch.randn_like(X)
    level = SIGMA.float().view(1, 1, -1, 1, 1)
    x, v = (1 - level) * x0 + level * noise, (noise - x0).to(dtype)
    found = velocity_to_x0(x, v, SIGMA)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x0, atol=1e-6 if dtype == torch.float32 else 0.03, rtol=0)
    assert torch.equal(found[:, :, 2], x[:, :, 2])


def test_denoiser_wraps_a_velocity() -> None:
    assert torch.equal(Denoiser(lambda x, sigma: 3 * x)(X, SIGMA), velocity_to_x0(X, 3 * X, SIGMA))


@pytest.mark.parametrize("mask", [torch.tensor([True, False, True]), torch.arange(20).view(1, 1, 1, 4, 5) % 3 == 0])
def test_known_gives_the_known_latents(mask: Tensor) -> None:
    latents = torch.full_like(X, 7.0)
    x0 = keep_known(lambda x, sigma: torch.full_like(x, float("nan")), latents, mask)(X, SIGMA)
    where = (mask.view(1, 1, -1, 1, 1) if mask.ndim == 1 else mask).expand_as(X)
    assert (x0[where] == 7).all() and x0[~where].isnan().all()


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_known_columns_end_on_the_known_latents(name: str) -> None:
    latents = torch.randn_like(X)
    denoise = keep_known(lambda x, sigma: torch.tanh(x), latents, torch.tensor([False, True, False]))
    x, state = X, SOLVERS[name].init(lambda draws: torch.randn_like(X))
    for row, row_next in [(1.0, 0.6), (0.6, 0.2), (0.2, 0.0)]:
        sigma, sigma_next = torch.full_like(SIGMA, row), torch.full_like(SIGMA, row_next)
        x, state = SOLVERS[name].step(x, denoise(x, sigma), sigma, sigma_next, state)
    assert torch.equal(x[:, :, 1], latents[:, :, 1])
