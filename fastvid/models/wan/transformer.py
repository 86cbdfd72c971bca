"""The Wan video diffusion transformer, with or without pictures as a condition: embedders, blocks, model. Parameter
names are those of diffusers' WanTransformer3DModel, so its checkpoints load as they are.

Shapes: B batch, C latent channels, T latent frames, H/W latent height and width, N = T/pt * H/ph * W/pw tokens,
d width, L rows of text, M rows of pictures, K distinct timesteps, G groups of tokens that share one
(see `ops.reference`).
Maths: Wan2.1 `wan/modules/model.py` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.distributed.mesh import Layout, Mesh, RankView
from fastvid.errors import InvalidRequest
from fastvid.layers.attention import cross_attention, self_attention
from fastvid.layers.branches import plain_weight
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.layers.embeddings import RotaryTables, group_timesteps, timestep_sinusoid
from fastvid.layers.fused import FusedLinear
from fastvid.layers.kv_cache import KVCache, LayerCache
from fastvid.layers.levers import CallLevers, is_enough
from fastvid.layers.linear import FeedForward, Linear, TwoLinears, linear, linear_gelu_tanh, normal_parameter
from fastvid.layers.norms import Norm, normed
from fastvid.layers.residual import Stream
from fastvid.layers.sequence_parallel import SequenceParallel
from fastvid.layers.tiles import Tiling
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.ops import reference
from fastvid.ops.quantized import Activations
from fastvid.ops.sparse import Triple
from fastvid.ops.upload import upload

IMAGE_NORM_EPS = 1e-5  # of the norms around the image embedder, whatever the config's eps


class Modulation(NamedTuple):
    """Timesteps as the blocks need them: rows of the distinct ones, and which row each group of tokens takes."""

    rows: Tensor  # fp32 [K, 6, d]
    groups: Tensor  # int64 [B, G]


class Context(NamedTuple):
    """What cross-attention looks at: for each layer, keys and values of the text [B, L, heads, head_dim] and, in models
    that see pictures, of the pictures [B, M, heads, head_dim]."""

    layers: tuple[tuple[Tensor, ...], ...]


class AnyContext(Protocol):
    """A Context, or that of a model which looks at more."""

    @property
    def layers(self) -> tuple[tuple[Tensor, ...], ...]: ...


class Inputs(NamedTuple):
    """What one call computes from."""

    latents: Tensor
    known: Tensor | None
    timesteps: Tensor  # the distinct ones, [K]
    groups: Tensor  # which of them each group of tokens has, [B, G]
    rotary: tuple[Tensor, Tensor]
    context: AnyContext


class SelfAttention(nn.Module):
    """The attention of a video's tokens to each other. Queries, keys and values are one product."""

    def __init__(self, config: WanTransformerConfig, ops: Any, number: int) -> None:
        super().__init__()
        self.ops, self.eps, self.number = ops, config.eps, number  # of its layer
        self.to_qkv = FusedLinear(config.dim, config.dim, 3)
        self.to_q, self.to_k, self.to_v = self.to_qkv.layers()  # as checkpoints have them
        self.to_out = nn.ModuleList([Linear(config.dim, config.dim)])
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)

    def forward(
        self,
        tokens: Stream,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | CausalBlocks | None = None,
        parallel: SequenceParallel | None = None,
    ) -> Tensor:
        """[B, N, d], which is freed on the way, -> [B, N, d]; with a cache, attention goes to what is in it too, and
        with `parallel` to the tokens of other ranks."""
        qkv, norms = linear(self.ops, self.to_qkv, tokens.take()[0]), (self.norm_q.weight, self.norm_k.weight)
        q, k, v = self.ops.qkv_norm_rope(qkv, *norms, *rotary, self.eps)
        del qkv
        blocks = None if parallel is None else parallel.blocks(self.number)
        return linear(self.ops, self.to_out[0], self_attention(self.ops, q, k, v, cache, parallel, blocks))


