"""SkyReels V2's diffusion forcing transformer of 1.3B: Wan's, and it is told the frame rate. SkyReels' other models are
Wan's networks. Parameter names are those of diffusers' SkyReelsV2Transformer3DModel.

Shapes: as in `fastvid.models.wan.transformer`.
Maths: SkyReels-V2 `skyreels_v2_infer/modules/transformer.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.layers.linear import Embedding, Linear
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import AnyContext, WanTransformer
from fastvid.ops import reference

FPS = (16, 24)  # the frame rates of its training; others count as the second


class RateContext(NamedTuple):
    """A `wan.Context` with what the frame rate adds to the modulation of every timestep: fp32 [6, d]."""

    layers: tuple[tuple[Tensor, ...], ...]
    rate: Tensor


class RateProjection(nn.Module):
    """Linear, SiLU, Linear: [d] -> [6 * d], under the names that diffusers gives them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": Linear(dim, dim)}), nn.Identity(), Linear(dim, 6 * dim)])

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self.net
        assert isinstance(first, nn.ModuleDict)
        made: Tensor = second(F.silu(first["proj"](x)))
        return made


class SkyReelsTransformer(WanTransformer):
    """Velocity (noise - clean) of noisy video latents, given the noise level of each frame, a text and the frame rate.

    config: WanTransformerConfig with inject_sample_info. `forward` is that of WanTransformer with a context from
    `prepare_context`.
    """

    def __init__(self, config: WanTransformerConfig, ops: Any = reference) -> None:
        super().__init__(config, ops)
        self.fps_embedding = Embedding(2, config.dim)
        self.fps_projection = RateProjection(config.dim)

    def prepare_context(
        self, text_embeds: Tensor, image_embeds: Tensor | None = None, *, fps: float = FPS[1]
    ) -> RateContext:
        """Everything that depends on text, pictures and frame rate alone, once a request. fps: frames a second."""
        layers = super().prepare_context(text_embeds, image_embeds).layers
        number = torch.tensor(int(fps != FPS[0]), dtype=torch.int64, device=text_embeds.device)
        rate = self.fps_projection(self.fps_embedding(number))
        return RateContext(layers, rate.float().unflatten(-1, (6, -1)))

    def _embed_time(self, timesteps: Tensor, context: AnyContext) -> tuple[Tensor, Tensor]:
        assert isinstance(context, RateContext)
        embedding, rows = super()._embed_time(timesteps, context)
        return embedding, rows + context.rate
