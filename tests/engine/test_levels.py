"""The noise levels that models are told where some columns of a window are known."""

from __future__ import annotations

import torch

from fastvid.engine.conditioning import Conditions
from fastvid.models.loaded import CHANNELS, TIMESTEPS
from fastvid.sampling.noise_table import TableRow


def told(conditions: Conditions) -> list[float]:
    sigma = torch.tensor([0.0, 0.5], dtype=torch.float64)
    row = TableRow(sigma, torch.zeros(2))
    _, levels = conditions.input(torch.zeros(1, 1, 2, 1, 1), row, lambda start, stop: torch.zeros(1), None)
    return levels.tolist()


def test_models_of_one_timestep_are_told_the_highest_level() -> None:
    """Carried columns of a next shot are known, and an image-to-video model has one level for all."""
    known = torch.tensor([True, False])
    assert told(Conditions(CHANNELS, known)) == [0.5, 0.5]
    assert told(Conditions(CHANNELS, known, per_token=True)) == [0.0, 0.5]
    assert told(Conditions(TIMESTEPS, known)) == [0.0, 0.5]
