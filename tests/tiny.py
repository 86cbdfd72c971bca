"""Small checkpoints with random weights in the published layout, written by diffusers and transformers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right", "on", "white"]


def write_tokenizer(folder: Path, max_length: int = 16) -> None:
    """A word tokenizer as transformers saves one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    ).save_pretrained(folder)


def make_pipeline(
    seed: int = 0,
    flow_shift: float = 3.0,
    vae_config: dict[str, Any] | None = None,
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
    vocab_size: int = len(WORDS),
    **changed: Any,
):
    """A diffusers WanPipeline with random weights: 2 layers of width 48, VAE of base width 8 if not said; a second
    expert if there is a boundary. changed: sizes of the transformer."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    vae_config = vae_config or {"base_dim": 8, "num_res_blocks": 1, "z_dim": 16}
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": vae_config["z_dim"],
        "out_channels": vae_config["z_dim"],
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 80,
        "num_layers": 2,
        **changed,
    }
    transformer = WanTransformer3DModel(**sizes).eval()
    vae = AutoencoderKLWan(**vae_config).eval()
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    transformer_2 = None if boundary_ratio is None else WanTransformer3DModel(**sizes).eval()
    return WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(config).eval(),
        transformer=transformer,
        transformer_2=transformer_2,
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        vae=vae,
        scheduler=scheduler,
    )


def write_checkpoint(folder: Path, seed: int = 0, **options):
    """Writes such a pipeline as a folder, and returns it with its tokenizer."""
    from transformers import AutoTokenizer

    write_tokenizer(folder / "tokenizer")
    pipe = make_pipeline(seed, **options)
    pipe.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pipe.register_modules(tokenizer=pipe.tokenizer)
    pipe.save_pretrained(folder)
    return pipe
