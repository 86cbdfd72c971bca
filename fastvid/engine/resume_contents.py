"""What request.json and head.json of a checkpoint hold, read as if a stranger had written them: every name, type and
range is checked before it is used. Whether it fits the request is checked in `fastvid.engine.resume_checks`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastvid.checks import MAX_FRAMES, shown
from fastvid.engine import resume_files as files
from fastvid.errors import CheckpointError
from fastvid.layers.kv_cache import CacheState
from fastvid.requests.arguments import RUN, VERBS
from fastvid.requests.request import DATA

ENTRIES = {"format", "verb", "arguments", "recipe", "model", "layout", "loras"}  # of request.json
MOST = 2**31  # of counts: rows, segments, files
MAX_DEPTH, MAX_LAYERS = 12, 1000

Slots = dict[str, list[int]]


@dataclass(frozen=True)
class Head:
    """A checkpoint's progress, as head.json holds it. rows: rows done. segments: segments begun. clean: number of valid
    clean-* files. state: the state-* file. steps: the steps-* file, with a step cache. caches:
    (cache-* file, {prompt number: its slots}). places: the position of each cache."""

    rows: int = 0
    segments: int = 0
    clean: int = 0
    state: str = ""
    steps: str = ""
    caches: list[tuple[str, Slots]] = field(default_factory=list)
    places: dict[str, CacheState] = field(default_factory=dict)


class _Wrong(Exception):
    """A value that a checkpoint does not have."""


# ---------------------------------------------------------------- request.json


def get_about(path: Any) -> dict[str, Any]:
    """A checkpoint's request.json. Raises CheckpointError if there is none, or for another format."""
    folder = files.folder_of(path)
    try:
        about = files.get_json(folder, "request.json")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} holds no checkpoint: there is no request.json in it") from None
    if about.get("format") != files.FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {shown(about.get('format'))}; "
            f"this version of fastvid reads {files.FORMAT}"
        )
    try:
        _check_about(about)
    except _Wrong as wrong:
        raise CheckpointError(f"{folder / 'request.json'} holds no request: {wrong}; start the request anew") from None
    return about


def _check_about(about: dict[str, Any]) -> None:
    _check_json(about, MAX_DEPTH)
    _check(set(about) <= ENTRIES, "an entry", sorted(set(about) - ENTRIES)[:1])
    _check(isinstance(about.get("verb"), str) and about["verb"] in VERBS, "verb", about.get("verb"))
    for name in ("arguments", "recipe", "model"):
        _check(isinstance(about.get(name), dict), name, about.get(name))
    _check(isinstance(about.get("layout"), str | None), "layout", about.get("layout"))
    loras = about.get("loras", [])
    _check(isinstance(loras, list) and all(isinstance(one, list) and one for one in loras), "loras", loras)
    for name, value in about["arguments"].items():
        _check(name in VERBS[about["verb"]] and name not in RUN, f"arguments: {name!r:.40}", value)
        if name in DATA:
            _check_reference(name, value, 2)


def _check_reference(name: str, value: Any, depth: int) -> None:
    """A file's path, several, some for frames, or the type of what was given in memory."""
    if isinstance(value, list):
        _check(depth > 0, name, value)
        for item in value:
            _check_reference(name, item, depth - 1)
        return
    _check(isinstance(value, dict) and len(value) == 1, name, value)
    kind, inner = next(iter(value.items()))
    if kind == "at":
        _check(depth > 0 and isinstance(inner, dict), name, value)
        for frame, item in inner.items():
            _check(re.fullmatch(r"[0-9]{1,9}", frame) and int(frame) < MAX_FRAMES, name, value)
            _check_reference(name, item, 0)
    else:
        _check(kind in ("path", "given") and isinstance(inner, str) and "\0" not in inner, name, value)


