"""Tiny SkyReels V2 checkpoints as diffusers writes them, and diffusers' pipelines of diffusion forcing as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import write_tokenizer

HEIGHT, WIDTH = 64, 96
SIGMAS = (0.999, 0.95, 0.85, 0.7, 0.45, 0.2)
PIPELINE = "SkyReelsV2DiffusionForcingPipeline"


def make(kind: str = PIPELINE, folder: Path | None = None, **changes: Any) -> Any:
    """A diffusers pipeline of that class with random weights; written into `folder` if there is one."""
    import diffusers
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 16, "out_channels": 16, "text_dim": 32}
    sizes |= {"freq_dim": 256, "ffn_dim": 80, "num_layers": 2, "inject_sample_info": True, **changes}
    transformer = diffusers.SkyReelsV2Transformer3DModel(**sizes).eval()
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1, z_dim=16).eval()
    for module in (transformer, vae):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    for block in transformer.blocks:  # random tokens hardly look at each other: so that it counts which do
        block.attn1.norm_q.weight.data *= 4
        block.attn1.to_out[0].weight.data *= 20
    text = UMT5Config(vocab_size=13, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "tokenizer": None, "text_encoder": None}
    parts["scheduler"] = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=8.0
    )
    if folder is not None:
        write_tokenizer(folder / "tokenizer", 16)
        parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
        parts["text_encoder"] = UMT5EncoderModel(text).eval()
    if kind == "SkyReelsV2ImageToVideoPipeline":
        parts |= image_parts()
    pipe = getattr(diffusers, kind)(**parts)
    if folder is not None:
        pipe.save_pretrained(folder)
    return pipe


def image_parts() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"image_encoder": CLIPVisionModelWithProjection(clip).eval(), "image_processor": processor}


def embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(seed))


def right_unipc(sigmas: Any = SIGMAS) -> Any:
    """diffusers' UniPC at these levels, told the timesteps of our table, with one thing put right: their pipelines
    overwrite the latents that a step keeps for the next one's corrector, so it keeps a copy."""
    from diffusers import UniPCMultistepScheduler

    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)

    class Right(UniPCMultistepScheduler):
        def set_timesteps(self, *args: Any, **options: Any) -> None:
            super().set_timesteps(len(levels) - 1)
            self.sigmas, self.timesteps = levels, (levels[:-1] * 1000).long()

        def step(self, output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            return super().step(output, timestep, sample.clone(), **options)

    return Right(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000)


@torch.no_grad()
def wanted(pipe: Any, latents: torch.Tensor | None = None, scheduler: Any = None, **options: Any) -> torch.Tensor:
    """The clean latents of diffusers' pipeline, which takes these as its noise."""
    pipe.scheduler = scheduler or right_unipc()
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe.prepare_latents

    def prepare(*args: Any, **given: Any) -> Any:
        made = drawn(*args, **given)
        noise, *rest = made if isinstance(made, tuple) else (made,)
        noise = noise if latents is None else latents[:, :, : noise.shape[2]].clone()
        return (noise, *rest) if isinstance(made, tuple) else noise

    pipe.prepare_latents = prepare
    try:
        return pipe(
            prompt=None,
            prompt_embeds=embeds(1),
            negative_prompt_embeds=embeds(2),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=len(SIGMAS),
            output_type="latent",
            **{"guidance_scale": 3.0, **options},
        ).frames
    finally:
        pipe.prepare_latents = drawn


OURS: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0, "sigmas": SIGMAS, "seed": 5}


def text() -> dict[str, Any]:
    return {"prompt_embeds": embeds(1), "negative_prompt_embeds": embeds(2)}


def picture(seed: int) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 32
    waves = [np.sin(x * (1 + k + seed)) * np.cos(y * (2 - k) + seed) for k in range(3)]
    return ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)
