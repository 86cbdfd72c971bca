"""JSON files read with checks, and a config.json as a frozen dataclass."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastvid.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

# Modules are built, without weights, to see what a config asks for: a depth that nobody publishes would take forever.
DEPTHS, DEEPEST = ("num_layers", "num_hidden_layers", "num_res_blocks"), 512


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object {{...}} is expected")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object without duplicate names, of which readers would take different ones. Raises
    ValueError."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:80]!r} stands there twice")
    return made


def read_fields(
    cls: type[T], config: Mapping[str, Any], source: str, *, ignored: Iterable[str] = (), strict: bool = True
) -> T:
    """Make a config dataclass whose fields are all numbers, flags, or tuples of them, from what a file says.

    Each value must have the type of the field's default, and numbers must be positive. Keys that begin with "_", and
    the ignored ones, are left alone; any other key that is set and unknown is an error if strict, since it may change
    what the model computes. Raises CheckpointError, with source in front.
    """
    known = {field.name: field.default for field in fields(cls)}
    values = {key: config[key] for key in known if key in config}
    unknown = [key for key in config if key not in known and key not in ignored and not key.startswith("_")]
    if strict and (unknown := [key for key in unknown if config[key] not in (None, False)]):
        raise CheckpointError(f"{source} sets {', '.join(sorted(unknown))}, which this model does not know")
    made = {key: _checked(value, known[key], f"{source}: {key}") for key, value in values.items()}
    _check_depth(made, source)
    return cls(**made)


def _check_depth(values: Mapping[str, Any], source: str) -> None:
    for key in DEPTHS:
        if values.get(key, 0) > DEEPEST:
            raise CheckpointError(f"{source}: {key} is {values[key]}; at most {DEEPEST} are allowed")


def read_vae_config(cls: type[T], config: Mapping[str, Any]) -> T:
    """The same for a VAE of the Wan family, whose lists have any length; keys that it does not know are left alone.

    Raises CheckpointError also for sizes that do not fit each other, and for what no such VAE here can do.
    """
    source = "vae/config.json"
    if config.get("attn_scales"):
        raise CheckpointError(f"{source} has attn_scales={config['attn_scales']}; only [] is supported")
    values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
    for key, value in values.items():
        like = getattr(cls, key)
        if not _like(value, like):
            raise CheckpointError(f"{source}: {key} is {value!r}; a value like {like!r} is needed")
    _check_depth(values, source)
    vae: Any = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    if len(vae.latents_mean) != vae.z_dim or len(vae.latents_std) != vae.z_dim:
        raise CheckpointError(f"{source}: latents_mean and latents_std need z_dim={vae.z_dim} numbers each")
    if len(vae.temperal_downsample) != len(vae.dim_mult) - 1:
        raise CheckpointError(
            f"{source}: temperal_downsample has {len(vae.temperal_downsample)} values; one less than dim_mult, "
            f"{len(vae.dim_mult) - 1}, are needed"
        )
    return vae


def _like(value: Any, like: Any) -> bool:
    """Whether a value, or every one in a list, is a flag, a positive whole number, or a finite one, as `like` is."""
    if isinstance(like, tuple):
        return isinstance(value, list | tuple) and len(value) > 0 and all(_like(item, like[0]) for item in value)
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    if isinstance(like, int):
        return isinstance(value, int) and value > 0
    return isinstance(value, int | float) and math.isfinite(value)


def _checked(value: Any, like: Any, name: str) -> Any:
    if isinstance(like, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(like):
            raise CheckpointError(f"{name} is {value!r}; {len(like)} values like {list(like)} are needed")
        return tuple(_checked(item, first, name) for item, first in zip(value, like, strict=True))
    kind = (int, float) if isinstance(like, float) else type(like)
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(like, bool):
        raise CheckpointError(f"{name} is {value!r}; a value like {like!r} is needed")
    if not isinstance(value, bool) and not 0 < value < float("inf"):
        raise CheckpointError(f"{name} is {value!r}; a positive number is needed")
    return type(like)(value)
