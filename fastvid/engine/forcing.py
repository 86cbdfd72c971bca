"""What diffusion forcing adds to a call of the model: attention in causal blocks, and a little noise on the frames that
were known before the window began, which hides the seam to them.

A column is a latent frame. Source: SkyReels-V2 `skyreels_v2_infer/pipelines/diffusion_forcing_pipeline.py`. It draws
that noise without a seed; here it follows from the request's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.requests.request import Resolved
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import TRAIN_TIMESTEPS


def causal_blocks(request: Resolved, columns: int) -> CausalBlocks | None:
    """Which columns of a window see which; None: all see all."""
    if not request.causal_attention or request.causal_block_size is None:
        return None
    return CausalBlocks(columns, request.causal_block_size)


@dataclass(frozen=True)
class KnownNoise:
    """Noise on the first `known` columns of a segment, in every row anew.

    amount: in thousandths, which is also the timestep that the model is told. sigmas: the noise levels [N] of the
    request. fresh: makes noise, see `StreamNoise.fresh`.
    """

    known: int
    amount: float
    sigmas: Tensor
    fresh: Callable[[int, Tensor], Tensor]

    def add(self, row: TableRow, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """A window's latents [1, C, t, h, w] and timesteps, [t] or one a token, with the noise."""
        known = min(self.known - row.start, x.shape[2])
        if known <= 0 or not self.amount:
            return x, times
        share, each = self.amount / TRAIN_TIMESTEPS, len(times) // x.shape[2]
        noise = self.fresh(row.start, torch.full((known,), self._draw(row), dtype=torch.int64))
        first = (1 - share) * x[:, :, :known] + share * noise.to(x)
        told = torch.full_like(times[: known * each], self.amount)
        return torch.cat((first, x[:, :, known:]), dim=2), torch.cat((told, times[known * each :]))

    def _draw(self, row: TableRow) -> int:
        """A number that no other row of a table has: one more than the steps that the row's columns have made."""
        return 1 + int((self.sigmas[None] > row.sigma[:, None]).sum())
