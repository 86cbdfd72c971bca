"""JSON files read with checks, and a config.json as a frozen dataclass."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastvid.errors import CheckpointError
from fastvid.files import read_bytes, reason

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

MAX_JSON = 1 << 22  # bytes; the largest published file that is read here (a tokenizer_config.json) has 1.2 MB
MAX_VALUES = 100_000  # in one file
MAX_DEPTH = 32
LONGEST = 1024  # values in a list
# Modules are built, without weights, to see what a config asks for: a depth that nobody publishes would take forever.
DEPTHS, DEEPEST = ("num_layers", "num_hidden_layers", "num_res_blocks"), 128
LARGEST = 2**31 - 1
LARGEST_FRACTION = 3.4028234663852886e38  # of fp32


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if the file is missing, no regular file, larger than what is
    published, or holds anything else."""
    try:
        value = parse_json(read_bytes(path, MAX_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {reason(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object {{...}} is expected")
    return value


def parse_json(text: str | bytes, most: int = MAX_VALUES) -> Any:
    """A JSON text of at most so many values, without duplicate names, and not nested deeper than MAX_DEPTH.

    Raises ValueError, for one of very many values before it is parsed.
    """
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if _count_values(data) > most:  # the more exact count takes longer
        bare = re.sub(rb'"[^"]*"?', b"", data.replace(b"\\\\", b"").replace(b'\\"', b""))
        if _count_values(bare) > most:
            raise ValueError(f"it has more than {most:,} values")
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique_names)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    inside = [value]
    for _ in range(MAX_DEPTH):
        if not (inside := [inner for each in inside for inner in _values(each) if isinstance(inner, dict | list)]):
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _count_values(data: bytes) -> int:
    """About as many as there are values in a JSON text. Punctuation in strings counts too."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


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
        raise CheckpointError(f"{source} sets {', '.join(sorted(unknown)):.200}, which this model does not know")
    made = {key: _checked(config[key], known[key], f"{source}: {key}") for key in known if key in config}
    for key in DEPTHS:
        if made.get(key, 0) > DEEPEST:
            raise CheckpointError(f"{source}: {key} is {made[key]}; at most {DEEPEST} are allowed")
    return replace(default, **made)


def _checked(value: Any, like: Any, name: str, lowest: float = 0) -> Any:
    if isinstance(like, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise CheckpointError(f"{name} is {value!r:.80}; values like {list(like)} are needed")
        if len(value) > LONGEST:
            raise CheckpointError(f"{name} has {len(value)} values; at most {LONGEST} are allowed")
        lowest = -math.inf if isinstance(like[0], float) else 0
        return tuple(_checked(item, like[0], name, lowest) for item in value)
    kind = (int, float) if isinstance(like, float) else type(like)
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(like, bool):
        raise CheckpointError(f"{name} is {value!r:.80}; a value like {like!r} is needed")
    highest = LARGEST_FRACTION if isinstance(like, float) else LARGEST
    if not isinstance(value, bool) and not max(lowest, -highest - 1) < value <= highest:
        wanted = "finite" if lowest else "positive"
        raise CheckpointError(f"{name} is {value!r:.80}; a {wanted} number up to {highest:g} is needed")
    return type(like)(value)
