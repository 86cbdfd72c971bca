"""Turns a verb's arguments into a checked, laid out and planned request; computes nothing yet."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastvid import checks
from fastvid.distributed.cards import Card
from fastvid.distributed.layout import agree, first
from fastvid.distributed.mesh import Layout
from fastvid.engine.events import Plan
from fastvid.engine.session import Job
from fastvid.errors import InvalidRequest
from fastvid.media.sound import Track
from fastvid.media.targets import paths_in
from fastvid.models.loaded import Model
from fastvid.pipeline import control_checks, sparsity, tensors, verbs
from fastvid.pipeline.cache_checks import check_cache
from fastvid.pipeline.few_steps import with_few_steps
from fastvid.pipeline.loras import for_request
from fastvid.pipeline.progressive import in_two_stages
from fastvid.pipeline.request_warnings import warn_of_forcing, warn_of_guidance, warn_of_size
from fastvid.pipeline.tiling import with_tiles, without_levers
from fastvid.planning.plan import plan_request
from fastvid.planning.quantized import format_of_products
from fastvid.planning.speed import Rates, assumed, find_rates
from fastvid.requests import batch, inputs, prompts
from fastvid.requests.arguments import ARGUMENTS, VERBS, checked
from fastvid.requests.options import GivenAgain
from fastvid.requests.request import DATA, Request, Resolved, check_verb
from fastvid.requests.soundtrack import soundtrack
from fastvid.requests.timeline import Timeline
from fastvid.sampling.sigmas import make_sigmas
from fastvid.version import __version__

AGAIN = "again"
log = logging.getLogger(__name__)


def files_in(options: dict[str, Any]) -> tuple[str, ...]:
    """The absolute paths of the pictures and clips that a verb is given as files."""
    return tuple(map(os.path.abspath, paths_in([options[name] for name in DATA if name in options])))


@dataclass(frozen=True)
class Prepared:
    """A checked and planned request, with its recipe. model: as it runs it, with the request's LoRAs."""

    model: Model
    job: Job
    plan: Plan
    recipe: dict[str, Any]
    sound: Track | None = None


def make_request(verb: str, options: dict[str, Any], variant: Callable[[], str]) -> Request:
    """The validated request, with its prompt expanded if requested. variant: returns the name of the model's preset."""
    request = Request.make(verb, **options)
    log.debug("request: %s", request)
    return expanded(request, variant)


def make_requests(verb: str, options: Mapping[str, Any], variant: Callable[[], str]) -> list[Request]:
    """The request of each video of a batch, in order; all are checked before the first prompt is expanded. Raises
    InvalidRequest, which says which video's is wrong."""
    each, made = batch.each(options), []
    for number, one in enumerate(each):
        try:
            made.append(Request.make(verb, **one))
        except InvalidRequest as error:
            raise InvalidRequest(f"batch, video {number + 1} of {len(each)}: {error}") from None
    return [expanded(request, variant) for request in made]


def expanded(request: Request, variant: Callable[[], str]) -> Request:
    """The request with its prompt expanded if requested."""
    return prompts.expanded(request, variant()) if request.expand_prompt else request


def prepare(
    model: Model,
    request: Request,
    keep_frames: bool = False,
    *,
    free: int | None = None,
    rates: Rates | None = None,
    layout: Layout | None = None,
    complete: bool = True,
) -> Prepared:
    """Reads a request's inputs, checks it against the model, lays it out and plans it.

    keep_frames: whether all frames stay in memory. free: available bytes on the device; default: what is free now.
    rates: this machine's speed, for a time estimate. layout: the layout of a resumed request. complete: False if clips
    that drive a character may be missing. Raises InvalidRequest, MediaError, OutOfMemory.
    """
    model = for_request(model, request.loras or ())
    request = with_few_steps(model, sparsity.with_default(model, request))
    resolved = inputs.read(request).resolve(model.preset)
    verbs.check_driving(model, request, resolved, complete)
    inputs.warn_of_shapes(resolved)
    inputs.warn_of_control(request, resolved)
    if model.face_layers:
        inputs.warn_of_driving(resolved, model.face_side)
    resolved = replace(resolved, seed=agree(model.mesh, resolved.seed, first))
    control_checks.check_control(model, resolved)
    timeline = verbs.lay_out(resolved, verbs.rules_of(model, resolved))
    verbs.check(model, resolved, timeline)
    sparsity.check(model, resolved)
    resolved = _with_tensors(model, resolved, timeline)
    sigmas = sigmas_of(resolved)
    timeline = with_tiles(model, resolved, in_two_stages(model, resolved, timeline, len(sigmas)))
    resolved = without_levers(resolved, timeline)
    resolved = check_cache(model, resolved, timeline, sigmas, asked=request.cache is not None)
    recipe = resolved.to_recipe(model=model.name, version=__version__, **model.settings)
    recipe |= sparsity.said(model, resolved)
    if all(segment.tile is None for segment in timeline.segments):
        warn_of_size(model, resolved)
    warn_of_forcing(model, resolved)
    plan, layout = plan_request(model, resolved, timeline, sigmas, keep_frames, free, rates, layout)
    warn_of_guidance(model, request, resolved, timeline, sigmas, layout)
    log.info("plan: %s", _summary(plan))
    job = Job(resolved, timeline, sigmas, plan.decode_chunk, plan.decode_stripes, plan.decode_beside, layout)
    return Prepared(model, job, plan, recipe, soundtrack(resolved, timeline))


