"""From a verb's arguments to a request that is checked, laid out and planned; nothing is computed yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastvid.distributed import layout as parallel
from fastvid.distributed.mesh import Layout
from fastvid.engine.events import Plan
from fastvid.engine.session import Job
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.pipeline import verbs
from fastvid.planning import planning
from fastvid.planning.speed import Rates
from fastvid.requests import inputs
from fastvid.requests.request import Request, Resolved
from fastvid.requests.timeline import Timeline
from fastvid.sampling import check_sigmas, make_sigmas
from fastvid.version import __version__


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and planned, and its recipe."""

    job: Job
    plan: Plan
    recipe: dict[str, Any]


def prepare(
    parts: Model,
    verb: str,
    options: dict[str, Any],
    keep_frames: bool = False,
    *,
    free: int | None = None,
    rates: Rates | None = None,
    layout: Layout | None = None,
) -> Prepared:
    """Check everything about a request and plan it. keep_frames: all of its frames stay in memory. free: bytes of the
    device, if not what can be taken now. rates: for an estimate of time. layout: of a request that goes on.
    Raises InvalidRequest, MediaError, OutOfMemory."""
    request = inputs.read(Request.make(verb, **options)).resolve(parts.preset)
    request = replace(request, seed=parallel.agree(parts.mesh, request.seed, parallel.first))
    verbs.check_control(parts, request)
    timeline = verbs.lay_out(request, verbs.rules_of(parts))
    verbs.check(parts, request, timeline)
    _check_tensors(parts, request, timeline)
    sigmas = sigmas_of(request)
    recipe = request.to_recipe(model=parts.model, version=__version__, **parts.settings)
    made, layout = planning.plan_request(parts, request, timeline, sigmas, keep_frames, free, rates, layout)
    job = Job(request, timeline, sigmas, made.decode_chunk, made.decode_stripes, made.decode_beside, layout)
    return Prepared(job, made, recipe)


def sigmas_of(request: Resolved) -> np.ndarray:
    """The noise levels [N] of a request: of a work on a clip, the share of the steps that its strength says."""
    if request.sigmas is not None:
        sigmas = check_sigmas(request.sigmas)
    else:
        sigmas = make_sigmas(request.num_inference_steps, request.flow_shift, request.solver)
    if request.strength is None:
        return sigmas
    return sigmas[len(sigmas) - max(1, int(len(sigmas) * request.strength)) :]


def _check_tensors(parts: Model, request: Resolved, timeline: Timeline) -> None:
    config, segments = parts.transformer.config, timeline.segments
    if request.latents is not None:
        if len(segments) > 1:
            raise InvalidRequest(
                f"latents: this request is made in {len(segments)} parts, whose noise is seed's; leave it out"
            )
        _check_tensor("latents", request.latents, (1, *segments[0].latent_shape(config.out_channels)))
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(request, name)
        if value is not None:
            rows = value.shape[1] if len(value.shape) == 3 else parts.tokenizer.text_length
            _check_tensor(name, value, (1, max(1, int(rows)), config.text_dim))


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InvalidRequest(f"{name} has shape {list(value.shape)}; for this request it must be {list(shape)}")
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point():
        raise InvalidRequest(f"{name} is {tensor.dtype}; it must be floating point, such as float32")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidRequest(f"{name} holds NaN or infinity; all values must be finite")
