"""Videos from pictures: whole pipelines against diffusers' on random weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import write_image_model
from PIL import Image
from pipelines import SIGMAS, picture, run_theirs

import fastvid
from fastvid.cli.commands import main

Model = tuple[str, Any, fastvid.Pipeline]  # kind, diffusers', ours


@pytest.fixture(scope="module", params=["i2v", "flf2v", "a14b", "ti2v"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, fastvid.Pipeline]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_image_model(folder, request.param)
    return request.param, theirs, fastvid.load(str(folder), device="cpu")


def test_frames_equal_diffusers(model: Model) -> None:
    kind, theirs, pipe = model
    images = {"image": picture(0)}
    if kind in ("flf2v", "a14b"):
        images["last_image"] = picture(1)
    scale = 16 if kind == "ti2v" else 8
    channels = theirs.vae.config.z_dim
    latents = torch.randn(1, channels, 3, 64 // scale, 96 // scale, generator=torch.Generator().manual_seed(4))
    made = pipe.generate(
        "a red circle moving left",
        negative_prompt="blue square",
        num_frames=9,
        solver="euler",
        sigmas=SIGMAS,
        guidance_scale=4.0,
        latents=latents,
        size="96x64",
        **images,
    ).frames
    wanted = run_theirs(theirs, latents, **{name: Image.fromarray(value) for name, value in images.items()})
    assert made.shape == wanted.shape and made.std() > 5
    difference = np.abs(made.astype(int) - wanted.astype(int))
    assert (difference <= 1).mean() >= 0.999


def test_the_picture_decides_what_comes_out(model: Model) -> None:
    kind, _, pipe = model
    last = {"last_image": picture(2)} if kind == "flf2v" else {}
    options = {"num_frames": 5, "num_inference_steps": 2, "seed": 1, "size": "64x64", **last}
    one, other = (pipe.generate("a", image=picture(seed, 64, 64), **options).frames for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_what_does_not_fit_the_model_is_refused(model: Model) -> None:
    kind, _, pipe = model
    options = {"num_inference_steps": 1, "size": "64x64"}
    if kind != "ti2v":
        with pytest.raises(fastvid.InvalidRequest, match="give image="):
            pipe.plan("a", **options)
    if kind in ("i2v", "a14b"):  # one frame is one frame, as diffusers makes it
        assert pipe.generate("a", image=picture(0), num_frames=1, **options).frames.shape == (1, 64, 64, 3)
    if kind == "flf2v":
        with pytest.raises(fastvid.InvalidRequest, match="give last_image="):
            pipe.plan("a", image=picture(0), num_frames=5, **options)
    if kind == "i2v":
        with pytest.raises(fastvid.InvalidRequest, match="last_image"):
            pipe.plan("a", image=picture(0), last_image=picture(1), num_frames=5, **options)
    if kind in ("flf2v", "a14b"):
        with pytest.raises(fastvid.InvalidRequest, match="nearest is 9"):
            pipe.plan("a", image=picture(0), last_image=picture(1), num_frames=7, **options)


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


@pytest.mark.slow
class TestEmbedded:
    """The embedded model takes a first frame natively."""

    def test_the_first_frame_is_the_picture(self, pipe: fastvid.Pipeline, tmp_path: Path) -> None:
        prompt = "a red circle moving right on a white background"
        first = pipe.generate(prompt, seed=1, num_frames=1).frames[0]
        video = pipe.generate(prompt, seed=2, image=first)
        assert np.abs(video.frames[0].astype(int) - first).mean() < 6
        assert np.abs(video.frames[-1].astype(int) - first).mean() > 6
        Image.fromarray(first).save(tmp_path / "first.png")
        for same in (tmp_path / "first.png", str(tmp_path / "first.png"), Image.fromarray(first), torch.tensor(first)):
            again = pipe.generate(prompt, seed=2, image=same)
            assert np.array_equal(again.frames, video.frames)
        assert set(video.recipe["image"]) == {"shape", "dtype", "sha256"}

    def test_from_the_command_line(self, pipe: fastvid.Pipeline, tmp_path: Path) -> None:
        Image.fromarray(picture(0, 64, 64)).save(tmp_path / "first.png")
        words = ["generate", "a red circle", "--image", str(tmp_path / "first.png"), "--seed", "3", "--steps", "2"]
        assert main([*words, "--quiet", "-o", str(tmp_path / "out.npy")]) == 0
        made = pipe.generate("a red circle", image=picture(0, 64, 64), seed=3, num_inference_steps=2)
        assert np.array_equal(np.load(tmp_path / "out.npy"), made.frames)
        assert main([*words[:3], str(tmp_path / "missing.png"), "--quiet", "-o", str(tmp_path / "no.npy")]) == 1
        assert not (tmp_path / "no.npy").exists()

    def test_the_size_follows_the_picture(self, pipe: fastvid.Pipeline) -> None:
        plan = pipe.plan("a red circle", image=picture(0, 64, 128))
        assert plan.width == 2 * plan.height
        assert pipe.plan("a red circle", image=picture(0, 64, 128), size="64x80").height == 80

    def test_odd_sizes_are_cropped(self, pipe: fastvid.Pipeline) -> None:
        video = pipe.generate("a red circle", image=picture(0, 70, 90), size="90x70", num_inference_steps=2, seed=1)
        assert video.frames.shape == (17, 70, 90, 3)

    @pytest.mark.parametrize(
        ("image", "says"),
        [
            (np.zeros((64, 64, 2), np.uint8), r"\[H, W, 3\]"),
            (np.full((64, 64, 3), 200, np.float32), "floating point from 0 to 200"),
            (np.zeros((0, 64, 3), np.uint8), r"\[0, 64, 3\]"),
            (7, "a file, a uint8 RGB array"),
        ],
    )
    def test_what_is_no_picture(self, pipe: fastvid.Pipeline, image: Any, says: str) -> None:
        with pytest.raises(fastvid.InvalidRequest, match=says):
            pipe.plan("a", image=image)

    def test_a_file_that_cannot_be_read(self, pipe: fastvid.Pipeline, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
        for name in ("missing.png", "broken.png"):
            with pytest.raises(fastvid.Error, match=name):
                pipe.plan("a", image=tmp_path / name)


def test_a_text_model_has_a_picture_put_back_at_every_step(tmp_path: Path) -> None:
    from tiny import write_checkpoint

    write_checkpoint(tmp_path)
    pipe, shown = fastvid.load(str(tmp_path), device="cpu"), picture(0, 64, 64)
    assert pipe.inspect()["recipe"]["patterns"]["first"] == "reimposed"
    made = pipe.generate("a", image=shown, num_frames=9, num_inference_steps=3, size="64x64", seed=0)
    assert np.array_equal(made.frames[0], pipe.decode(pipe.encode(shown[None]))[0])
    free = pipe.generate("a", num_frames=9, num_inference_steps=3, size="64x64", seed=0)
    assert not np.array_equal(made.latents[:, :, 1:], free.latents[:, :, 1:])
