"""Pipelines of tiny models as diffusers writes and runs them, and what several tests ask of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import write_tokenizer

from fastvid import Pipeline
from fastvid.pipeline.prepare import Prepared, prepare
from fastvid.requests.request import Request


def prepared(pipe: Pipeline, verb: str = "generate", **options: Any) -> Prepared:
    """A request laid out and planned, without running it."""
    return prepare(pipe._model, Request.make(verb, **options))


HEIGHT, WIDTH = 64, 96
SIGMAS = [1.0, 0.93, 0.84, 0.72, 0.6, 0.45, 0.3, 0.15]


def picture(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth colours, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / 32
    waves = [np.sin(x * (1 + k + seed)) * np.cos(y * (2 - k) + seed) for k in range(3)]
    return ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)


def run_theirs(theirs: Any, latents: torch.Tensor, **given: Any) -> np.ndarray:
    """diffusers' 9 frames with flow matching's Euler steps at the levels of SIGMAS."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs.scheduler = FlowMatchEulerDiscreteScheduler()
    set_timesteps = theirs.scheduler.set_timesteps
    theirs.scheduler.set_timesteps = lambda steps, device=None, **_: set_timesteps(sigmas=SIGMAS, device=device)
    theirs.set_progress_bar_config(disable=True)
    height, width = (side * theirs.vae_scale_factor_spatial for side in latents.shape[3:])
    out = theirs(
        prompt="a red circle moving left",
        negative_prompt="blue square",
        height=height,
        width=width,
        num_frames=9,
        num_inference_steps=len(SIGMAS),
        guidance_scale=4.0,
        latents=latents.clone(),
        max_sequence_length=theirs.tokenizer.model_max_length,
        output_type="np",
        **given,
    ).frames[0]
    return (out * 255).round().astype(np.uint8)


def write_vace(folder: Path) -> Any:
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
    # A random encoder says little about its frames, and random tokens hardly look at each other: so that both count.
    transformer.vace_patch_embedding.weight.data[:, :32] *= 30
    for block in (*transformer.blocks, *transformer.vace_blocks):
        block.attn1.norm_q.weight.data *= 4
        block.attn1.to_out[0].weight.data *= 40
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


def clip(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colours that change, uint8 [F, H, W, 3]."""
    return np.stack([picture(i, height, width) for i in range(count)])


def region(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A bar that moves, white, with a soft edge: uint8 [F, H, W]."""
    x = np.arange(width)[None, None] - 8 * np.arange(count)[:, None, None]
    return np.broadcast_to(np.clip(40 * (20 - np.abs(x - 20)), 0, 255), (count, height, width)).astype(np.uint8)


def noise(frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 16, frames, HEIGHT // 8, WIDTH // 8, generator=generator)


def share_of_equal(made: np.ndarray, wanted: np.ndarray) -> float:
    """The share of values that are within 1 of 255."""
    assert made.shape == wanted.shape
    return (np.abs(made.astype(int) - wanted.astype(int)) <= 1).mean()


def diffusers_frames(pipe, latents, sigmas, guidance, height, width, num_frames):
    """uint8 frames of diffusers' own pipeline with Euler steps over exactly these sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Given(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
            super().set_timesteps(sigmas=list(sigmas), device=device)

    pipe.scheduler = Given(num_train_timesteps=1000, shift=1.0)
    with torch.no_grad():
        out = pipe(
            prompt="a red circle moving left",
            negative_prompt="blue square",
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=len(sigmas),
            guidance_scale=guidance,
            latents=latents.clone(),
            max_sequence_length=16,
            output_type="np",
        ).frames[0]
    return (np.asarray(out) * 255).round().astype(np.uint8)
