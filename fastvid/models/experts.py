"""The denoisers of a model, one or two, and which of them a noise level belongs to.

Wan 2.2 A14B has one transformer for high noise and one for low. On a GPU only the one in use has to be there: the other
waits in host memory, and they change places when the level crosses the boundary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastvid.models.wan import WanTransformer
from fastvid.sampling.sigmas import TRAIN_TIMESTEPS


class Experts:
    """One transformer, or two: high noise first.

    boundary_ratio: the first is used at timesteps from boundary_ratio * 1000 on, the second below (Wan2.2
    `wan/text2video.py`; diffusers' WanPipeline). None for one transformer.
    """

    def __init__(
        self, modules: Sequence[WanTransformer], boundary_ratio: float | None, device: torch.device | str
    ) -> None:
        if len(modules) > 1 and boundary_ratio is None:
            raise ValueError("two experts need a boundary_ratio")
        self.modules, self.device = tuple(modules), torch.device(device)
        self.boundary = boundary_ratio * TRAIN_TIMESTEPS if boundary_ratio is not None and len(modules) > 1 else None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.modules)

    def choose(self, timestep: float) -> int:
        """Which one a timestep (0..1000, as the model is told it) belongs to."""
        return int(self.boundary is not None and timestep < self.boundary)

    @contextmanager
    def use(self, number: int) -> Iterator[WanTransformer]:
        """One of them, on the device until the block ends; where they take turns there, so do those who ask."""
        if len(self) == 1 or self.device.type == "cpu":
            yield self.modules[number]
            return
        with self._lock:
            for other in self.modules:
                if other is not self.modules[number] and _where(other) != "cpu":
                    other.to("cpu")
            if _where(self.modules[number]) != self.device.type:
                self.modules[number].to(self.device)
            yield self.modules[number]


def _where(module: WanTransformer) -> str:
    return next(module.parameters()).device.type
