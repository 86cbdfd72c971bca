"""What a running request tells its caller: the one event stream of `pipe.stream`.

Order: one Started, then Step and Frames as they happen, and one Finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastvid.planning.plan import Plan


@dataclass(frozen=True)
class Started:
    """The request is planned and accepted; nothing has been computed yet."""

    plan: Plan
    seed: int
    num_frames: int
    height: int
    width: int
    fps: float
    total_steps: int
    recipe: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Step:
    """One denoising step is done: the step-th (from 1) of total, from noise level `sigma`, after `seconds`."""

    step: int
    total: int
    sigma: float
    seconds: float


@dataclass(frozen=True)
class Frames:
    """The next frames of the video: uint8 RGB [n, H, W, 3], the first of them frame `start`."""

    start: int
    frames: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """All frames are out. `latents` are the clean, normalised ones that were made,
    [1, C, T, h, w], or None if they were not kept; `seconds` are a stage's."""

    seed: int
    num_frames: int
    fps: float
    latents: torch.Tensor | None = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)


Event = Started | Step | Frames | Finished