class CrossAttention(nn.Module):
    """The attention of a video's tokens to a text and, with keys and values of their own (added), to pictures."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.eps, self.heads = ops, config.eps, config.num_attention_heads
        self.to_q = Linear(config.dim, config.dim)
        self.to_k = Linear(config.dim, config.dim)
        self.to_v = Linear(config.dim, config.dim)
        self.to_out = nn.ModuleList([Linear(config.dim, config.dim)])
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)
        if config.added_kv_proj_dim:
            self.add_k_proj = Linear(config.added_kv_proj_dim, config.dim)
            self.add_v_proj = Linear(config.added_kv_proj_dim, config.dim)
            self.norm_added_k = nn.RMSNorm(config.dim, config.eps)

    def project_context(self, text: Tensor, pictures: Tensor | None = None) -> tuple[Tensor, ...]:
        """Keys and values of the text [B, L, d]: two tensors [B, L, heads, head_dim]; and two of pictures [B, M, d]."""
        pair = self._keys(self.to_k, self.norm_k, text), self._to_heads(linear(self.ops, self.to_v, text))
        if pictures is None:
            return pair
        keys = self._keys(self.add_k_proj, self.norm_added_k, pictures)
        return *pair, keys, self._to_heads(linear(self.ops, self.add_v_proj, pictures))

    def forward(self, x: Activations, *context: Tensor) -> Tensor:
        """x [B, N, d], keys and values from project_context -> [B, N, d]. Text and pictures have a softmax each."""
        q = self._keys(self.to_q, self.norm_q, x)
        out = cross_attention(self.ops, q, *context[:2])
        if len(context) > 2:
            out = out + cross_attention(self.ops, q, *context[2:])
        return linear(self.ops, self.to_out[0], out)

    def _keys(self, layer: nn.Module, norm: nn.RMSNorm, x: Activations) -> Tensor:
        return self._to_heads(self.ops.rms_norm(linear(self.ops, layer, x), norm.weight, self.eps))

    def _to_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; the first and last modulated by the timestep."""

    def __init__(self, config: WanTransformerConfig, ops: Any, number: int = 0) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        self.attn1 = SelfAttention(config, ops, number)
        self.attn2 = CrossAttention(config, ops)
        self.norm2 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim, ops)
        self.scale_shift_table = normal_parameter(1, 6, config.dim, std=config.dim**-0.5)

    def forward(
        self,
        stream: Stream,
        modulation: Modulation,
        context: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | CausalBlocks | None = None,
        parallel: SequenceParallel | None = None,
    ) -> Stream:
        rows, index = self.scale_shift_table + modulation.rows, modulation.groups
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
        x, y, gate = stream.take()
        x, y = normed(self.ops, self.attn1.to_qkv, x, y, gate, Norm(shift1, scale1, index, self.eps))
        tokens, y = Stream(cast(Tensor, y)), None  # or codes, as to_qkv takes them
        y = self.attn1(tokens, rotary, cache, parallel)
        if self.norm2 is None:
            x = y = self.ops.gated_residual(x, y, gate1, index)
        else:
            norm = Norm(self.norm2.bias, self.norm2.weight, index, self.eps)
            x, y = normed(self.ops, self.attn2.to_q, x, y, gate1, norm)
        y = self.attn2(y, *context)
        x, y = normed(self.ops, self.ffn.first, x, y, None, Norm(shift2, scale2, index, self.eps))
        return Stream(x, self.ffn(y), gate2)


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
        pictures = pictures.to(cast(Linear, self.ff.net[2]).weight.dtype)
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


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """operator.call, which torch.compile cannot trace."""
    return function(*args)


def cross_attentions(blocks: nn.ModuleList) -> list[nn.Module]:
    return [cast(Block, block).attn2 for block in blocks]


