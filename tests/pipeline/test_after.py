"""Frames between a clip's frames, and larger clips: what comes out unchanged, how much, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from streams import run, same, snapshots

import fastvid
from fastvid.engine import tiles
from fastvid.engine.between import corrected
from fastvid.engine.events import Started
from fastvid.errors import InvalidRequest
from fastvid.media.images import resize
from fastvid.models.preset import EVERYTHING
from fastvid.pipeline.pipeline import Pipeline
from fastvid.requests.after import Between
from fastvid.requests.request import Request
from fastvid.requests.timeline import Segment

RED = "a red circle moving right on a white background"
FEW: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "strength": 1.0}


def clip(count: int, side: int = 64) -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return resize(noise, side, side)


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> fastvid.Pipeline:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder, vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16})
    return fastvid.load(str(folder), device="cpu")


def changed(pipe: fastvid.Pipeline, **values: Any) -> Pipeline:
    return Pipeline(replace(pipe._model, preset=replace(pipe._model.preset, patterns=EVERYTHING, **values)))


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.filterwarnings("ignore:prompt")
def test_a_clips_frames_come_out_as_they_are(small: fastvid.Pipeline, carries: bool) -> None:
    frames = clip(7)
    pipe = changed(small, carries=carries, window=3, overlap=1, context=1)
    plan = pipe.plan(verb="interpolate", video=frames, factor=3, **FEW)
    events = list(pipe.stream(RED, verb="interpolate", video=frames, factor=3, **FEW))
    made = np.concatenate([event.frames for event in events if hasattr(event, "frames")])
    assert made.shape == (19, 64, 64, 3) and plan.num_frames == 19 and plan.windows > 1
    assert np.array_equal(made[::3], frames)
    assert isinstance(events[0], Started) and events[0].total_steps == 2 * plan.windows
    assert events[0].fps == plan.fps == 48


@pytest.mark.filterwarnings("ignore:prompt")
def test_both_go_on_from_any_step(small: fastvid.Pipeline, tmp_path: Path) -> None:
    pipe, frames = changed(small, carries=True, window=3, overlap=1), clip(4)
    for verb, options in (("interpolate", {"factor": 3}), ("upscale", {"scale": 1.5, "tile": "64x64"})):
        asked = {"verb": verb, "video": frames, **options, **FEW}
        whole, path = run(pipe.stream(RED, **asked)), tmp_path / verb
        copies = snapshots(pipe.stream(RED, **asked, checkpoint=path, checkpoint_every=0), path, tmp_path / f"{verb}s")
        for copy in copies[1:-1:2]:
            assert same(run(pipe.resume(copy, video=frames)), whole)


def test_a_larger_clip_shows_what_the_clip_shows(pipe: fastvid.Pipeline) -> None:
    frames = clip(5)
    plan = pipe.plan(verb="upscale", video=frames, num_inference_steps=2)
    whole = pipe.plan(verb="upscale", video=frames, num_inference_steps=2, tile="128x128")
    assert (plan.width, plan.height, plan.num_frames) == (128, 128, 5)
    assert plan.tokens * 4 == whole.tokens and plan.model_calls == 9 * whole.model_calls
    assert plan.bytes_activations < whole.bytes_activations
    made = pipe.upscale(frames, RED, num_inference_steps=2, seed=1)
    assert made.frames.shape == (5, 128, 128, 3) and "scale" not in made.recipe
    assert np.abs(resize(made.frames, 64, 64).astype(int) - frames).mean() < 2
    again = Request.from_recipe(made.recipe, video=frames)
    assert (again.width, again.height) == (128, 128)


def test_tiles_that_agree_are_the_whole() -> None:
    assert tiles.spans(16, 8) == [(0, 8), (4, 12), (8, 16)] and tiles.spans(8, 8) == [(0, 8)]
    segment = Segment(5, 128, 96, 5, 128, 96, tile=(64, 64))
    x = torch.randn(1, 4, 2, 16, 12, generator=torch.Generator().manual_seed(0))
    tiled = tiles.Tiled(lambda part, times, context, known: 2 * part + times[:, :, None, None].sum(), segment)
    assert torch.allclose(tiled(x, torch.ones(1, 2), None, None), 2 * x + 2, atol=1e-5)


def test_what_a_frame_is_off_by_is_shared_between_known_ones() -> None:
    frames = np.full((5, 1, 1, 3), 100, np.uint8)
    known = {10: frames[0] + 8, 14: frames[0] + 0}
    assert corrected(frames, 10, known)[:, 0, 0, 0].tolist() == [108, 106, 104, 102, 100]


def test_frames_are_faded_into_each_other() -> None:
    frames = clip(3)
    made = Between(fastvid.open_clip(frames), 2)
    assert made.num_frames == 5 and np.array_equal(made.read(0, 5)[::2], frames)
    assert np.abs(made.read(1, 2)[0].astype(float) - (frames[0].astype(float) + frames[1]) / 2).max() <= 0.5
    assert list(made.known(1, 4)) == [2] and list(made.known(-3, 99)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("verb", "options", "match"),
    [
        ("interpolate", {"factor": 1}, "the nearest is 2"),
        ("interpolate", {"factor": 2, "fps": 30}, "both given"),
        ("interpolate", {"method": "difusion"}, "the nearest is diffusion"),
        ("upscale", {"scale": 2, "size": "96x96"}, "scale and width are both given"),
        ("upscale", {"tile": "32x64"}, "the nearest is 64x64"),
        ("upscale", {"progressive": 0.5}, "upscale starts from a clip"),
        ("generate", {"factor": 2}, "generate does not take it"),
    ],
)
def test_what_cannot_be_is_refused(pipe: fastvid.Pipeline, verb: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        pipe.plan(RED, verb=verb, **({} if verb == "generate" else {"video": clip(3)}), **options)


def test_the_rate_of_a_file_gives_the_factor_and_its_sound_stays(pipe: fastvid.Pipeline, tmp_path: Path) -> None:
    frames = clip(3)
    fastvid.Video(frames, 8.0, 0, None, {}).save(tmp_path / "a.mp4")
    plan = pipe.plan(verb="interpolate", video=tmp_path / "a.mp4", fps=24)
    assert (plan.fps, plan.num_frames) == (24, 7)
    with pytest.raises(InvalidRequest, match="the nearest is 24"):
        pipe.plan(verb="interpolate", video=tmp_path / "a.mp4", fps=22)
    with pytest.raises(InvalidRequest, match="one frame"):
        pipe.plan(verb="interpolate", video=frames[:1])
