"""The Wan video diffusion transformer (text to video): config, blocks, model. Parameter names are those of diffusers'
WanTransformer3DModel, so its checkpoints load as they are.

Shapes: B batch, C latent channels, T latent frames, H/W latent height and width, N = T/pt * H/ph * W/pw tokens,
d width, L rows of text, K distinct timesteps, G groups of tokens that share one (see `ops.reference`).
Maths: Wan2.1 `wan/modules/model.py` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.attention import cross_attention, self_attention
from fastvid.layers.embeddings import rotary_table, timestep_sinusoid
from fastvid.layers.linear import Linear, linear_gelu_tanh
from fastvid.layers.parameters import normal_parameter
from fastvid.models.configs import read_fields
from fastvid.ops import reference

QK_NORM = "rms_norm_across_heads"
NOT_YET = {
    "image_dim": "a CLIP picture as condition",
    "added_kv_proj_dim": "attention to picture tokens",
    "pos_embed_seq_len": "first and last frame conditioning",
    "vace_layers": "the VACE control branch",
    "vace_in_channels": "the VACE control branch",
}


@dataclass(frozen=True)
class WanTransformerConfig:
    """What `transformer/config.json` says. Width d is num_attention_heads * attention_head_dim."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanTransformerConfig:
        """Read a diffusers config; CheckpointError for values that this model does not implement."""
        config = {**config, "out_channels": config.get("out_channels") or config.get("in_channels", cls.in_channels)}
        for key, meaning in NOT_YET.items():
            if config.get(key) is not None:
                raise CheckpointError(
                    f"transformer/config.json has {key}={config[key]!r}: {meaning} is not supported yet; "
                    "text-to-video models are"
                )
        if config.get("qk_norm", QK_NORM) != QK_NORM:
            raise CheckpointError(
                f"transformer/config.json has qk_norm={config['qk_norm']!r}; only {QK_NORM!r} is known"
            )
        made = read_fields(cls, config, "transformer/config.json", ignored=("qk_norm", "rope_max_seq_len"))
        if made.attention_head_dim % 2 or made.freq_dim % 2:
            raise CheckpointError("transformer/config.json: attention_head_dim and freq_dim have to be even")
        return made


class Modulation(NamedTuple):
    """Timesteps as the blocks need them: rows of the distinct ones, and which row each group of tokens takes."""

    rows: Tensor  # fp32 [K, 6, d]
    index: Tensor  # int64 [B, G]


class Context(NamedTuple):
    """The text as cross-attention needs it: for each layer, keys and values [B, L, heads, head_dim]."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class Attention(nn.Module):
    """Projections and norms of one attention; attn1 looks at the video itself, attn2 at the text."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.eps, self.heads = ops, config.eps, config.num_attention_heads
        self.to_q = Linear(config.dim, config.dim)
        self.to_k = Linear(config.dim, config.dim)
        self.to_v = Linear(config.dim, config.dim)
        self.to_out = nn.ModuleList([Linear(config.dim, config.dim)])
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)

    def self_attend(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, N, d] -> [B, N, d]."""
        q = self.ops.rms_norm_rope(self.to_q(x), self.norm_q.weight, *rotary, self.eps)
        k = self.ops.rms_norm_rope(self.to_k(x), self.norm_k.weight, *rotary, self.eps)
        return self.to_out[0](self_attention(self.ops, q, k, self._split(self.to_v(x))))

    def project_context(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text [B, L, d]: two tensors [B, L, heads, head_dim]."""
        k = self.ops.rms_norm(self.to_k(text), self.norm_k.weight, self.eps)
        return self._split(k), self._split(self.to_v(text))

    def cross_attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x [B, N, d], k and v from project_context -> [B, N, d]."""
        q = self.ops.rms_norm(self.to_q(x), self.norm_q.weight, self.eps)
        return self.to_out[0](cross_attention(self.ops, self._split(q), k, v))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        inner = nn.ModuleDict({"proj": Linear(config.dim, config.ffn_dim)})
        self.net = nn.ModuleList([inner, nn.Identity(), Linear(config.ffn_dim, config.dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](linear_gelu_tanh(self.ops, self.net[0]["proj"], x))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated by the timestep."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        self.attn1 = Attention(config, ops)
        self.attn2 = Attention(config, ops)
        self.norm2 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(config, ops)
        self.scale_shift_table = normal_parameter(1, 6, config.dim, std=config.dim**-0.5)

    def forward(
        self, x: Tensor, modulation: Modulation, context: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, N, d] -> [B, N, d]."""
        rows, index = self.scale_shift_table + modulation.rows, modulation.index
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
        y = self.ops.modulated_layer_norm(x, shift1, scale1, index, self.eps)
        x = self.ops.gated_residual(x, self.attn1.self_attend(y, rotary), gate1, index)
        x = x + self.attn2.cross_attend(self._norm2(x), *context)
        y = self.ops.modulated_layer_norm(x, shift2, scale2, index, self.eps)
        return self.ops.gated_residual(x, self.ffn(y), gate2, index)

    def _norm2(self, x: Tensor) -> Tensor:
        return x if self.norm2 is None else self.ops.layer_norm(x, self.norm2.weight, self.norm2.bias, self.eps)


