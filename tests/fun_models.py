"""Tiny models of VideoX-Fun in the layout in which they were published, and what they make, by diffusers' networks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from image_models import VAE22
from PIL import Image
from safetensors.torch import save_file
from tiny import write_tokenizer
from torch import Tensor, nn

from fastvid.models.wan.config import LATENT_STATISTICS
from fastvid.models.wan.weight_names import ORIGINAL, origins

# kind: channels in and out, CLIP, a reference, experts
KINDS: Mapping[str, tuple[int, int, bool, bool, int]] = {
    "inp-2.1": (36, 16, True, False, 1),
    "inp-a14b": (36, 16, False, False, 2),
    "inp-5b": (100, 48, False, False, 1),
    "control-1.0": (48, 16, True, False, 1),
    "control-1.1": (48, 16, True, True, 1),
    "control-a14b": (52, 16, False, True, 2),
    "control-5b": (148, 48, False, True, 1),
}
VARIANTS = {
    "inp-2.1": "wan2.1-fun-inp-1.3b",
    "inp-a14b": "wan2.2-fun-inp-a14b",
    "inp-5b": "wan2.2-fun-inp-5b",
    "control-1.0": "wan2.1-fun-control-14b",
    "control-1.1": "wan2.1-fun-v1.1-control-1.3b",
    "control-a14b": "wan2.2-fun-control-a14b",
    "control-5b": "wan2.2-fun-control-5b",
}
CLIP = {"hidden_size": 1280, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16}
CLIP |= {"image_size": 28, "patch_size": 14}


@dataclass
class Fun:
    """A tiny model's networks, by diffusers and transformers, and its folder."""

    kind: str
    folder: Path
    experts: list[Any]
    ref_convs: list[nn.Conv2d]
    vae: Any
    clip: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def write_fun(folder: Path, kind: str, heads: tuple[int, int] = (2, 24)) -> Fun:
    """A tiny model in VideoX-Fun's layout, with encoders in safetensors. heads: their number and width."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

    given, out, image, reference, count = KINDS[kind]
    torch.manual_seed(3)
    dim = heads[0] * heads[1]
    sizes: dict[str, Any] = {
        **{"num_attention_heads": heads[0], "attention_head_dim": heads[1], "in_channels": given, "out_channels": out},
        **{"text_dim": 32, "freq_dim": 256, "ffn_dim": 80, "num_layers": 2},
    }
    sizes |= {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": dim} if image else {}
    experts = [WanTransformer3DModel(**sizes).eval() for _ in range(count)]
    mean, std = LATENT_STATISTICS[48]
    large = VAE22 | {"latents_mean": list(mean), "latents_std": list(std)}
    vae = AutoencoderKLWan(**(large if out == 48 else {"base_dim": 8, "num_res_blocks": 1, "z_dim": 16})).eval()
    for module in (*experts, vae):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    refs = [nn.Conv2d(out, dim, 2, 2) for _ in range(count if reference else 0)]
    for i, expert in enumerate(experts):
        state = expert.state_dict() | ({f"ref_conv.{k}": v for k, v in refs[i].state_dict().items()} if refs else {})
        inner = folder / ["high_noise_model", "low_noise_model"][i] if count == 2 else folder
        write_original(inner / "diffusion_pytorch_model.safetensors", state)
        config = {
            "_class_name": "WanTransformer3DModel",
            "dim": dim,
            "num_heads": heads[0],
            "in_dim": given,
            "out_dim": out,
        }
        config |= {"ffn_dim": 80, "freq_dim": 256, "num_layers": 2, "eps": 1e-6, "text_len": 512}
        config |= {"add_ref_conv": reference, "in_dim_ref_conv": out, "add_control_adapter": False}
        (inner / "config.json").write_text(json.dumps(config))
    write_original(folder / f"Wan{'2.2' if out == 48 else '2.1'}_VAE.safetensors", vae.state_dict())
    write_tokenizer(folder / "google" / "umt5-xxl", 512)
    text = UMT5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    write_original(folder / "models_t5_umt5-xxl-enc-bf16.safetensors", UMT5EncoderModel(text).state_dict())
    clip = None
    if image:
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP, hidden_act="gelu", projection_dim=8)).eval()
        write_original(folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors", clip.state_dict())
    return Fun(kind, folder, experts, refs, vae, clip)


def write_original(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {name: origin.make(state.__getitem__).contiguous() for name, origin in origins(state, ORIGINAL).items()}
    save_file({name: tensor.clone() for name, tensor in made.items()}, path)


# ---------------------------------------------------------------- what they make


class Patch(nn.Module):
    """The reference's tokens in front of the video's."""

    def __init__(self, conv: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.conv, self.tokens = conv, tokens

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.tokens[:, :, None], self.conv(x[:, :, 1:])), 2)


def encode(vae: Any, frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{x}")).view(1, -1, 1, 1, 1) for x in ("mean", "std"))
    return (vae.encode(frames).latent_dist.mode() - mean) / std


def look(fun: Fun, picture: np.ndarray | None) -> Tensor | None:
    from transformers import CLIPImageProcessor

    if fun.clip is None:
        return None
    if picture is None:
        return torch.zeros(1, 5, CLIP["hidden_size"])
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor(images=Image.fromarray(picture), return_tensors="pt").pixel_values
    return fun.clip(pixels, output_hidden_states=True).hidden_states[-2]


def signed(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).float().div(127.5).sub(1).movedim(-1, 0)[None]


def mask_of(free: Tensor, size: tuple[int, ...]) -> Tensor:
    """VideoX-Fun's mask channels of free pixels [F, H, W]: [1, 4, T, h, w], 1 where known."""
    folded = torch.cat((free[:1].repeat(4, 1, 1), free[1:])).reshape(-1, 4, *free.shape[1:]).transpose(0, 1)[None]
    first = F.interpolate(1 - folded[:, :, :1], (1, *size[1:]), mode="trilinear", align_corners=False)
    rest = F.interpolate(1 - folded[:, :, 1:], (size[0] - 1, *size[1:]), mode="trilinear", align_corners=False)
    return torch.cat((first, rest), 2)


