"""VideoX-Fun's Control models with a reference picture: the Wan transformer, whose tokens have those of the picture's
latent in front, as one more frame. Their parameter names are Wan's, and `ref_conv`.

Shapes: as in `fastvid.models.wan.transformer`; M = H/ph * W/pw tokens of the reference.
Maths: aigc-apps/VideoX-Fun `videox_fun/models/wan_transformer3d.py` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvid.errors import InvalidRequest
from fastvid.layers.levers import CallLevers
from fastvid.layers.residual import Stream
from fastvid.layers.sequence_parallel import SequenceParallel
from fastvid.models.wan.config import WanFunConfig
from fastvid.models.wan.transformer import AnyContext, Inputs, Modulation, WanTransformer
from fastvid.ops import reference


class FunContext(NamedTuple):
    """What the blocks look at (see `wan.Context`), and the tokens of the reference picture. last: on several ranks, the
    timestep of the video's last token, which another rank may have."""

    layers: tuple[tuple[Tensor, ...], ...]
    tokens: Tensor  # [B, M, d]
    last: Tensor | None = None  # row of the distinct timesteps [B, 1]


class WanFunTransformer(WanTransformer):
    """Velocity (noise - clean) of noisy video latents, given their noise level, a text and a reference picture.

    config: WanFunConfig. ops: an object with the functions of `fastvid.ops.reference`.
    `forward` is that of WanTransformer with a context from `prepare_context`. In time, the reference stands at 0 and
    the video from 1 on.
    """

    def __init__(self, config: WanFunConfig, ops: Any = reference) -> None:
        super().__init__(config.transformer, ops)
        patch = config.transformer.patch_size[1:]
        self.ref_conv = nn.Conv2d(config.in_dim_ref_conv, config.transformer.dim, patch, patch)

    def prepare_context(
        self, text_embeds: Tensor, image_embeds: Tensor | None = None, *, reference: Tensor | None = None
    ) -> FunContext:
        """Everything that depends on the condition alone, once a request. text_embeds [B, L, text_dim]. image_embeds
        [B, M, image_dim] of models with an image_dim. reference [B, C, H, W]: the picture's latent, of the video's
        height and width, or zeros without one, as in training."""
        channels, patch = self.ref_conv.in_channels, self.config.patch_size[1:]
        wanted, given = (text_embeds.shape[0], channels), None if reference is None else reference.shape
        if given is None or len(given) != 4 or given[:2] != wanted or any(map(int.__mod__, given[2:], patch)):
            raise InvalidRequest(
                f"a reference {[*wanted, 'H', 'W']} is needed, H, W multiples of {patch}, not "
                f"{None if given is None else list(given)}"
            )
        assert reference is not None
        tokens = self.ref_conv(reference.to(self.ref_conv.weight.dtype)).flatten(2).transpose(1, 2)
        return FunContext(super().prepare_context(text_embeds, image_embeds).layers, tokens)

    def _check_context(self, context: AnyContext, latents: Tensor, cache: Any) -> None:
        assert isinstance(context, FunContext)
        _, height, width = self.config.patch_size
        tokens = latents.shape[3] // height * (latents.shape[4] // width)
        if cache is not None or context.tokens.shape[1] != tokens:
            raise InvalidRequest(
                f"the reference has {context.tokens.shape[1]} tokens; one of latents of this size has {tokens}"
            )

    def _rotary(
        self, grid: tuple[int, int, int], offset: int | Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Angles of the reference, at time 0, and behind it the video's, one later than they would be."""
        t, h, w = grid
        times = range(offset, offset + t) if isinstance(offset, int) else offset
        return self.rotary((t + 1, h, w), (0, *(time + 1 for time in times)), device)

    def _shard(self, inputs: Inputs, parallel: SequenceParallel) -> Inputs:
        assert isinstance(inputs.context, FunContext)
        tokens, (cos, sin) = inputs.context.tokens, inputs.rotary
        one, more = replace(parallel, frames=1), replace(parallel, frames=parallel.frames + 1)
        context = inputs.context._replace(tokens=one.shard_rows(tokens, 1), last=inputs.groups[:, -1:])
        rotary = more.shard_rows(cos, 0), more.shard_rows(sin, 0)
        video = inputs._replace(rotary=(cos[tokens.shape[1] :], sin[tokens.shape[1] :]))
        return super()._shard(video, parallel)._replace(context=context, rotary=rotary)

    def _run_blocks(
        self,
        stream: Stream,
        modulation: Modulation,
        context: AnyContext,
        rotary: tuple[Tensor, Tensor],
        cache: Any = None,
        parallel: SequenceParallel | None = None,
        levers: CallLevers | None = None,
    ) -> Tensor:
        """The video's tokens [B, N, d] after the blocks; the reference's are dropped. Its timestep is that of the last
        token."""
        assert isinstance(context, FunContext)
        video, *_ = stream.take()
        tokens, groups = context.tokens.to(video.dtype), modulation.groups
        count = tokens.shape[1]
        if groups.shape[1] > 1:
            each = max(1, count * groups.shape[1] // video.shape[1])
            last = groups[:, -1:] if context.last is None else context.last
            groups = torch.cat((last.expand(-1, each), groups), 1)
        stream = Stream(torch.cat((tokens, video), 1))
        del video
        parallel = None if parallel is None else replace(parallel, frames=parallel.frames + 1)
        out = super()._run_blocks(stream, modulation._replace(groups=groups), context, rotary, cache, parallel, levers)
        return out[:, count:].contiguous()
