"""The events of a running request, as `pipe.stream` yields them.

Order: one Started, then Step and Frames as they happen, and one Finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastvid.media.sound import Track


@dataclass(frozen=True)
class Started:
    """The request is planned and accepted; nothing has been computed yet. sound: the video's, read from its clips on
    demand, for `FrameSink`; None without."""

    plan: Plan
    seed: int
    num_frames: int
    height: int
    width: int
    fps: float
    total_steps: int
    recipe: dict[str, Any] = field(repr=False)
    sound: Track | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Step:
    """Denoising step number `step` (from 1) of `total` is done. It began at noise level `sigma` and took `seconds`;
    on a GPU, which is one step behind the host, that is mostly the time of the step before."""

    step: int
    total: int
    sigma: float
    seconds: float


@dataclass(frozen=True)
class Frames:
    """The next frames of the video, uint8 RGB [n, H, W, 3]; the first is number `start`."""

    start: int
    frames: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """All frames have been yielded. latents: the generated clean, normalized latents [1, C, T, h, w]; None if not kept.
    seconds: by stage (text, denoise, decode)."""

    seed: int
    num_frames: int
    fps: float
    latents: torch.Tensor | None = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)


Event = Started | Step | Frames | Finished


@dataclass(frozen=True)
class Plan:
    """The cost of a request. Sizes are in pixels, bytes and floating point operations.

    model_height, model_width, model_frames: the model's output before cropping. latent_shape: (C, T, h, w). tokens:
    in the largest window. decode_chunk: latent frames per decoded chunk, decoded in decode_stripes horizontal
    stripes. decode_beside: whether chunks are decoded while later latents are denoised. flops_attention: attention's
    part of flops_denoise.

    bytes_device: peak on the device, weights included. bytes_host: weights kept in host memory. bytes_free: memory
    available on the device. bytes_graphs: buffers of CUDA graphs. offload: the offload mode. choices: the planner's
    decisions, in sentences. quality: as asked for. levers: what is done less of, each in words. quantized: part -> how
    its weights are held, for those that stay quantized.

    seconds, seconds_parts: estimated time, total and by stage; None and empty without an estimate. rates: by whose
    rates, "" without one.

    With several ranks: parallel: the layout. parallel_why: the reason for it. link: the interconnect, and whether it
    was detected, requested or assumed. layouts: predicted seconds per step of each layout that fits, the chosen one
    first. efficiency: predicted speedup of a step divided by the number of ranks; only with an estimate.
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
    rates: str = ""
    quantized: Mapping[str, str] = field(default_factory=dict)
    quality: str = "exact"
    levers: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = f"{self.num_frames} frames of {self.width}x{self.height} at {self.fps:g} fps"
        time = "" if self.seconds is None else f", about {self.seconds:.3g} s"
        return f"<Plan: {size}, {self.steps} steps, {self.bytes_device / 2**30:.2f} GiB on {self.device}{time}>"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        lists = {"latent_shape": list(self.latent_shape), "choices": list(self.choices)}
        dicts = {
            name: dict(getattr(self, name)) for name in ("backends", "seconds_parts", "layouts", "quantized", "levers")
        }
        return {**asdict(self), **lists, **dicts}