class WanTransformer(nn.Module):
    """Velocity (noise - clean) of noisy video latents, given their noise level, a text and perhaps pictures.

    config: WanTransformerConfig. ops: an object with the functions of `fastvid.ops.reference`.
    Models with more in_channels than out_channels take mask and latents of known frames behind the noisy latents (see
    `fastvid.models.wan.conditioning`).
    """

    # What the published code computes in fp32 whatever the dtype of the rest (diffusers: _keep_in_fp32_modules).
    FP32_PARTS: tuple[str, ...] = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    # Some files of models that see pictures have a norm that nothing uses.
    UNUSED = ("norm_added_q",)
    # Lists of blocks that need not be on the device all at once: `walk` iterates over them (`fastvid.device.offload`).
    STREAMED: tuple[str, ...] = ("blocks",)
    # Linear layers whose weight an operation takes itself, so that no branch can be beside it.
    DIRECT = ("proj_out",)

    def __init__(self, config: WanTransformerConfig, ops: Any = reference) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.walk: Callable[[Iterable[nn.Module]], Iterator[Any]] = iter
        self.run: Callable[..., Tensor] = call  # replaced by `fastvid.device.cuda_graphs`, which replays `_velocity`
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config, ops)
        self.blocks = nn.ModuleList([Block(config, ops, number) for number in range(config.num_layers)])
        self.rotary = RotaryTables(config.attention_head_dim)
        pt, ph, pw = config.patch_size
        self.proj_out = Linear(config.dim, config.out_channels * pt * ph * pw)
        self.scale_shift_table = normal_parameter(1, 2, config.dim, std=config.dim**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def prepare_context(self, text_embeds: Tensor, image_embeds: Tensor | None = None) -> AnyContext:
        """Everything that depends on text and pictures alone, once a request.

        text_embeds [B, L, text_dim]. image_embeds [B, M, image_dim], what CLIP makes of the pictures, one after the
        other: needed by models with an image_dim, and by no others.
        """
        text, pictures = self._embed(text_embeds, image_embeds)
        attentions = self.walk(cross_attentions(self.blocks))
        return Context(tuple(attention.project_context(text, pictures) for attention in attentions))

    def _embed(self, text_embeds: Tensor, image_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, d] and pictures [B, M, d], checked."""
        if text_embeds.ndim != 3 or text_embeds.shape[-1] != self.config.text_dim:
            raise InvalidRequest(
                f"text embeddings are [B, L, {self.config.text_dim}] for this model, not {list(text_embeds.shape)}"
            )
        self._check_pictures(image_embeds, text_embeds.shape[0])
        embedder = self.condition_embedder
        text = embedder.embed_text(text_embeds)
        if image_embeds is None:
            return text, None
        assert embedder.image_embedder is not None
        return text, embedder.image_embedder(image_embeds)

    def _check_pictures(self, embeds: Tensor | None, batch: int) -> None:
        width, rows = self.config.image_dim, self.config.pos_embed_seq_len
        if (embeds is None) != (width == 0):
            raise InvalidRequest(
                f"this model needs image embeddings [B, M, {width}]"
                if width
                else "this model takes no image embeddings"
            )
        if embeds is None:
            return
        wrong = embeds.ndim != 3 or embeds.shape[0] != batch or embeds.shape[2] != width or embeds.shape[1] == 0
        if wrong or embeds.shape[1] != (rows or embeds.shape[1]):
            raise InvalidRequest(
                f"image embeddings are [{batch}, {rows or 'M'}, {width}] for this model, not {list(embeds.shape)}"
            )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | AnyContext,
        *,
        known: Tensor | None = None,
        rope_offset: int | Sequence[int] = 0,
        cache: KVCache | CausalBlocks | None = None,
        view: RankView | None = None,
        levers: CallLevers | None = None,
    ) -> Tensor:
        """Predict the velocity of latents [B, C, T, H, W]; same shape (with out_channels) and dtype.

        timestep, on 0..1000: [B], [B, T / pt] (one a latent frame) or [B, N] (one a token). On the CPU, where it is
        looked at, it costs no wait for the device.
        text: embeddings [B, L, text_dim], or what prepare_context made of them.
        known: of models that take more channels, those behind the latents', if latents does not have them.
        rope_offset: the time of the first latent frame, for windows of a longer video; or that of every one.
        cache: of a causal model. The frames attend to themselves and to those in it, and are put into it in place of
        what it holds of them; `cache.begin` was told of them. Or the blocks of frames that do not see later ones.
        view: this rank's among those that share the tokens; all of them call with the same arguments, each gets the
        whole result, and a cache holds this rank's share.
        levers: what this call does less of.
        """
        grid = self._grid(latents, known)
        context = self.prepare_context(text) if isinstance(text, Tensor) else text
        self._check_context(context, latents, cache)
        values, index = (upload(one, latents.device) for one in group_timesteps(timestep, latents.shape[0], grid))
        inputs = Inputs(latents, known, values, index, self._rotary(grid, rope_offset, latents.device), context)
        tiling = None if levers is None or levers.sparsity is None else levers.sparsity.tiling(grid[1:], latents.device)
        if tiling is not None or (view is not None and view.layout.sequence > 1):
            parallel = self._sequence_parallel(view or RankView(Mesh(), Layout()), grid, tiling)
            own = self._velocity(self._shard(inputs, parallel), cache, parallel, levers)
            return parallel.gather(own, self.config.patch_size, latents.shape[3])
        if cache is None and levers is None:
            return self.run(self._velocity, inputs)
        return self._velocity(inputs, cache, levers=levers)

    def _rotary(self, grid: Triple, offset: int | Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles of every token that the blocks see."""
        return self.rotary(grid, offset, device)

    def _check_context(self, context: AnyContext, latents: Tensor, cache: KVCache | CausalBlocks | None) -> None:
        """Raises InvalidRequest for a context that does not fit the latents."""

    def _sequence_parallel(self, view: RankView, grid: Triple, tiling: Tiling | None) -> SequenceParallel:
        layout, heads, tokens = view.layout, self.config.num_attention_heads, grid[1] * grid[2]
        if heads % layout.ulysses or layout.sequence > tokens:
            raise InvalidRequest(
                f"parallel: {layout} does not fit {heads} heads and {tokens} tokens a frame: ulysses has to divide the "
                f"heads, and ring x ulysses be at most the tokens of a frame"
            )
        return SequenceParallel.of_grid(view, grid, tiling)

    def _shard(self, inputs: Inputs, parallel: SequenceParallel) -> Inputs:
        """This rank's part."""
        latents, known, values, index, (cos, sin), context = inputs
        latents = parallel.shard(latents, self.config.patch_size)
        known = None if known is None else parallel.shard(known, self.config.patch_size)
        index, rotary = (
            parallel.shard_groups(index, len(cos)),
            (parallel.shard_rows(cos, 0), parallel.shard_rows(sin, 0)),
        )
        return Inputs(latents, known, values, index, rotary, context)

    def _velocity(
        self,
        inputs: Inputs,
        cache: KVCache | CausalBlocks | None = None,
        parallel: SequenceParallel | None = None,
        levers: CallLevers | None = None,
    ) -> Tensor:
        """The part of a call that is work for the device alone."""
        latents, known, values, index, rotary, context = inputs
        embedding, rows = self._embed_time(values, context)
        embed = self.patch_embedding.weight, self.patch_embedding.bias
        stream = Stream(self.ops.patch_embed(latents, *embed, known))
        x = self._run_blocks(stream, Modulation(rows, index), context, rotary, cache, parallel, levers)
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(1)).unbind(1)
        out, patch = (plain_weight(self.proj_out), self.proj_out.bias), self.config.patch_size
        grid = [n // p for n, p in zip(latents.shape[2:], patch, strict=True)]
        return self.ops.head(x, shift, scale, index, *out, grid, patch, self.config.eps, latents.dtype)

    def _embed_time(self, timesteps: Tensor, context: AnyContext) -> tuple[Tensor, Tensor]:
        """See `ConditionEmbedder.embed_time`."""
        return self.condition_embedder.embed_time(timesteps)

    def _run_blocks(
        self,
        stream: Stream,
        modulation: Modulation,
        context: AnyContext,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | CausalBlocks | None = None,
        parallel: SequenceParallel | None = None,
        levers: CallLevers | None = None,
    ) -> Tensor:
        """The tokens [B, N, d] after the blocks, or what a step cache says that they would be."""

        def blocks(stream: Stream) -> Stream:
            return self._through_blocks(stream, modulation, context, rotary, cache, parallel, levers)

        if levers is None or levers.blocks is None:
            return self._added(blocks(stream), modulation)
        return levers.blocks.run(stream, blocks, lambda stream: self._added(Stream(*stream.parts()), modulation))

    def _through_blocks(
        self,
        stream: Stream,
        modulation: Modulation,
        context: AnyContext,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | CausalBlocks | None,
        parallel: SequenceParallel | None,
        levers: CallLevers | None,
    ) -> Stream:
        """The stream behind the last block that runs."""
        caches = cache.layers if isinstance(cache, KVCache) else (cache,) * len(self.blocks)
        for block, layer, kept in zip(self.walk(self.blocks), context.layers, caches, strict=True):
            stream = block(stream, modulation, layer, rotary, kept, parallel)
            if is_enough(levers, stream):
                break
        return stream

    def _added(self, stream: Stream, modulation: Modulation) -> Tensor:
        """The residual stream [B, N, d] with nothing left to add."""
        x, y, gate = stream.take()
        return x if y is None else self.ops.gated_residual(x, y, gate, modulation.groups)

    def _grid(self, latents: Tensor, known: Tensor | None = None) -> Triple:
        """Tokens along t, h, w."""
        patch, given = self.config.patch_size, [latents] if known is None else [latents, known]
        fits = all(one.ndim == 5 for one in given) and len({(one.shape[0], *one.shape[2:]) for one in given}) == 1
        fits = fits and sum(one.shape[1] for one in given) == self.config.in_channels
        if not fits or any(n % p for n, p in zip(latents.shape[2:], patch, strict=True)):
            raise InvalidRequest(
                f"latents are [B, {self.config.in_channels}, T, H, W], with what is known behind them, and T, H, W "
                f"multiples of {patch} for this model, not {' and '.join(str(list(one.shape)) for one in given)}"
            )
        t, h, w = (n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        return t, h, w
