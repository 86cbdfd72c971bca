"""Interleaved timing."""

from __future__ import annotations

import time

import pytest
import torch

from fastvid.tuning.timing import MAX_ROUNDS, Case, measure, measure_within

CPU = torch.device("cpu")


def test_every_case_is_first_as_often() -> None:
    order: list[str] = []
    cases = [Case(name, lambda name=name: order.append(name)) for name in "abc"]
    rows = measure(cases, CPU, rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [row.name for row in rows] == list("abc") and {row.rounds for row in rows} == {3}


@pytest.mark.parametrize(("each", "seconds", "rounds"), [(0.0, 0.05, MAX_ROUNDS), (0.02, 0.3, 15), (0.2, 0.1, 1)])
def test_rounds_fit_into_the_time(each: float, seconds: float, rounds: int) -> None:
    began = time.monotonic()
    rows = measure_within([Case("a", lambda: time.sleep(each))], CPU, seconds)
    assert time.monotonic() - began < 2 * seconds + 2 * each + 0.2
    assert rounds / 3 <= rows[0].rounds <= rounds + 1


def test_short_time_still_gives_some_rounds() -> None:
    assert measure_within([Case("a", lambda: time.sleep(0.01))], CPU, 0.06)[0].rounds >= 2


def test_the_faster_case_is_told() -> None:
    rows = measure_within([Case("slow", lambda: time.sleep(0.01)), Case("fast", lambda: time.sleep(0.001))], CPU, 0.2)
    assert rows[1].median < rows[0].median / 2 and rows[1].speed > 2 and rows[0].speed == 1
