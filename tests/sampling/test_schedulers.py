"""Scheduler files: what is read runs as diffusers runs it, what is not read is a problem by the key's name."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.errors import CheckpointError, FastvidWarning, InvalidRequest
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.variants import find_preset
from fastvid.requests.request import Request
from fastvid.sampling.schedulers import (
    _FLOW_SAYS,
    DEFAULTS,
    DPM,
    FLOW_EULER,
    FLOW_LCM,
    UNIPC,
    Scheduler,
    _beta_quantiles,
    read_scheduler,
)
from fastvid.sampling.sigmas import make_sigmas, timesteps
from fastvid.sampling.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore::fastvid.errors.FastvidWarning")
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "text_dim": 8}
FEW = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_class(name: str) -> None:
    theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert {key: one.default for key, one in theirs.items() if key != "self"} == DEFAULTS[name]


def sampled_by_diffusers(config: dict[str, Any], steps: int, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Of a toy model whose velocity is tanh(x) + t / 1000."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x) + time / 1000, time, x, return_dict=False)[0]
    return scheduler, x


def sampled(scheduler: Scheduler, steps: int, x: torch.Tensor) -> torch.Tensor:
    levels = scheduler.sigmas(steps, scheduler.flow_shift or 1.0) or make_sigmas(steps, 1.0, scheduler.solver)
    solver, table = SOLVERS[scheduler.solver], torch.tensor([*levels, 0.0], dtype=torch.float64)
    state, x = solver.init(), x.double()
    for sigma, after in zip(table[:-1], table[1:], strict=True):
        velocity = torch.tanh(x) + float(timesteps(sigma.numpy(), scheduler.solver)) / 1000
        x, state = solver.step(x, x - sigma * velocity, sigma[None], after[None], state)
    return x


SPACING = st.sampled_from(["", "use_karras_sigmas", "use_exponential_sigmas"])
ODD = {
    UNIPC: [("solver_order", 3), ("solver_type", "bh1"), ("predict_x0", False), ("disable_corrector", [0])],
    DPM: [
        ("solver_order", 1),
        ("solver_type", "heun"),
        ("algorithm_type", "sde-dpmsolver++"),
        ("use_lu_lambdas", True),
    ],
    FLOW_EULER: [("invert_sigmas", True), ("use_dynamic_shifting", True), ("num_train_timesteps", 500)],
}
ODD[UNIPC] += [("final_sigmas_type", "sigma_min"), ("prediction_type", "epsilon"), ("use_flow_sigmas", False)]
ODD[UNIPC] += [("use_exponential_sigmas", True), ("use_beta_sigmas", True), ("lower_order_final", False)]
ODD[DPM] += [("use_lu_lambdas", True), ("thresholding", True), ("variance_type", "learned")]
ODD[DPM] += [("final_sigmas_type", "sigma_min"), ("prediction_type", "sample"), ("use_karras_sigmas", True)]
ODD[FLOW_LCM] = [("invert_sigmas", True), ("scale_factors", [0.5]), ("use_dynamic_shifting", True)]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([UNIPC, DPM, FLOW_EULER]),
    steps=st.integers(2, 40),
    shift=st.floats(0.25, 20),
    spacing=SPACING,
    terminal=st.sampled_from([None, 0, 0.02, 0.3]),
    inert=st.dictionaries(st.sampled_from(["base_shift", "max_shift", "steps_offset", "sample_max_value"]), st.just(3)),
)
def test_what_is_read_runs_as_in_diffusers(
    name: str, steps: int, shift: float, spacing: str, terminal: float | None, inert: dict[str, Any]
) -> None:
    """Every config is run as diffusers runs it, or is a problem; one with nothing odd is never a problem."""
    flow = name == FLOW_EULER
    config: dict[str, Any] = {"_class_name": name, "shift" if flow else "flow_shift": shift, **inert}
    config |= {} if flow else _FLOW_SAYS
    config |= {spacing: True} if spacing else {}
    config |= {"shift_terminal": terminal} if terminal is not None and name != DPM else {}
    made = read_scheduler(config)
    if made.problem:
        assert not flow and spacing and spacing in made.problem
        return
    x = torch.linspace(-2, 2, 24).reshape(1, 2, 1, 3, 4)
    theirs, wanted = sampled_by_diffusers(config, steps, x)
    if made.table:
        assert np.allclose(made.sigmas(steps, made.flow_shift or 1.0), theirs.sigmas[:-1], rtol=0, atol=2e-7)
        assert torch.allclose(sampled(made, steps, x).float(), wanted, rtol=0, atol=2e-4)
    else:  # the original code's table, which differs a little: see the module
        ours = make_sigmas(steps, shift, made.solver)
        assert (name, spacing) == (UNIPC, "") and np.allclose(ours, theirs.sigmas[:-1], rtol=0, atol=0.03)


def test_the_defaults_of_a_class_fill_what_a_file_leaves_out() -> None:
    """A FlowMatchEulerDiscreteScheduler without shift has 1, and what is said in another class's words is not read."""
    assert read_scheduler({"_class_name": FLOW_EULER}).flow_shift == 1.0
    assert read_scheduler({"_class_name": FLOW_EULER, "shift": None}).flow_shift == 1.0
    with pytest.warns(FastvidWarning, match="flow_shift=8.0"):
        assert read_scheduler({"_class_name": FLOW_EULER, "flow_shift": 8.0}).flow_shift == 1.0
    assert read_scheduler({"_class_name": UNIPC, **_FLOW_SAYS}) == Scheduler(UNIPC, "unipc", 1.0)
    assert "use_flow_sigmas=False" in read_scheduler({"_class_name": UNIPC}).problem
    assert read_scheduler({"flow_shift": 4}) == Scheduler("", flow_shift=4.0)
    assert read_scheduler({"flow_shift": 4}, UNIPC) == Scheduler(UNIPC, "unipc", 4.0)
    assert read_scheduler({}, UNIPC) == Scheduler(UNIPC, "unipc")


