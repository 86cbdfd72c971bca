"""Tiny checkpoints with random weights, in the published diffusers layout.

diffusers and transformers write the files. The weights are drawn by numpy's Philox generator, keyed by the name of each
tensor, so they are the same with every version of torch. `ensure` writes a model once, under a hash of this file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right", "on", "white"]
WIDTH, TEXT_DIM, IMAGE_DIM = 48, 32, 32
VAE_21 = {"base_dim": 8, "num_res_blocks": 1, "z_dim": 16}
VAE_22 = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "num_res_blocks": 1,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 48,
    "latents_std": [1.5] * 48,
}
CLIP = {
    "hidden_size": IMAGE_DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}
SHARP = 4.0  # queries are so much larger than they would be: tokens of random weights hardly look at each other


def ensure(folder: Path, kind: str) -> Path:
    """The folder of a tiny model, written if it is not there yet. kind: a key of KINDS."""
    made = folder / content_hash() / kind
    if not made.exists():
        partial = made.with_name(f"{kind}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        KINDS[kind](partial)
        partial.rename(made)
    return made


def content_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------- weights


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32. The name is the seed."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def fill(module: torch.nn.Module, label: str) -> Any:
    """Replace every parameter of a module. Norms are near 1, matrices keep the size of what they multiply."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = scaled(name, draw(f"{label}.{name}", tuple(parameter.shape)))
            parameter.copy_(torch.from_numpy(values))
    return module.eval()


def scaled(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith("bias"):
        return values * np.float32(0.05)
    if "norm_q" in name:
        return SHARP * (1 + np.float32(0.1) * values)
    if "norm" in name or name.endswith("gamma"):
        return 1 + np.float32(0.1) * values
    fan_in = values[0].size if values.ndim > 1 else values.size
    return values / np.float32(fan_in) ** np.float32(0.5)


# ---------------------------------------------------------------- parts


def transformer(label: str, channels: int, **changed: Any) -> Any:
    """A WanTransformer3DModel of two layers. channels: of its latents."""
    from diffusers import WanTransformer3DModel

    return fill(WanTransformer3DModel(**sizes(channels, **changed)), label)


def sizes(channels: int, **changed: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": WIDTH // 2,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": TEXT_DIM,
        "freq_dim": 256,
        "ffn_dim": 80,
        "num_layers": 2,
        **changed,
    }


def vae(config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKLWan

    return fill(AutoencoderKLWan(**config), "vae")


def text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(WORDS),
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return fill(UMT5EncoderModel(config), "text_encoder")


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return fill(CLIPVisionModel(CLIPVisionConfig(**CLIP)), "image_encoder")


def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def tokenizer(folder: Path, max_length: int) -> Any:
    """A word tokenizer, written by transformers and read back."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=max_length, padding_side="right", **words)
    fast.save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def shared_parts(folder: Path, config: dict[str, Any], max_length: int = 16) -> dict[str, Any]:
    """What every kind of pipeline has."""
    return {
        "tokenizer": tokenizer(folder, max_length),
        "text_encoder": text_encoder(),
        "vae": vae(config),
        "scheduler": scheduler(),
    }


# ---------------------------------------------------------------- models


def write_t2v(folder: Path) -> None:
    from diffusers import WanPipeline

    WanPipeline(**shared_parts(folder, VAE_21), transformer=transformer("high", 16)).save_pretrained(folder)


def write_deep(folder: Path) -> None:
    """Three layers: the keys of a rollout then show what other frames' keys were made of."""
    from diffusers import WanPipeline

    made = transformer("deep", 16, num_layers=3)
    WanPipeline(**shared_parts(folder, VAE_21), transformer=made).save_pretrained(folder)


def write_two(folder: Path) -> None:
    """Two experts, as Wan 2.2 T2V-A14B has them."""
    from diffusers import WanPipeline

    experts = {"transformer": transformer("high", 16), "transformer_2": transformer("low", 16)}
    WanPipeline(**shared_parts(folder, VAE_21), **experts, boundary_ratio=0.6875).save_pretrained(folder)


def write_ti2v(folder: Path) -> None:
    """The VAE of Wan 2.2 and a timestep for each token, as TI2V-5B has them."""
    from diffusers import WanPipeline

    made = transformer("high", 48)
    WanPipeline(**shared_parts(folder, VAE_22), transformer=made, expand_timesteps=True).save_pretrained(folder)


def write_pictures(folder: Path, two_experts: bool = False, clip: bool = True, **changed: Any) -> None:
    """An image-to-video model. Its tokenizer gives 512 rows, as diffusers wants it."""
    from diffusers import WanImageToVideoPipeline

    changed = {"in_channels": 36, "out_channels": 16, **changed}
    changed |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": WIDTH} if clip else {}
    WanImageToVideoPipeline(
        **shared_parts(folder, VAE_21, 512),
        image_encoder=image_encoder() if clip else None,
        image_processor=image_processor() if clip else None,
        transformer=transformer("high", 16, **changed),
        transformer_2=transformer("low", 16, **changed) if two_experts else None,
        boundary_ratio=0.72 if two_experts else None,
    ).save_pretrained(folder)


def write_i2v_two(folder: Path) -> None:
    write_pictures(folder, two_experts=True, clip=False)


def write_flf2v(folder: Path) -> None:
    write_pictures(folder, pos_embed_seq_len=10)


def write_vace(folder: Path) -> None:
    """Four layers, hints at the first and the third."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    config = sizes(16, num_layers=4, vace_layers=[0, 2], vace_in_channels=96)
    made = fill(WanVACETransformer3DModel(**config), "vace")
    WanVACEPipeline(**shared_parts(folder, VAE_21), transformer=made).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "t2v": write_t2v,
    "deep": write_deep,
    "two": write_two,
    "ti2v": write_ti2v,
    "i2v": write_pictures,
    "i2v-two": write_i2v_two,
    "flf2v": write_flf2v,
    "vace": write_vace,
}


# ---------------------------------------------------------------- a LoRA


def ensure_lora(folder: Path) -> Path:
    """A LoRA of rank 2 for the transformer of "t2v", in diffusers' names."""
    from safetensors.numpy import save_file

    path = folder / content_hash() / "lora.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module in ("blocks.0.attn1.to_q", "blocks.0.attn2.to_v", "blocks.1.attn1.to_out.0"):
            tensors[f"transformer.{module}.lora_A.weight"] = draw(f"lora.{module}.A", (2, WIDTH))
            tensors[f"transformer.{module}.lora_B.weight"] = draw(f"lora.{module}.B", (WIDTH, 2))
        save_file(tensors, path)
    return path
