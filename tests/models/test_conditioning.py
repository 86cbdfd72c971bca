"""Conditioning tensors against those that diffusers' pipelines make of the same pictures, with a tiny VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from torch import Tensor

from fastvid.engine.pixels import fit_pictures, fit_reference, to_signed
from fastvid.errors import InvalidRequest
from fastvid.models.wan import conditioning
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE

HEIGHT, WIDTH = 32, 48
# Sizes of pictures below: Pillow 13 resizes columns first where the height shrinks more (see `media.images.resize`).
TINY: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 1}


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def make_vae(**changes: Any) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**{"base_dim": 4, "num_res_blocks": 1, **changes}).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return make_vae()


def encoder(vae: AutoencoderKLWan) -> conditioning.Encode:
    """diffusers' VAE as the function that conditioning takes, rounding as the pipelines do: then results are equal."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return lambda frames: (vae.encode(frames).latent_dist.mode() - mean) * (1.0 / std)


def our_encoder(vae: AutoencoderKLWan) -> conditioning.Encode:
    model = WanVAE(WanVAEConfig.from_dict(dict(vae.config)))
    model.load_state_dict(vae.state_dict())
    return lambda frames: model.eval().encode(frames)[0]


def i2v_pipeline(vae: AutoencoderKLWan, **options: Any) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(None, None, vae, UniPCMultistepScheduler(), **options)


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def signed(number: int, batch: int = 1) -> Tensor:
    return to_signed(torch.from_numpy(np.stack([picture(number + 10 * i) for i in range(batch)])))


def run_pipeline(pipe: WanImageToVideoPipeline, last: Tensor | None, num_frames: int) -> Tensor:
    """The pipeline's own condition for a first and perhaps a last picture."""
    given = signed(1), 1, 16, HEIGHT, WIDTH, num_frames, torch.float32, torch.device("cpu")
    return pipe.prepare_latents(*given, last_image=last)[1]


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (64, 100), (20, 31), (77, 120)])
def test_pictures_are_stretched_as_the_pipeline_does(vae: AutoencoderKLWan, size: tuple[int, int]) -> None:
    image = picture(1, *size)
    expected = i2v_pipeline(vae).video_processor.preprocess(Image.fromarray(image), height=HEIGHT, width=WIDTH)
    found = fit_pictures(torch.from_numpy(image)[None], HEIGHT, WIDTH)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


# ---------------------------------------------------------------- I2V and FLF2V


