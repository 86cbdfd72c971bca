"""The events of a running request: what `pipe.stream` yields.

Order: one Started, then Step and Frames as they happen, and one Finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


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
    """Denoising step number `step` (from 1) of `total` is done: it began at noise level `sigma` and took `seconds`."""

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
    """All frames are out. latents: the clean, normalised ones that were made, [1, C, T, h, w], or None if they were not
    kept. seconds: by stage (text, denoise, decode)."""

    seed: int
    num_frames: int
    fps: float
    latents: torch.Tensor | None = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)


Event = Started | Step | Frames | Finished


@dataclass(frozen=True)
class Plan:
    """What running a request takes. Sizes are in pixels, bytes and floating point operations.

    model_height, model_width, model_frames: what the model makes before cropping. latent_shape: (C, T, h, w).
    tokens: of the largest window. decode_chunk: latent frames decoded at a time, in decode_stripes stripes of rows;
    decode_beside: while later ones are denoised. flops_attention: its part of flops_denoise.

    bytes_device: the peak on the device, weights included. bytes_host: weights kept in host memory. bytes_free: what can
    still be taken on the device. bytes_graphs: buffers of CUDA graphs. offload: how weights share the device; choices: what was
    decided, in sentences.

    seconds, seconds_parts: estimated time, in all and by part; None and empty if no estimate was asked for.

    On several ranks: parallel: the layout; parallel_why: the reason for it; link: what joins the ranks, and whether that
    was found, given or assumed; layouts: predicted seconds of a step for each layout that fits, the chosen one first;
    efficiency: predicted speed of a step over that of one rank times the ranks, only with an estimate.
    """

    height: int
    width: int
    num_frames: int
    model_height: int
    model_width: int
    model_frames: int
    fps: float
    latent_shape: tuple[int, int, int, int]
    segments: int
    windows: int
    tokens: int
    steps: int
    model_calls: int
    decode_chunk: int
    decode_stripes: int
    flops_denoise: float
    bytes_weights: int
    bytes_activations: int
    bytes_decoder: int
    bytes_latents: int
    bytes_frames: int
    bytes_free: int
    bytes_encoder: int
    bytes_context: int
    bytes_device: int
    bytes_host: int
    offload: str
    choices: tuple[str, ...]
    device: str
    dtype: str
    backends: Mapping[str, str]
    decode_beside: bool = False
    flops_attention: float = 0.0
    seconds: float | None = None
    seconds_parts: Mapping[str, float] = field(default_factory=dict)
    parallel: str = ""
    bytes_graphs: int = 0
    efficiency: float | None = None
    layouts: Mapping[str, float] = field(default_factory=dict)
    parallel_why: str = ""
    link: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        lists = {"latent_shape": list(self.latent_shape), "choices": list(self.choices)}
        dicts = {name: dict(getattr(self, name)) for name in ("backends", "seconds_parts", "layouts")}
        return {**asdict(self), **lists, **dicts}
