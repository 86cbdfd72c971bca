"""A tiny Wan-Animate checkpoint as diffusers writes and runs it, and what drives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_models import CLIP
from PIL import Image
from pipelines import HEIGHT, WIDTH, clip, picture, prepared, region
from tiny import write_tokenizer

from fastvid.models.wan.weight_names import rules
from fastvid.sampling.noise import StreamNoise

SIDE = 32  # of the face's pictures
LEVELS = [1.0, 0.7, 0.3]
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "ffn_dim": 80,
    "num_layers": 4,
    "image_dim": CLIP["hidden_size"],
    "added_kv_proj_dim": 48,
    "motion_encoder_size": SIDE,
    "motion_encoder_channel_sizes": {"32": 6, "16": 8, "8": 10, "4": 12},
    "motion_style_dim": 20,
    "motion_dim": 5,
    "motion_encoder_dim": 18,
    "face_encoder_hidden_dim": 28,
    "face_encoder_num_heads": 3,
    "inject_face_latents_blocks": 2,
    "motion_encoder_batch_size": 4,
}


def write_animate(folder: Path, **changes: Any) -> Any:
    """A diffusers WanAnimatePipeline in the published layout: four layers, face blocks after the first and third."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanAnimatePipeline, WanAnimateTransformer3DModel
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    write_tokenizer(folder / "tokenizer", 512)  # diffusers takes the last 512 rows for the text, whatever its length
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(3)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1, z_dim=16).eval()
    transformer = WanAnimateTransformer3DModel(**{**TINY, **changes}).eval()
    for module in (transformer, vae):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    for block in transformer.face_adapter:  # so that the face counts
        block.to_out.weight.data *= 20
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    pipe = WanAnimatePipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        image_encoder=CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        transformer=transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
    )
    pipe.save_pretrained(folder)
    return pipe


def driving(count: int, mode: str = "animate", **changes: Any) -> dict[str, Any]:
    """Inputs of a request: the character is tall, the face video small."""
    given = {"image": picture(5, 90, 60), "pose_video": clip(count), "face_video": clip(count + 3, 40, 40)[3:]}
    if mode == "replace":
        given |= {"mode": mode, "background_video": clip(count + 2)[2:], "mask_video": region(count)}
    return given | changes


def pil(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(one) for one in frames]


def run_animate(theirs: Any, ours: Any, seed: int, guidance: float, given: dict[str, Any]) -> np.ndarray:
    """diffusers' frames, with our noise in every segment, Euler steps at LEVELS, and segments that start
    from frames of 8 bits."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    asked = prepared(ours, prompt="", seed=seed, size=f"{WIDTH}x{HEIGHT}", **given).job
    segments = iter(asked.timeline.segments)

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        segment = next(segments)
        _, *size = segment.latent_shape(16)[1:]
        return StreamNoise(seed, (16, *size), segment.origin, torch.device("cpu"), None).initial(0, segment.columns)

    theirs.scheduler = FlowMatchEulerDiscreteScheduler()
    set_timesteps, decode = theirs.scheduler.set_timesteps, type(theirs.vae).decode
    theirs.scheduler.set_timesteps = lambda steps, device=None, **_: set_timesteps(sigmas=LEVELS, device=device)
    theirs.prepare_latents = draw

    def rounded(latents: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
        frames = decode(theirs.vae, latents, **options)[0]
        return (((frames + 1) * 127.5).round() / 127.5 - 1,)

    theirs.vae.decode = rounded
    theirs.set_progress_bar_config(disable=True)
    videos = {
        name: pil(np.repeat(video[..., None], 3, axis=-1) if video.ndim == 3 else video)
        for name, video in given.items()
        if name.endswith("video")
    }
    rest = {name: value for name, value in given.items() if name not in videos and name != "image"}
    out = theirs(
        image=Image.fromarray(given["image"]),
        prompt="a red circle moving left",
        negative_prompt="blue square",
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=len(LEVELS),
        guidance_scale=guidance,
        output_type="np",
        **videos,
        **rest,
    ).frames[0]
    return (out * 255).round().astype(np.uint8)


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's weights as the original repository keeps them, by hand: Wan2.2 `wan/modules/animate/`."""
    levels = len([name for name in state if name.endswith("conv_skip.weight")])
    made = dict(pair for name, tensor in state.items() for pair in _original(name, tensor, levels))
    for name in [name for name in made if name.endswith("linear1_k.weight") or name.endswith("linear1_k.bias")]:
        other = name.replace("linear1_k", "linear1_v")
        made[name.replace("linear1_k", "linear1_kv")] = torch.cat((made.pop(name), made.pop(other)))
    return made


def _original(name: str, tensor: torch.Tensor, levels: int) -> list[tuple[str, torch.Tensor]]:
    """One tensor by its original name; with that of the blur's kernel beside a convolution that has one. levels: of the
    motion encoder."""
    parts = name.split(".")
    if parts[0] == "face_adapter":
        inner = {"to_q": "linear1_q", "to_k": "linear1_k", "to_v": "linear1_v", "to_out": "linear2"}
        inner |= {"norm_q": "q_norm", "norm_k": "k_norm"}
        return [(f"face_adapter.fuser_blocks.{parts[1]}.{inner[parts[2]]}.{parts[3]}", tensor)]
    if parts[0] == "face_encoder":
        return [(f"face_encoder.{parts[1]}.conv.{parts[2]}" if parts[1].startswith("conv") else name, tensor)]
    if parts[0] != "motion_encoder":
        return [(rules("transformer").translate(name, "original"), tensor)]
    convs = "motion_encoder.enc.net_app.convs"
    if parts[1] == "motion_synthesis_weight":
        return [("motion_encoder.dec.direction.weight", tensor)]
    if parts[1] == "motion_network":
        return [(f"motion_encoder.enc.fc.{parts[2]}.{parts[3]}", tensor)]
    if parts[1] == "conv_out":
        return [(f"{convs}.{levels + 1}.weight", tensor)]
    if parts[1] == "conv_in":
        return [(f"{convs}.0.{'0.weight' if parts[2] == 'weight' else '1.bias'}", _as_bias(tensor))]
    level, conv, blurred = int(parts[2]) + 1, {"conv_skip": "skip"}.get(parts[3], parts[3]), parts[3] != "conv1"
    stem = f"{convs}.{level}.{conv}"
    if parts[-1] == "bias":
        return [(f"{stem}.{1 + blurred}.bias", _as_bias(tensor))]
    kernel = [(f"{stem}.0.kernel", torch.ones(4, 4) / 16)] if blurred else []
    return [(f"{stem}.{int(blurred)}.weight", tensor), *kernel]


def _as_bias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim > 1 else tensor.view(1, -1, 1, 1)
