"""Requests whose first steps are made at half the size: what they refuse, plan, keep and resume."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from streams import run, same, snapshots

import fastvid
from fastvid.engine import progressive
from fastvid.engine.events import Started, Step
from fastvid.errors import InvalidRequest
from fastvid.models.preset import EVERYTHING
from fastvid.pipeline.pipeline import Pipeline
from fastvid.sampling.noise_table import in_two, windows

RED = "a red circle moving right on a white background"
FEW: dict[str, Any] = {"width": 96, "height": 96, "num_inference_steps": 4, "seed": 3, "progressive": 0.5}


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


def test_the_first_steps_are_small_and_counted(pipe: fastvid.Pipeline) -> None:
    plan, exact = (pipe.plan(RED, **FEW | {"progressive": share}) for share in (0.5, None))
    started, *events = pipe.stream(RED, num_frames=5, **FEW)
    assert isinstance(started, Started)
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == started.total_steps == 4 == plan.steps
    assert plan.levers == {"progressive": "2 of 4 steps at 48x48"}
    assert 0.5 * exact.flops_denoise < plan.flops_denoise < 0.65 * exact.flops_denoise
    assert plan.model_calls == exact.model_calls and plan.bytes_device == exact.bytes_device


def test_the_recipe_makes_the_same_video_and_exact_requests_stay_as_they_are(pipe: fastvid.Pipeline) -> None:
    made = pipe.generate(RED, num_frames=5, **FEW)
    again = pipe.generate(**{k: v for k, v in made.recipe.items() if k in FEW or k in ("prompt", "num_frames")})
    assert made.recipe["progressive"] == 0.5
    assert np.array_equal(made.frames, again.frames)
    exact = pipe.generate(RED, num_frames=5, **FEW | {"progressive": None})
    off = pipe.generate(RED, num_frames=5, **FEW | {"progressive": 0})
    assert np.array_equal(exact.frames, off.frames)
    assert not np.array_equal(exact.frames, made.frames)


def test_known_frames_are_exact_in_long_videos(pipe: fastvid.Pipeline) -> None:
    clip = pipe.generate(RED, num_frames=5, **FEW | {"num_inference_steps": 2}).frames
    longer = pipe.extend(clip, RED, num_frames=34, **FEW | {"num_inference_steps": 2, "width": None, "height": None})
    assert longer.frames.shape == (39, 96, 96, 3)
    assert np.array_equal(longer.frames[:5], clip)
    key = pipe.generate(RED, num_frames=9, keyframes={8: clip[4]}, **FEW | {"num_inference_steps": 2})
    assert np.array_equal(key.frames[8], clip[4])


def test_noise_keeps_its_variance_and_its_means() -> None:
    noise = torch.randn(1, 4, 2, 30, 46, generator=torch.Generator().manual_seed(0))
    small = progressive.averaged(noise, 15, 22)
    assert small.shape == (1, 4, 2, 15, 22)
    assert 0.9 < float(small.std()) < 1.1
    even = progressive.averaged(noise, 15, 23)
    assert torch.allclose(even[0, 0, 0, 3, 5], noise[0, 0, 0, 6:8, 10:12].mean() * 2)


def test_a_window_goes_to_zero_small_and_on_at_full_size() -> None:
    sigmas = np.array([1.0, 0.8, 0.5, 0.2])
    rows = list(in_two(windows(sigmas, [(0, 3), (2, 5)], torch.zeros(5, dtype=torch.bool)), 2))
    assert [row.small for row in rows] == [True, True, False, False] * 2
    assert [float(row.sigma_next.max()) for row in rows[:4]] == [0.8, 0.0, 0.2, 0.0]


@pytest.mark.parametrize(
    ("verb", "options", "match"),
    [
        ("generate", {"width": 64, "height": 128}, "nearest size is 96x128"),
        ("generate", {"num_inference_steps": 1}, "the nearest is 2"),
        ("generate", {"schedule": "staggered"}, "schedule=staggered"),
        ("edit", {"video": np.zeros((5, 96, 96, 3), np.uint8)}, "edit starts from a clip"),
        ("generate", {"solver": "redraw"}, "solver=redraw"),
    ],
)
def test_what_cannot_be_made_so_is_refused(
    pipe: fastvid.Pipeline, verb: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidRequest, match=match):
        pipe.plan(RED, verb=verb, **FEW | options)


def test_windows_go_on_from_any_step(tmp_path: Any) -> None:
    tiny.write_checkpoint(tmp_path / "model", vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16})
    pipe = fastvid.load(str(tmp_path / "model"), device="cpu")
    known = replace(pipe._model.preset, patterns=EVERYTHING, carries=True, window=3, overlap=1, anchor=8)
    pipe = Pipeline(replace(pipe._model, preset=known))
    picture = np.random.default_rng(0).integers(0, 256, (96, 112, 3), np.uint8)
    options = FEW | {"num_frames": 13, "width": 112, "image": picture, "guidance_scale": 1.0}
    path = tmp_path / "checkpoint"
    wanted = run(pipe.stream(RED, **options))
    found = snapshots(pipe.stream(RED, checkpoint=path, checkpoint_every=0, **options), path, tmp_path / "copies")
    assert len(found) > 8
    for copy in found[2:-1:3]:
        assert same(run(pipe.resume(copy, image=picture)), wanted)
