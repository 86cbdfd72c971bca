"""The loop over a noise table: whole clips, staggered columns, what is handed out when."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvid.sampling import loop, noise_table
from fastvid.sampling.sigmas import find_solver, make_sigmas


def denoise_to(target):
    return lambda x, sigma: target.expand_as(x)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_a_perfect_denoiser_is_followed_to_its_target(solver):
    target = torch.randn(1, 4, 3, 2, 2)
    table = noise_table.whole_clip(make_sigmas(7, 3.0, solver), 3)
    rows = list(loop.walk(table, torch.randn(1, 4, 3, 2, 2), find_solver(solver), lambda row: denoise_to(target)))
    assert [r.number for r in rows] == list(range(7))
    assert all(r.clean is None for r in rows[:-1])
    torch.testing.assert_close(rows[-1].clean, target, rtol=0, atol=1e-5)


def test_whole_clip_table_ends_on_zero_and_joins():
    table = noise_table.whole_clip(np.array([1.0, 0.6, 0.2]), 4)
    assert [float(r.sigma[0]) for r in table] == [1.0, 0.6, 0.2]
    assert [float(r.sigma_next[3]) for r in table] == [0.6, 0.2, 0.0]
    assert all(r.sigma.dtype == torch.float64 and r.sigma.shape == (4,) for r in table)


def test_columns_come_out_as_soon_as_they_are_clean():
    levels = [1.0, 0.5, 0.0]
    rows = []
    for step in range(4):  # column i starts i steps later
        at = [min(max(step - i, 0), 2) for i in range(3)]
        after = [min(max(step + 1 - i, 0), 2) for i in range(3)]
        rows.append(
            noise_table.TableRow(
                torch.tensor([levels[k] for k in at], dtype=torch.float64),
                torch.tensor([levels[k] for k in after], dtype=torch.float64),
            )
        )
    target = torch.randn(1, 2, 3, 2, 2)
    out = list(loop.walk(rows, torch.randn(1, 2, 3, 2, 2), find_solver("euler"), lambda row: denoise_to(target)))
    assert [(r.start, None if r.clean is None else r.clean.shape[2]) for r in out] == [
        (0, None),
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    made = torch.cat([r.clean for r in out if r.clean is not None], dim=2)
    torch.testing.assert_close(made, target, rtol=0, atol=1e-6)


def test_a_caller_s_grad_mode_is_its_own():
    walked = loop.walk(
        noise_table.whole_clip(np.array([1.0, 0.5]), 1),
        torch.zeros(1, 1, 1, 2, 2),
        find_solver("euler"),
        lambda row: lambda x, s: x,
    )
    for _ in walked:
        assert torch.is_grad_enabled()
