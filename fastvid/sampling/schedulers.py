"""Reads a scheduler_config.json: which solver it means, and the noise levels that diffusers makes of it.

    FlowMatchEulerDiscreteScheduler  euler, or redraw if it samples stochastically
    FlowMatchLCMScheduler            redraw
    UniPCMultistepScheduler          unipc, with flow sigmas
    DPMSolverMultistepScheduler      dpm++, with flow sigmas

The arithmetic is that of diffusers 0.42 `schedulers/`. The one exception is UniPC without Karras levels, whose table is
the original Wan code's (see `sigmas.make_sigmas`), as in diffusers up to 0.36. Whatever else a file asks for is a
`problem`: it is refused when a request relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastvid import notices
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.sampling.sigmas import TRAIN_TIMESTEPS, shift_sigmas

SOURCE = "scheduler/scheduler_config.json"
KARRAS, EXPONENTIAL, BETA = "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"
SPACINGS = (KARRAS, EXPONENTIAL, BETA)
FLOW_EULER, FLOW_LCM = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
UNIPC, DPM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"

_FLOW: dict[str, Any] = {
    **{"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5},
    **{"max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False},
    **{"shift_terminal": None, KARRAS: False, EXPONENTIAL: False, BETA: False, "time_shift_type": "exponential"},
}
_MULTISTEP: dict[str, Any] = {
    **{"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    **{"trained_betas": None, "solver_order": 2, "prediction_type": "epsilon", "thresholding": False},
    **{"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "lower_order_final": True, KARRAS: False},
    **{EXPONENTIAL: False, BETA: False, "use_flow_sigmas": False, "flow_shift": 1.0, "timestep_spacing": "linspace"},
    **{"steps_offset": 0, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False},
    **{"use_dynamic_shifting": False, "time_shift_type": "exponential"},
}
# The settings of each class, and what diffusers takes where a file does not say.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    FLOW_EULER: _FLOW | {"stochastic_sampling": False},
    FLOW_LCM: _FLOW | {"scale_factors": None, "upscale_mode": "bicubic"},
    UNIPC: _MULTISTEP
    | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None}
    | {"sigma_min": None, "sigma_max": None, "shift_terminal": None},
    DPM: _MULTISTEP
    | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False}
    | {"lambda_min_clipped": -math.inf, "variance_type": None},
}
# Settings that are read below, or that change nothing for flow matching without dynamic shifting.
_READ = {"shift", "flow_shift", "shift_terminal", "sigma_min", "sigma_max", "stochastic_sampling"}
_INERT = {
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type", "upscale_mode"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "timestep_spacing"),
    *("steps_offset", "dynamic_thresholding_ratio", "sample_max_value", "euler_at_final", "lambda_min_clipped"),
}
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
# Other values than the default that come out as the default does. diffusers replaces another class's solver type.
_SAME: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    UNIPC: {"solver_type": ("midpoint", "heun", "logrho")},
    DPM: {"solver_type": ("logrho", "bh1", "bh2"), "algorithm_type": ("deis",), "lower_order_final": (False,)},
}
_FLOW_SAYS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_NOT_SETTINGS = {"torch_dtype", "dtype", "architectures", "model_type", "transformers_version"}
Table = Callable[["Scheduler", int, float], np.ndarray]


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler_config.json asks for.

    class_name: the scheduler's; "" if the file names none. solver: a name of `solvers.SOLVERS`; "" if unknown.
    flow_shift: None if nothing is said of it. table: which noise levels; "" for those of `make_sigmas`. spacing: one of
    SPACINGS, or "". terminal: the last level. sigma_min, sigma_max: ends of a table with a spacing, if not its own.
    problem: why requests cannot be run as it says; "" if they can.
    """

    class_name: str
    solver: str = ""
    flow_shift: float | None = None
    table: str = ""
    spacing: str = ""
    terminal: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    problem: str = ""

    def sigmas(self, num_inference_steps: int, flow_shift: float) -> tuple[float, ...] | None:
        """The noise levels, descending, without the final zero; None for those of `make_sigmas`.

        Raises InvalidRequest if the file cannot be followed.
        """
        if self.problem:
            raise InvalidRequest(
                f"{SOURCE} asks for {self.problem}, which fastvid cannot run; say what runs instead: solver=, and "
                "flow_shift= or sigmas="
            )
        if not self.table:
            return None
        with np.errstate(all="ignore"):  # judged below
            levels = _TABLES[self.table](self, num_inference_steps, flow_shift)
        if not (np.all(np.diff(levels) < 0) and levels[-1] > 0 and levels[0] <= 1):  # NaN fails too
            raise InvalidRequest(
                f"num_inference_steps={num_inference_steps}: the noise levels that {SOURCE} asks for run together or "
                f"leave 0 to 1 with flow_shift={flow_shift:g}; give solver= and flow_shift=, or sigmas="
            )
        return tuple(map(float, levels))


