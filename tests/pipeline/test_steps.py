"""pipe.embed, pipe.encode, pipe.decode: the same as what generate does inside, and clear about what they can't take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastvid
from fastvid.distributed.mesh import Mesh
from fastvid.models.wan.config import WanVAEConfig
from fastvid.pipeline import steps
from fastvid.planning.memory import decoder_bytes

OPTIONS = {"num_inference_steps": 2, "num_frames": 9, "seed": 1}


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


def test_embed_is_what_a_prompt_becomes(pipe: fastvid.Pipeline) -> None:
    embeds = pipe.embed("a red circle moving right on a white background")
    assert embeds.shape == (1, 16, 128)
    by_text = pipe.generate("a red circle moving right on a white background", **OPTIONS)
    by_embeds = pipe.generate(prompt_embeds=embeds, **OPTIONS)
    assert np.array_equal(by_text.frames, by_embeds.frames)


def test_decode_is_what_generate_shows(pipe: fastvid.Pipeline) -> None:
    video = pipe.generate("a red circle", height=64, width=96, **OPTIONS)
    again = pipe.decode(video.latents)
    difference = np.abs(again.astype(int) - video.frames.astype(int))
    # Chunks of another length: equal but for the order of sums.
    assert again.shape == video.frames.shape and difference.max() <= 1 and (difference == 0).mean() > 0.999


def test_decode_takes_as_many_latent_frames_as_a_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = SimpleNamespace(config=WanVAEConfig())
    model: Any = SimpleNamespace(vae=vae, mesh=Mesh(), vae_dtype=torch.bfloat16, device=torch.device("cuda"))
    monkeypatch.setattr(steps, "available_bytes", lambda device: 80 << 30)
    small, large = (1, 16, 21, 30, 52), (1, 16, 21, 136, 240)
    assert [steps._chunk(model, shape) for shape in (small, large, (1, 16, 3, 30, 52))] == [10, 1, 3]
    found = [decoder_bytes(vae.config, 240, 416, 4 * count, itemsize=2) for count in (2, 5, 10)]
    for bytes_free, wanted in ((found[2], 10), (found[2] - 1, 5), (found[1] - 1, 2), (found[0] - 1, 1), (0, 1)):
        monkeypatch.setattr(steps, "available_bytes", lambda device, free=bytes_free: free)
        assert steps._chunk(model, small) == wanted
    model.device = torch.device("cpu")
    assert steps._chunk(model, small) == 1


def test_a_clip_survives_encode_and_decode(pipe: fastvid.Pipeline) -> None:
    frames = np.zeros((5, 64, 72, 3), np.uint8)
    frames[:, 20:44, 20:44] = (230, 25, 25)
    latents = pipe.encode(frames)
    assert latents.shape == (1, 16, 2, 8, 9) and latents.dtype == torch.float32 and not latents.requires_grad
    again = pipe.decode(latents)
    assert np.abs(again.astype(float) - frames).mean() < 10
    assert np.array_equal(pipe.encode(torch.from_numpy(frames)), latents)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (np.zeros((4, 64, 64, 3), np.uint8), "nearest is 5"),
        (np.zeros((0, 64, 64, 3), np.uint8), "nearest is 1"),
        (np.zeros((5, 60, 64, 3), np.uint8), "height 60; it must be a multiple of 8, such as 64"),
        (np.zeros((5, 64, 3, 3), np.uint8), "width 3"),
        (np.zeros((5, 64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 3), np.uint8), r"\[T, H, W, 3\]"),
        ("clip.mp4", "a tensor or a numpy array"),
    ],
)
def test_frames_that_cannot_be_encoded(pipe: fastvid.Pipeline, frames: Any, says: str) -> None:
    with pytest.raises(fastvid.InvalidRequest, match=says):
        pipe.encode(frames)


@pytest.mark.parametrize(
    ("latents", "says"),
    [
        (torch.zeros(1, 4, 2, 8, 8), r"\[1, 16, T, h, w\]"),
        (torch.zeros(16, 2, 8, 8), r"\[1, 16, T, h, w\]"),
        (torch.zeros(1, 16, 0, 8, 8), r"\[1, 16, T, h, w\]"),
        (torch.zeros(1, 16, 1, 8, 8, dtype=torch.long), "floating point"),
        (torch.full((1, 16, 1, 8, 8), torch.nan), "finite"),
        (None, "a tensor or a numpy array"),
    ],
)
def test_latents_that_cannot_be_decoded(pipe: fastvid.Pipeline, latents: Any, says: str) -> None:
    with pytest.raises(fastvid.InvalidRequest, match=says):
        pipe.decode(latents)


def test_a_prompt_that_cannot_be_embedded(pipe: fastvid.Pipeline) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="prompt"):
        pipe.embed(7)  # type: ignore[arg-type]
