"""The models: what they are (`open_checkpoint`), what they are asked for by default (`Recipe`), how they are built."""

from __future__ import annotations

from fastvid.loaders.checkpoint import (
    EXPERTS,
    KINDS,
    Checkpoint,
    Part,
    PartKind,
    build_text_encoder,
    build_transformer,
    build_vae,
    load_part,
    open_checkpoint,
)
from fastvid.models.common.experts import Experts
from fastvid.models.common.tokenizer import TextTokenizer, clean_prompt, encode_prompt
from fastvid.models.common.umt5 import UMT5Config, UMT5Encoder
from fastvid.models.patterns import Patterns
from fastvid.models.wan.presets import (
    EMBEDDED,
    VARIANTS,
    WAN_1_3B,
    WAN_14B,
    Recipe,
    Rollout,
    Signature,
    Variant,
    find_recipe,
    find_variants,
    read_signature,
)
from fastvid.models.wan.transformer import WanTransformer, WanTransformerConfig
from fastvid.models.wan.vae import WanVAE, WanVAEConfig
from fastvid.models.wan.vae22 import VAEConfig, WanVAE22, WanVAE22Config

__all__ = [
    "EMBEDDED",
    "EXPERTS",
    "KINDS",
    "VARIANTS",
    "WAN_14B",
    "WAN_1_3B",
    "Checkpoint",
    "Experts",
    "Part",
    "PartKind",
    "Patterns",
    "Recipe",
    "Rollout",
    "Signature",
    "TextTokenizer",
    "UMT5Config",
    "UMT5Encoder",
    "VAEConfig",
    "Variant",
    "WanTransformer",
    "WanTransformerConfig",
    "WanVAE",
    "WanVAE22",
    "WanVAE22Config",
    "WanVAEConfig",
    "build_text_encoder",
    "build_transformer",
    "build_vae",
    "clean_prompt",
    "encode_prompt",
    "find_recipe",
    "find_variants",
    "load_part",
    "open_checkpoint",
    "read_signature",
]
