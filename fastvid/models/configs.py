"""A config.json, as a frozen dataclass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fastvid.errors import CheckpointError

T = TypeVar("T")


def read_fields(
    cls: type[T], config: Mapping[str, Any], source: str, *, ignored: Iterable[str] = (), strict: bool = True
) -> T:
    """Make a config dataclass whose fields are all numbers, flags, or tuples of them, from what a file says.

    Each value must have the type of the field's default, and numbers must be positive. Keys that begin with "_", and
    the ignored ones, are left alone; any other key that is set and unknown is an error if strict, since it may change
    what the model computes. Raises CheckpointError, with source in front.
    """
    known = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    values = {key: config[key] for key in known if key in config}
    unknown = [key for key in config if key not in known and key not in ignored and not key.startswith("_")]
    if strict and (unknown := [key for key in unknown if config[key] not in (None, False)]):
        raise CheckpointError(f"{source} sets {', '.join(sorted(unknown))}, which this model does not know")
    return cls(**{key: _checked(value, known[key], f"{source}: {key}") for key, value in values.items()})


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
