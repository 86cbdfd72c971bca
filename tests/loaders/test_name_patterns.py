"""Patterns of peft match what peft matches, and take no time that grows without bounds."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvid.loaders.name_patterns import NamePatterns

PIECES = st.sampled_from(
    ["a", "b", r"\.", ".", "ab", "a*", "b+", ".*", r"\d", r"\d+", "[ab]", "[^a]", "(a|b.)", "(ab)?", "a{2}", "(a*b)*",
     "(?:a|)+", "^", "$", "|", r"\w*?", "[0-9]+", r"(a|b\.){1,2}"]
)  # fmt: skip
NAMES = st.text("ab.0", max_size=12)


def matches(pattern: str, name: str) -> bool:
    return NamePatterns([pattern]).first([name]) is not None


@given(st.lists(PIECES, max_size=6).map("".join), NAMES)
def test_what_peft_matches(pattern: str, name: str) -> None:
    assert matches(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


def test_the_first_that_matches() -> None:
    patterns = NamePatterns(["q", r"attn1\..*", "to_q", ".*"])
    assert patterns.first(["blocks.0.attn1.to_q"]) == r"attn1\..*"
    assert patterns.first(["blocks.0.x.to_q"]) == "to_q" and patterns.first(["y", "to_q"]) == "to_q"
    assert NamePatterns(["q"]).first(["to_q"]) is None


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*b", "(.*)*x", ".*.*.*.*.*.*.*.*x", "((a{0,99}){0,99}){0,99}b"])
def test_patterns_that_take_forever_elsewhere(pattern: str) -> None:
    assert not matches(pattern, "a" * 100)


def test_work_is_bounded() -> None:
    patterns = NamePatterns([f"(((a|b)*{i}?)*(a*)*)*x" for i in range(100)])
    start = time.monotonic()
    with pytest.raises(ValueError, match="take too long"):
        for i in range(1000):
            patterns.first([f"blocks.{i}." + "ab" * 100])
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("pattern", ["(", "a" * 600, "(?i)a*", r"(a)\1*", "a{5,2}", r"(?<=a)b*", "(" * 400])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|characters"):
        NamePatterns([pattern])


def test_lists_that_are_refused() -> None:
    for patterns in (["a"] * 6000, [3]):
        with pytest.raises(ValueError, match="at most 5,000 texts"):
            NamePatterns(patterns)
