"""The checkpoint that ships with the package: its layout, its size, and that its videos show what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvid
from fastvid.api import inspect
from fastvid.benchmarks.quality.clips import Scene, draw
from fastvid.benchmarks.quality.measure import measure
from fastvid.loaders.names import find_folder

FOLDER = find_folder("embedded")


@pytest.fixture(scope="module")
def pipe():
    return fastvid.load("embedded", device="cpu")


def test_it_is_small_and_in_the_published_layout():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 32_000_000
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["expand_timesteps"] is True
    assert not list(FOLDER.rglob("*.bin")) and not list(FOLDER.rglob("*.pt*"))


def test_nothing_is_wrong_with_it():
    found = inspect("embedded")
    assert found["problems"] == [] and found["recipe"]["name"] == "embedded" and found["text_length"] == 16


def test_defaults(pipe):
    plan = pipe.plan("a red circle")
    assert (plan.width, plan.height, plan.num_frames, plan.fps, plan.steps) == (64, 64, 17, 16.0, 20)


def test_diffusers_loads_it_and_makes_the_same_first_step(pipe):
    """The layout is the real one: diffusers' own pipeline reads it, and its transformer agrees with ours."""
    from diffusers import WanPipeline

    theirs = WanPipeline.from_pretrained(FOLDER)
    text = theirs.encode_prompt("a red circle moving right", do_classifier_free_guidance=False, max_sequence_length=16)
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.transformer(latents, torch.tensor([700.0]), text[0]).sample
        embeds = pipe._model.embed("a red circle moving right")
        made = pipe._model.transformer(latents, torch.tensor([700.0]), embeds)
    torch.testing.assert_close(embeds, text[0], rtol=1e-4, atol=1e-5)
    assert float((made - wanted).norm() / wanted.norm()) < 1e-5


def test_its_vae_keeps_a_clip(pipe):
    scene = Scene("red", "circle", "moving right", "white", across=0.4)
    clip = draw(scene, 17, 64, 64).movedim(0, 1)[None]
    vae = pipe._model.vae
    with torch.no_grad():
        again = vae.decode(vae.encode(clip)[0])[0]
    assert float(-10 * torch.log10(((again - clip) / 2).square().mean())) > 26


SCENES = [
    Scene("red", "circle", "moving right", "white"),
    Scene("green", "square", "moving left", "black"),
    Scene("blue", "triangle", "moving up", "white"),
    Scene("yellow", "circle", "moving down", "black"),
    Scene("red", "square", "standing still", "white"),
    Scene("blue", "circle", "growing", "white"),
]


def test_videos_show_what_was_asked_for(pipe):
    """Six captions of the words that every version knows; the whole score is
    `python -m fastvid.benchmarks.quality.score`."""
    shown = [measure(pipe.generate(scene.caption, seed=i).frames) for i, scene in enumerate(SCENES)]
    right = {
        trait: np.mean([getattr(s, trait) == getattr(m, trait) for s, m in zip(SCENES, shown, strict=True)])
        for trait in ("colour", "background", "motion")
    }
    assert min(right.values()) >= 4 / 6, right


def test_the_command_line_s_first_line(tmp_path: Path):
    from fastvid.cli.commands import main
    from fastvid.media.metadata import read_video

    out = tmp_path / "out.mp4"
    assert main(["generate", "a red circle moving right on a white background", "-o", str(out), "--seed", "1"]) == 0
    frames, fps = read_video(out)
    assert frames.shape == (17, 64, 64, 3) and fps == 16
    again = tmp_path / "again.mp4"
    assert main(["generate", "--recipe", str(out), "-o", str(again), "--quiet"]) == 0
    assert again.read_bytes() == out.read_bytes()
