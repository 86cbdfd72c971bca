"""Loaded models, each made once in a run, and models that are told to be of another kind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import golden_models
from golden_record import Lab

import fastvid

GIB = 2**30


def pipe(lab: Lab, model: str, **options: Any) -> Any:
    """A pipeline on the CPU. model: "embedded" or a kind of tiny model. options: as `fastvid.load` takes them."""
    key = (model, repr(sorted(options.items())))
    if key not in lab.pipes:
        lab.pipes[key] = fastvid.load(path_of(lab, model), device="cpu", **options)
    return lab.pipes[key]


def path_of(lab: Lab, model: str) -> str:
    return model if model == "embedded" else str(golden_models.ensure(lab.models, model))


def causal(lab: Lab, published: str, model: str = "deep", **changed: Any) -> Any:
    """A tiny model that is told to be a published one with few steps or a rollout.

    Which recipe a checkpoint has follows from its sizes, and a tiny one of these sizes there is not. So this is the one
    place that looks behind the public names: it finds the object that has the recipe and changes that.
    """
    key = (published, model, repr(changed))
    if key not in lab.pipes:
        wanted = told_by(holder(fastvid.blueprint(published, device_memory=80 * GIB))[1])[1]
        own = pipe(lab, model)
        name, inner = holder(own)
        field, has = told_by(inner)
        kept = {one: getattr(has, one) for one in ("spatial_multiple", "temporal")}
        made = copy.copy(own)
        setattr(made, name, dataclasses.replace(inner, **{field: dataclasses.replace(wanted, **kept, **changed)}))
        lab.pipes[key] = made
    return lab.pipes[key]


def told_by(model: Any) -> tuple[str, Any]:
    """The field of a loaded model that says which published model it is: its name and its value."""
    name = next(name for name in ("preset", "recipe") if hasattr(model, name))
    return name, getattr(model, name)


def holder(owner: Any) -> tuple[str, Any]:
    """The attribute with the loaded model, a dataclass that knows its published model: its name and its value."""
    for name, value in vars(owner).items():
        if dataclasses.is_dataclass(value) and (hasattr(value, "preset") or hasattr(value, "recipe")):
            return name, value
    raise AttributeError(f"{type(owner).__name__} holds no loaded model: adapt golden_pipes.holder")
