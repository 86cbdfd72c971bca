"""VideoX-Fun's models from their published layout, by the whole way: latents equal those of diffusers' networks, driven
as VideoX-Fun drives its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fun_models import KINDS, VARIANTS, Fun, sample, write_fun
from pipelines import clip, picture

import fastvid
from fastvid import Pipeline

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
