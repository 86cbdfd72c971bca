"""The UMT5 text encoder. Parameter names are those of transformers' UMT5EncoderModel, so its checkpoints load as they
are; they hold the token embedding once, as `shared.weight`.

Shapes: B batch, L tokens, d d_model, H heads. Maths: transformers `models/umt5/modeling_umt5.py` (Apache-2.0): T5 with
a relative position bias of its own in every layer, RMS norms, no scaling of the scores and no biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.layers.linear import Embedding
from fastvid.models.common.config_reader import read_fields

GATED = "gated-gelu"


@dataclass(frozen=True)
class UMT5Config:
    """What `text_encoder/config.json` says; the defaults are transformers'."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UMT5Config:
        """Read a transformers config; CheckpointError for values that this model does not implement."""
        if (kind := config.get("feed_forward_proj", GATED)) != GATED:
            raise CheckpointError(
                f"text_encoder/config.json has feed_forward_proj={kind!r:.70}; only {GATED!r} is known"
            )
        made = read_fields(cls(), config, "text_encoder/config.json", strict=False)
        exact = made.relative_attention_num_buckets // 4
        if exact * 4 != made.relative_attention_num_buckets or made.relative_attention_max_distance <= exact:
            raise CheckpointError(
                "text_encoder/config.json: relative_attention_num_buckets has to be a multiple of 4, and "
                "relative_attention_max_distance more than a quarter of it"
            )
        return made


UMT5_XXL = UMT5Config(256384, 4096, 64, 10240, 24, 64)  # of every published Wan model


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Unscaled attention with a learned bias for each bucket of distances."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, d], buckets [L, L] int64, mask [B, 1, 1, L] added to the scores -> [B, L, d]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)
        weights = F.softmax((q @ k.transpose(-1, -2) + bias + mask).float(), dim=-1).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """wo(gelu_tanh(wi_0(x)) * wi_1(x))."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class AttentionLayer(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), buckets, mask)


class FeedForwardLayer(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedFeedForward(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, buckets, mask))


class Encoder(nn.Module):
    """The blocks and the last norm. The token embedding belongs to UMT5Encoder."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class UMT5Encoder(nn.Module):
    """Token ids to embeddings."""

    # A file written from an untied copy of the model holds the embedding twice.
    ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
    # What `walk` iterates over (see `fastvid.device.offload`).
    STREAMED = ("encoder.block",)

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.walk: Callable[[Iterable[nn.Module]], Iterator[Any]] = iter
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask (1: a token, 0: padding) [B, L] -> [B, L, d], the last hidden state."""
        x = self.shared(input_ids)
        buckets = self._buckets(input_ids.shape[1], input_ids.device)
        mask = torch.zeros(attention_mask.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(attention_mask == 0, torch.finfo(x.dtype).min)[:, None, None]
        for block in self.walk(self.encoder.block):
            x = block(x, buckets, mask)
        return self.encoder.final_layer_norm(x)

    def _buckets(self, length: int, device: torch.device) -> Tensor:
        """Bucket of key position - query position [L, L]: half of them a sign, first exact, then in log steps."""
        position = torch.arange(length, device=device)
        offset = position[None, :] - position[:, None]
        half = self.config.relative_attention_num_buckets // 2
        exact, distance = half // 2, offset.abs()
        ratio = torch.log(distance.float() / exact) / math.log(self.config.relative_attention_max_distance / exact)
        far = (exact + (ratio * (half - exact)).to(torch.long)).clamp(max=half - 1)
        return (offset > 0) * half + torch.where(distance < exact, distance, far)
