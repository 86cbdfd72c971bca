"""Batches of prompts and seeds: the videos of single requests, byte for byte; together, to within rounding."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

import fastvid
from fastvid.models.common.contexts import joined
from fastvid.models.wan.vace import VACEContext
from fastvid.pipeline import batches

RED, BLUE = "a red circle moving right on a white background", "a blue square growing on a black background"
SHORT: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 5}


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


def clip(count: int = 9) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 255, (count, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompt": ["a", "b"], "seed": [1, 2]}, [("a", 1), ("b", 2)]),
        ({"prompt": ["a", "b"], "seed": 3}, [("a", 3), ("b", 3)]),
        ({"prompt": "a", "seed": range(2, 4)}, [("a", 2), ("a", 3)]),
        ({"prompt": ["a"], "seed": np.arange(2)}, [("a", 0), ("a", 1)]),
        ({"prompt": ("a",)}, [("a", None)]),
    ],
)
def test_lists_pair_up(given: dict[str, Any], expected: list[Any]) -> None:
    assert [(one.prompt, one.seed) for one in batches.requests_of(None, "generate", given)] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt": ["a", "b", "c"], "seed": [1, 2]},
            r"^seed=.*allowed is 1 value, or 3, as prompt has; the nearest is 3",
        ),
        ({"prompt": []}, r"^prompt=.*allowed is 1 to 10000 values"),
        ({"prompt": ["a", 3]}, r"^batch, video 2 of 2: prompt=3: allowed is one string"),
        ({"prompt": "a", "seed": [1, 2**63]}, r"^batch, video 2 of 2: seed="),
        ({"prompt": ["a", "b"], "checkpoint": "job"}, "^checkpoint is of one video"),
        ({"prompt": ["a", "b"], "batch_size": 0}, "batch_size=0: allowed is a whole number from 1"),
    ],
)
def test_what_no_batch_can_be_is_refused(pipe: fastvid.Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(fastvid.InvalidRequest, match=message):
        pipe.generate(**given, **SHORT)


@pytest.mark.parametrize("name", ["stream", "plan"])
def test_a_stream_and_a_plan_are_of_one_video(pipe: fastvid.Pipeline, name: str) -> None:
    for given in ({"prompt": [RED, BLUE]}, {"prompt": RED, "seed": [1, 2]}):
        with pytest.raises(fastvid.InvalidRequest, match="allowed is one .*; lists are for the verbs"):
            getattr(pipe, name)(**given, **SHORT)


def test_videos_are_those_of_single_requests(pipe: fastvid.Pipeline) -> None:
    made = pipe.generate([RED, BLUE], seed=[4, 5], **SHORT)
    assert isinstance(made, list) and [video.seed for video in made] == [4, 5]
    for video, prompt in zip(made, (RED, BLUE), strict=True):
        alone = pipe.generate(prompt, seed=video.seed, **SHORT)
        assert np.array_equal(video.frames, alone.frames) and video.recipe == alone.recipe
    again = asyncio.run(pipe.aextend(made[0], seed=[7], num_frames=4, num_inference_steps=1))
    assert len(again) == 1 and again[0].seed == 7 and np.array_equal(again[0].frames[:5], made[0].frames)


TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "guidance": ("generate", {"guidance_scale": 3.0, "negative_prompt": [BLUE, RED], **SHORT}),
    "picture": ("generate", {"image": clip(1)[0], **SHORT}),
    "redraw": ("generate", {"solver": "redraw", **SHORT}),
    "windows": ("generate", {"num_frames": 37, "num_inference_steps": 2}),
    "image": ("image", {"num_inference_steps": 2}),
    "sides": ("extend", {"video": clip(), "direction": "both", "num_frames": 4, "num_inference_steps": 2}),
    "edit": ("edit", {"video": clip(), "num_inference_steps": 4}),
    "flow edit": ("edit", {"video": clip(), "source_prompt": BLUE, "num_inference_steps": 4}),
    "mask": ("edit", {"video": clip(), "mask": np.eye(64, dtype=bool), "num_inference_steps": 4}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in ("guidance", "sides") else pytest.mark.slow) for name in TOGETHER]
)
def test_together_they_differ_by_rounding_alone(pipe: fastvid.Pipeline, case: str) -> None:
    """Measured: latents differ by up to 3e-5, of values up to 4."""
    verb, options = TOGETHER[case]
    given = {"prompt": [RED, BLUE], "seed": [1, 2], **options}
    alone, made = (getattr(pipe, verb)(**given, batch_size=size) for size in (1, 2))
    for one, other in zip(alone, made, strict=True):
        assert one.recipe == other.recipe and torch.allclose(one.latents, other.latents, atol=2e-3)
        assert np.abs(one.frames.astype(int) - other.frames).max() <= 2
    assert not np.array_equal(made[0].frames, made[1].frames)


def test_a_step_of_all_is_one_call(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, transformer = list[int](), pipe._model.transformer
    forward = transformer.forward
    monkeypatch.setattr(transformer, "forward", lambda x, *a, **o: calls.append(len(x)) or forward(x, *a, **o))
    requests = batches.requests_of(
        pipe, "generate", {"prompt": RED, "seed": range(5), "batch_size": 2, "guidance_scale": 1, **SHORT}
    )
    events = list(batches.events(pipe, requests, False, False))
    assert calls == [2, 2, 2, 2, 1, 1]
    for number in range(5):
        own = [event for at, event in events if at == number]
        assert [event.step for event in own if isinstance(event, fastvid.Step)] == [1, 2]
        assert isinstance(own[0], fastvid.Started) and isinstance(own[-1], fastvid.Finished)
    assert pipe._scheduler.running == 0


def test_as_many_as_fit_are_made_together(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pipe.plan(RED, **SHORT)
    room = plan.bytes_device + 2 * batches.bytes_of_one_more(plan) + 1000
    monkeypatch.setattr("fastvid.planning.plan.available_bytes", lambda device, mapped=0: room - pipe._model.bytes_held)
    request = batches.requests_of(pipe, "generate", {"prompt": [RED] * 4, "batch_size": 4, **SHORT})[0]
    with pytest.warns(fastvid.errors.FastvidWarning, match="only 3 of these videos fit"):
        assert pipe._fitting(request, 4) == 3


def test_levers_of_one_video_are_refused_together(pipe: fastvid.Pipeline) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="batch_size=2: cache=.* is for one video at a time"):
        pipe.generate([RED, BLUE], batch_size=2, cache="first_block", **SHORT)


def test_a_batch_that_is_left_early_frees_its_turn(pipe: fastvid.Pipeline) -> None:
    requests = batches.requests_of(pipe, "generate", {"prompt": RED, "seed": range(3), "batch_size": 2, **SHORT})
    stream = batches.events(pipe, requests, False, False)
    while not isinstance(next(stream)[1], fastvid.Step):
        pass
    stream.close()
    assert pipe._scheduler.running == 0 and pipe.generate(RED, seed=1, **SHORT).num_frames == 5


def test_contexts_of_other_models_are_joined() -> None:
    def one(value: float) -> VACEContext:
        pair = (torch.full((1, 2, 1, 3), value), torch.full((1, 2, 1, 3), -value))
        return VACEContext((pair, pair), (pair,), torch.full((1, 4, 1, 2, 2), value), (0.5,))

    both = joined([one(1.0), one(2.0)])
    assert both.layers[1][0][:, 0, 0, 0].tolist() == [1.0, 2.0] and both.control.shape[0] == 2 and both.scales == (0.5,)
