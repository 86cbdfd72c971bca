"""Noise levels for flow matching: which sigmas a solver visits, and which timesteps the model is told.

A sigma is the share of noise: x = (1 - sigma) * x0 + sigma * noise, 1 is pure noise, 0 is clean. A table holds N of
them, strictly descending, float64; the 0 that every table ends on is left out. A model is told 1000 * sigma.
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvid.errors import InvalidRequest
from fastvid.sampling.solvers import SOLVERS, Solver

TRAIN_TIMESTEPS = 1000
MAX_STEPS = 1000


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
    with np.errstate(divide="ignore"):  # at sigma 1 the denominator is s, but rounds to 0 for the smallest s
        shifted = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
    return np.where(sigmas == 1, 1.0, shifted)


def make_sigmas(num_inference_steps: int, flow_shift: float, solver: str) -> np.ndarray:
    """The table that the original Wan code uses with this solver: float64 [num_inference_steps], descending, without
    the final zero (Wan2.1 wan/utils/fm_solvers.py and fm_solvers_unipc.py).

    Raises `InvalidRequest` for a step count outside 1..1000, for a shift that is not a positive finite number, and for
    one so extreme that neighbouring levels become the same number.
    """
    steps = _check_steps(num_inference_steps)
    shift = _check_shift(flow_shift)
    sigmas = shift_sigmas(np.linspace(find_solver(solver).first_sigma, 0, steps + 1)[:-1], shift)
    if not (np.all(np.diff(sigmas) < 0) and sigmas[-1] > 0 and sigmas[0] <= 1):
        raise InvalidRequest(
            f"flow_shift={flow_shift!r} is too extreme for {steps} steps: the noise levels run together. "
            f"Nearest that is sure to work: {min(max(shift, 0.01), 100.0):g}."
        )
    return sigmas


def timesteps(sigmas: Any, solver: str) -> np.ndarray:
    """What the model is told at these noise levels, any shape: 1000 * sigma, cut to int64 for the solvers whose
    original does so (unipc, dpm++), float64 for euler."""
    times = TRAIN_TIMESTEPS * np.asarray(sigmas, dtype=np.float64)
    return times.astype(np.int64) if find_solver(solver).integer_timesteps else times


def check_sigmas(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """A caller's own table as float64 [N], used as it is: no shift is applied.

    Raises `InvalidRequest` unless it is one row of 1 to 1000 finite numbers in (0, 1], strictly descending, without the
    final zero.
    """
    table = _as_row(sigmas)
    if not np.all(np.isfinite(table)):
        raise InvalidRequest(f"sigmas[{_first(~np.isfinite(table))}] is not a finite number; sigmas lie in (0, 1].")
    if table[-1] == 0 and table.size > 1:
        raise InvalidRequest("sigmas ends with 0; leave out the final zero, it is added.")
    outside = (table <= 0) | (table > 1)
    if outside.any():
        at = _first(outside)
        nearest = 1.0 if table[at] > 1 else 0.001
        raise InvalidRequest(f"sigmas[{at}]={table[at]:g} is outside (0, 1]. Nearest that works: {nearest}.")
    rising = np.diff(table) >= 0
    if rising.any():
        at = _first(rising) + 1
        raise InvalidRequest(
            f"sigmas must descend strictly, but sigmas[{at}]={table[at]:.17g} follows {table[at - 1]:.17g}; "
            "sort them in descending order and drop repeats."
        )
    return table


def _as_row(sigmas: Any) -> np.ndarray:
    try:  # the length first: an enormous range must not be laid out in memory
        table = np.asarray(sigmas if 1 <= len(sigmas) <= MAX_STEPS else None)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        table = np.asarray(None)
    if table.ndim != 1 or table.dtype.kind not in "iuf":
        raise InvalidRequest(f"sigmas must be one row of 1 to {MAX_STEPS} numbers, got {reprlib.repr(sigmas)}.")
    return table.astype(np.float64)


def _first(flags: np.ndarray) -> int:
    return int(np.argmax(flags))


def _check_steps(num_inference_steps: int) -> int:
    whole = isinstance(num_inference_steps, numbers.Integral) and not isinstance(num_inference_steps, bool)
    if whole and 1 <= num_inference_steps <= MAX_STEPS:
        return int(num_inference_steps)
    allowed = f"a whole number from 1 to {MAX_STEPS}"
    if not isinstance(num_inference_steps, numbers.Real):
        raise InvalidRequest(f"num_inference_steps must be {allowed}, got {type(num_inference_steps).__name__}.")
    nearest = round(min(MAX_STEPS, max(1, num_inference_steps)))
    raise InvalidRequest(f"num_inference_steps={num_inference_steps} must be {allowed}. Nearest: {nearest}.")


def _check_shift(flow_shift: float) -> float:
    try:
        shift = float(flow_shift)
    except (TypeError, ValueError, OverflowError):
        shift = math.nan
    if not (math.isfinite(shift) and shift > 0):
        raise InvalidRequest(
            f"flow_shift={flow_shift!r} must be a positive finite number; 1 leaves the table unshifted."
        )
    return shift
