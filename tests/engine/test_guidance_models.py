"""Guidance that does less in models that see more than a text: both halves in one call, and a reused difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import skyreels_cases
import torch
from animate_models import driving, write_animate
from fun_models import VARIANTS, write_fun
from image_models import write_image_model
from pipelines import clip, picture, write_vace

import fastvid

FUN = ("control-1.1", "control-a14b", "inp-5b")
ASKED: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "blue square", "guidance_scale": 4.0, "seed": 3}
ASKED |= {"num_inference_steps": 7, "size": "96x64"}


def models() -> dict[str, tuple[Callable[[Path], Any], dict[str, Any], dict[str, Any]]]:
    """kind -> what writes it, what it is loaded with, and what a request of it has beside."""
    short = {"num_frames": 9}
    found = {
        "vace": (write_vace, {}, {"video": clip(9), "reference_images": [picture(2)], **short}),
        "animate": (write_animate, {}, driving(9, segment_frame_length=9)),
        "skyreels": (
            lambda folder: skyreels_cases.make(folder=folder),
            {"variant": "skyreels-v2-df-1.3b-540p"},
            {"num_frames": 21, "causal_block_size": 3, "causal_attention": True},
        ),
        "skyreels in turns": (
            lambda folder: skyreels_cases.make(folder=folder),
            {"variant": "skyreels-v2-df-1.3b-540p"},
            {"num_frames": 21, "ar_step": 2, "image": picture(1)},
        ),
    }
    for kind in ("i2v", "a14b", "ti2v"):
        found[kind] = (lambda folder, kind=kind: write_image_model(folder, kind), {}, {"image": picture(1), **short})
    for kind in FUN:
        more = {"video": clip(9), "reference_images": [picture(2)]} if "control" in kind else {"image": picture(1)}
        load = {"variant": VARIANTS[kind]}
        found[kind] = (lambda folder, kind=kind: write_fun(folder, kind), load, {**more, **short})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", models())
@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
def test_levers_of_guidance(kind: str, tmp_path: Path) -> None:
    write, load, more = models()[kind]
    write(tmp_path / "model")
    pipe = fastvid.load(str(tmp_path / "model"), device="cpu", **load)
    for block in (block for expert in pipe._model.experts.modules for block in expert.blocks):
        block.attn2.to_out[0].weight.data *= 20  # so that prompts count
    asked = {**ASKED, **more}
    apart, count = run(pipe, asked)
    together, sizes = run(pipe, {**asked, "guidance_batch": True})
    assert set(sizes) == {2} and sum(sizes) == sum(count) and error(together, apart) < 1e-5
    assert pipe.plan(**asked, guidance_batch=True).model_calls == sum(sizes)
    for levers in ({"guidance_every": 2}, {"guidance_interval": (0.3, 0.95)}):
        less, sizes = run(pipe, {**asked, **levers})
        assert sum(sizes) == pipe.plan(**asked, **levers).model_calls
        if kind != "skyreels in turns" or "guidance_interval" in levers:
            assert sum(sizes) < sum(count) and 0 < error(less, apart) < 0.5
        else:
            assert error(less, apart) == 0


def run(pipe: fastvid.Pipeline, asked: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """The latents, and how many prompts each call of the model had."""
    sizes: list[int] = []
    experts = pipe._model.experts.modules
    hooks = [one.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))) for one in experts]
    latents = pipe.generate(**asked).latents
    for hook in hooks:
        hook.remove()
    return latents, sizes


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
