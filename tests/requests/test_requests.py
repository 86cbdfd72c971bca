"""What can be asked: wrong types, ranges, counting rules, sizes, and recipes there and back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvid import checks
from fastvid.errors import InvalidRequest
from fastvid.requests import sizes
from fastvid.requests.request import Request, Resolved


@dataclass(frozen=True)
class Recipe:
    name: str = "embedded"
    num_inference_steps: int = 20
    flow_shift: float = 3.0
    guidance_scale: float = 5.0
    fps: float = 16
    num_frames: int = 17
    height: int = 64
    width: int = 64
    negative_prompt: str = ""
    solver: str = "unipc"
    spatial_multiple: int = 16
    temporal: int = 4


def resolved(recipe: Recipe | None = None, **kwargs: Any) -> Resolved:
    return Request.make(**{"prompt": "a", **kwargs}).resolve(recipe or Recipe())


def refused(match: str, **kwargs: Any) -> str:
    with pytest.raises(InvalidRequest, match=match) as caught:
        resolved(**kwargs)
    return str(caught.value)


def test_needs_no_torch_and_no_numpy() -> None:
    code = "import sys, fastvid.requests.request; assert not {'torch', 'numpy', 'av'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recipe_fills_what_is_not_given() -> None:
    made = resolved(seed=7, width=128)
    assert (made.width, made.height, made.num_frames, made.fps) == (128, 64, 17, 16.0)
    assert (made.num_inference_steps, made.guidance_scale, made.flow_shift, made.solver) == (20, 5.0, 3.0, "unipc")
    assert (made.prompt, made.negative_prompt, made.seed, made.guidance_scale_2) == ("a", "", 7, None)
    with pytest.raises(FrozenInstanceError):
        made.seed = 8  # type: ignore[misc]


def test_what_is_given_wins() -> None:
    asked = {"negative_prompt": "n", "height": 72, "width": 90, "num_frames": 3, "fps": 24.0, "seed": 2**63 - 1}
    asked |= {"num_inference_steps": 4, "guidance_scale": 0.0, "flow_shift": 7.5, "solver": "dpm++"}
    made = resolved(**asked)
    assert {name: getattr(made, name) for name in asked} == asked


def test_a_zero_is_not_left_out() -> None:
    made = resolved(seed=0, guidance_scale=0, negative_prompt="", prompt="")
    assert (made.seed, made.guidance_scale, made.prompt) == (0, 0.0, "")
    assert resolved(Recipe(negative_prompt="bad"), negative_prompt="").negative_prompt == ""


def test_a_seed_is_drawn_and_kept() -> None:
    seeds = {resolved().seed for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= seed <= checks.MAX_SEED for seed in seeds)


def test_a_seed_of_minus_one_is_a_random_one_that_stays() -> None:
    requests = [
        Request.make("finalize", video="draft.mp4", seed=seed) for seed in (-1, np.int64(-1), -1.0, Fraction(-1))
    ]
    seeds = {request.seed for request in requests}
    assert len(seeds) > 1 and all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    for request in requests:  # made again, as for another process, it is the same
        assert Request.make("finalize", **request.arguments()).seed == request.seed


@given(num_frames=st.integers(1, checks.MAX_FRAMES), width=st.integers(64, 1080), height=st.integers(64, 1080))
def test_the_model_makes_the_next_size_it_can(num_frames: int, width: int, height: int) -> None:
    made = resolved(num_frames=num_frames, width=width, height=height)
    assert (made.num_frames, made.width, made.height) == (num_frames, width, height)
    assert made.model_frames % 4 == 1 and 0 <= made.model_frames - num_frames < 4
    assert made.model_width % 16 == made.model_height % 16 == 0
    assert 0 <= made.model_width - width < 16 and 0 <= made.model_height - height < 16


@given(seconds=st.floats(0.1, 500), fps=st.floats(0.1, 240))
def test_seconds_count_frames(seconds: float, fps: float) -> None:
    expected = round(seconds * fps)
    if 1 <= expected <= checks.MAX_FRAMES:
        assert resolved(seconds=seconds, fps=fps).num_frames == expected
    else:
        refused("frames", seconds=seconds, fps=fps)
    assert resolved(seconds=1.0).num_frames == 16


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "seed", "num_inference_steps"])
@pytest.mark.parametrize("value", [True, np.True_, "17", 2.5, float("nan"), float("inf"), [17], b"1", object(), 1j])
def test_whole_numbers_refuse_other_types(name: str, value: Any) -> None:
    refused(f"^{name}=.*whole number", **{name: value})


@pytest.mark.parametrize("name", ["fps", "seconds", "guidance_scale", "guidance_scale_2", "flow_shift"])
@pytest.mark.parametrize(
    "value", [False, "1", float("nan"), float("inf"), -float("inf"), -1.0, 10**400, np.ones(2), torch.tensor(True)]
)
def test_numbers_refuse_other_types(name: str, value: Any) -> None:
    refused(f"^{name}=", **{name: value})


@pytest.mark.parametrize(
    "value", [81, np.int64(81), np.uint8(81), 81.0, np.float32(81), torch.tensor(81), Fraction(81)]
)
def test_scalars_of_every_library_are_taken(value: Any) -> None:
    made = resolved(num_frames=value, guidance_scale=value)
    assert type(made.num_frames) is int and made.num_frames == 81
    assert type(made.guidance_scale) is float and made.guidance_scale == 81.0


@given(value=st.integers(-(2**70), 2**70))
def test_integers_are_in_range_or_refused_with_the_nearest(value: int) -> None:
    for name, low, high in (
        ("height", 64, 1080),
        ("num_frames", 1, checks.MAX_FRAMES),
        ("num_inference_steps", 1, 1000),
        ("seed", -1, checks.MAX_SEED),
    ):
        if (name, value) == ("seed", -1):
            continue  # a random one: see below
        if low <= value <= high:
            assert getattr(resolved(**{name: value}), name) == value
        elif name != "height" or not 1080 < value <= 2048:
            assert refused(f"{name}=", **{name: value}).endswith(
                f"nearest is {2048 if value > high == 1080 else (low if value < low else high)}"
            )


def test_enormous_values_cost_nothing() -> None:
    start = time.perf_counter()
    for kwargs in (
        {"num_frames": 10**5000},
        {"seconds": 1e300},
        {"sigmas": range(10**15)},
        {"prompt": "a" * 10**7},
        {"seed": 2**63},
        {"sigmas": np.zeros(10**6)},
    ):
        assert len(refused("allowed", **kwargs)) < 400
    Request.make(prompt="é" * 100_000, sigmas=list(np.linspace(1, 0.001, 1000))).resolve(Recipe())
    assert time.perf_counter() - start < 0.5  # seven requests; each takes under 10 ms on a quiet machine


@pytest.mark.parametrize("prompt", ["a\0b", "\ud800", ["a"], 3, b"a", "x" * 100_001])
def test_prompts_that_are_refused(prompt: Any) -> None:
    refused("^prompt=", prompt=prompt)
    refused("^negative_prompt=", negative_prompt=prompt)


def test_a_prompt_is_needed() -> None:
    with pytest.raises(InvalidRequest, match="prompt is missing"):
        Request.make()
    embeds = np.zeros((1, 4, 8), np.float32)
    assert Request.make(prompt_embeds=embeds).resolve(Recipe()).prompt is None
    refused("both given", prompt_embeds=embeds)
    refused("tensor", latents=3)


@pytest.mark.parametrize(
    "given_name, nearest",
    [("num_frame", "num_frames"), ("steps", "num_inference_steps"), ("promt", "prompt"), ("cfg", "guidance_scale")],
)
def test_unknown_names_are_told_the_nearest(given_name: str, nearest: str) -> None:
    refused(f"{given_name}.*nearest is {nearest}", **{given_name: 1})


def test_keyframes_are_frames_with_a_picture_each() -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    refused("keyframes=.*dict of frames", keyframes=black)
    refused("keyframes frame=-1.*nearest is 0", keyframes={-1: black})
    refused("keyframes.3.=", keyframes={3: 5})
    assert resolved(keyframes=None).num_frames == 17
    made = resolved(keyframes={8: black}, image=black)
    assert sorted(made.known_pictures) == [0, 8]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_frames": 5, "seconds": 1},
        {"size": "64x64", "width": 64},
        {"aspect": "16:9", "height": 64},
        {"sigmas": [1.0, 0.5], "flow_shift": 3.0},
        {"sigmas": [1.0, 0.5], "num_inference_steps": 3},
    ],
)
def test_contradictions_are_refused(kwargs: dict[str, Any]) -> None:
    refused("both given|but sigmas", **kwargs)


@pytest.mark.parametrize(
    "sigmas",
    [[], [1.1], [0.0], [0.5, 0.5], [0.5, 0.6], [1, 0.5, 0], [float("nan")], ["1"], "1", 0.5, np.ones((2, 2)), {1: 1}],
)
def test_sigmas_that_are_refused(sigmas: Any) -> None:
    refused("^sigmas", sigmas=sigmas)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_sigmas_are_used_as_they_are(kind: Any) -> None:
    made = resolved(sigmas=kind([1.0, 0.75, 0.25]), num_inference_steps=3)
    assert made.sigmas == (1.0, 0.75, 0.25) and made.num_inference_steps == 3


@pytest.mark.parametrize(
    "width, height, num_frames, nearest",
    [
        (1920, 1088, 17, "1920x1080"),
        (1088, 1920, 17, "1080x1920"),
        (2048, 2048, 2, "1920x1080"),
        (1928, 64, 2, "1920x64"),
    ],
)
def test_videos_have_limits_that_pictures_have_not(width: int, height: int, num_frames: int, nearest: str) -> None:
    refused(f"nearest is {nearest}", width=width, height=height, num_frames=num_frames)
    assert resolved(width=width, height=height, num_frames=1).width == width


def test_the_largest_videos_are_allowed() -> None:
    made = resolved(width=1920, height=1080, num_frames=checks.MAX_FRAMES)
    assert (made.model_width, made.model_height, made.model_frames) == (1920, 1088, checks.MAX_FRAMES + 1)
    assert resolved(size="1080x1920").model_width == 1088


@pytest.mark.parametrize(
    "aspect, budget, expected",
    [
        ("16:9", "480p", (832, 480)),
        ("9:16", "480P", (480, 832)),
        ("16:9", "720p", (1280, 720)),
        ("9:16", "1080p", (1080, 1920)),
        (16 / 9, "1080p", (1920, 1080)),
        ("1:1", 2**18, (512, 512)),
        (None, "480p", (624, 624)),
        ("16:9", None, (112, 64)),
    ],
)
def test_an_aspect_and_a_budget_give_a_size(aspect: Any, budget: Any, expected: tuple[int, int]) -> None:
    made = resolved(aspect=aspect, budget=budget)
    assert (made.width, made.height) == expected


@given(
    ratio=st.fractions(Fraction(1, 4), 4, max_denominator=64),
    area=st.integers(300 * 300, 1920 * 1080),
    num_frames=st.sampled_from([1, 17]),
)
def test_the_nearest_size_is_allowed_and_near(ratio: Fraction, area: int, num_frames: int) -> None:
    width, height = sizes.nearest_size(ratio, area, num_frames)
    sizes.check_size(width, height, num_frames)
    assert width * height <= area and min(width, height) >= 64
    assert width % 16 == 0 or height % 16 == 0
    largest = sizes.nearest_size(ratio, 2**22, num_frames)
    if area <= largest[0] * largest[1]:  # else the sides are at their limits
        assert width * height > 0.8 * area
    assert 0.85 < width / height / ratio < 1.18


@pytest.mark.parametrize("aspect", ["16:0", "a:b", "1:2:3", "", "nan", "inf:1", -1, 0, True, "100:1", "9" * 99])
def test_aspects_that_are_refused(aspect: Any) -> None:
    refused("^aspect=", aspect=aspect)


@pytest.mark.parametrize(
    "size", ["832", "832x", "axb", "-1x64", "832x480x2", 832, (832, 480), "x" * 99, "9" * 20 + "x64"]
)
def test_sizes_that_are_refused(size: Any) -> None:
    refused("^(size|width)=", size=size)


def test_a_budget_is_named_or_counted() -> None:
    assert "nearest is 480p" in refused("^budget=", budget="481p")
    refused("^budget=", budget=100)


def test_guidance_scale_2_is_for_models_of_two_experts() -> None:
    refused("one expert", guidance_scale_2=3.0)


@dataclass(frozen=True)
class TwoExperts(Recipe):
    guidance_scale: float = 4.0
    guidance_scale_2: float = 3.0
    boundary_ratio: float = 0.875


@pytest.mark.parametrize("scale", [0, 0.3, 1])
def test_up_to_1_there_is_no_guidance(scale: float) -> None:
    """As in diffusers, where the first scale decides, and the second is taken as it is."""
    made = resolved(guidance_scale=scale)
    assert made.guidance_scale == scale and not made.guided(1) and made.guidance_scales(1) == (1.0,)
    both = resolved(TwoExperts(), guidance_scale=scale, guidance_scale_2=2.0)
    assert not both.guided(2) and both.guidance_scales(2) == (1.0, 1.0)
    assert resolved(TwoExperts(), guidance_scale=3.0, guidance_scale_2=scale).guidance_scales(2) == (3.0, scale)
    assert resolved(known_guidance_scale=scale, guidance_scale=3.0).guidance_scales(1, known=True) == (1.0,)


def test_boundary_ratio_is_for_models_of_two_experts() -> None:
    refused("boundary_ratio=0.5.*one transformer", boundary_ratio=0.5)
    made = resolved(TwoExperts(), seed=1, boundary_ratio=0)
    assert made.to_recipe()["boundary_ratio"] == 0.0 and "boundary_ratio" not in resolved(TwoExperts()).to_recipe()
    assert Request.from_recipe(made.to_recipe()).resolve(TwoExperts()) == made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (4.0, 3.0)),
        ({"guidance_scale": 2.0}, (2.0, 2.0)),
        ({"guidance_scale_2": 2.0}, (4.0, 2.0)),
        ({"guidance_scale": 6.0, "guidance_scale_2": 1.0}, (6.0, 1.0)),
    ],
)
def test_the_second_scale_follows_the_first_if_that_is_given(
    given: dict[str, float], expected: tuple[float, float]
) -> None:
    made = resolved(TwoExperts(), seed=1, **given)
    assert (made.guidance_scale, made.guidance_scale_2) == made.guidance_scales(2) == expected
    assert Request.from_recipe(made.to_recipe()).resolve(TwoExperts()) == made
    assert resolved(guidance_scale=2.0).guidance_scales(1) == (2.0,)


@dataclass(frozen=True)
class FewSteps(Recipe):
    sigmas: tuple[float, ...] | None = (1.0, 0.75, 0.5)


def test_the_recipes_own_levels_are_for_its_own_steps() -> None:
    made = resolved(FewSteps(), seed=1)
    assert (made.sigmas, made.num_inference_steps) == ((1.0, 0.75, 0.5), 3)
    assert Request.from_recipe(made.to_recipe()).resolve(FewSteps()) == made
    for options, steps in (({"num_inference_steps": 7}, 7), ({"flow_shift": 2.0}, 20)):
        changed = resolved(FewSteps(), **options)
        assert changed.sigmas is None and changed.num_inference_steps == steps
    assert resolved(FewSteps(), sigmas=[0.5]).sigmas == (0.5,)


def test_a_recipe_makes_the_same_request_again() -> None:
    made = resolved(prompt='é"\n', num_inference_steps=7, fps=23.976, width=70, solver="euler")
    recipe = json.loads(json.dumps(made.to_recipe(model="embedded", version="1.2", dtype="float32")))
    assert recipe["model"] == "embedded" and recipe["settings"] == {"dtype": "float32"} and recipe["fastvid"] == "1.2"
    assert Request.from_recipe(recipe).resolve(Recipe(num_inference_steps=99, flow_shift=9.0, height=512)) == made


@given(
    asked=st.fixed_dictionaries(
        {
            "seed": st.integers(0, checks.MAX_SEED),
            "prompt": st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        },
        optional={
            "num_frames": st.integers(1, checks.MAX_FRAMES),
            "guidance_scale": st.floats(0, 1000),
            "fps": st.floats(0.1, 240),
            "flow_shift": st.floats(0.01, 100),
            "height": st.integers(64, 1080),
            "solver": st.sampled_from(checks.SOLVERS),
        },
    )
)
def test_every_recipe_survives_json(asked: dict[str, Any]) -> None:
    asked["prompt"] = asked["prompt"].replace("\0", "")
    made = resolved(**asked)
    assert Request.from_recipe(json.loads(json.dumps(made.to_recipe()))).resolve(Recipe()) == made


def test_sigmas_travel_in_a_recipe() -> None:
    made = resolved(sigmas=[1.0, 0.1], seed=1)
    recipe = made.to_recipe()
    assert recipe["sigmas"] == [1.0, 0.1] and "flow_shift" not in recipe and "num_inference_steps" not in recipe
    assert Request.from_recipe(recipe).resolve(Recipe()) == made
    changed = Request.from_recipe(recipe, num_inference_steps=5).resolve(Recipe())
    assert changed.sigmas is None and changed.num_inference_steps == 5


def test_overrides_drop_what_contradicts_them() -> None:
    recipe = resolved(num_frames=33, width=128, height=128, seed=5).to_recipe()
    made = Request.from_recipe(recipe, seconds=1, size="64x80", seed=None).resolve(Recipe())
    assert (made.num_frames, made.width, made.height, made.seed) == (16, 64, 80, 5)
    assert Request.from_recipe(recipe, aspect="16:9").resolve(Recipe()).width == 112


def test_tensors_are_recorded_and_asked_for_again() -> None:
    latents = torch.arange(6, dtype=torch.bfloat16).reshape(1, 6)
    recipe = resolved(latents=latents, seed=1).to_recipe()
    assert recipe["latents"]["shape"] == [1, 6] and recipe["latents"]["dtype"] == "bfloat16"
    other = resolved(latents=latents.float().numpy()).to_recipe()
    assert other["latents"]["sha256"] == recipe["latents"]["sha256"]
    assert resolved(latents=latents + 1).to_recipe()["latents"]["sha256"] != recipe["latents"]["sha256"]
    with pytest.raises(InvalidRequest, match="latents= of shape"):
        Request.from_recipe(json.loads(json.dumps(recipe)))
    assert Request.from_recipe(recipe, latents=latents).latents is latents


@pytest.mark.parametrize(
    "recipe", [{}, {"a": 1}, [], None, "x", {"fastvid": "1", "verb": "edit"}, {"fastvid": "1", "x": 1}]
)
def test_foreign_recipes_are_refused(recipe: Any) -> None:
    with pytest.raises(InvalidRequest):
        Request.from_recipe(recipe)


def test_arguments_are_what_was_given() -> None:
    request = Request.make(prompt="a", size="64x80", seed=3)
    assert request.arguments() == {"prompt": "a", "width": 64, "height": 80, "seed": 3}
    assert Request.make(**request.arguments()) == request
    assert replace(request, seed=4) != request


def test_an_area_may_be_a_number_in_words_and_a_verb_has_a_nearest() -> None:
    assert resolved(budget="65536").width == resolved(budget=65536).width == 256
    with pytest.raises(
        InvalidRequest, match="verb=.finalise.: allowed is one of generate, .*; the nearest is finalize"
    ):
        Request.make("finalise", prompt="a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"checkpoint": 3}, "checkpoint=3: allowed is the name of a file or folder"),
        ({"checkpoint": "job", "checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"checkpoint_every": 1}, "checkpoint_every says how checkpoints are written; give checkpoint= too"),
        ({"checkpoint": "job", "keep_checkpoint": 1}, "keep_checkpoint=1: allowed is True or False"),
        ({"prompt_model": "m"}, "prompt_model is given without expand_prompt"),
        ({"expand_prompt": "yes"}, "expand_prompt='yes': allowed is True or False"),
    ],
)
def test_how_a_request_runs_is_checked_with_it(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Request.make(prompt="a", **options)


def test_how_a_request_runs_says_nothing_about_the_video() -> None:
    request = Request.make(prompt="a", seed=1, checkpoint="job", checkpoint_every=0, expand_prompt=True)
    assert request.video_arguments() == {"prompt": "a", "seed": 1}
    assert request.checkpoint_options() == {"checkpoint": "job", "checkpoint_every": 0.0}
    assert request.arguments() == {"prompt": "a", "seed": 1, "expand_prompt": True} | request.checkpoint_options()
    assert not set(request.arguments()) & set(request.resolve(Recipe()).to_recipe()) - {"prompt", "seed"}
