"""The first latent frame of a video, kept in view of later windows by models that were trained so; and the guidance of
windows in which something is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from streams import frames_of

import fastvid
from fastvid.engine import conditioning
from fastvid.models.preset import Rollout
from fastvid.requests.request import Request
from fastvid.sampling import loop, noise_table
from fastvid.sampling.sigmas import find_solver

GAP = 16
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """Windows of four columns, of which the next is shown one, told of it by timesteps, and the first."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder)
    return with_preset(fastvid.load(str(folder), device="cpu"), window=4, overlap=1, carries=True, anchor=GAP)


def with_preset(pipe, **changed):
    recipe = dataclasses.replace(pipe._model.preset, per_token_timesteps=True, **changed)
    return type(pipe)(dataclasses.replace(pipe._model, preset=recipe))


def calls_of(pipe, monkeypatch, run):
    """What `run` gives, and (latents, timesteps, where the columns stand) of every call of the transformer in it."""
    calls, transformer = [], pipe._model.transformer
    forward = transformer.forward

    def spy(latents, timestep, text, **options):
        calls.append((latents, timestep, options["rope_offset"]))
        return forward(latents, timestep, text, **options)

    monkeypatch.setattr(transformer, "forward", spy)
    return run(), calls


@pytest.mark.parametrize("anchor", [False, True])
def test_positions_hold_the_first_column_where_it_is_wanted(anchor):
    clean = torch.randn(1, 2, 5, 2, 2)
    spans = noise_table.window_spans(5, 3, 1)
    rows = noise_table.windows(np.array([1.0, 0.5]), spans, torch.zeros(5, dtype=torch.bool))
    solver = find_solver("euler")
    walked = list(
        loop.walk(
            rows,
            torch.randn(1, 2, 5, 2, 2),
            solver,
            lambda row: lambda x, sigma: clean[:, :, row.start : row.stop],
            anchor=anchor,
        )
    )
    assert [w.position.first is None for w in walked] == [True, not anchor, not anchor, not anchor]
    if anchor:
        torch.testing.assert_close(walked[-1].position.first, clean[:, :, :1])
        assert walked[-1].position.first.untyped_storage().nbytes() == 4 * 2 * 2 * 2  # not the window with it


def test_later_windows_are_shown_the_first_frame(pipe, monkeypatch):
    video, calls = calls_of(pipe, monkeypatch, lambda: pipe.generate("a", num_frames=25, guidance_scale=1.0, **SMALL))
    assert [latents.shape[2] for latents, _, _ in calls] == [4, 4, 5, 5]  # 7 columns: 0-3, then 3-6
    for _, timestep, places in calls[:2]:
        assert places == 0 and (timestep > 0).all()
    for latents, timestep, places in calls[2:]:
        assert tuple(places) == (-GAP, 0, 1, 2, 3)
        torch.testing.assert_close(latents[:, :, :1], video.latents[:, :, :1].to(latents))
        torch.testing.assert_close(latents[:, :, 1:2], video.latents[:, :, 3:4].to(latents))
        assert (timestep[0].view(5, -1)[:2] == 0).all() and (timestep[0].view(5, -1)[2:] > 0).all()
    assert pipe.plan("a", num_frames=25, guidance_scale=1.0, **SMALL).tokens == 5 * 16
    without = with_preset(pipe, anchor=None).generate("a", num_frames=25, guidance_scale=1.0, **SMALL)
    assert torch.equal(without.latents[:, :, :4], video.latents[:, :, :4])
    assert not torch.equal(without.latents[:, :, 4:], video.latents[:, :, 4:])


def test_what_is_shown_counts_for_the_levels_of_tokens_too():
    x, anchor = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 4, 1, 4, 4)
    levels = torch.rand(3 * 4, dtype=torch.float64) + 0.1
    seen, told = conditioning.anchored(x, levels, anchor)
    assert seen.shape[2] == 4 and torch.equal(seen[:, :, :1], anchor)
    assert torch.equal(told, torch.cat((torch.zeros(4, dtype=torch.float64), levels)))
    assert conditioning.anchored(x, levels[:3], anchor)[1].tolist() == [0.0, *levels[:3].tolist()]


