"""Batches: one call of a verb with lists of prompts, negative prompts or seeds, a video for each.

Lists of one length go together, place by place; a list of one, or a value that is none, goes with all of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvid import checks
from fastvid.checks import Check, refuse
from fastvid.errors import InvalidRequest

LISTS = ("prompt", "negative_prompt", "seed")
"""The arguments that may be lists."""
MOST = 10_000  # videos


def is_batch(options: Mapping[str, Any]) -> bool:
    """Whether a verb's arguments ask for several videos."""
    return any(_is_several(options.get(name)) for name in LISTS)


def each(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each video, in order. Raises InvalidRequest for lists that do not go together."""
    if options.get("checkpoint") is not None:
        raise InvalidRequest("checkpoint is of one video; leave it out of a batch, or make the videos one by one")
    lists = {name: _values(name, options[name]) for name in LISTS if _is_several(options.get(name))}
    longest = max(lists, key=lambda name: len(lists[name]))
    count = len(lists[longest])
    for name, values in lists.items():
        if len(values) not in (1, count):
            allowed = f"1 value, or {count}, as {longest} has"
            refuse(name, values, allowed, 1 if len(values) < count / 2 else count)
    numbers = range(count)
    chosen = [{name: values[n if len(values) > 1 else 0] for name, values in lists.items()} for n in numbers]
    return [{**options, **values} for values in chosen]


def one_video(check: Check, allowed: str) -> Check:
    """A check of what verbs take as a list, for a batch; here it is of one video."""

    @checks.guarded(allowed)
    def of_one(name: str, value: Any) -> Any:
        if checks.is_list(value):
            refuse(
                name, value, f"{allowed}; lists are for the verbs, such as generate, which make a video for each value"
            )
        return check(name, value)

    return of_one


def _is_several(value: Any) -> bool:
    return checks.is_list(value) or len(getattr(value, "shape", ())) == 1


def _values(name: str, value: Any) -> list[Any]:
    return checks.items(name, value if checks.is_list(value) else value.tolist(), f"1 to {MOST} values", MOST)