class TwoLinears(nn.Module):
    """Linear, an activation, Linear, under the names that diffusers gives them."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, dim)
        self.linear_2 = Linear(dim, dim)


class ConditionEmbedder(nn.Module):
    """Timesteps to modulation rows, text embeddings to the width of the model."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.freq_dim = ops, config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, config.dim)
        self.time_proj = Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLinears(config.text_dim, config.dim)

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


class WanTransformer(nn.Module):
    """Velocity (noise - clean) of noisy video latents, given their noise level and a text.

    config: WanTransformerConfig. ops: an object with the functions of `fastvid.ops.reference`.
    """

    # What the published code computes in fp32 whatever the dtype of the rest (diffusers: _keep_in_fp32_modules).
    FP32_PARTS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")

    def __init__(self, config: WanTransformerConfig, ops: Any = reference) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config, ops)
        self.blocks = nn.ModuleList([Block(config, ops) for _ in range(config.num_layers)])
        pt, ph, pw = config.patch_size
        self.proj_out = Linear(config.dim, config.out_channels * pt * ph * pw)
        self.scale_shift_table = normal_parameter(1, 2, config.dim, std=config.dim**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream and the large matrices."""
        return self.patch_embedding.weight.dtype

    def prepare_context(self, text_embeds: Tensor) -> Context:
        """Everything that depends on the text alone, once a request: text_embeds [B, L, text_dim] -> Context."""
        if text_embeds.ndim != 3 or text_embeds.shape[-1] != self.config.text_dim:
            raise InvalidRequest(
                f"text embeddings are [B, L, {self.config.text_dim}] for this model, not {list(text_embeds.shape)}"
            )
        text = self.condition_embedder.embed_text(text_embeds)
        return Context(tuple(block.attn2.project_context(text) for block in self.blocks))

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor | Context, *, rope_offset: int = 0) -> Tensor:
        """Predict the velocity of latents [B, C, T, H, W]; same shape (with out_channels) and dtype.

        timestep, on 0..1000: [B], [B, T / pt] (one a latent frame) or [B, N] (one a token).
        text: embeddings [B, L, text_dim], or what prepare_context made of them.
        rope_offset: absolute index of the first latent frame, for windows of a longer video.
        """
        grid = self._grid(latents)
        context = text if isinstance(text, Context) else self.prepare_context(text)
        values, index = group_timesteps(timestep, latents.shape[0], grid)
        embedding, rows = self.condition_embedder.embed_time(values)
        modulation = Modulation(rows, index)
        rotary = rotary_table(grid, self.config.attention_head_dim, offset=rope_offset, device=latents.device)
        x = self.ops.patch_embed(latents.to(self.dtype), self.patch_embedding.weight, self.patch_embedding.bias)
        for block, layer in zip(self.blocks, context.layers, strict=True):
            x = block(x, modulation, layer, rotary)
        return self._head(x, embedding, index, grid).to(latents.dtype)

    def _head(self, x: Tensor, embedding: Tensor, index: Tensor, grid: tuple[int, int, int]) -> Tensor:
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(1)).unbind(1)
        x = self.proj_out(self.ops.modulated_layer_norm(x, shift, scale, index, self.config.eps))
        return self.ops.unpatchify(x, grid, self.config.patch_size)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along t, h, w."""
        sizes = zip(latents.shape[2:], self.config.patch_size, strict=True) if latents.ndim == 5 else ()
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels or any(n % p for n, p in sizes):
            raise InvalidRequest(
                f"latents are [B, {self.config.in_channels}, T, H, W] with T, H, W multiples of "
                f"{self.config.patch_size} for this model, not {list(latents.shape)}"
            )
        t, h, w = (n // p for n, p in zip(latents.shape[2:], self.config.patch_size, strict=True))
        return t, h, w


def group_timesteps(timestep: Tensor, batch: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The distinct timesteps [K], and the row of each group of tokens [B, G]: G = 1, t or N.

    timestep [B], [B, t] or [B, N] for a (t, h, w) grid of N tokens; one that is even within frames becomes [B, t].
    """
    t, tokens = grid[0], grid[0] * grid[1] * grid[2]
    if timestep.shape == (batch,):
        return timestep, torch.arange(batch, device=timestep.device)[:, None]
    if timestep.shape not in ((batch, t), (batch, tokens)):
        raise InvalidRequest(
            f"timestep is [{batch}], [{batch}, {t}] (a frame) or [{batch}, {tokens}] (a token) here, "
            f"not {list(timestep.shape)}"
        )
    frames = timestep.unflatten(1, (t, -1))
    if torch.equal(frames, frames[..., :1].expand_as(frames)):
        timestep = frames[..., 0]
    return torch.unique(timestep, return_inverse=True)