def _summary(plan: Plan) -> str:
    return (
        f"{plan.num_frames} frames of {plan.width}x{plan.height}, {plan.steps} steps in {plan.windows} windows "
        f"of up to {plan.tokens} tokens, {plan.bytes_device / 2**30:.2f} GiB of {plan.bytes_free / 2**30:.2f} free, "
        f"offload {plan.offload}"
    )


def plan_of(
    model: Model,
    prompt: str | None = None,
    *,
    verb: str = "generate",
    estimate: bool | str = False,
    free: int | None = None,
    keep_frames: bool = True,
    card: Card | None = None,
    **options: Any,
) -> Plan:
    """The cost of a request; see `Pipeline.plan` and `Blueprint.plan`."""
    request = planned(verb, prompt, options)
    rates = None
    if estimate and card:
        rates = assumed(card, model.dtype, model.vae_dtype, format_of_products(model))
    elif estimate:
        eight = format_of_products(model)
        rates = find_rates(model.ops, model.device, model.dtype, again=estimate == AGAIN, eight=eight)
    return prepare(model, request, keep_frames, free=free, rates=rates, complete=False).plan


@checks.guarded(f"True, False or {AGAIN!r}")
def estimate_of(name: str, value: Any) -> bool | str:
    """`estimate=` of a plan."""
    return AGAIN if isinstance(value, str) and value == AGAIN else checks.flag(name, value)


def given_again(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that `resume` is given, checked like a verb's arguments."""
    for name in inputs:
        if name not in ARGUMENTS:
            near = checks.nearest_name(name, GivenAgain.__annotations__)
            raise InvalidRequest(f"resume does not take {checks.shown(name)}; the nearest is {near}")
    return {name: value for name, value in checked(inputs).items() if value is not None}


def planned(verb: str, prompt: str | None, options: dict[str, Any]) -> Request:
    """The validated request of a plan, whose prompt may be left out."""
    given = {"prompt": prompt, **options}
    left_out = prompt is None and options.get("prompt_embeds") is None
    if left_out and "prompt" in VERBS[check_verb("verb", verb)] and "shots" not in VERBS[verb]:
        given["prompt"] = ""
    return Request.make(verb, **given)


def sigmas_of(request: Resolved) -> np.ndarray:
    """The noise levels [N] of a request; with a strength, only the last `strength` share of them."""
    if request.sigmas is not None:
        sigmas = np.array(request.sigmas, np.float64)
    else:
        sigmas = make_sigmas(request.num_inference_steps, request.flow_shift, request.solver)
    if request.strength is None:
        return sigmas
    return sigmas[len(sigmas) - max(1, int(len(sigmas) * request.strength)) :]


def _with_tensors(model: Model, request: Resolved, timeline: Timeline) -> Resolved:
    """The request with its noise and embeddings as tensors. Raises InvalidRequest for those that do not fit it."""
    config, segments = model.transformer.config, timeline.segments
    given: dict[str, Any] = {}
    if request.latents is not None:
        if len(segments) > 1:
            raise InvalidRequest(
                f"latents: this request is made in {len(segments)} parts, whose noise is seed's; leave it out"
            )
        shape = (1, *segments[0].latent_shape(config.out_channels))
        given["latents"] = _tensor("latents", request.latents, shape, torch.float32)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(request, name)
        if value is not None:
            rows = value.shape[1] if len(value.shape) == 3 else model.tokenizer.text_length
            given[name] = _tensor(name, value, (1, max(1, int(rows)), config.text_dim), model.dtype)
    return replace(request, **given)


def _tensor(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if tuple(value.shape) != shape:
        given = f"{list(value.shape)!s:.60}"
        raise InvalidRequest(f"{name} has shape {given}; for this request it must be {list(shape)}")
    return tensors.finite(name, value, dtype)