def read_scheduler(config: Mapping[str, Any], class_name: str | None = None) -> Scheduler:
    """What a scheduler_config.json asks for. class_name: that of model_index.json, for a file that does not name its
    own; such a file may say as little as a shift.

    Raises CheckpointError for numbers that are none.
    """
    said = {key: value for key, value in config.items() if value is not None and key not in _NOT_SETTINGS}
    stated = said.get("_class_name")
    if not isinstance(stated, str | None):
        raise CheckpointError(f"{SOURCE}: _class_name is {stated!r:.60}; a name is needed")
    if stated and class_name not in (None, stated):
        notices.warn(f"model_index.json calls the scheduler a {class_name}, {SOURCE} a {stated}, which counts")
    name = stated or class_name
    if name is None:
        return Scheduler("", flow_shift=_number(said, "flow_shift", _number(said, "shift")))
    if name not in DEFAULTS:
        return Scheduler(name, problem=f"a scheduler of the class {name}")
    said = {key: value for key, value in said.items() if not key.startswith("_")}
    if not stated and name in (UNIPC, DPM):
        said = {**_FLOW_SAYS, **said}
    problems, redraws = _problems(name, said), name == FLOW_LCM or bool(said.get("stochastic_sampling"))
    return Scheduler(
        name,
        {UNIPC: "unipc", DPM: "dpm++"}.get(name) or ("redraw" if redraws else "euler"),
        _number(said, "flow_shift" if name in (UNIPC, DPM) else "shift", 1.0 if stated else None),
        _table_of(name, said),
        next((key for key in SPACINGS if said.get(key)), ""),
        _number(said, "shift_terminal") or None,
        _number(said, "sigma_min"),
        _number(said, "sigma_max"),
        f"a {name} with {', '.join(problems)}" if problems else "",
    )


def _problems(name: str, said: Mapping[str, Any]) -> list[str]:
    """What a file asks for that is not done, as "key=value"."""
    defaults, problems = DEFAULTS[name], []
    needed = _FLOW_SAYS if "use_flow_sigmas" in defaults else {}
    spaced = [key for key in SPACINGS if said.get(key)]
    for key, value in {**defaults, **said}.items():
        default = needed.get(key, defaults.get(key))
        if key not in defaults:
            problems += _foreign(name, key, value)
        elif key in SPACINGS:
            usable = not needed or (name == UNIPC and key == KARRAS and said.get("use_flow_sigmas") is True)
            problems += [f"{key}={value!r:.40}"] if value is not False and (not usable or len(spaced) > 1) else []
        elif key in _BETAS and name == UNIPC and spaced:
            problems += [f"{key}={value!r:.40}"] if value != default else []
        elif key not in _READ | _INERT and value != default and value not in _SAME.get(name, {}).get(key, ()):
            problems.append(f"{key}={value!r:.40}")
    return problems


def _foreign(name: str, key: str, value: Any) -> list[str]:
    """A setting of another class is not read by diffusers either: that is said. One of no class is a problem."""
    if key in ("sigma_min", "sigma_max") or value is False or value == _FLOW_SAYS.get(key):
        return []
    others = [defaults[key] for defaults in DEFAULTS.values() if key in defaults]
    if not others:
        return [f"{key}={value!r:.40}"]
    if value not in others:
        notices.warn(f"{SOURCE}: {key}={value!r:.40} is no setting of a {name}; diffusers does not read it either")
    return []


