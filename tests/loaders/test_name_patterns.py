"""Patterns of peft match what peft matches, and take no time that grows without bounds."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvid.loaders.name_patterns import matches_end

PIECES = st.sampled_from(
    ["a", "b", r"\.", ".", "ab", "a*", "b+", ".*", r"\d", r"\d+", "[ab]", "[^a]", "(a|b.)", "(ab)?", "a{2}", "(a*b)*",
     "(?:a|)+", "^", "$", "|", r"\w*?", "[0-9]+", r"(a|b\.){1,2}"]
)  # fmt: skip
NAMES = st.text("ab.0", max_size=12)


@given(st.lists(PIECES, max_size=6).map("".join), NAMES)
def test_what_peft_matches(pattern: str, name: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert matches_end(pattern, name) == expected


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*b", "(.*)*x", ".*.*.*.*.*.*.*.*x", "((a{0,99}){0,99}){0,99}b"])
def test_patterns_that_take_forever_elsewhere(pattern: str) -> None:
    start = time.monotonic()
    assert not matches_end(pattern, "a" * 100)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("pattern", ["(", "a" * 600, "(?i)a*", r"(a)\1*", "((((a*)*)*)*)*", "a{5,2}", r"(?<=a)b*"])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|characters"):
        matches_end(pattern, "a.b")
