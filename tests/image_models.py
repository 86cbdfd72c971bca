"""Tiny checkpoints of models that take pictures, written by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import write_tokenizer

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}
VAE22 = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "num_res_blocks": 1,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def write_image_model(folder: Path, kind: str) -> Any:
    """A tiny diffusers WanImageToVideoPipeline: i2v (CLIP), flf2v (CLIP, two pictures), a14b (two experts), ti2v."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanTransformer3DModel,
    )
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    # diffusers takes the last 512 rows of pictures and text for the text, whatever the text's length.
    write_tokenizer(folder / "tokenizer", 512)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(3)
    vae = AutoencoderKLWan(**(VAE22 if kind == "ti2v" else {"base_dim": 8, "num_res_blocks": 1, "z_dim": 16})).eval()
    z, sees = vae.config.z_dim, kind in ("i2v", "flf2v")
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": z if kind == "ti2v" else 2 * z + 4,
        "out_channels": z,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 80,
        "num_layers": 2,
    }
    if sees:
        sizes |= {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": 48}
    if kind == "flf2v":
        sizes["pos_embed_seq_len"] = 2 * 5
    experts = [WanTransformer3DModel(**sizes).eval() for _ in range(2 if kind == "a14b" else 1)]
    for module in (*experts, vae):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        image_encoder=CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval() if sees else None,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        if sees
        else None,
        transformer=experts[0],
        transformer_2=experts[1] if kind == "a14b" else None,
        boundary_ratio=0.72 if kind == "a14b" else None,
        expand_timesteps=kind == "ti2v",
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )
    pipe.save_pretrained(folder)
    return pipe
