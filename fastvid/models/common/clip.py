"""The CLIP vision encoder that Wan 2.1 I2V and FLF2V look at their pictures with (ViT-H/14).
Parameter names are those of transformers' CLIPVisionModel, so its checkpoints load as they are.

Shapes: B pictures, S side of a picture in pixels, M = 1 + (S / patch_size)^2 tokens, d hidden_size.
Maths: transformers `models/clip/modeling_clip.py` (Apache-2.0). The model is conditioned on what all layers but the
last make of a picture (Wan2.1 `wan/modules/clip.py`, use_31_block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.attention import self_attention
from fastvid.layers.linear import Embedding, Linear, normal_parameter
from fastvid.models.common.config_reader import read_fields
from fastvid.ops import reference
from fastvid.ops.quantized import dense

ACTIVATION, DEFAULT_ACTIVATION = "gelu", "quick_gelu"


@dataclass(frozen=True)
class CLIPVisionConfig:
    """What `image_encoder/config.json` says; the defaults are transformers'."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPVisionConfig:
        """Read a transformers config; CheckpointError for values that this model does not implement."""
        source = "image_encoder/config.json"
        if (activation := config.get("hidden_act", DEFAULT_ACTIVATION)) != ACTIVATION:
            raise CheckpointError(f"{source} has hidden_act={activation!r:.80}; only {ACTIVATION!r} is known")
        if (channels := config.get("num_channels", 3)) != 3:
            raise CheckpointError(f"{source} has num_channels={channels!r:.80}; pictures have 3")
        made = read_fields(cls(), config, source, strict=False)
        if made.hidden_size % made.num_attention_heads or made.image_size < made.patch_size:
            raise CheckpointError(
                f"{source}: hidden_size has to be a multiple of num_attention_heads, and image_size at least patch_size"
            )
        if made.num_hidden_layers < 2:
            raise CheckpointError(f"{source}: num_hidden_layers is 1; the last layer is left out, so 2 are needed")
        return made


CLIP_HUGE = CLIPVisionConfig(1280, 5120, 32, 16, 224, 14)  # ViT-H/14, of every published Wan model that has one


class Embeddings(nn.Module):
    """Patches and a learned token in front of them, with learned positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        self.class_embedding = normal_parameter(d, std=d**-0.5)
        self.patch_embedding = nn.Conv2d(3, d, patch, stride=patch, bias=False)
        self.position_embedding = Embedding(config.tokens, d)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, M, d]."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((first, patches), dim=1) + dense(self.position_embedding.weight)


class SelfAttention(nn.Module):
    def __init__(self, config: CLIPVisionConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.heads = ops, config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self_attention(self.ops, q, k, v))


class FeedForward(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: CLIPVisionConfig, ops: Any) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, ops)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig, ops: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(config, ops) for _ in range(config.num_hidden_layers)])


class CLIPVisionEncoder(nn.Module):
    """Pictures to the tokens that an I2V model looks at."""

    # Of CLIPVisionModelWithProjection, and a buffer that older versions of transformers saved.
    UNUSED = ("visual_projection", "position_ids")

    def __init__(self, config: CLIPVisionConfig, ops: Any = reference) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, ops)
        # Held because files have it; only a pooled embedding would need it.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        # transformers before 5 wrote every name behind this prefix, and CLIPVisionModelWithProjection still does.
        self.ALIASES = {f"vision_model.{name}": name for name, _ in self.named_parameters()}

    def forward(self, pixels: Tensor) -> Tensor:
        """What all layers but the last make of pixels [B, 3, S, S] -> [B, M, d]. See `engine.pixels.clip_pixels`."""
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise InvalidRequest(f"pictures are [B, 3, {size}, {size}] for this encoder, not {list(pixels.shape)}")
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        return x
