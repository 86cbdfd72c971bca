"""Latents of a window put together: its known region, a clean column before it, several as a batch.

Shapes: B batch, C channels, t columns of a window, N tokens of a window, h/w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """The known region of a window: mask bool [1, 1, t, h, w], True where known; clean latents [1, C, t, h, w].

    on_host: the mask on the CPU, where noise levels are computed.
    """

    mask: Tensor
    clean: Tensor
    on_host: Tensor

    def levels(self, sigma: Tensor, patch: int = 2) -> Tensor:
        """The noise level of every token [N], 0 for known ones. sigma: the columns' levels [t]."""
        free = ~self.on_host[0, 0, :, ::patch, ::patch]
        return (sigma.view(-1, 1, 1) * free).flatten()


def batched(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [1, ...] as one [B, ...]; a single one is itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def anchored(x: Tensor, levels: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and noise levels ([t] or [N]) with a clean column [1, C, 1, h, w] prepended."""
    levels_per_column = 1 if len(levels) == x.shape[2] else len(levels) // x.shape[2]
    return torch.cat((anchor.to(x), x), dim=2), torch.cat((levels.new_zeros(levels_per_column), levels))
