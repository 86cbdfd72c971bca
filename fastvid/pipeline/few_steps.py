"""`preset=`: a method of few steps in one word. It fills what the caller has not said: steps, noise levels, solver and
guidance. Which method a LoRA was made for is known by its name, its folder's, its repository's, or a title in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastvid import notices
from fastvid.checks import near_name, refuse
from fastvid.models.loaded import Model
from fastvid.models.registry import FEW_STEPS, method_of
from fastvid.requests.request import Request

AUTO = ("auto", "lora")
TITLES = ("modelspec.title", "ss_output_name", "title", "name")
LEVELS = ("sigmas", "num_inference_steps", "flow_shift")
"""Arguments of which one that is given replaces all of the method's."""
MOST_STEPS = 10  # of a model that is distilled itself


def with_few_steps(model: Model, request: Request) -> Request:
    """The request with the values of its method of few steps. model: with the request's LoRAs.

    Warns of a method that neither the model nor a LoRA was made for, and of a LoRA of few steps without one. Raises
    InvalidRequest for a name that there is not.
    """
    found = loaded(model)
    if request.preset is None:
        _advise(request, found)
        return request
    name = request.preset
    if name in AUTO:
        name = next(iter(found.values()), "")
    elif name not in FEW_STEPS:
        allowed = f"auto (the LoRA's own), {', '.join(FEW_STEPS)}"
        refuse("preset", name, allowed, near_name(name, (*AUTO, *FEW_STEPS)) or "auto")
    if not found and not is_distilled(model):
        notices.warn(
            f"preset={request.preset}: no LoRA of few steps is loaded, and {model.preset.name} is not made for few; "
            "the video will be blurred or broken"
        )
    return replace(request, **_missing(request, name)) if name else request


def loaded(model: Model) -> dict[str, str]:
    """The model's LoRAs of few steps: file -> method."""
    files = [str(lora[0]) for lora in (*model.asked, *model.loras) if lora[1] != 0]
    named = {file: next(filter(None, map(method_of, _names(Path(file)))), None) for file in files}
    return {file: method for file, method in named.items() if method is not None}


def is_distilled(model: Model) -> bool:
    """Whether the model itself is made for few steps."""
    preset = model.preset
    return preset.guidance_scale <= 1 and (preset.sigmas is not None or preset.num_inference_steps <= MOST_STEPS)


def _missing(request: Request, name: str) -> dict[str, Any]:
    """The method's values of arguments that the request leaves out."""
    values = dict(FEW_STEPS[name].values)
    if any(getattr(request, level) is not None for level in ("sigmas", "num_inference_steps")):
        values = {key: value for key, value in values.items() if key not in ("sigmas", "num_inference_steps")}
    if request.sigmas is not None or (request.flow_shift is not None and "sigmas" in values):
        values = {key: value for key, value in values.items() if key not in LEVELS}
    if request.source_prompt is not None:
        values.pop("solver")  # FlowEdit has its own
    return {key: value for key, value in values.items() if getattr(request, key) is None}


def _advise(request: Request, found: dict[str, str]) -> None:
    """Names the method of a LoRA whose request does not say how it is to be run."""
    says = request.guidance_scale is not None, request.num_inference_steps is not None or request.sigmas is not None
    if found and not all(says):
        file, method = next(iter(found.items()))
        notices.warn(
            f"{Path(file).name} is a LoRA of few steps, and the model's own steps and guidance spoil what it makes: "
            f"give preset={method}, or preset=auto"
        )


def _names(file: Path) -> Iterator[str]:
    """What may tell a LoRA's method, the surest first."""
    yield file.stem
    yield file.parent.name
    yield from (part for part in file.parts if part.startswith("models--"))
    try:
        with safe_open(file, framework="pt") as opened:
            texts = opened.metadata() or {}
    except (SafetensorError, OSError):
        return
    yield from (texts[key] for key in TITLES if key in texts)