def test_an_edit_by_the_difference_shows_each_prompt_its_own_first_frame(pipe, monkeypatch):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (25, 64, 64, 3), dtype=np.uint8)
    options = {"num_inference_steps": 4, "strength": 0.5, "seed": 3, "guidance_scale": 1.0}
    edited, calls = calls_of(pipe, monkeypatch, lambda: pipe.edit(clip, "b", source_prompt="a", **options))
    shown = [latents[:, :, :1] for latents, _, _ in calls if latents.shape[2] == 5]
    head = pipe.encode(clip)[:, :, :1]
    assert len(shown) == 4
    for target, source in zip(shown[::2], shown[1::2], strict=True):
        torch.testing.assert_close(source, head.to(source), rtol=0, atol=1e-5)
        torch.testing.assert_close(target, edited.latents[:, :, :1].to(target), rtol=0, atol=1e-5)
        assert not torch.allclose(target, source, atol=1e-3)


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 2, 4, 5))])
def test_a_request_goes_on_with_the_first_frame_in_view(pipe, tmp_path, stop):
    """The last windows begin with rows 3 and 5."""
    request = {"num_frames": 37, "guidance_scale": 2.0, **SMALL}
    whole, folder = pipe.generate("a", **request), str(tmp_path / "job.ckpt")
    stream = pipe.stream("a", checkpoint=folder, checkpoint_every=0, **request)
    for event in stream:
        if isinstance(event, fastvid.Step) and event.step == stop:
            break
    stream.cancel()
    stream.close()
    assert np.array_equal(frames_of(pipe.resume(folder)), whole.frames)


# ---------------------------------------------------------------- guidance where something is known


@pytest.mark.parametrize(
    ("given", "windows", "recorded"),
    [
        ({}, (2, 1), (3.0, 1.0)),
        ({"guidance_scale": 2.0}, (2, 2), (2.0, None)),
        ({"guidance_scale": 1.0}, (1, 1), (1.0, None)),
        ({"known_guidance_scale": 2.0}, (2, 2), (3.0, 2.0)),
        ({"guidance_scale": 1.0, "known_guidance_scale": 2.0}, (1, 2), (1.0, 2.0)),
    ],
)
def test_windows_with_known_frames_have_a_scale_of_their_own(pipe, monkeypatch, given, windows, recorded):
    pipe = with_preset(pipe, guidance_scale=3.0, known_guidance_scale=1.0)
    request = {"num_frames": 25, **SMALL, **given}
    video, calls = calls_of(pipe, monkeypatch, lambda: pipe.generate("a", **request))
    steps = SMALL["num_inference_steps"]
    assert [sum(latents.shape[2] == n for latents, _, _ in calls) for n in (4, 5)] == [steps * n for n in windows]
    assert pipe.plan("a", **request).model_calls == len(calls)
    assert (video.recipe["guidance_scale"], video.recipe.get("known_guidance_scale")) == recorded
    monkeypatch.undo()
    again = Request.from_recipe(video.recipe).arguments()
    assert np.array_equal(pipe.generate(**again).frames, video.frames)


@pytest.mark.parametrize("verb", ["picture", "extend", "extend_before", "blend", "edit"])
def test_calls_are_counted_where_pictures_and_clips_are_known(pipe, monkeypatch, verb):
    pipe = with_preset(pipe, guidance_scale=3.0, known_guidance_scale=1.0)
    clip = np.random.default_rng(1).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    steps = {"num_inference_steps": 2, "seed": 1}
    run, kwargs = {
        "picture": ("generate", {"prompt": "a", "last_image": clip[0], "num_frames": 13, "size": "64x64"}),
        "extend": ("extend", {"video": clip, "prompt": "a", "num_frames": 20}),
        "extend_before": ("extend", {"video": clip, "prompt": "a", "num_frames": 9, "direction": "before"}),
        "blend": ("blend", {"video": clip, "video_2": clip, "prompt": "a", "num_frames": 8}),
        "edit": ("edit", {"video": clip, "prompt": "a"}),
    }[verb]
    events, calls = calls_of(pipe, monkeypatch, lambda: list(pipe.stream(verb=run, **kwargs, **steps)))
    assert events[0].plan.model_calls == len(calls) > 0
    assert verb == "edit" or all((timestep == 0).any() for _, timestep, _ in calls)


def test_causal_models_have_one_scale(tmp_path):
    tiny.write_checkpoint(tmp_path)
    pipe = fastvid.load(str(tmp_path), device="cpu")
    pipe = with_preset(pipe, rollout=Rollout(frames_per_block=1))
    with pytest.raises(fastvid.InvalidRequest, match="known_guidance_scale"):
        pipe.plan("a", known_guidance_scale=2.0, **SMALL)
