"""JSON files read with checks, and a config.json as a frozen dataclass."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
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
    default: T, config: Mapping[str, Any], source: str, *, ignored: Iterable[str] = (), strict: bool = True
) -> T:
    """A config dataclass whose fields are all numbers, flags, or tuples of them, with what a file says of it.

    Each value must have the type of the default; numbers must be positive, in lists of fractions finite. Keys that
    begin with "_", and the ignored ones, are left alone; any other key that is set and unknown is an error if strict,
    since it may change what the model computes. Raises CheckpointError, with source in front.
    """
    known = {field.name: getattr(default, field.name) for field in fields(default)}
    unknown = [key for key in config if key not in known and key not in ignored and not key.startswith("_")]
    if strict and (unknown := [key for key in unknown if config[key] not in (None, False)]):
        raise CheckpointError(f"{source} sets {', '.join(sorted(unknown))}, which this model does not know")
    made = {key: _checked(config[key], known[key], f"{source}: {key}") for key in known if key in config}
    for key in DEPTHS:
        if made.get(key, 0) > DEEPEST:
            raise CheckpointError(f"{source}: {key} is {made[key]}; at most {DEEPEST} are allowed")
    return replace(default, **made)


def _checked(value: Any, like: Any, name: str, lowest: float = 0) -> Any:
    if isinstance(like, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise CheckpointError(f"{name} is {value!r}; values like {list(like)} are needed")
        lowest = -math.inf if isinstance(like[0], float) else 0
        return tuple(_checked(item, like[0], name, lowest) for item in value)
    kind = (int, float) if isinstance(like, float) else type(like)
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(like, bool):
        raise CheckpointError(f"{name} is {value!r}; a value like {like!r} is needed")
    if not isinstance(value, bool) and not lowest < value < math.inf:
        raise CheckpointError(f"{name} is {value!r}; a {'finite' if lowest else 'positive'} number is needed")
    return type(like)(value)
