"""Regular expressions that a file brings along, matched with bounded work: peft's alpha_pattern and rank_pattern.

Python's own matcher takes exponential time on patterns such as (a+)+b. Here a pattern is walked with the set of all
places that it can have reached (Thompson, "Regular expression search algorithm", 1968).
"""

from __future__ import annotations

import re
import re._constants as ops  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Iterable, Sequence
from typing import Any

MAX_LENGTH, MAX_PATTERNS = 500, 5000
MAX_STEPS = 1_000_000  # of one list of patterns, about 1 s; a hundred patterns over a thousand names take 300,000
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


class NamePatterns:
    """A list of patterns, of which the first that matches a dotted name is wanted, as in peft's `get_pattern_key`: one
    matches if it matches from one of the name's words to its end. Raises ValueError for a pattern that is broken or
    not supported, and for patterns that take too much work."""

    def __init__(self, patterns: Iterable[Any]) -> None:
        listed = list(patterns)
        if len(listed) > MAX_PATTERNS or not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"{len(listed):,} patterns; at most {MAX_PATTERNS:,} texts are read")
        self._parsed = [(pattern, _parse(pattern)) for pattern in listed]
        self._steps = 0

    def first(self, names: Sequence[str]) -> str | None:
        """The first pattern that matches one of the names."""
        matching = (pattern for pattern, tree in self._parsed if any(self._matches(tree, name) for name in names))
        return next(matching, None)

    def _matches(self, tree: Any, name: str) -> bool:
        self._count(1 + len(name) // 64)
        if isinstance(tree, re.Pattern):
            return tree.match(name) is not None
        starts = {0, *(found.end() for found in re.finditer(r"\.", name))}
        return len(name) in self._ends(tree, name, starts)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise ValueError("its patterns take too long to match")

    def _ends(self, nodes: Sequence[Any], text: str, places: set[int]) -> set[int]:
        """Where a match of the nodes, one after the other, can end that begins at one of these places."""
        for op, value in nodes:
            if not places:
                break
            self._count(len(places))
            if op is ops.SUBPATTERN:
                places = self._ends(value[3], text, places)
            elif op is ops.BRANCH:
                places = set().union(*(self._ends(branch, text, places) for branch in value[1]))
            elif op in _REPEATS:
                places = self._repeat(value, text, places)
            elif op is ops.AT:
                places = places & {0 if value in _BEGIN else len(text)}
            else:
                places = {place + 1 for place in places if place < len(text) and _is_letter(op, value, text[place])}
        return places

    def _repeat(self, value: tuple[int, int, Sequence[Any]], text: str, places: set[int]) -> set[int]:
        least, most, nodes = value
        for _ in range(min(least, len(text) + 1)):  # after so many times a further one changes nothing
            self._count(1)
            places = self._ends(nodes, text, places)
        reached, new = set(places), places
        for _ in range(min(most - least, len(text) + 1)):
            self._count(1)
            new = self._ends(nodes, text, new) - reached
            if not new:
                break
            reached |= new
        return reached


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
    if tree.state.flags & ~re.UNICODE or not _supported(tree):
        raise ValueError(f"{pattern!r:.80} is a regular expression of a kind that is not supported here")
    return tree


def _supported(nodes: Sequence[Any]) -> bool:
    return all(_is_supported(op, value) for op, value in nodes)


def _is_supported(op: Any, value: Any) -> bool:
    if op is ops.SUBPATTERN:
        return _supported(value[3])
    if op is ops.BRANCH:
        return all(map(_supported, value[1]))
    if op in _REPEATS:
        return _supported(value[2])
    return op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN) or (op is ops.AT and value in (*_BEGIN, *_END))


def _is_letter(op: Any, value: Any, letter: str) -> bool:
    """Whether a node of one letter matches it."""
    if op is ops.IN:
        negated = value[0][0] is ops.NEGATE
        return any(_is_letter(kind, inner, letter) for kind, inner in value[negated:]) != negated
    if op is ops.RANGE:
        return bool(value[0] <= ord(letter) <= value[1])
    if op is ops.CATEGORY:
        return re.match(_CATEGORIES[value], letter) is not None
    if op is ops.ANY:
        return letter != "\n"
    return (ord(letter) == value) == (op is ops.LITERAL)  # or NOT_LITERAL
