"""A pipeline that is not real, for tests of the command line: it makes noise of the size that was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fastvid.cli import commands
from fastvid.engine.events import Finished, Frames, Started, Step
from fastvid.requests import inputs
from fastvid.requests.request import Request


@dataclass(frozen=True)
class Recipe:
    num_inference_steps: int = 4
    flow_shift: float = 3.0
    guidance_scale: float = 5.0
    fps: float = 16
    num_frames: int = 5
    height: int = 64
    width: int = 64
    negative_prompt: str = ""
    solver: str = "unipc"
    edit_strength: float | None = None
    spatial_multiple: int = 16
    temporal: int = 4


class FakePipe:
    """Makes frames from the request; raises `failure` after the first ones."""

    failure: BaseException | None = None

    def __init__(self) -> None:
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.closed = self.left = 0
        self.streamed: list[Request] = []

    def load(self, model: str, **kwargs: Any) -> FakePipe:
        self.loaded.append((model, kwargs))
        return self

    def __enter__(self) -> FakePipe:
        return self

    def __exit__(self, *_: Any) -> None:
        self.left += 1

    def stream(
        self, prompt: str | None = None, *, verb: str = "generate", keep_latents: bool = True, **kwargs: Any
    ) -> Iterator[Any]:
        assert not keep_latents, "memory would grow with the video"
        request = Request.make(verb, prompt=prompt, **kwargs)
        self.streamed.append(request)
        return self._events(inputs.read(request).resolve(Recipe()))

    def _events(self, made: Any) -> Iterator[Any]:
        try:
            recipe = made.to_recipe(model=self.loaded[-1][0], version="0", dtype="float32")
            steps = made.num_inference_steps
            yield Started(None, made.seed, made.num_frames, made.height, made.width, made.fps, steps, recipe)  # type: ignore[arg-type]
            yield from (Step(i + 1, steps, 0.5, 0.1) for i in range(steps))
            rng = np.random.default_rng(made.seed)
            for i in range(made.num_frames):
                yield Frames(i, rng.integers(0, 256, (1, made.height, made.width, 3), np.uint8))
                if self.failure is not None:
                    raise self.failure
            spent = {"text": 0.1, "denoise": 0.2, "decode": 0.3}
            yield Finished(made.seed, made.num_frames, made.fps, None, recipe, spent)
        finally:
            self.closed += 1

    def inspect(
        self, model: str, loras: Any = (), parts: Any = None, variant: Any = None, quantize: Any = None
    ) -> dict[str, Any]:
        return {"model": model, "parts": {"vae": {"parameters": 3, "types": ["F32"]}}}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = commands.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def failed(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """The one line on standard error of a command that fails and leaves nothing."""
    before = sorted(os.listdir())
    found, out, err = run(capsys, *words)
    assert (found, out, sorted(os.listdir())) == (status, "", before), err
    assert err.startswith("fastvid: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err
