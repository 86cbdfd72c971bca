"""Batches together, and warm-ups, on models of every kind: what each is told beside the text is joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from animate_models import driving, write_animate
from fun_models import VARIANTS, write_fun
from image_models import write_image_model
from pipelines import clip, picture, write_vace
from skyreels_cases import make

import fastvid
from fastvid.models.wan import presets

pytestmark = pytest.mark.slow


def _rollout(folder: Path) -> fastvid.Pipeline:
    tiny.write_checkpoint(folder)
    model = fastvid.load(str(folder), device="cpu")._model
    return fastvid.Pipeline(replace(model, preset=replace(presets.LONGLIVE, spatial_multiple=16, temporal=4)))


def _of(write: Callable[..., Any], *kind: str, variant: str | None = None) -> Callable[[Path], fastvid.Pipeline]:
    def load(folder: Path) -> fastvid.Pipeline:
        made = write(folder, *kind)
        return fastvid.load(str(getattr(made, "folder", folder)), device="cpu", variant=variant)

    return load


CASES: dict[str, tuple[Callable[[Path], fastvid.Pipeline], dict[str, Any]]] = {
    "rollout": (_rollout, {"num_frames": 33}),
    "vace": (_of(write_vace), {"video": clip(9), "reference_images": [picture(3)]}),
    "i2v": (_of(write_image_model, "i2v"), {"image": picture(1)}),
    "a14b": (_of(write_image_model, "a14b"), {"image": picture(1), "num_inference_steps": 4}),
    "ti2v": (_of(write_image_model, "ti2v"), {"image": picture(1)}),
    "control": (
        _of(write_fun, "control-1.1", variant=VARIANTS["control-1.1"]),
        {"video": clip(9), "image": picture(1)},
    ),
    "animate": (_of(write_animate), driving(9)),
    "skyreels": (
        _of(lambda folder: make(folder=folder), variant="skyreels-v2-df-1.3b-540p"),
        {"image": picture(1), "addnoise_condition": 20, "ar_step": 1, "num_inference_steps": 3},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_videos_together_and_warm_ups(tmp_path: Path, kind: str) -> None:
    load, given = CASES[kind]
    pipe = load(tmp_path)
    options: dict[str, Any] = {"size": "96x64", "num_frames": 9, **given}
    if kind != "rollout":
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": ["blue", "white"], **options}
    prompts, seeds = ["a red circle moving left", "a blue square"], [1, 2]
    alone, together = (pipe.generate(prompts, seed=seeds, batch_size=size, **options) for size in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-3) and one.recipe == other.recipe
    assert not torch.allclose(together[0].latents, together[1].latents, atol=1e-2)
    sizes = {"size": "96x64", "num_frames": 9, "num_inference_steps": given.get("num_inference_steps")}
    assert pipe.warmup(sizes | ({"num_inference_steps": None} if kind == "rollout" else {}))
