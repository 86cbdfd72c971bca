"""The whole way: against diffusers' WanPipeline on the same weights, and what a service relies on: equal bytes for
equal seeds, requests that leave no trace on each other, cancelling, refusals before anything is computed."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tiny
import torch
from pipelines import diffusers_frames

import fastvid
from fastvid.engine.events import Finished, Frames, Started, Step

PROMPT = "a red circle moving right on a white background"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, tiny.write_checkpoint(folder)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return fastvid.load(str(checkpoint[0]), device="cpu")


@pytest.mark.parametrize(("height", "width", "num_frames"), [(64, 96, 9), (80, 64, 13)])
def test_frames_equal_diffusers(checkpoint, pipe, height, width, num_frames):
    generator = torch.Generator().manual_seed(height)
    latents = torch.randn(1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    sigmas = [1.0, 0.95, 0.88, 0.8, 0.69, 0.55, 0.38, 0.2]
    theirs = diffusers_frames(checkpoint[1], latents, sigmas, 4.0, height, width, num_frames)
    ours = pipe.generate(
        "a red circle moving left",
        negative_prompt="blue square",
        height=height,
        width=width,
        num_frames=num_frames,
        solver="euler",
        sigmas=sigmas,
        guidance_scale=4.0,
        latents=latents,
    ).frames
    assert ours.shape == theirs.shape and ours.std() > 5
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert (difference <= 1).mean() >= 0.999


def test_same_seed_same_bytes_and_other_seed_other_bytes(pipe):
    options = {"num_inference_steps": 3, "num_frames": 5, "height": 64, "width": 64}
    one, two, other = (pipe.generate("a red circle", seed=s, **options) for s in (7, 7, 8))
    assert np.array_equal(one.frames, two.frames) and torch.equal(one.latents, two.latents)
    assert not np.array_equal(one.frames, other.frames)
    assert (one.seed, one.recipe["seed"]) == (7, 7)


def test_requests_leave_no_trace_on_each_other(pipe):
    options = {"num_inference_steps": 3, "num_frames": 5, "height": 64, "width": 64}
    first = pipe.generate("a red circle", seed=1, **options).frames
    for i in range(8):
        pipe.generate("a blue square", seed=100 + i, solver=("euler", "dpm++")[i % 2], **options)
    assert np.array_equal(pipe.generate("a red circle", seed=1, **options).frames, first)


def test_two_interleaved_requests_equal_each_alone(pipe):
    a = {"num_inference_steps": 4, "num_frames": 9, "height": 64, "width": 64, "seed": 1}
    b = {"num_inference_steps": 6, "num_frames": 5, "height": 64, "width": 96, "seed": 2, "solver": "dpm++"}
    alone = [pipe.generate("a red circle", **o).frames for o in (a, b)]
    streams = [pipe.stream("a red circle", **o) for o in (a, b)]
    frames: list[list[np.ndarray]] = [[], []]
    running = [0, 1]
    while running:
        for i in list(running):
            event = next(streams[i], None)
            if event is None:
                running.remove(i)
            elif isinstance(event, Frames):
                frames[i].append(event.frames)
    for made, wanted in zip(frames, alone, strict=True):
        assert np.array_equal(np.concatenate(made), wanted)


def test_events_in_order_and_grad_mode_untouched(pipe):
    assert torch.is_grad_enabled()
    kinds = []
    for event in pipe.stream("a red circle", num_inference_steps=3, num_frames=7, height=70, width=66, seed=0):
        assert torch.is_grad_enabled()
        kinds.append(type(event))
        if isinstance(event, Started):
            assert (event.num_frames, event.height, event.width, event.total_steps) == (7, 70, 66, 3)
        if isinstance(event, Frames):
            assert event.frames.dtype == np.uint8 and event.frames.shape[1:] == (70, 66, 3)
        if isinstance(event, Finished):
            assert event.latents.shape == (1, 16, 3, 10, 10)
    assert kinds[0] is Started and kinds[-1] is Finished and kinds.count(Step) == 3


def test_cancel_stops_between_steps(pipe):
    stream = pipe.stream("a red circle", num_inference_steps=50, num_frames=5, height=64, width=64, seed=0)
    steps = 0
    with pytest.raises(fastvid.Cancelled):
        for event in stream:
            if isinstance(event, Step):
                steps += 1
                stream.cancel()
    assert steps == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8])
def test_every_frame_count_comes_out(pipe, count):
    video = pipe.generate("a", num_frames=count, height=64, width=64, num_inference_steps=1, seed=0)
    assert len(video.frames) == count


def test_given_embeddings_stand_for_the_prompt(pipe):
    options = {"num_inference_steps": 2, "num_frames": 5, "height": 64, "width": 64, "seed": 3, "guidance_scale": 1.0}
    embeds = pipe._model.embed("a red circle")
    ours = pipe.generate(prompt_embeds=embeds, **options)
    assert np.array_equal(ours.frames, pipe.generate("a red circle", **options).frames)
    assert not np.array_equal(ours.frames, pipe.generate("a blue square", **options).frames)


def test_initial_latents_are_not_changed(pipe):
    latents = torch.randn(1, 16, 2, 8, 8)
    before = latents.clone()
    pipe.generate("a", latents=latents, num_frames=5, height=64, width=64, num_inference_steps=2)
    assert torch.equal(latents, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"latents": torch.zeros(1, 16, 2, 8, 9)}, "must be [1, 16, 2, 8, 8]"),
        ({"latents": torch.full((1, 16, 2, 8, 8), float("nan"))}, "NaN"),
        ({"latents": torch.zeros(1, 16, 2, 8, 8, dtype=torch.int32)}, "floating point"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"num_frames": 2**62}, "num_frames"),
        ({"width": 63}, "64"),
        ({"stepss": 3}, "num_inference_steps"),
        ({"solver": "unipcc"}, "unipc"),
    ],
)
def test_bad_requests_are_refused_at_once(pipe, options, text):
    start = time.perf_counter()
    with pytest.raises(fastvid.InvalidRequest, match=None) as error:
        pipe.stream("a", **{"num_frames": 5, "height": 64, "width": 64, **options})
    assert time.perf_counter() - start < 0.5
    assert text in str(error.value)


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(pipe, monkeypatch):
    from fastvid.planning import plan

    monkeypatch.setattr(plan, "available_bytes", lambda *_: 400_000_000)
    with pytest.raises(fastvid.OutOfMemory, match="num_frames=") as error:
        pipe.plan("a", num_frames=2**17, height=256, width=256)
    fits = int(str(error.value).rsplit("num_frames=", 1)[1])
    assert fits % 4 == 1
    assert pipe.plan("a", num_frames=fits, height=256, width=256).num_frames == fits
    with pytest.raises(fastvid.OutOfMemory):
        pipe.plan("a", num_frames=fits + 4, height=256, width=256)


def test_plan_counts_what_is_run(pipe):
    plan = pipe.plan("a", num_frames=10, height=70, width=90, num_inference_steps=7, guidance_scale=2.0)
    assert (plan.model_frames, plan.model_height, plan.model_width) == (13, 80, 96)
    assert plan.latent_shape == (16, 4, 10, 12) and plan.tokens == 4 * 5 * 6 and plan.model_calls == 14


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("embeded", "embedded"),
        ("no/such-model", "hf download"),
        ("/no/such/folder", "does not exist"),
        ("", "embedded"),
    ],
)
def test_unknown_models(model, text):
    with pytest.raises(fastvid.Error, match=text):
        fastvid.load(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"dtype": "fp23"}, "float32"), ({"device": "cpuu"}, "cpu"), ({"backend": "reff"}, "reference")],
)
def test_bad_load_options(options, text):
    with pytest.raises(fastvid.InvalidRequest, match=text):
        fastvid.load("embedded", **options)