@pytest.mark.parametrize(("name", "key", "value"), [(name, *odd) for name, odds in ODD.items() for odd in odds])
def test_what_is_not_done_is_named(name: str, key: str, value: Any) -> None:
    base = {"_class_name": name} | (_FLOW_SAYS if name in (UNIPC, DPM) else {})
    assert not read_scheduler(base).problem
    made = read_scheduler({**base, key: value})
    assert f"{key}={value!r}" in made.problem and name in made.problem
    with pytest.raises(InvalidRequest, match="solver="):
        made.sigmas(4, 5.0)


def test_other_classes_and_unknown_settings_are_problems() -> None:
    assert "LCMScheduler" in read_scheduler({"_class_name": "LCMScheduler"}).problem
    assert "LCMScheduler" in read_scheduler({"flow_shift": 3.0}, "LCMScheduler").problem
    assert "use_magic=True" in read_scheduler({"_class_name": FLOW_EULER, "use_magic": True}).problem
    for harmless in ({"use_magic": False}, {"use_magic": None}, {"torch_dtype": "bfloat16"}, {"_note": "x"}):
        assert not read_scheduler({"_class_name": FLOW_EULER, **harmless}).problem
    with pytest.warns(FastvidWarning, match="a FlowMatchEulerDiscreteScheduler"):
        assert read_scheduler({"_class_name": FLOW_EULER}, UNIPC).solver == "euler"


@pytest.mark.parametrize("value", ["x", -1, 0, True, [3], 10**400, float("nan"), float("inf")])
def test_numbers_that_are_none(value: Any) -> None:
    with pytest.raises(CheckpointError, match="shift is"):
        read_scheduler({"_class_name": FLOW_EULER, "shift": value})


def test_few_steps_are_redrawn() -> None:
    for config in ({"_class_name": FLOW_LCM, "shift": 5.0}, {"_class_name": FLOW_EULER, "stochastic_sampling": True}):
        made = read_scheduler(config)
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
        theirs.set_timesteps(4)
        assert made.solver == "redraw" and not made.problem
        assert np.allclose(made.sigmas(4, made.flow_shift or 1.0), theirs.sigmas[:-1], rtol=0, atol=1e-7)


def test_beta_levels() -> None:
    """scipy, of which diffusers takes them, is not needed; mpmath has the distribution function."""
    shares = 1 - np.linspace(0, 1, 23)
    back = [mpmath.betainc(0.6, 0.6, 0, x, regularized=True) for x in _beta_quantiles(shares)]
    assert np.allclose(np.array(back, float), shares, rtol=0, atol=1e-12)
    levels = read_scheduler({"_class_name": FLOW_EULER, "use_beta_sigmas": True}).sigmas(23, 1.0)
    assert levels is not None and levels[0] == 1 and levels[-1] == pytest.approx(0.001)


# ---------------------------------------------------------------- caller, file, preset


def preset_of(scheduler: dict[str, Any], transformer: dict[str, Any] = SMALL, name: str = "", own: bool = True) -> Any:
    return find_preset(transformer, WanVAEConfig(), scheduler, {}, name, own=own)


def resolved(scheduler: dict[str, Any], **asked: Any) -> Any:
    return Request.make("generate", prompt="", num_inference_steps=4, **asked).resolve(preset_of(scheduler))


def test_the_file_beats_the_preset_and_the_caller_the_file() -> None:
    karras = {"_class_name": FLOW_EULER, "shift": 3.0, "use_karras_sigmas": True}
    file = read_scheduler(karras)
    assert resolved(karras).sigmas == file.sigmas(4, 3.0) and resolved(karras).solver == "euler"
    assert resolved(karras, flow_shift=7.0).sigmas == file.sigmas(4, 7.0)
    named = resolved(karras, solver="dpm++")
    assert (named.sigmas, named.flow_shift, named.solver) == (None, 3.0, "dpm++")
    unipc = resolved({"_class_name": UNIPC, "flow_shift": 9.0, **_FLOW_SAYS})
    assert (unipc.sigmas, unipc.flow_shift, unipc.solver) == (None, 9.0, "unipc")


def test_a_scheduler_that_cannot_be_run_needs_a_solver_of_the_caller() -> None:
    strange = {"_class_name": "LCMScheduler"}
    with pytest.raises(InvalidRequest, match="LCMScheduler.*solver="):
        resolved(strange)
    with pytest.raises(InvalidRequest, match="LCMScheduler"):
        resolved(strange, flow_shift=3.0)
    assert resolved(strange, solver="euler", flow_shift=3.0).sigmas is None


def test_a_published_model_runs_as_its_folder_says() -> None:
    for shift in (3.0, 8.0):
        assert preset_of({"_class_name": UNIPC, "flow_shift": shift, **_FLOW_SAYS}, FEW).flow_shift == shift
    assert preset_of({"flow_shift": 3.0}, FEW, own=False).flow_shift == 5.0


def test_levels_that_a_model_was_trained_with_stay_and_that_is_said() -> None:
    config = {"_class_name": UNIPC, "flow_shift": 3.0, **_FLOW_SAYS}
    with pytest.warns(FastvidWarning, match="fastwan2.1-t2v-1.3b .*UniPCMultistepScheduler"):
        preset = preset_of(config, FEW, "FastWan")
    assert preset.solver == "redraw" and len(preset.sigmas) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset_of(config, FEW)  # nothing to say of the plain one
