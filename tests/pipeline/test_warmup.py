"""Warm-up: a request finds every shape already run; nothing else changes."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
import torch

import fastvid

RED = "a red circle moving right on a white background"


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


def shapes_of(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Collects the shapes of all calls of the networks from now on."""
    seen: set[Any] = set()
    for module, name in (
        (pipe._model.transformer, "forward"),
        (pipe._model.vae, "decode"),
        (pipe._model.vae, "encode"),
    ):
        plain = getattr(module, name)

        def call(x: torch.Tensor, *args: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
            seen.add((name, tuple(x.shape), args[0] is None if args and name == "decode" else None))
            return plain(x, *args, **options)

        monkeypatch.setattr(module, name, call)
    return seen


@pytest.mark.parametrize(
    ("size", "request_"),
    [
        ("96x64", {"size": "96x64"}),
        ((64, 64, 9), {"num_frames": 9}),
        ({"verb": "image", "size": "128x64"}, {"verb": "image", "size": "128x64"}),
        (None, {}),
        pytest.param((64, 64, 90), {"num_frames": 90}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_request_finds_all_shapes_warm(
    pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch, size: Any, request_: dict[str, Any]
) -> None:
    seen = shapes_of(pipe, monkeypatch)
    pipe.warmup(size)
    warm, calls = set(seen), len(seen)
    assert calls
    seen.clear()
    for _ in pipe.stream(RED, seed=1, num_inference_steps=4, keep_latents=False, **request_):
        pass
    assert seen and seen <= warm


def test_nothing_else_changes(pipe: fastvid.Pipeline) -> None:
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "num_frames": 5}
    before = pipe.generate(RED, **options).frames
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    seconds = pipe.warmup(["64x64", (64, 64, 5)], num_inference_steps=2)
    assert list(seconds) == ["64x64, 17 frames", "64x64, 5 frames"] and min(seconds.values()) > 0
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert np.array_equal(pipe.generate(RED, **options).frames, before) and pipe._scheduler.running == 0
    assert set(asyncio.run(pipe.awarmup((64, 64, 5)))) == {"64x64, 5 frames"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (["64x64", "832*480"], r"^sizes\[1\] of the warm-up: size="),
        ([(64, 64), (64, 4096)], r"^sizes\[1\] of the warm-up: height=4096.*the nearest is 2048"),
        ([(64,)], r"^sizes\[0\]=.*allowed is sizes such as"),
        ([], "^sizes=.*allowed is sizes such as"),
        (3, "^sizes=3: allowed is sizes such as"),
        ({"verb": "extnd"}, r"^sizes\[0\] of the warm-up: verb='extnd'"),
        ({"verb": "extend"}, r"^sizes\[0\] of the warm-up: video is missing"),
        ({"checkpoint": "job"}, r"^sizes\[0\] of the warm-up: checkpoint: a warm-up makes no video"),
    ],
)
def test_bad_sizes_are_refused_before_anything_runs(
    pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch, sizes: Any, message: str
) -> None:
    seen = shapes_of(pipe, monkeypatch)
    with pytest.raises(fastvid.InvalidRequest, match=message):
        pipe.warmup(sizes)
    assert not seen
