"""Wan VACE: the Wan transformer with a second, shorter stack of blocks that sees control latents (known frames, masks,
reference pictures) and gives hints to the first. Parameter names are those of diffusers' WanVACETransformer3DModel.

Shapes: as in `fastvid.models.wan.transformer`; V control channels (2 latents and a mask channel for each
of their pixels: 96).
Maths: Wan2.1 `wan/modules/vace_model.py` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.errors import InvalidRequest
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.layers.kv_cache import KVCache
from fastvid.layers.levers import CallLevers, is_enough
from fastvid.layers.linear import Linear, linear
from fastvid.layers.residual import Stream
from fastvid.layers.sequence_parallel import SequenceParallel
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
from fastvid.models.wan.transformer import (
    AnyContext,
    Block,
    Inputs,
    Modulation,
    WanTransformer,
    cross_attentions,
)
from fastvid.ops import reference


class VACEContext(NamedTuple):
    """What the blocks look at (see `wan.Context`), for both stacks, and the control. Requests or guidance branches that
    differ in text alone share the control's tensor."""

    layers: tuple[tuple[Tensor, ...], ...]
    vace_layers: tuple[tuple[Tensor, ...], ...]
    control: Tensor  # [B, V, T, H, W]
    scales: tuple[float, ...]


class VACEBlock(Block):
    """A block of the control stack: it goes on from the control before it, and gives a hint."""

    def __init__(self, config: WanTransformerConfig, ops: Any, number: int, first: bool) -> None:
        super().__init__(config, ops, number)
        self.proj_in = Linear(config.dim, config.dim) if first else None
        self.proj_out = Linear(config.dim, config.dim)


class WanVACETransformer(WanTransformer):
    """Velocity (noise - clean) of noisy video latents, given their noise level, a text and a control.

    config: WanVACEConfig. ops: an object with the functions of `fastvid.ops.reference`.
    `forward` is that of WanTransformer with a context from `prepare_context`.
    """

    STREAMED = ("blocks", "vace_blocks")

    def __init__(self, config: WanVACEConfig, ops: Any = reference) -> None:
        super().__init__(config.transformer, ops)
        self.vace_config = config
        main = config.transformer
        self.vace_patch_embedding = nn.Conv3d(config.vace_in_channels, main.dim, main.patch_size, main.patch_size)
        layers = enumerate(config.vace_layers)
        self.vace_blocks = nn.ModuleList([VACEBlock(main, ops, number, first=i == 0) for i, number in layers])

    def prepare_context(
        self,
        text_embeds: Tensor,
        image_embeds: Tensor | None = None,
        *,
        control: Tensor | None = None,
        scales: float | Sequence[float] = 1.0,
    ) -> VACEContext:
        """Everything that depends on the condition alone, once a request.

        text_embeds [B, L, text_dim]. control [B, V, T, H, W], V = vace_in_channels: what `conditioning.vace_condition`
        makes. scales: how much the hints count, in all layers or in each of vace_layers.
        """
        control = self._check_control(control, text_embeds.shape[0])
        wanted = len(self.vace_blocks)
        scales = (float(scales),) * wanted if isinstance(scales, int | float) else tuple(float(s) for s in scales)
        if len(scales) != wanted:
            raise InvalidRequest(f"scales are one number, or {wanted} (one for each of vace_layers), not {len(scales)}")
        embedded = self._embed(text_embeds, image_embeds)
        main, vace = (
            tuple(attention.project_context(*embedded) for attention in self.walk(cross_attentions(blocks)))
            for blocks in (self.blocks, self.vace_blocks)
        )
        return VACEContext(main, vace, control, scales)

    def _check_context(self, context: AnyContext, latents: Tensor, cache: KVCache | CausalBlocks | None) -> None:
        """The control has the latents' height and width, and may end before them."""
        if cache is not None:
            raise InvalidRequest("models with a control branch keep no KV cache")
        assert isinstance(context, VACEContext)
        (t, *size), (latent_t, *latent_size) = context.control.shape[2:], latents.shape[2:]
        if size != latent_size or t > latent_t:
            raise InvalidRequest(
                f"the control is {[t, *size]} (T, H, W) and does not fit latents of {[latent_t, *latent_size]}"
            )

    def _shard(self, inputs: Inputs, parallel: SequenceParallel) -> Inputs:
        assert isinstance(inputs.context, VACEContext)
        control = parallel.shard(inputs.context.control, self.config.patch_size)
        return super()._shard(inputs, parallel)._replace(context=inputs.context._replace(control=control))

    def _through_blocks(
        self,
        stream: Stream,
        modulation: Modulation,
        context: AnyContext,
        rotary: tuple[Tensor, Tensor],
        cache: Any,
        parallel: SequenceParallel | None,
        levers: CallLevers | None,
    ) -> Stream:
        """A control block runs when its hint is due, so that there is one hint at a time."""
        assert isinstance(context, VACEContext)
        start, *_ = stream.take()
        control, stream, walk = self._embed_control(context.control, start), Stream(start), self.walk(self._due())
        due = iter(zip(context.vace_layers, context.scales, strict=True))
        for number, layer in enumerate(context.layers):
            stream = next(walk)(stream, modulation, layer, rotary, None, parallel)
            if number in self.vace_config.vace_layers:
                vace, (seen, scale) = next(walk), next(due)
                # The first goes on from the control's tokens and, on top, the video's.
                control = control if vace.proj_in is None else linear(self.ops, vace.proj_in, control) + start
                control = self._added(vace(Stream(control), modulation, seen, rotary, None, parallel), modulation)
                start = None
                hint = linear(self.ops, vace.proj_out, control)
                stream = Stream(self._added(stream, modulation).add(hint, alpha=scale))
            if is_enough(levers, stream):
                return stream
        next(walk, None)
        return stream

    def _due(self) -> list[nn.Module]:
        """The blocks of both stacks in the order in which they run."""
        hints = dict(zip(self.vace_config.vace_layers, self.vace_blocks, strict=True))
        return [b for number, block in enumerate(self.blocks) for b in (block, hints.get(number)) if b is not None]

    def _embed_control(self, control: Tensor, x: Tensor) -> Tensor:
        """The control's tokens, with zeros behind them up to the video's number [B, N, d]."""
        embedding = self.vace_patch_embedding
        tokens = self.ops.patch_embed(control, embedding.weight, embedding.bias)
        return F.pad(tokens, (0, 0, 0, x.shape[1] - tokens.shape[1]))

    def _check_control(self, control: Tensor | None, batch: int) -> Tensor:
        """The control itself, if it can be used."""
        wanted, patch = (batch, self.vace_config.vace_in_channels), self.config.patch_size
        if (
            control is None
            or control.ndim != 5
            or control.shape[:2] != wanted
            or any(n % p for n, p in zip(control.shape[2:], patch, strict=True))
        ):
            given = None if control is None else list(control.shape)
            raise InvalidRequest(
                f"a control [{wanted[0]}, {wanted[1]}, T, H, W] is needed, T, H, W multiples of {patch}, not {given}"
            )
        return control
