"""What a request will cost, before anything is computed: sizes, model calls, arithmetic, memory, and the choices made.

A request that does not fit is refused here, with the number that does not fit and the nearest request that does.
Formulas for arithmetic: N tokens, width d, ffn f, L text rows; linear 2N(6d^2 + 2df), self-attention 4 N^2 d,
cross-attention 4 N L d, a layer and call each; the layers of a control branch cost the same, and 2N d^2 for a hint.
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
    encoder: int = 0

    @property
    def total(self) -> int:
        return max(self.activations, self.decoder, self.encoder) + self.latents + self.frames


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
    bytes_encoder: int
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
        lead=len(request.reference_images or ()),
    )


def count_tokens(timeline: Timeline, config: WanTransformerConfig) -> int:
    """Tokens of the whole clip."""
    shape = timeline.latent_shape(1)[1:]
    return math.prod(n // p for n, p in zip(shape, config.patch_size, strict=True))


def denoise_flops(tokens: int, text_rows: int, config: WanTransformerConfig, control_layers: int = 0) -> float:
    """Floating point operations of one model call. control_layers: of a control branch beside it."""
    d, f = config.dim, config.ffn_dim
    layer = 2 * tokens * (6 * d * d + 2 * d * f) + 4 * tokens * tokens * d + 4 * tokens * text_rows * d
    # What goes into the control branch is projected once, what comes out in every layer.
    control = control_layers * layer + (control_layers + 1) * 2 * tokens * d * d if control_layers else 0
    return float(config.num_layers * layer + control)


def decode_chunk(timeline: Timeline) -> int:
    """Latent frames decoded at a time: one for large frames, more where a frame is small."""
    pixels = timeline.made_height * timeline.made_width * timeline.temporal
    return max(1, min(timeline.columns - timeline.lead, (1 << 17) // pixels))


def cost(
    timeline: Timeline,
    config: WanTransformerConfig,
    vae: VAEConfig,
    itemsize: int,
    solver_copies: int = 6,
    control_layers: int = 0,
) -> Cost:
    """Peak bytes of a whole-clip request.

    Activations: residual, norm, q, k, v, output and the wider of two feed-forward tensors, counted in the compute type
    and fp32; with control_layers, two more: the control, and the residual that waits for its hint. Decoder: about ten
    of its widest tensors for one chunk. Encoder, of models that see whole videos: as much, and the frames that it
    takes. Latents: the solver's history, and what the control branch sees.
    """
    tokens, pixels = count_tokens(timeline, config), timeline.made_height * timeline.made_width
    residuals = 8 if control_layers else 6
    decoder = timeline.temporal * decode_chunk(timeline) * pixels * vae.widest * 4 * 10
    seen = 2 * vae.z_dim + timeline.spatial**2 if control_layers else 0
    # Of every pixel: the video and what of it stays or changes (3 each), the mask and the rounded mask; or the video.
    values = 8 if control_layers else 3 if config.in_channels > config.out_channels else 0
    return Cost(
        activations=tokens * (config.dim * (4 + residuals * itemsize) + 2 * config.ffn_dim * itemsize),
        decoder=decoder,
        latents=math.prod(timeline.latent_shape(vae.z_dim * solver_copies + seen)) * 4,
        frames=timeline.num_frames * timeline.height * timeline.width * 3,
        encoder=values and decoder + timeline.made_frames * pixels * values * 4,
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
    parts = {name: getattr(need, name) for name in ("activations", "encoder", "decoder", "latents", "frames")}
    worst = max(parts, key=parts.get)
    hint = f"the nearest that fits is num_frames={largest_that_fits}" if largest_that_fits else "ask for a smaller size"
    raise OutOfMemory(
        f"{timeline.width}x{timeline.height} with {timeline.num_frames} frames takes about "
        f"{need.total / 2**30:.1f} GiB beside the weights ({worst}: {parts[worst] / 2**30:.1f} GiB), "
        f"and {free / 2**30:.1f} GiB are free; {hint}"
    )


def most_frames(timeline: Timeline, fits: Any) -> int:
    """The largest number of frames up to the timeline's for which `fits(timeline)`, 0 if none."""
    low, high = 0, timeline.columns - timeline.lead
    while low < high:
        middle = (low + high + 1) // 2
        frames = (middle - 1) * timeline.temporal + 1
        ok = fits(replace(timeline, num_frames=frames, made_frames=frames))
        low, high = (middle, high) if ok else (low, middle - 1)
    return (low - 1) * timeline.temporal + 1 if low else 0
