"""What goes into a Wan transformer beside latents: timesteps as modulation, text and pictures at its width.

Shapes: B batch, L rows of text, M rows of pictures, K distinct timesteps, d width.
Maths: Wan2.1 `wan/modules/model.py` (Apache-2.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.layers.embeddings import timestep_sinusoid
from fastvid.layers.linear import FeedForward, Linear, TwoLinears, linear_gelu_tanh
from fastvid.layers.parameters import normal_parameter

if TYPE_CHECKING:
    from fastvid.models.wan.transformer import WanTransformerConfig

IMAGE_NORM_EPS = 1e-5  # of the norms around the image embedder, whatever the config's eps


class ImageEmbedder(nn.Module):
    """CLIP tokens to the width of the model; first and last picture told apart by learned positions, if it has them."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = nn.LayerNorm(config.image_dim, IMAGE_NORM_EPS)
        self.ff = FeedForward(config.image_dim, config.image_dim, config.dim, ops, exact=True)
        self.norm2 = nn.LayerNorm(config.dim, IMAGE_NORM_EPS)
        self.pos_embed = None
        if config.pos_embed_seq_len:
            self.pos_embed = normal_parameter(1, config.pos_embed_seq_len, config.image_dim, std=0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, M, image_dim] -> [B, M, d]."""
        pictures = pictures.to(self.ff.net[2].weight.dtype)
        x = pictures if self.pos_embed is None else pictures + self.pos_embed
        x = self.ff(self.ops.layer_norm(x, self.norm1.weight, self.norm1.bias, IMAGE_NORM_EPS))
        return self.ops.layer_norm(x, self.norm2.weight, self.norm2.bias, IMAGE_NORM_EPS)


class ConditionEmbedder(nn.Module):
    """Timesteps to modulation rows, text and pictures to the width of the model."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.freq_dim = ops, config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, config.dim)
        self.time_proj = Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLinears(config.text_dim, config.dim)
        self.image_embedder = ImageEmbedder(config, ops) if config.image_dim else None

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct timesteps [K] -> fp32 embedding [K, d] for the head and fp32 rows [K, 6, d] for the blocks."""
        layers = self.time_embedder
        wave = timestep_sinusoid(timestep, self.freq_dim).to(layers.linear_1.weight.dtype)
        embedding = layers.linear_2(F.silu(layers.linear_1(wave)))
        rows = self.time_proj(F.silu(embedding).to(self.time_proj.weight.dtype))
        return embedding.float(), rows.float().unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, L, text_dim] -> [B, L, d]."""
        layers = self.text_embedder
        text = text.to(layers.linear_1.weight.dtype)
        return layers.linear_2(linear_gelu_tanh(self.ops, layers.linear_1, text))