def _table_of(name: str, said: Mapping[str, Any]) -> str:
    if name in (FLOW_EULER, FLOW_LCM):
        return "flow_match"
    if name == DPM:
        return "dpm"
    if said.get(KARRAS):
        return "karras"
    return "unipc" if said.get("shift_terminal") else ""


def _number(said: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    value = said.get(key, default)
    if value is None:
        return None
    positive = key != "shift_terminal"  # where 0 means none
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < 1e9
        or (positive and not value)
    ):
        raise CheckpointError(f"{SOURCE}: {key} is {value!r:.60}; a positive number is needed")
    return float(value)


# ---------------------------------------------------------------- noise levels


def _flow_match(scheduler: Scheduler, steps: int, shift: float) -> np.ndarray:
    """FlowMatchEulerDiscreteScheduler: from 1 to its smallest level, which is shifted already, and shifted again."""
    lowest = np.float32(1) / np.float32(TRAIN_TIMESTEPS)
    lowest = np.float32(shift) * lowest / (1 + np.float32(shift - 1) * lowest)
    levels = shift_sigmas(np.linspace(1, float(lowest), steps), shift)
    return _spaced(scheduler, _stretched(scheduler, levels))


def _dpm(scheduler: Scheduler, steps: int, shift: float) -> np.ndarray:
    """DPMSolverMultistepScheduler."""
    return np.flip(shift_sigmas(1 - np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1), shift))[:-1]


def _unipc(scheduler: Scheduler, steps: int, shift: float) -> np.ndarray:
    """UniPCMultistepScheduler, which stays below 1."""
    levels = _stretched(scheduler, shift_sigmas(np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], shift))
    return np.minimum(levels, 1 - 1e-6)


def _karras(scheduler: Scheduler, steps: int, shift: float) -> np.ndarray:
    """UniPC with Karras' levels: those of the variance preserving process with linear betas, as shares of noise. They
    take no shift."""
    alphas = torch.cumprod(1 - torch.linspace(0.0001, 0.02, TRAIN_TIMESTEPS, dtype=torch.float32), 0)
    ratios = ((1 - alphas) / alphas).sqrt().flip(0).double().numpy()
    levels = _spaced(scheduler, ratios, steps)
    return levels / (levels + 1)


def _stretched(scheduler: Scheduler, levels: np.ndarray) -> np.ndarray:
    """With 1 - level scaled, so that the last level is the terminal one."""
    if scheduler.terminal is None:
        return levels
    return 1 - (1 - levels) * ((1 - scheduler.terminal) / (1 - levels[-1]))


def _spaced(scheduler: Scheduler, levels: np.ndarray, steps: int | None = None) -> np.ndarray:
    """Other levels between the same ends. Karras: arXiv 2206.00364, eq. 5, rho 7; beta: arXiv 2407.12173."""
    count = len(levels) if steps is None else steps
    high = levels[0] if scheduler.sigma_max is None else scheduler.sigma_max
    low = levels[-1] if scheduler.sigma_min is None else scheduler.sigma_min
    if scheduler.spacing == KARRAS:
        return np.linspace(high ** (1 / 7), low ** (1 / 7), count) ** 7
    if scheduler.spacing == EXPONENTIAL:
        return np.exp(np.linspace(math.log(high), math.log(low), count))
    if scheduler.spacing == BETA:
        return low + _beta_quantiles(1 - np.linspace(0, 1, count)) * (high - low)
    return levels


def _beta_quantiles(shares: np.ndarray, a: float = 0.6) -> np.ndarray:
    """Quantiles of the symmetric beta distribution B(a, a): its distribution function's power series, bisected."""
    tail, factors = np.minimum(shares, 1 - shares), [1.0]
    for n in range(1, 64):
        factors.append(factors[-1] * (n - a) / n)
    weights = np.array([factor / (a + n) for n, factor in enumerate(factors)])
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = scale * middle**a * np.polynomial.polynomial.polyval(middle, weights) < tail
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.5, low, 1 - low)


_TABLES: Mapping[str, Table] = {"flow_match": _flow_match, "dpm": _dpm, "unipc": _unipc, "karras": _karras}
