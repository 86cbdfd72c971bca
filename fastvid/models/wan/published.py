"""Configurations of the published models by name, for planning without their files: what shapes and `Signature` do not
say comes from Wan2.1 `wan/configs/`, Wan2.2 `wan/configs/` and the config.json files on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvid.models.common.clip import CLIPVisionConfig
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.preset import Preset, Signature
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig, WanVAE22Config, WanVAEConfig
from fastvid.models.wan.presets import EMBEDDED, VARIANTS

FFN_DIM = {1536: 8960, 3072: 14336, 5120: 13824}  # by width
VACE_STEP = {1536: 2, 5120: 5}  # every so many blocks there is a control block
HEAD_DIM = 128
TWO_PICTURES = 514  # CLIP tokens of a first and a last picture
TEXT_LENGTH = 512

NAMES = tuple(variant.preset.name for variant in VARIANTS if variant.preset is not EMBEDDED)
"""The models that are known by name. The embedded one is there as files."""


def describe(name: str) -> tuple[Preset, dict[str, Any]]:
    """The recipe of a published model, and the configuration of each of its parts, as a checkpoint names them."""
    variant = next(variant for variant in VARIANTS if variant.preset.name == name)
    signature = variant.signature
    transformer, text = transformer_config(signature), UMT5Config()
    configs: dict[str, Any] = {"transformer": transformer}
    if signature.experts > 1:
        configs["transformer_2"] = transformer
    configs |= {"vae": WanVAE22Config() if signature.out_channels == 48 else WanVAEConfig(), "text_encoder": text}
    return variant.preset, configs | ({"image_encoder": CLIPVisionConfig()} if signature.image else {})


def transformer_config(signature: Signature) -> WanTransformerConfig | WanVACEConfig:
    """A published transformer's configuration."""
    dim, image = signature.dim, signature.image
    made = WanTransformerConfig(
        num_attention_heads=dim // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        in_channels=signature.in_channels,
        out_channels=signature.out_channels,
        text_dim=signature.text_dim,
        ffn_dim=FFN_DIM[dim],
        num_layers=signature.num_layers,
        **_picture(dim, signature.positions) if image else {},
    )
    return WanVACEConfig(made, tuple(range(0, signature.num_layers, VACE_STEP[dim]))) if signature.control else made


def _picture(dim: int, positions: bool) -> Mapping[str, int]:
    sizes = {"image_dim": CLIPVisionConfig().hidden_size, "added_kv_proj_dim": dim}
    return sizes | ({"pos_embed_seq_len": TWO_PICTURES} if positions else {})
