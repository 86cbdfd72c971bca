"""Noise levels for flow matching: which sigmas a solver visits, and which timesteps the model is told.

A sigma is the share of noise: x = (1 - sigma) * x0 + sigma * noise; 1 is pure noise, 0 is clean. A table has N of them,
float64, strictly descending, without the final 0. A model is told 1000 * sigma.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from fastvid import checks
from fastvid.errors import InvalidRequest
from fastvid.sampling.solvers import SOLVERS, Solver

TRAIN_TIMESTEPS = 1000


def find_solver(name: str) -> Solver:
    """The registered solver of that name; `InvalidRequest` names the nearest one otherwise."""
    if isinstance(name, str) and name in SOLVERS:
        return SOLVERS[name]
    nearest = difflib.get_close_matches(str(name).lower(), SOLVERS, n=1, cutoff=0.0)[0]
    allowed = ", ".join(repr(known) for known in SOLVERS)
    raise InvalidRequest(f"solver={name!r:.60} is not known; allowed are {allowed}. Nearest: {nearest!r}.")


def shift_sigmas(sigmas: np.ndarray, flow_shift: float) -> np.ndarray:
    """s*sigma / (1 + (s-1)*sigma): moves the table towards noise for s > 1 (SD3, arXiv 2403.03206, eq. 23).
    0 and 1 stay where they are."""
    with np.errstate(divide="ignore"):  # at sigma 1 the denominator s rounds to 0 for the smallest s
        shifted = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
    return np.where(sigmas == 1, 1.0, shifted)


def make_sigmas(num_inference_steps: int, flow_shift: float, solver: str) -> np.ndarray:
    """The table that the original Wan code uses with this solver: float64 [num_inference_steps], descending, without
    the final zero (Wan2.1 wan/utils/fm_solvers.py and fm_solvers_unipc.py).

    Raises `InvalidRequest` for a step count outside 1..1000, for a shift that is not positive and finite, and for one
    so extreme that neighbouring levels become the same number.
    """
    steps = checks.whole(1, checks.MAX_STEPS)("num_inference_steps", num_inference_steps)
    if not (math.isfinite(flow_shift) and flow_shift > 0):
        raise InvalidRequest(
            f"flow_shift={flow_shift!r} must be a positive finite number; 1 leaves the table unshifted."
        )
    sigmas = shift_sigmas(np.linspace(find_solver(solver).first_sigma, 0, steps + 1)[:-1], float(flow_shift))
    if not (np.all(np.diff(sigmas) < 0) and sigmas[-1] > 0 and sigmas[0] <= 1):
        raise InvalidRequest(
            f"flow_shift={flow_shift!r} is too extreme for {steps} steps: the noise levels run together. "
            f"Nearest that is sure to work: {min(max(flow_shift, 0.01), 100.0):g}."
        )
    return sigmas


def timesteps(sigmas: Any, solver: str) -> np.ndarray:
    """What the model is told at these noise levels, any shape: 1000 * sigma, truncated to int64 for solvers whose
    original does so (unipc, dpm++), else float64."""
    times = TRAIN_TIMESTEPS * np.asarray(sigmas, dtype=np.float64)
    return times.astype(np.int64) if find_solver(solver).integer_timesteps else times
