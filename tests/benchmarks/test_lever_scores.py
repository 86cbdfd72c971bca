"""The benchmark of the levers: paired differences, how presets are chosen, likeness of frames, drawing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastvid.benchmarks.host import RESULTS
from fastvid.benchmarks.quality import levers
from fastvid.benchmarks.quality.plot_levers import front, plot
from fastvid.benchmarks.quality.score import TRAITS
from fastvid.models.wan.presets import EMBEDDED


def rows(case: str, seconds: float, wrong: range, count: int = 400) -> list[dict[str, Any]]:
    """Rows of prompts that take `seconds`, of which some show another motion."""
    traits = dict.fromkeys(TRAITS, True)
    made = [{"case": case, "prompt": n, "seconds": seconds, **traits, "motion": n not in wrong} for n in range(count)]
    return [row | ({} if case == "exact" else {"psnr": 40.0, "ssim": 0.9}) for row in made]


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    exact = rows("exact", 2.0, range(40))
    same = rows("a", 1.0, range(40))
    other = rows("b", 0.7, range(20, 60))  # as many wrong, but other ones: the interval is wide
    worse = rows("c", 0.5, range(80))
    return levers.summary([*exact, *same, *other, *worse])


def test_a_summary_is_of_paired_differences(lines: list[dict[str, Any]]) -> None:
    by_name = {line["case"]: line for line in lines}
    assert by_name["a"]["speedup"] == 2.0 and by_name["a"]["interval"] == [0.0, 0.0]
    assert by_name["b"]["lost"] == pytest.approx(0.0)
    spread = 1.96 * 100 * (0.1 * 400 / 399) ** 0.5 / 20  # 40 of 400 prompts differ by one
    assert by_name["b"]["interval"] == pytest.approx([-spread, spread])
    assert by_name["c"]["lost"] == pytest.approx(10.0) and by_name["c"]["truth"] == pytest.approx(0.8)
    assert by_name["exact"]["truth"] == pytest.approx(0.9) and "psnr" not in by_name["exact"]


def test_a_preset_is_the_fastest_case_that_keeps_to_the_limit(lines: list[dict[str, Any]]) -> None:
    assert levers.choose(lines) == {"balanced": "b", "fast": "b"}  # c has lost ten points
    fast = levers.summary([*rows("exact", 2.0, range(0)), *rows("d", 0.5, range(8)), *rows("e", 0.6, range(0))])
    assert levers.choose(fast) == {"balanced": "e", "fast": "d"}  # d has lost two
    assert levers.choose(fast, least=401) == {}


def test_the_presets_are_what_the_committed_result_has_chosen() -> None:
    result = json.loads((RESULTS / "levers.json").read_text())
    assert levers.choose(result["rows"]) == result["chosen"]
    assert {name: result["settings"][case] for name, case in result["chosen"].items()} == EMBEDDED.qualities


def test_likeness_of_frames() -> None:
    random = np.random.default_rng(0)
    clip = random.integers(0, 256, (3, 32, 32, 3), np.uint8)
    near = np.clip(clip.astype(int) + random.integers(-2, 3, clip.shape), 0, 255).astype(np.uint8)
    assert levers.psnr(clip, clip) == 99.0 and levers.ssim(clip, clip) == pytest.approx(1.0)
    error = np.mean((clip.astype(float) - near) ** 2)
    assert levers.psnr(near, clip) == pytest.approx(10 * np.log10(255**2 / error))
    assert 0.99 < levers.ssim(near, clip) < 1.0 and levers.ssim(255 - clip, clip) < 0


def test_the_drawing_joins_what_nothing_beats(lines: list[dict[str, Any]]) -> None:
    assert [line["case"] for line in front(lines)] == ["b", "c"]  # a loses as much as b, and is slower
    drawn = plot({"rows": lines, "chosen": levers.choose(lines)})
    assert drawn.count("<circle") == len(lines) and "fast: b" in drawn
