"""VideoX-Fun's models from their published layout, by the whole way: latents equal those of diffusers' networks, driven
as VideoX-Fun drives its own.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fun_models import KINDS, VARIANTS, Fun, sample, write_fun
from PIL import Image
from pipelines import clip, picture

import fastvid
from fastvid import Pipeline
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, InvalidRequest

HEIGHT, WIDTH, FRAMES = 64, 96, 9
SIGMAS = [1.0, 0.95, 0.85, 0.6, 0.3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("fun")

    @cache
    def load(kind: str) -> tuple[Fun, Pipeline]:
        fun = write_fun(root / kind, kind)
        return fun, fastvid.load(str(fun.folder), device="cpu", variant=VARIANTS[kind])

    return load


def options(fun: Fun) -> dict[str, Any]:
    torch.manual_seed(5)
    side = 16 if fun.kind.endswith("5b") else 8
    noise = torch.randn(1, KINDS[fun.kind][1], 3, HEIGHT // side, WIDTH // side)
    texts = torch.randn(1, 512, 32), torch.randn(1, 512, 32)
    return {"noise": noise, "texts": texts}


def compare(models: Any, kind: str, ours: dict[str, Any], theirs: dict[str, Any], verb: str = "generate") -> None:
    fun, pipe = models(kind)
    given = options(fun)
    made = getattr(pipe, verb)(
        **{"prompt_embeds": given["texts"][0], "negative_prompt_embeds": given["texts"][1], "latents": given["noise"]},
        **{"guidance_scale": 4.0, "sigmas": SIGMAS, "solver": "euler", "seed": 1},
        **({"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES} if verb == "generate" else {}),
        **ours,
    )
    wanted = sample(fun, **given, sigmas=SIGMAS, **theirs)
    torch.testing.assert_close(torch.as_tensor(made.latents), wanted, atol=2e-4, rtol=1e-3)


def whole(*known: int) -> np.ndarray:
    """Free pixels of a video whose frames of these numbers are known."""
    free = np.ones((FRAMES, HEIGHT, WIDTH), np.uint8)
    free[list(known)] = 0
    return free


def region() -> np.ndarray:
    free = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    free[:, 10:45, 20:70] = 1
    free[3:, :30] = 1
    return free


def frames(**pictures: np.ndarray) -> np.ndarray:
    made = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for name, each in pictures.items():
        made[int(name[1:])] = each
    return made


A, B, C = picture(0), picture(1), picture(2)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_known(models: Any, kind: str) -> None:
    compare(models, kind, {}, {})


@pytest.mark.parametrize("kind", ["inp-2.1", "inp-a14b", "inp-5b", "control-a14b", "control-5b"])
def test_a_first_picture(models: Any, kind: str) -> None:
    theirs = {"frames": frames(_0=A), "free": whole(0)} | ({"start": A} if kind == "inp-2.1" else {})
    compare(models, kind, {"image": A}, theirs)


@pytest.mark.parametrize("kind", ["inp-2.1", "inp-5b", "inp-a14b"])
def test_first_and_last_picture(models: Any, kind: str) -> None:
    theirs = {"frames": frames(_0=A, _8=B), "free": whole(0, 8)} | ({"start": A} if kind == "inp-2.1" else {})
    compare(models, kind, {"image": A, "last_image": B}, theirs)


@pytest.mark.parametrize("kind", ["inp-2.1", "inp-5b"])
def test_a_last_picture_alone(models: Any, kind: str) -> None:
    """CLIP sees zeros; of the 5B, known tokens are told timestep 0, and stay noisy."""
    compare(models, kind, {"last_image": B}, {"frames": frames(_8=B), "free": whole(8)})


@pytest.mark.parametrize("kind", ["inp-2.1", "inp-a14b", "inp-5b"])
def test_a_region_of_a_video(models: Any, kind: str) -> None:
    video, free = clip(FRAMES), region()
    compare(models, kind, {"video": video, "mask": free * 255}, {"frames": video, "free": free})


@pytest.mark.parametrize("kind", ["inp-2.1", "control-a14b"])
def test_an_edit_of_a_region(models: Any, kind: str) -> None:
    video, free = clip(FRAMES), region()
    ours = {"video": video, "mask": free * 255, "strength": 1.0}
    compare(models, kind, ours, {"frames": video, "free": free}, verb="edit")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "control" in kind])
def test_a_control_a_start_and_a_reference(models: Any, kind: str) -> None:
    fun, _ = models(kind)
    ours: dict[str, Any] = {"video": clip(FRAMES)[::-1].copy(), "image": A}
    theirs: dict[str, Any] = {"control": ours["video"]}
    if kind in ("control-1.0", "control-1.1"):
        theirs |= {"start": A}
    else:
        theirs |= {"frames": frames(_0=A), "free": whole(0)}
    if fun.ref_convs:
        ours, theirs = ours | {"reference_images": [C]}, theirs | {"reference": C}
    compare(models, kind, ours, theirs)


def test_a_reference_alone(models: Any) -> None:
    compare(models, "control-1.1", {"reference_images": [C]}, {"reference": C})


# ---------------------------------------------------------------- the surface

ASKED: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
WHITE = np.full((HEIGHT, WIDTH), 255, np.uint8)


def test_from_the_command_line_and_by_its_recipe(models: Any, tmp_path: Path) -> None:
    fun, pipe = models("control-1.1")
    pictures = {"--image": A, "--reference-image": C}
    words = ["--model", str(fun.folder), "--variant", VARIANTS[fun.kind], "--quiet"]
    files: list[str] = []
    np.save(tmp_path / "pose.npy", clip(5))
    for flag, each in pictures.items():
        Image.fromarray(each).save(tmp_path / f"{flag[2:]}.png")
        files += [flag, str(tmp_path / f"{flag[2:]}.png")]
    files += ["--video", str(tmp_path / "pose.npy")]
    asked = ["--size", f"{WIDTH}x{HEIGHT}", "--num-frames", "5", "--steps", "2", "--seed", "1"]
    made = pipe.generate("a red circle", video=clip(5), image=A, reference_images=[C], **ASKED)
    assert main(["generate", "a red circle", *words, *asked, *files, "-o", str(tmp_path / "one.mp4")]) == 0
    again = ["--recipe", str(tmp_path / "one.mp4"), *files, "--quiet"]
    assert main(["generate", *again, "-o", str(tmp_path / "two.npy")]) == 0
    assert (np.load(tmp_path / "two.npy") == made.frames).all()
    assert made.recipe["settings"]["variant"] == VARIANTS[fun.kind]


@pytest.mark.parametrize(
    ("kind", "asked", "match"),
    [
        ("inp-2.1", {"video": clip(5)}, "keeps the frames of a video where mask is black; give mask too"),
        ("inp-2.1", {"mask": WHITE}, "mask says what of a video stays; give video too"),
        ("inp-2.1", {"reference_images": [A]}, "takes none; leave them out .Fun-Control from V1.1"),
        ("inp-2.1", {"conditioning_scale": 0.5}, "has no control branch, whose weight that is"),
        ("inp-2.1", {"schedule": "staggered"}, "one level in all frames"),
        ("inp-2.1", {"start_image": A}, "no argument 'start_image'; the nearest is image"),
        ("control-1.0", {"reference_images": [A]}, "takes none; leave them out"),
        ("control-1.0", {"video": clip(5), "mask": WHITE}, "takes video as a control, all of it; leave mask out"),
        ("control-1.0", {"last_image": A}, "cannot take pictures in between; it can take a first picture"),
        ("control-1.0", {"image": A, "num_frames": 1}, "ask for more than one frame"),
        ("control-1.1", {"reference_images": [A, B]}, "reference_images has 2 pictures; .* takes one"),
        ("control-1.1", {"video": clip(4)}, "num_frames=5: video has 4 frames; the nearest is 4"),
        ("control-1.1", {"control_video": clip(5)}, "no argument 'control_video'; the nearest is video"),
        ("control-1.1", {"ref_image": A}, "no argument 'ref_image'; the nearest is reference_images"),
    ],
)
def test_wrong_requests(models: Any, kind: str, asked: dict[str, Any], match: str) -> None:
    _, pipe = models(kind)
    with pytest.raises(InvalidRequest, match=match):
        pipe.generate("a red circle", **{**ASKED, **asked})


def test_a_region_is_no_part_of_the_first_control_models(models: Any) -> None:
    with pytest.raises(InvalidRequest, match="cannot take a region to keep"):
        models("control-1.1")[1].edit(clip(5), "a red circle", mask=WHITE)


def test_a_plan_counts_the_reference() -> None:
    """As one more latent frame, with a picture or without."""
    tokens = [
        fastvid.blueprint(name, card="RTX 4090").plan("a", size="832x480").tokens
        for name in ("wan2.1-fun-control-1.3b", "wan2.1-fun-v1.1-control-1.3b")
    ]
    assert tokens == [21 * 1560, 22 * 1560]


def test_a_wrong_variant(models: Any) -> None:
    with pytest.raises(CheckpointError, match="variant=wan2.1-fun-inp-14b: the weights are of another kind"):
        fastvid.load(str(models("control-1.1")[0].folder), device="cpu", variant="wan2.1-fun-inp-14b")
    with pytest.raises(InvalidRequest, match="the nearest is wan2.1-fun-inp-14b"):
        fastvid.load("embedded", device="cpu", variant="wan2.1-fun-inp-14")


# ---------------------------------------------------------------- layouts


def test_single_files_of_comfyui(tmp_path: Path) -> None:
    """Two experts, the second found by its name; what they lack comes from a folder."""
    fun = write_fun(tmp_path / "whole", "control-a14b", (1, 128))
    whole = fastvid.load(str(fun.folder), device="cpu").generate("a red circle", reference_images=[C], **ASKED)
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    for noise in ("high", "low"):
        source = fun.folder / f"{noise}_noise_model" / "diffusion_pytorch_model.safetensors"
        shutil.copy(source, folder / f"wan2.2_fun_control_{noise}_noise_14B_bf16.safetensors")
    file = folder / "wan2.2_fun_control_high_noise_14B_bf16.safetensors"
    parts = {"vae": fun.folder / "Wan2.1_VAE.safetensors", "tokenizer": fun.folder / "google" / "umt5-xxl"}
    parts |= {"text_encoder": fun.folder / "models_t5_umt5-xxl-enc-bf16.safetensors"}
    pipe = fastvid.load(str(file), device="cpu", parts=parts)
    assert pipe._model.checkpoint.experts == ("transformer", "transformer_2")
    assert (pipe.generate("a red circle", reference_images=[C], **ASKED).frames == whole.frames).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inp-2.1", "control-1.1"])
def test_converted_folders_make_the_same(models: Any, tmp_path: Path, kind: str) -> None:
    """And are still told from I2V, whose tensors Fun-InP has."""
    fun, pipe = models(kind)
    source = tmp_path / "Wan2.1-Fun-V1.1-1.3B-InP"
    shutil.copytree(fun.folder, source)
    assert main(["convert", str(source), str(tmp_path / "made"), "--quiet"]) == 0
    assert main(["convert", str(tmp_path / "made"), str(tmp_path / "Wan2.1-Fun-InP-back"), "--to", "original"]) == 0
    wanted = pipe.generate("a red circle", image=A, **ASKED).frames
    for folder in ("made", "Wan2.1-Fun-InP-back"):
        made = fastvid.load(str(tmp_path / folder), device="cpu")
        assert made._model.preset.pictures_optional and made._model.preset.solver == "euler"
        assert (made.generate("a red circle", image=A, **ASKED).frames == wanted).all()
