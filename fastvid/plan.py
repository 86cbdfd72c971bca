"""What a request will cost, before anything is computed: sizes, model calls, arithmetic, memory, and the choices made.

A request that does not fit is refused here, with the number that does not fit and the nearest request that does.
Formulas for arithmetic: N tokens, width d, ffn f, L text rows; linear 2N(6d^2 + 2df), self-attention 4 N^2 d,
cross-attention 4 N L d, a layer and call each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvid.errors import OutOfMemory
from fastvid.models.wan import WanTransformerConfig
from fastvid.models.wan_vae22 import VAEConfig
from fastvid.requests import Resolved
from fastvid.timeline import Timeline


@dataclass(frozen=True)
class Cost:
    """Bytes at the peak of each part; `total` is what must fit beside the loaded weights."""

    activations: int
    decoder: int
    latents: int
    frames: int

    @property
    def total(self) -> int:
        return max(self.activations, self.decoder) + self.latents + self.frames


@dataclass(frozen=True)
class Plan:
    """What running a request takes. Sizes in pixels, bytes, and floating point operations."""

    height: int
    width: int
    num_frames: int
    model_height: int
    model_width: int
    model_frames: int
    fps: float
    latent_shape: tuple[int, int, int, int]
    tokens: int
    steps: int
    model_calls: int
    decode_chunk: int
    flops_denoise: float
    bytes_weights: int
    bytes_activations: int
    bytes_decoder: int
    bytes_latents: int
    bytes_frames: int
    bytes_free: int
    device: str
    dtype: str
    backends: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "latent_shape": list(self.latent_shape), "backends": dict(self.backends)}


def lay_out(request: Resolved, vae: VAEConfig) -> Timeline:
    """The timeline of a request: all frames free."""
    return Timeline(
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        made_frames=request.model_frames,
        made_height=request.model_height,
        made_width=request.model_width,
        spatial=vae.spatial_scale,
        temporal=vae.temporal_scale,
    )


def count_tokens(timeline: Timeline, config: WanTransformerConfig) -> int:
    """Tokens of the whole clip."""
    shape = timeline.latent_shape(1)[1:]
    return math.prod(n // p for n, p in zip(shape, config.patch_size, strict=True))


def denoise_flops(tokens: int, text_rows: int, config: WanTransformerConfig) -> float:
    """Floating point operations of one model call."""
    d, f = config.dim, config.ffn_dim
    layer = 2 * tokens * (6 * d * d + 2 * d * f) + 4 * tokens * tokens * d + 4 * tokens * text_rows * d
    return float(config.num_layers * layer)


def decode_chunk(timeline: Timeline) -> int:
    """Latent frames decoded at a time: one for large frames, more where a frame is small."""
    pixels = timeline.made_height * timeline.made_width * timeline.temporal
    return max(1, min(timeline.columns, (1 << 17) // pixels))


def cost(
    timeline: Timeline, config: WanTransformerConfig, vae: VAEConfig, itemsize: int, solver_copies: int = 6
) -> Cost:
    """Peak bytes of a whole-clip request.

    Activations: residual, norm, q, k, v, output and the wider of two feed-forward tensors, counted in the compute type
    and fp32. Decoder: about ten of its widest tensors for one chunk. Latents: the solver's history.
    """
    tokens, pixels = count_tokens(timeline, config), timeline.made_height * timeline.made_width
    chunk_frames = timeline.temporal * decode_chunk(timeline)
    return Cost(
        activations=tokens * (config.dim * (4 + 6 * itemsize) + 2 * config.ffn_dim * itemsize),
        decoder=chunk_frames * pixels * vae.widest * 4 * 10,
        latents=math.prod(timeline.latent_shape(vae.z_dim)) * 4 * solver_copies,
        frames=timeline.num_frames * timeline.height * timeline.width * 3,
    )


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_free())
    return 1 << 62  # no way to know on this system: refuse nothing


def _cgroup_free() -> int:
    """What the container's own limit leaves, if there is one."""
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return max(0, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else 1 << 62


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check_fits(need: Cost, free: int, timeline: Timeline, largest_that_fits: int) -> None:
    """Raises OutOfMemory for a request that does not fit, naming the nearest that does."""
    if need.total <= free:
        return
    parts = {name: getattr(need, name) for name in ("activations", "decoder", "latents", "frames")}
    worst = max(parts, key=parts.get)
    hint = f"the nearest that fits is num_frames={largest_that_fits}" if largest_that_fits else "ask for a smaller size"
    raise OutOfMemory(
        f"{timeline.width}x{timeline.height} with {timeline.num_frames} frames takes about "
        f"{need.total / 2**30:.1f} GiB beside the weights ({worst}: {parts[worst] / 2**30:.1f} GiB), "
        f"and {free / 2**30:.1f} GiB are free; {hint}"
    )


def most_frames(timeline: Timeline, fits: Any) -> int:
    """The largest number of frames up to the timeline's for which `fits(timeline)`, 0 if none."""
    low, high = 0, timeline.columns
    while low < high:
        middle = (low + high + 1) // 2
        frames = (middle - 1) * timeline.temporal + 1
        ok = fits(replace(timeline, num_frames=frames, made_frames=frames))
        low, high = (middle, high) if ok else (low, middle - 1)
    return (low - 1) * timeline.temporal + 1 if low else 0