@pytest.mark.parametrize(("num_frames", "last"), [(1, False), (5, False), (5, True), (13, False), (13, True)])
@torch.no_grad()
def test_i2v_and_flf2v_channels_equal_the_pipelines(vae: AutoencoderKLWan, num_frames: int, last: bool) -> None:
    pictures = {0: signed(1), **({num_frames - 1: signed(2)} if last else {})}
    expected = run_pipeline(i2v_pipeline(vae), pictures[num_frames - 1] if last else None, num_frames)
    found = conditioning.image_condition(encoder(vae), pictures, num_frames)
    assert found.shape == (1, 20, (num_frames + 3) // 4, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(found, expected)
    assert error(conditioning.image_condition(our_encoder(vae), pictures, num_frames), expected) < 1e-6


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(vae: AutoencoderKLWan) -> None:
    both = conditioning.image_condition(encoder(vae), {0: signed(1, 2), 4: signed(2, 2)}, 5)
    one = conditioning.image_condition(encoder(vae), {0: signed(1, 2)[1:], 4: signed(2, 2)[1:]}, 5)
    assert both.shape[0] == 2 and error(both[1:], one) < 1e-6


def test_a_last_frame_marks_one_channel_of_the_last_latent() -> None:
    known = torch.zeros(9, dtype=torch.bool)
    known[[0, 8]] = True
    assert conditioning.mask_channels(known).int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({}, "one or more"),
        ({0: torch.zeros(1, 3, 8, 8), 1: torch.zeros(1, 3, 8, 9)}, "of one size"),
        ({0: torch.zeros(3, 8, 8)}, r"\[B, 3, H, W\]"),
        ({5: torch.zeros(1, 3, 8, 8), -1: torch.zeros(1, 3, 8, 8)}, r"frames 0 to 4, not \[5, -1\]"),
    ],
)
def test_pictures_that_do_not_fit(pictures: dict[int, Tensor], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        conditioning.place_pictures(pictures, 5)


def test_frames_that_are_no_whole_latents() -> None:
    with pytest.raises(InvalidRequest, match=r"4k\+1 pixel frames"):
        conditioning.mask_channels(torch.ones(8, dtype=torch.bool))


# ---------------------------------------------------------------- VACE


@pytest.fixture(scope="module")
def vace(vae: AutoencoderKLWan) -> WanVACEPipeline:
    model = WanVACETransformer3DModel(**TINY, text_dim=4, vace_layers=[0])
    return WanVACEPipeline(None, None, vae, UniPCMultistepScheduler(), model)


def to_pil(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def run_vace(pipe: WanVACEPipeline, frames: np.ndarray, mask: np.ndarray, references: list[np.ndarray]) -> Tensor:
    """The pipeline's own conditioning latents."""
    cpu = torch.device("cpu")
    pictures = to_pil(references) or None
    given = pipe.preprocess_conditions(
        to_pil(frames), to_pil(mask), pictures, 1, HEIGHT, WIDTH, len(frames), torch.float32, cpu
    )
    latents = pipe.prepare_video_latents(*given, None, cpu)
    return torch.cat((latents, pipe.prepare_masks(given[1], given[2])), dim=1)


def control(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames, and a mask of all values between black and white: the pipeline rounds it in one place only."""
    frames = np.stack([picture(100 + i) for i in range(count)])
    mask = np.random.default_rng(count).integers(0, 256, (count, HEIGHT, WIDTH, 1), dtype=np.uint8)
    return frames, mask.repeat(3, axis=3)


def run_ours(encode: conditioning.Encode, frames: np.ndarray, mask: np.ndarray, references: list[np.ndarray]) -> Tensor:
    video = to_signed(torch.from_numpy(frames)).transpose(0, 1)[None]
    # Through [-1, 1] and back, as the pipeline does, which rounds.
    values = (to_signed(torch.from_numpy(mask)).transpose(0, 1)[None, :1] + 1) / 2
    pictures = [fit_reference(torch.from_numpy(r), HEIGHT, WIDTH)[None] for r in references]
    return conditioning.vace_condition(encode, video, values, pictures)


REFERENCES = [picture(7, 40, 20), picture(8, 66, 135), picture(9, 32, 48)]


@pytest.mark.parametrize(("count", "references"), [(1, 0), (5, 1), (13, 3)])
@torch.no_grad()
def test_vace_equals_the_pipeline(vace: WanVACEPipeline, count: int, references: int) -> None:
    given = *control(count), REFERENCES[:references]
    expected = run_vace(vace, *given)
    found = run_ours(encoder(vace.vae), *given)
    assert found.shape == (1, 96, references + (count + 3) // 4, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(found, expected)
    assert error(run_ours(our_encoder(vace.vae), *given), expected) < 1e-6


@torch.no_grad()
def test_without_a_video_everything_is_to_be_made(vace: WanVACEPipeline) -> None:
    """What the pipeline does if it is given neither video nor mask."""
    cpu = torch.device("cpu")
    given = vace.preprocess_conditions(None, None, None, 1, HEIGHT, WIDTH, 5, torch.float32, cpu)
    expected = torch.cat((vace.prepare_video_latents(*given, None, cpu), vace.prepare_masks(given[1], given[2])), dim=1)
    frames = torch.zeros(1, 3, 5, HEIGHT, WIDTH)
    assert torch.equal(conditioning.vace_condition(encoder(vace.vae), frames, torch.ones(1, 1, 5, 32, 48)), expected)


@pytest.mark.parametrize("size", [(40, 20), (66, 135), (32, 48), (333, 100)])
def test_references_equal_the_pipelines(vace: WanVACEPipeline, size: tuple[int, int]) -> None:
    image = picture(4, *size)
    cpu = torch.device("cpu")
    given = vace.preprocess_conditions(None, None, Image.fromarray(image), 1, HEIGHT, WIDTH, 1, torch.float32, cpu)
    assert torch.equal(fit_reference(torch.from_numpy(image), HEIGHT, WIDTH), given[2][0][0])


def later_mask(mask: Tensor) -> Tensor:
    return mask.roll(1, dims=2)


def rounded(mask: Tensor) -> Tensor:
    return (mask > 0.5).float()


def turned(mask: Tensor) -> Tensor:
    return mask.transpose(-1, -2).reshape(mask.shape)


@pytest.mark.parametrize("mistake", [later_mask, rounded, turned])
def test_a_small_mistake_in_the_mask_would_be_seen(vace: WanVACEPipeline, mistake: Callable[[Tensor], Tensor]) -> None:
    mask = torch.rand(1, 1, 13, HEIGHT, WIDTH)
    expected = vace.prepare_masks(mask.expand(-1, 3, -1, -1, -1), [[]])
    assert torch.equal(conditioning.vace_masks(mask), expected)
    assert not torch.equal(conditioning.vace_masks(mistake(mask)), expected)


@pytest.mark.parametrize(
    ("frames", "mask", "reference", "message"),
    [
        ((1, 3, 5, 32, 44), (1, 1, 5, 32, 44), (1, 3, 32, 44), "multiples of 8"),
        ((1, 3, 5, 32, 48), (1, 3, 5, 32, 48), (1, 3, 32, 48), r"mask of these frames is \[1, 1, 5, 32, 48\]"),
        ((1, 3, 5, 32, 48), (1, 1, 5, 32, 48), (3, 32, 48), r"not \[\[3, 32, 48\]\]"),
    ],
)
def test_controls_that_do_not_fit(frames: Any, mask: Any, reference: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        conditioning.vace_condition(lambda x: x, torch.zeros(frames), torch.zeros(mask), [torch.zeros(reference)])
