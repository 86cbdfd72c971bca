"""`pipe.calibrate`: measures a model once, for the levers that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, linalg

from fastvid import checks
from fastvid.engine import magcache, windows
from fastvid.engine.measure import denoise
from fastvid.engine.session import Job
from fastvid.engine.step_methods import Agree, Branch, Method
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.pipeline.prepare import make_request, prepare
from fastvid.requests.levers import OFF

PROMPTS = (
    "a red fox runs through fresh snow, and the camera follows it from the side",
    "waves break on a rocky coast at sunset, seen from above",
    "a woman in a yellow coat walks along a busy street in the rain",
)
SHAPES = (
    "a red circle moving right on a white background",
    "a blue star spinning on a black background",
    "a green square growing on a gray background",
)
"""For models that know few words."""

MEASURED = ("cache",)
TINY = 1e-12


@dataclass(frozen=True)
class Recorder(Method):
    """Runs all blocks, and records how the size of what they add changes: per token, the mean of its ratio to that of
    the step before. made: for each of `magcache.TEXTS`, {step: ratios}."""

    made: tuple[dict[int, list[float]], ...] = field(default_factory=lambda: ({}, {}))

    def predict(self, branch: Branch, step: int, x: Tensor, agree: Agree) -> Tensor | None:
        return None

    def keep(self, branch: Branch, step: int, x: Tensor, out: Tensor) -> None:
        residual = out - x
        if branch.last == step - 1 and step > 0:
            now, before = (linalg.vector_norm(one.float(), dim=-1) for one in (residual, branch.tensors["residual"]))
            self.made[branch.negative].setdefault(step, []).append(float((now / (before + TINY)).mean()))
        branch.ran(step, residual=residual)


def calibrate(
    model: Model,
    measured: str = "cache",
    prompts: Sequence[str] | None = None,
    output: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """See Pipeline.calibrate."""
    checks.one_of(MEASURED)("measured", measured)
    if model.mesh.size > 1:
        raise InvalidRequest("calibrate runs on one rank; load with parallel=1, and use the file on any number")
    prompts = _prompts(model, prompts)
    if given := [name for name in OFF if options.get(name) is not None]:
        raise InvalidRequest(f"calibrate: {given[0]} leaves out work, and everything is measured; leave it out")
    jobs = [_job(model, prompt, {"seed": number, **options}) for number, prompt in enumerate(prompts)]
    levels, request = _levels(model, jobs[0]), jobs[0].request
    recorder = Recorder(len(levels))
    for job in jobs:
        denoise(model, job, lambda levers: levers.measure(recorder))
    path = magcache.default_path(model, request) if output is None else Path(checks.path("output", output))
    ratios = {name: _ratios(recorder, index, len(levels)) for index, name in enumerate(magcache.TEXTS)}
    try:
        magcache.write(path, magcache.key_of(model, request), levels, ratios)
    except OSError as error:
        raise InvalidRequest(f"calibrate: {path} cannot be written: {error.strerror}") from error
    return {"file": str(path), "prompts": len(prompts), "steps": len(levels), "ratios": ratios}


def _prompts(model: Model, given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return SHAPES if getattr(model.tokenizer, "words", lambda: ())() else PROMPTS
    prompts = tuple(checks.text("prompts", one) for one in ([given] if isinstance(given, str) else given))
    if not prompts:
        raise InvalidRequest("prompts: allowed is one prompt or more; leave it out for some of fastvid's own")
    return prompts


def _job(model: Model, prompt: str, options: dict[str, Any]) -> Job:
    return prepare(model, make_request("generate", {**options, "prompt": prompt}, lambda: model.preset.name)).job


def _levels(model: Model, job: Job) -> np.ndarray:
    return windows.levels_of(model, job.timeline.segments[0], job.sigmas, job.request)


def _ratios(recorder: Recorder, index: int, steps: int) -> list[float]:
    """The mean ratio of each step; 1 where none was measured: in the first, at an expert switch, without guidance."""
    made = recorder.made[index] or recorder.made[0]
    return [float(np.mean(made[step])) if step in made else 1.0 for step in range(steps)]
