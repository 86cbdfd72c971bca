"""Step caches in requests: exact where nothing is reused, per request, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastvid
from fastvid.engine.events import Frames

PROMPT = "a red circle moving right on a white background"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 8, "seed": 3}
METHODS = ("first_block:threshold=0.3,warmup=2", "taylorseer:every=3,warmup=2", "easycache:threshold=0.3,warmup=2", 1.5)


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


@pytest.mark.parametrize("cache", METHODS)
def test_resumed_requests_are_bit_identical(pipe: fastvid.Pipeline, tmp_path: Path, cache: Any) -> None:
    whole = pipe.generate(PROMPT, **SMALL, cache=cache)
    exact = pipe.generate(PROMPT, **SMALL)
    assert not np.array_equal(whole.frames, exact.frames)
    folder = tmp_path / "job.ckpt"
    stream = pipe.stream(PROMPT, **SMALL, cache=cache, checkpoint=str(folder), checkpoint_every=0)
    for event in stream:
        if getattr(event, "step", 0) == 5:
            break
    stream.close()
    assert list(folder.glob("steps-*"))
    frames = [event.frames for event in pipe.resume(str(folder)) if isinstance(event, Frames)]
    assert np.array_equal(np.concatenate(frames), whole.frames)