@torch.no_grad()
def sample(
    fun: Fun,
    noise: Tensor,
    texts: tuple[Tensor, Tensor],
    sigmas: list[float],
    *,
    guidance: float = 4.0,
    frames: np.ndarray | None = None,
    free: np.ndarray | None = None,
    control: np.ndarray | None = None,
    start: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    boundary: float = 0.9,
) -> Tensor:
    """Latents after Euler steps. frames, free: a video and which of its pixels [F, H, W] are to be made; none: all."""
    seen, levels, imposed = [], None, None
    zeros, latents = torch.zeros_like(noise), noise
    if "control" in fun.kind:
        seen.append(zeros if control is None else encode(fun.vae, signed(control)))
    if fun.kind in ("control-1.0", "control-1.1"):
        first = zeros.clone()
        if start is not None:
            first[:, :, :1] = encode(fun.vae, signed(start[None]))
        seen.append(first)
    elif frames is None:
        seen += [torch.zeros(1, 4, *noise.shape[2:]), zeros]
    else:
        mask = torch.from_numpy(free).float()
        known = encode(fun.vae, signed(frames) * (mask < 0.5))
        seen += [mask_of(mask, noise.shape[2:]), known]
        if fun.kind.endswith("5b"):
            folded = torch.cat((mask[:1].repeat(4, 1, 1), mask[1:])).reshape(-1, 4, *mask.shape[1:])[:, 0]
            levels = F.interpolate(folded[None, None], noise.shape[2:], mode="trilinear", align_corners=True)
            if not levels[:, :, 0].any():
                levels[:, :, 1:], imposed = 1.0, known
                latents = (1 - levels) * known + levels * latents
    embeds = look(fun, reference if reference is not None else start)
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        number = 1 if len(fun.experts) == 2 and sigma < boundary else 0
        transformer, refs = fun.experts[number], fun.ref_convs
        tokens = None
        if refs:
            pictures = zeros[:, :, 0] if reference is None else encode(fun.vae, signed(reference[None]))[:, :, 0]
            tokens = refs[number](pictures)
        time = torch.tensor([1000.0 * sigma])
        if levels is not None:
            time = (levels[0, 0, :, ::2, ::2] * 1000.0 * sigma).flatten()[None]
        parts = [_velocity(transformer, torch.cat((latents, *seen), 1), time, text, embeds, tokens) for text in texts]
        latents = latents + (after - sigma) * (parts[1] + guidance * (parts[0] - parts[1]))
        if imposed is not None:
            latents = (1 - levels) * imposed + levels * latents
    return latents


def _velocity(
    transformer: Any, x: Tensor, time: Tensor, text: Tensor, embeds: Tensor | None, tokens: Tensor | None
) -> Tensor:
    if tokens is None:
        return transformer(x, time, text, embeds).sample
    conv = transformer.patch_embedding
    if time.ndim == 2:
        time = torch.cat((time[:, -1:].expand(1, tokens[0, 0].numel()), time), 1)
    transformer.patch_embedding = Patch(conv, tokens)
    try:
        return transformer(torch.cat((x[:, :, :1], x), 2), time, text, embeds).sample[:, :, 1:]
    finally:
        transformer.patch_embedding = conv
