"""A step as one operation, in whole requests: used wherever it can be, and then the same video to within rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import fastvid
from fastvid.ops import solver_step
from fastvid.ops.dispatch import Ops

PROMPT = "a red circle moving right on a white background"
OPTIONS = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def plain() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


@pytest.fixture
def fused() -> tuple[fastvid.Pipeline, list[int]]:
    """A pipeline for which a kernel is bound that is the operation's reference, and the outputs of its calls."""
    calls: list[int] = []

    def step(*args: Any) -> list[Tensor]:
        made = solver_step.solver_step(*args)
        calls.append(len(made))
        return made

    pipe = fastvid.load("embedded", device="cpu")
    ops = pipe._model.ops
    bound = Ops({**ops.functions, "solver_step": step}, {**ops.bound, "solver_step": "triton"}, ops.reasons)
    pipe._model = replace(pipe._model, ops=bound)
    return pipe, calls


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("solver", "outputs"), [("euler", 2), ("dpm++", 2), ("unipc", 4)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_clip(plain: Any, fused: Any, solver: str, outputs: int, scale: float) -> None:
    pipe, calls = fused
    options = {**OPTIONS, "num_frames": 9, "solver": solver, "guidance_scale": scale}
    assert error(pipe.generate(PROMPT, **options).latents, plain.generate(PROMPT, **options).latents) < 1e-5
    assert calls == [outputs] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "frames"), [("windows", 41), ("staggered", 29)])
def test_columns_at_levels_of_their_own(plain: Any, fused: Any, schedule: str, frames: int) -> None:
    pipe, calls = fused
    options = {**OPTIONS, "num_frames": frames, "schedule": schedule}
    found, wanted = (list(p.stream(PROMPT, **options)) for p in (pipe, plain))
    assert error(found[-1].latents, wanted[-1].latents) < 1e-4
    assert len(calls) == sum(isinstance(event, fastvid.Step) for event in found) > 4


def test_where_clean_latents_are_needed_it_is_eager(plain: Any, fused: Any) -> None:
    pipe, calls = fused
    video = plain.generate(PROMPT, num_frames=5, **OPTIONS)
    mask = np.zeros(video.frames.shape[:3], bool)
    mask[:, :, :32] = True
    for options in ({"mask": mask, "strength": 0.7}, {"source_prompt": PROMPT, "solver": "euler"}):
        found, wanted = (p.edit(video, "a blue circle", **OPTIONS, **options) for p in (pipe, plain))
        assert (found.frames == wanted.frames).all() and calls == []
    options = {**OPTIONS, "num_frames": 5, "solver": "redraw"}
    assert (pipe.generate(PROMPT, **options).frames == plain.generate(PROMPT, **options).frames).all() and calls == []
