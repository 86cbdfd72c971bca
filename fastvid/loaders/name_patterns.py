"""Regular expressions that a file brings along, matched in bounded time: peft's alpha_pattern and rank_pattern.

Python's own matcher takes exponential time on patterns such as (a+)+b. Here a pattern is walked with the set of all
places that it can have reached (Thompson, "Regular expression search algorithm", 1968).
"""

from __future__ import annotations

import re
import re._constants as ops  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

MAX_LENGTH, MAX_NESTED = 500, 3
_BEGIN, _END = (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING), (ops.AT_END, ops.AT_END_STRING)
_CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern matches a dotted name from one of its words to its end, as peft's `get_pattern_key`: the whole
    name, or what follows one of its dots. Raises ValueError for a pattern that is broken or not supported."""
    tree = _parse(pattern)
    if isinstance(tree, re.Pattern):
        return tree.match(name) is not None
    starts = {0, *(found.end() for found in re.finditer(r"\.", name))}
    return len(name) in _ends(tree, name, starts)


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> Any:
    """The pattern's tree; a compiled pattern where nothing in it is repeated, which Python matches fast."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are read")
    try:
        if not re.search(r"[*+?{]", pattern):
            return re.compile(rf"(?:.*\.)?(?:{pattern})$")
        tree = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from None
    if tree.state.flags & ~re.UNICODE or not _supported(tree, 0):
        raise ValueError(f"{pattern!r:.80} is a regular expression of a kind that is not supported here")
    return tree


def _supported(nodes: Sequence[Any], depth: int) -> bool:
    for op, value in nodes:
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            continue
        if op is ops.AT and value in (*_BEGIN, *_END):
            continue
        if op is ops.SUBPATTERN and _supported(value[3], depth):
            continue
        if op is ops.BRANCH and all(_supported(branch, depth) for branch in value[1]):
            continue
        if op in _REPEATS and depth < MAX_NESTED and _supported(value[2], depth + 1):
            continue
        return False
    return True


def _ends(nodes: Sequence[Any], text: str, places: set[int]) -> set[int]:
    """Where a match of the nodes, one after the other, can end that begins at one of these places."""
    for op, value in nodes:
        if not places:
            break
        if op is ops.SUBPATTERN:
            places = _ends(value[3], text, places)
        elif op is ops.BRANCH:
            places = set().union(*(_ends(branch, text, places) for branch in value[1]))
        elif op in _REPEATS:
            places = _repeat(value, text, places)
        elif op is ops.AT:
            places = places & {0 if value in _BEGIN else len(text)}
        else:
            places = {place + 1 for place in places if place < len(text) and _matches(op, value, text[place])}
    return places


def _repeat(value: tuple[int, int, Sequence[Any]], text: str, places: set[int]) -> set[int]:
    least, most, nodes = value
    for _ in range(min(least, len(text) + 1)):  # after so many times a further one changes nothing
        places = _ends(nodes, text, places)
    reached, new = set(places), places
    for _ in range(min(most - least, len(text) + 1)):
        new = _ends(nodes, text, new) - reached
        if not new:
            break
        reached |= new
    return reached


def _matches(op: Any, value: Any, letter: str) -> bool:
    """Whether a node of one letter matches it."""
    if op is ops.IN:
        negated = value[0][0] is ops.NEGATE
        return any(_matches(kind, inner, letter) for kind, inner in value[negated:]) != negated
    if op is ops.RANGE:
        return bool(value[0] <= ord(letter) <= value[1])
    if op is ops.CATEGORY:
        return re.match(_CATEGORIES[value], letter) is not None
    if op is ops.ANY:
        return letter != "\n"
    return (ord(letter) == value) == (op is ops.LITERAL)  # or NOT_LITERAL
