"""Small Wan transformers of every kind: diffusers' with drawn weights, ours with the same, and what both are given.

Kinds: t2v (text alone), i2v and flf2v (pictures seen by CLIP, and more channels), vace (a control branch).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from fastvid.models.registry import build_transformer, read_transformer
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops import reference

COMMON: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 24, "out_channels": 4, "text_dim": 20}
T2V = {**COMMON, "in_channels": 4, "ffn_dim": 80, "num_layers": 3}
I2V = {**T2V, "in_channels": 12, "image_dim": 40, "added_kv_proj_dim": 72}
VACE = {**T2V, "num_layers": 5, "vace_layers": [0, 2, 3], "vace_in_channels": 9}
CONFIGS = {"t2v": T2V, "i2v": I2V, "flf2v": {**I2V, "pos_embed_seq_len": 14}, "vace": VACE}
NO_CLIP = {"image_dim": None, "added_kv_proj_dim": None}
SCALES = [0.7, 1.3, -0.4]
SIZES = [(1, 2, 2), (3, 6, 10), (5, 14, 6)]  # latent frames, height, width
TEXT = 512  # rows: diffusers' model takes everything in front of the last 512 for pictures


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def their_class(config: dict[str, Any]) -> type[nn.Module]:
    return WanVACETransformer3DModel if config.get("vace_layers") else WanTransformer3DModel


def diffusers_model(kind: str = "t2v", **changes: Any) -> nn.Module:
    """diffusers' model with every weight drawn, also those that start as ones or zeros."""
    torch.manual_seed(0)
    config = {**CONFIGS[kind], **changes}
    model = their_class(config)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if kind == "vace":  # faint tokens, on which a wrong epsilon in a norm shows
            for part in (model.patch_embedding, model.vace_patch_embedding, model.vace_blocks[0].proj_in):
                for parameter in part.parameters():
                    parameter.mul_(0.1)
    return model


def empty(theirs: nn.Module, ops: Any = reference) -> WanTransformer:
    """Ours by their config, without its weights."""
    return build_transformer(read_transformer(dict(theirs.config)), ops)


def ours(theirs: nn.Module, ops: Any = reference) -> WanTransformer:
    model = empty(theirs, ops)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def inputs(
    kind: str = "t2v", size: tuple[int, int, int] = (3, 6, 10), timesteps: str = "sample", batch: int = 2
) -> tuple[Tensor, ...]:
    """Latents, timesteps (one a sample, frame or token), text; then tokens of one or two pictures, or a control."""
    generator = torch.Generator().manual_seed(sum(size))
    t, h, w = size
    each = {"sample": (batch,), "frame": (batch, t), "token": (batch, t * h * w // 4)}[timesteps]
    channels, rows = CONFIGS[kind]["in_channels"], TEXT if "image_dim" in CONFIGS[kind] else 7
    more = {"i2v": (batch, 5, 40), "flf2v": (batch, 14, 40), "vace": (batch, 9, *size)}
    shapes = [(batch, channels, *size), (batch, rows, 20), *([more[kind]] if kind in more else [])]
    latents, *rest = [torch.randn(shape, generator=generator) for shape in shapes]
    timestep = torch.rand(each, generator=generator) * 1000
    if timesteps != "sample":
        timestep[torch.rand(each, generator=generator) < 0.4] = 0
    return latents, timestep, *rest


def run_theirs(
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    more: Tensor | None = None,
    scales: list[float] | None = SCALES,
) -> Tensor:
    tokens = latents[0, 0].numel() // 4
    if timestep.ndim == 2 and timestep.shape[1] != tokens:  # diffusers knows one a sample and one a token
        timestep = timestep.repeat_interleave(tokens // timestep.shape[1], dim=1)
    given: list[Any] = [latents, timestep, text]
    if isinstance(model, WanVACETransformer3DModel):
        given += [None, more, None if scales is None else torch.tensor(scales, dtype=latents.dtype)]
    elif more is not None:
        # It takes first and last picture as two samples.
        two = model.config.pos_embed_seq_len
        given.append(more.reshape(-1, more.shape[1] // 2, more.shape[2]) if two else more)
    return model(*given, return_dict=False)[0]


def run_ours(
    model: WanTransformer,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    more: Tensor | None = None,
    scales: Any = SCALES,
) -> Tensor:
    if hasattr(model, "vace_blocks"):
        return model(latents, timestep, model.prepare_context(text, control=more, scales=scales))
    return model(latents, timestep, text if more is None else model.prepare_context(text, more))


def halved(theirs: nn.Module, like: nn.Module) -> nn.Module:
    """Their model `like` in bf16, with what stays in fp32 from `theirs`."""
    half = like.bfloat16()
    for name, parameter in half.named_parameters():
        if set(WanTransformer.FP32_PARTS) & set(name.split(".")):
            parameter.data = theirs.get_parameter(name).data
    return half
