"""Refuses tokenizers of strangers that would make the tokenizers library panic, or run or grow without an end.

The library is written in Rust. What it does not expect ends in a panic: it is written to stderr, and comes out as a
BaseException. So what is known to panic is looked for before it is handed over.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastvid.errors import CheckpointError

MAX_CHARSMAP = 1 << 20  # bytes; the published ones have 0.3 MB
MAX_KEY, MAX_REPLACEMENT = 64, 256  # bytes; NFKC's longest replacement has 33
MAX_PARTS = 32  # normalizers, and tokens that are put around a text
MAX_GROWTH = 256  # times that replacements may lengthen a text
MAX_PATTERN = 2000  # characters of a regular expression
CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')
# In a regular expression: an escape, one that refers to a group, a repetition, the start of a group that is understood.
ESCAPE = re.compile(r"\\(?:[pP]\{[^{}]*\}|x\{[^{}]*\}|.)", re.DOTALL)
REFERENCE = re.compile(r"\\[1-9kgGRXyYK]")
REPEAT = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})")
GROUP = re.compile(r"\((?:\?(?:[im]*:|=|!|<=|<!|>))?")


@contextlib.contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Raise whatever comes out of the tokenizers library as a CheckpointError that begins with `problem`. The library
    raises bare Exceptions, and its panics are none."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise CheckpointError(f"{problem}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def check_bytes(data: bytes) -> None:
    """Check the tables of characters in a tokenizer.json. Raises ValueError."""
    for found in CHARSMAP.finditer(data):
        check_charsmap(base64.b64decode(found[1], validate=True))


def check_parts(tokenizer: Tokenizer) -> None:
    """Check what a tokenizer does with a text before and after its model. Raises ValueError."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor)
    growth = count = 1
    for state in _objects([json.loads(part.__getstate__()) for part in parts if part is not None]):
        kind, pattern = state.get("type"), state.get("Regex")
        count += kind is not None
        if isinstance(pattern, str) and not is_bounded(pattern):
            raise ValueError(f"the regular expression {pattern[:80]!r} may take for ever on some texts")
        if kind in ("Replace", "Prepend"):
            growth *= max(1, len(str(state.get("content") or state.get("prepend") or "")))
        if kind == "TemplateProcessing":
            _check_template(state)
        if count > MAX_PARTS or growth > MAX_GROWTH:
            raise ValueError(f"it has more than {MAX_PARTS} steps, or lengthens texts more than {MAX_GROWTH} times")


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a JSON value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def _check_template(state: Mapping[str, Any]) -> None:
    known = state["special_tokens"]
    for name in ("single", "pair"):
        tokens = [piece["SpecialToken"]["id"] for piece in state[name] if "SpecialToken" in piece]
        if missing := [token for token in tokens if token not in known]:
            raise ValueError(f"its post_processor puts {missing[0][:80]!r} around texts, which it does not define")
        if len(state[name]) + sum(len(known[token]["ids"]) for token in tokens) > MAX_PARTS:
            raise ValueError(f"its post_processor puts more than {MAX_PARTS} tokens around texts")


# ---------------------------------------------------------------- regular expressions


def is_bounded(pattern: str) -> bool:
    """Whether a search takes time that grows at most with the square of the text.

    Groups may not be repeated, nothing may refer to a group, and between two | outside of groups there may be two
    repetitions. Oniguruma itself gives up after ten million attempts at one place in a text, but not at the next.
    """
    if len(pattern) > MAX_PATTERN or any(REFERENCE.fullmatch(found[0]) for found in ESCAPE.finditer(pattern)):
        return False
    plain, before = ESCAPE.sub("e", pattern), ""
    while plain != before:  # [classes] of characters, also in one another
        plain, before = re.sub(r"\[[^\[\]]*\]", "c", plain), plain
    depth = repeats = options = at = 0
    while at < len(plain):
        if repeat := REPEAT.match(plain, at):
            group, optional = plain[:at].endswith(")"), repeat[0] == "?"
            repeats, options = repeats + (not optional), options + optional
            many = repeats > 2 or options > 8 or any(int(number or 0) > 1000 for number in repeat.group(1, 3))
            if many or (group and not optional):
                return False
            at = repeat.end() + (repeat[0] in "*+?" and plain[repeat.end() :][:1] in ("+", "?"))  # possessive, or lazy
            if REPEAT.match(plain, at):
                return False
            continue
        if plain[at] == "(":
            group_start = GROUP.match(plain, at)
            if plain[at + 1 : at + 2] in ("?", "*") and not (group_start and group_start[0] != "("):
                return False
            depth, at = depth + 1, group_start.end() if group_start else at + 1
            continue
        depth -= plain[at] == ")"
        if plain[at] == "|" and depth == 0:
            repeats = options = 0
        at += 1
    return True


# ---------------------------------------------------------------- tables of characters


def check_charsmap(data: bytes) -> None:
    """Check a sentencepiece table of characters and their replacements, which the library follows without checks.

    It is the size of a trie, the trie as a double array (github.com/s-yata/darts-clone), and the replacements with a
    NUL behind each. Raises ValueError.
    """
    size = int.from_bytes(data[:4], "little")
    if not 0 < size <= len(data) - 4 or size % 4 or len(data) > MAX_CHARSMAP:
        raise ValueError(f"its table of characters has {len(data)} bytes, of which {size} should be a trie")
    units, texts = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64), data[4 + size :]
    texts.decode()
    if not texts.endswith(b"\0") or max(map(len, texts.split(b"\0"))) > MAX_REPLACEMENT:
        raise ValueError(f"its table of characters has replacements of more than {MAX_REPLACEMENT} bytes")
    inside = [value >= len(texts) or texts[value] & 0xC0 == 0x80 for value in _values_of(units).tolist()]
    if any(inside):
        raise ValueError("its table of characters refers to replacements that it does not have")


def _values_of(units: np.ndarray) -> np.ndarray:
    """The values that can be reached from the root of a trie. Raises ValueError if a way leads out of it."""
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    labels, leaves = units & 0x800000FF, (units & 0x100) != 0
    letters = np.arange(1, 256)
    seen, values = np.zeros(len(units), bool), [np.zeros(0, np.int64)]
    bases = offsets[:1]
    for _ in range(MAX_KEY):
        if not len(bases):
            return np.unique(np.concatenate(values))
        if (bases | 0xFF).max() >= len(units):
            break
        seen[bases] = True
        places = bases[:, None] ^ letters
        places = places[labels[places] == letters]
        bases = places ^ offsets[places]
        if len(bases) and bases.max() >= len(units):
            break
        values.append(units[bases[leaves[places]]] & 0x7FFFFFFF)
        bases = np.unique(bases)
        bases = bases[~seen[bases]]
    raise ValueError("its table of characters leads out of itself")
