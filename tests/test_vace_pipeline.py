"""VACE: whole pipelines against diffusers' WanVACEPipeline on random weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_to_video import SIGMAS, picture
from tiny import write_tokenizer

import fastvid

HEIGHT, WIDTH = 64, 96


def write(folder: Path) -> Any:
    """A tiny diffusers WanVACEPipeline in the published layout: four layers, hints at the first and the third."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    write_tokenizer(folder / "tokenizer", 16)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(3)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1, z_dim=16).eval()
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=80,
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=96,
    ).eval()
    for module in (transformer, vae):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    # A random encoder says little about its frames; so that what it says counts as much as the mask.
    transformer.vace_patch_embedding.weight.data[:, :32] *= 30
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    pipe = WanVACEPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        transformer=transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vace")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write(folder)


@pytest.fixture(scope="module")
def pipe(theirs: Any, folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


def clip(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colours that change, uint8 [F, H, W, 3]."""
    return np.stack([picture(i, height, width) for i in range(count)])


def region(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A bar that moves, white, with a soft edge: uint8 [F, H, W]."""
    x = np.arange(width)[None, None] - 8 * np.arange(count)[:, None, None]
    return np.broadcast_to(np.clip(40 * (20 - np.abs(x - 20)), 0, 255), (count, height, width)).astype(np.uint8)


def pil(pictures: np.ndarray | list[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(one) for one in pictures]


def placed(pictures: dict[int, np.ndarray]) -> dict[str, torch.Tensor]:
    """A grey video with pictures in it that stay, as diffusers takes one that is not of 8 bits: [1, F, 3, H, W]."""
    video, mask = torch.full((1, 9, 3, HEIGHT, WIDTH), 0.5), torch.ones(1, 9, 3, HEIGHT, WIDTH)
    for frame, one in pictures.items():
        video[0, frame], mask[0, frame] = torch.from_numpy(one / 255).movedim(-1, 0), 0
    return {"video": video, "mask": mask}


VIDEO = {"video": clip(9), "mask": region(9)}
REFERENCES = [picture(7, 48, 40), picture(8, 66, 135)]
# What we are given, what diffusers is given, and how many references there are.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "text": ({}, {}, 0),
    "video": ({"video": clip(9)}, {"video": pil(clip(9))}, 0),
    "mask": (VIDEO, {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"])}, 0),
    "reference": (
        {**VIDEO, "reference_images": REFERENCES[0]},
        {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"]), "reference_images": pil(REFERENCES[:1])},
        1,
    ),
    "references": (
        {"video": clip(9), "reference_images": REFERENCES},
        {"video": pil(clip(9)), "reference_images": pil(REFERENCES)},
        2,
    ),
    "references alone": ({"reference_images": REFERENCES}, {"reference_images": pil(REFERENCES)}, 2),
    "half": (
        {**VIDEO, "conditioning_scale": 0.5},
        {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"]), "conditioning_scale": 0.5},
        0,
    ),
    "layers": (
        {**VIDEO, "conditioning_scale": [0.3, 1.4]},
        {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"]), "conditioning_scale": [0.3, 1.4]},
        0,
    ),
    "larger": (
        {"video": clip(9, 128, 192), "mask": region(9, 128, 192)},
        {"video": pil(clip(9, 128, 192)), "mask": pil(region(9, 128, 192))},
        0,
    ),
    "image": ({"image": picture(0)}, placed({0: picture(0)}), 0),
    "both images": ({"image": picture(0), "last_image": picture(1)}, placed({0: picture(0), 8: picture(1)}), 0),
}


def make(pipe: fastvid.Pipeline, latents: torch.Tensor, **options: Any) -> fastvid.Video:
    return pipe.generate(
        "a red circle moving left",
        negative_prompt="blue square",
        num_frames=9,
        solver="euler",
        sigmas=SIGMAS,
        guidance_scale=4.0,
        latents=latents,
        size=f"{WIDTH}x{HEIGHT}",
        **options,
    )


def run_vace(theirs: Any, latents: torch.Tensor, **options: Any) -> np.ndarray:
    """As `run_theirs`, for options that are no pictures alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs.scheduler = FlowMatchEulerDiscreteScheduler()
    set_timesteps = theirs.scheduler.set_timesteps
    theirs.scheduler.set_timesteps = lambda steps, device=None, **_: set_timesteps(sigmas=SIGMAS, device=device)
    theirs.set_progress_bar_config(disable=True)
    out = theirs(
        prompt="a red circle moving left",
        negative_prompt="blue square",
        height=HEIGHT,
        width=WIDTH,
        num_frames=9,
        num_inference_steps=len(SIGMAS),
        guidance_scale=4.0,
        latents=latents.clone(),
        max_sequence_length=16,
        output_type="np",
        **options,
    ).frames[0]
    return (out * 255).round().astype(np.uint8)


def noise(frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 16, frames, HEIGHT // 8, WIDTH // 8, generator=generator)


def same(made: np.ndarray, wanted: np.ndarray) -> float:
    """The share of values that are within 1 of 255."""
    assert made.shape == wanted.shape
    return (np.abs(made.astype(int) - wanted.astype(int)) <= 1).mean()


class TestEqualsDiffusers:
    @pytest.mark.parametrize("case", CASES)
    def test_frames(self, theirs: Any, pipe: fastvid.Pipeline, case: str) -> None:
        ours, given, references = CASES[case]
        latents = noise(3 + references)
        video = make(pipe, latents, **ours)
        assert video.frames.std() > 5
        assert video.latents.shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
        assert same(video.frames, run_vace(theirs, latents, **given)) >= 0.999

    def test_every_case_makes_something_else(self, pipe: fastvid.Pipeline) -> None:
        """So that none could pass for another: what is given counts."""
        made = [make(pipe, noise(3 + r), **ours).frames for name, (ours, _, r) in CASES.items() if r == 0]
        print([[float(round(same(a, b), 3)) for a in made] for b in made], [k for k in CASES if CASES[k][2] == 0])
        for i, one in enumerate(made):
            assert all(same(one, other) < 0.9 for other in made[:i])
