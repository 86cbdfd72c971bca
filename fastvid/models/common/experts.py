"""The denoisers of a model, one or two, and which of them a noise level belongs to.

Wan 2.2 A14B has one transformer for high noise and one for low. Only the one in use has to be on the device: see
`fastvid.device.offload` for how they are swapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from fastvid.device.offload import Resident, Swapped
from fastvid.sampling.sigmas import TRAIN_TIMESTEPS


class Experts:
    """One transformer, or two: high noise first.

    boundary_ratio: the first is used at timesteps from boundary_ratio * 1000 on, the second below (Wan2.2
    `wan/text2video.py`; diffusers' WanPipeline). None for one transformer. residency: how they come to the device;
    without it they stay where they are.
    """

    def __init__(
        self, modules: Sequence[nn.Module], boundary_ratio: float | None, residency: Resident | Swapped | None = None
    ) -> None:
        if len(modules) > 1 and boundary_ratio is None:
            raise ValueError("two experts need a boundary_ratio")
        self.modules, self.residency = tuple(modules), residency or Resident(modules)
        self.boundary = boundary_ratio * TRAIN_TIMESTEPS if boundary_ratio is not None and len(modules) > 1 else None

    def __len__(self) -> int:
        return len(self.modules)

    def choose(self, timestep: float, boundary_ratio: float | None = None) -> int:
        """Which one a timestep (0..1000, as it is told) belongs to. boundary_ratio: instead of the model's."""
        if self.boundary is None:
            return 0
        boundary = self.boundary if boundary_ratio is None else boundary_ratio * TRAIN_TIMESTEPS
        return int(timestep < boundary)

    def use(self, number: int) -> AbstractContextManager[nn.Module]:
        """One of them, on the device until the block ends."""
        return self.residency.use(number)