def _check_json(value: Any, depth: int) -> None:
    """Finite numbers of at most 64 bits, text, and containers of them, not deep."""
    if isinstance(value, dict | list):
        _check(depth > 0, "depth", value)
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_json(item, depth - 1)
    elif isinstance(value, float):
        _check(math.isfinite(value), "a number", value)
    elif isinstance(value, int):
        _check(abs(value) < 1 << 64, "a number", value)
    elif isinstance(value, str):
        _check(_is_unicode(value), "text", value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- head.json


def get_head(folder: Path) -> Head:
    """A checkpoint's head.json; an empty head if its process ended before the first save. Raises CheckpointError."""
    try:
        value = files.get_json(folder, "head.json")
    except FileNotFoundError:
        return Head()
    return as_head(folder, "head.json", value)


def as_head(folder: Path, name: str, value: dict[str, Any], known: Head | None = None) -> Head:
    """The head in a JSON object. known: of another rank, whose entries hold where the object has none."""
    try:
        named = {entry.name for entry in fields(Head)}
        _check(set(value) <= named, "an entry", sorted(set(value) - named)[:1])
        base = {entry: getattr(known, entry) for entry in named} if known else {}
        head = Head(**{**base, **value})
        _check_head(head)
    except _Wrong as wrong:
        raise CheckpointError(f"{folder / name} is no checkpoint's: {wrong}; start the request anew") from None
    return head


def _check_head(head: Head) -> None:
    for name in ("rows", "segments", "clean"):
        value = getattr(head, name)
        _check(_is_count(value, MOST), name, value)
    _check(isinstance(head.state, str) and _is_file(head.state, "state") | (head.state == ""), "state", head.state)
    _check((head.state != "") == (head.segments > 0), "state", head.state)
    _check(isinstance(head.steps, str) and _is_file(head.steps, "steps") | (head.steps == ""), "steps", head.steps)
    _check(head.segments > 0 or head.rows == head.clean == 0, "rows", head.rows)
    _check(isinstance(head.places, dict) and len(head.places) <= 3, "places", head.places)
    for text, place in head.places.items():
        _check(text in ("0", "-1", "-2") and _is_place(place), f"places: {text!r:.20}", place)
    _check(isinstance(head.caches, list), "caches", head.caches)
    for entry in head.caches:
        _check(isinstance(entry, list | tuple) and len(entry) == 2, "caches", entry)
        name, slots = entry
        _check(isinstance(name, str) and _is_file(name, "cache"), "caches", name)
        _check(isinstance(slots, dict) and set(slots) <= set(head.places), "caches", slots)
        _check(all(_are_slots(slots[text], head.places[text]["capacity"]) for text in slots), "caches", slots)


def _is_file(name: str, kind: str) -> bool:
    return name.startswith(kind) and files.TENSORS.fullmatch(name) is not None


def _is_place(place: Any) -> bool:
    if not isinstance(place, dict) or set(place) != set(CacheState.__annotations__):
        return False
    layers, capacity, sink, following = (place[name] for name in ("layers", "capacity", "sink", "next"))
    return (
        _is_count(layers, MAX_LAYERS)
        and _is_count(capacity, MAX_FRAMES)
        and _is_count(sink, capacity - 1)
        and _is_count(following, MOST)
        and _are_slots(place["slots"], capacity)
    )


def _are_slots(value: Any, capacity: int) -> bool:
    return isinstance(value, list) and all(_is_count(slot, capacity - 1) for slot in value) and _differ(value)


def _differ(values: list[int]) -> bool:
    return len(set(values)) == len(values)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _check(right: object, name: str, value: Any) -> None:
    if not right:
        raise _Wrong(f"{name} is {shown(value)}")


def clean_files(folder: Path, count: int) -> Iterator[str]:
    """The first `count` clean-* files, in order. Raises CheckpointError if one is missing."""
    by_number = {int(name.split("-")[1]): name for name in sorted(os.listdir(folder)) if _is_file(name, "clean")}
    for index in range(count):
        if index not in by_number:
            raise CheckpointError(
                f"{folder}: clean-{index:06d} is missing from this checkpoint; start the request anew"
            )
        yield by_number[index]
