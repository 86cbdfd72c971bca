"""Levers: their texts and mappings, what `quality` sets, what overrides it, and what recipes record."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastvid
from fastvid.errors import InvalidRequest
from fastvid.models.wan.presets import EMBEDDED
from fastvid.requests import levers
from fastvid.requests.request import Request

QUALITIES = {"balanced": {"cache": "taylorseer", "num_inference_steps": 12}, "fast": {"guidance_every": 3}}
PRESET = replace(EMBEDDED, qualities=QUALITIES)


def resolved(**arguments: Any) -> Any:
    return Request.make("generate", prompt="a red circle", seed=1, **arguments).resolve(PRESET)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (1.5, "target:speedup=1.5"),
        ("2", "target:speedup=2"),
        (np.float32(1.25), "target:speedup=1.25"),
        ("off", "off"),
        (" taylorseer ", "taylorseer"),
        ("taylorseer:order=1,every=3", "taylorseer:order=1,every=3"),
        ({"name": "first_block", "threshold": 0.1, "warmup": 4}, "first_block:threshold=0.1,warmup=4"),
    ],
)
def test_a_cache_is_read_from_numbers_texts_and_mappings(given: Any, text: str) -> None:
    made = levers.check_cache("cache", given)
    assert made == text and levers.check_cache("cache", made) == text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fist_block", "the nearest is first_block"),
        ("first_block:treshold=1", "the nearest is threshold"),
        ("first_block:threshold", "has no value"),
        ("first_block:threshold=nan", "threshold"),
        ("first_block:warmup=1.5", "warmup"),
        ({"threshold": 1}, "a mapping with a name"),
        (0.5, "the nearest is 1"),
        (math.inf, "cache"),
        (True, "cache"),
        ([1.5], "cache"),
    ],
)
def test_a_wrong_cache_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        levers.check_cache("cache", given)


def test_an_interval_is_two_levels_in_order() -> None:
    assert levers.check_interval("guidance_interval", [0.25, np.float64(1)]) == (0.25, 1.0)
    for wrong in ((0.9, 0.2), (0.1,), (0.1, 1.5), "0.1", (0.3, 0.3)):
        with pytest.raises(InvalidRequest, match="guidance_interval"):
            levers.check_interval("guidance_interval", wrong)


def test_nothing_is_on_unless_it_is_asked_for() -> None:
    for request in (resolved(), resolved(quality="exact"), resolved(**levers.OFF)):
        assert all(getattr(request, name) is None for name in levers.OFF)
    assert not set(levers.OFF) & set(resolved().to_recipe())


def test_quality_sets_levers_and_a_lever_beside_it_overrides() -> None:
    request = resolved(quality="balanced")
    assert (request.cache, request.num_inference_steps) == ("taylorseer", 12)
    request = resolved(quality="balanced", cache="off", num_inference_steps=9, guidance_every=2)
    assert (request.cache, request.num_inference_steps, request.guidance_every) == (None, 9, 2)
    with pytest.raises(InvalidRequest, match="the nearest is fast"):
        resolved(quality="fats")


@pytest.mark.parametrize("options", [{"quality": "balanced"}, {"quality": "balanced", "cache": "off"}, {"cache": 2}])
def test_a_recipe_sets_the_same_levers_whatever_quality_means_then(options: dict[str, Any]) -> None:
    request = resolved(**options)
    again = Request.from_recipe(request.to_recipe()).resolve(replace(PRESET, qualities={"balanced": {"cache": 3.0}}))
    names = (*levers.OFF, *levers.ALSO)
    assert [getattr(again, name) for name in names] == [getattr(request, name) for name in names]


def test_levers_that_are_off_change_no_byte() -> None:
    pipe = fastvid.load("embedded", device="cpu")
    short: dict[str, Any] = {"seed": 3, "num_frames": 5, "num_inference_steps": 3}
    plain = pipe.generate("a red circle", **short)
    off = pipe.generate("a red circle", **short, **levers.OFF, quality="exact")
    assert np.array_equal(plain.frames, off.frames)


def test_a_pipeline_says_what_quality_stands_for() -> None:
    told = fastvid.load("embedded", device="cpu").describe()["quality"]
    assert told == levers.tables(EMBEDDED) and set(told) == {"balanced", "fast"}


def test_quality_sets_no_steps_or_solver_beside_what_decides_them() -> None:
    preset = replace(EMBEDDED, qualities={"fast": {"num_inference_steps": 8, "solver": "dpm++"}})

    def made(verb: str = "generate", **arguments: Any) -> Any:
        return Request.make(verb, prompt="a red circle", quality="fast", **arguments).resolve(preset)

    assert (made().num_inference_steps, made().solver) == (8, "dpm++")
    assert made(sigmas=(1.0, 0.5)).sigmas == (1.0, 0.5)
    assert made(draft=True).num_inference_steps == round(EMBEDDED.num_inference_steps * 0.4)
    assert made("edit", video=np.zeros((1, 64, 64, 3), np.uint8), source_prompt="a dot").solver == "euler"
