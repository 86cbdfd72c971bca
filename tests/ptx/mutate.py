"""Mistakes, made in PTX: what an interpreter that is worth anything must not take for right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ptx.memory import Fault


@dataclass(frozen=True)
class Mistake:
    """pattern -> replacement, of the first `count` matches (0: of all) behind the first match of `behind`. fault: what
    the interpreter says of it. wrong: results are, instead of a fault, on one schedule at least."""

    name: str
    pattern: str
    replacement: str
    count: int = 1
    behind: str = ""
    fault: str = ""
    wrong: bool | None = None

    def __str__(self) -> str:
        return self.name

    def make(self, text: str) -> str:
        found = re.search(self.behind, text)
        assert found is not None, self.behind
        start = found.end() if self.behind else 0
        made, times = re.subn(self.pattern, self.replacement, text[start:], count=self.count)
        assert times, f"{self.pattern} is not there"
        return text[:start] + made


def is_caught(mistake: Mistake, right: Callable[[int], bool], seeds: int) -> None:
    """Asserts it. right: whether results are right on the schedule of a seed; raises Fault."""
    wrong = not mistake.fault if mistake.wrong is None else mistake.wrong
    for seed in range(seeds):
        try:
            if not right(seed):
                assert wrong, f"results are wrong, without {mistake.fault!r}"
                return
        except Fault as fault:
            assert mistake.fault and re.search(mistake.fault, str(fault)), fault
            return
    raise AssertionError(f"{mistake}: nobody saw it in {seeds} schedules")
