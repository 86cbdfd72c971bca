"""What a request will cost, before anything is computed: sizes, model calls, arithmetic, memory, and the choices made.

A request that does not fit is refused here, with the number that does not fit and the nearest request that does.
Formulas for arithmetic: N tokens, width d, ffn f, L text rows; linear 2N(6d^2 + 2df), self-attention 4 N^2 d,
cross-attention 4 N L d, a layer and call each; the layers of a control branch cost the same, and 2N d^2 for a hint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastvid.errors import OutOfMemory
from fastvid.models.wan import WanTransformerConfig
from fastvid.models.wan_vae22 import VAEConfig
from fastvid.timeline import Segment


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
    segments: int
    windows: int
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


def window_of(segment: Segment, columns: int) -> Segment:
    """A segment as long as what is with the model at once, of its length: what memory is taken for."""
    made = (min(columns, segment.columns) - segment.lead - 1) * segment.temporal + 1
    return replace(segment, made_frames=made, num_frames=made)


def count_tokens(segment: Segment, config: WanTransformerConfig) -> int:
    """Tokens of the whole clip."""
    shape = segment.latent_shape(1)[1:]
    return math.prod(n // p for n, p in zip(shape, config.patch_size, strict=True))


def denoise_flops(
    tokens: int, text_rows: int, config: WanTransformerConfig, control_layers: int = 0, keys: int | None = None
) -> float:
    """Floating point operations of one model call. control_layers: of a control branch beside it. keys: tokens that
    are attended to, where there are more (a KV cache)."""
    d, f = config.dim, config.ffn_dim
    layer = 2 * tokens * (6 * d * d + 2 * d * f) + 4 * tokens * (keys or tokens) * d + 4 * tokens * text_rows * d
    # What goes into the control branch is projected once, what comes out in every layer.
    control = control_layers * layer + (control_layers + 1) * 2 * tokens * d * d if control_layers else 0
    return float(config.num_layers * layer + control)


def decode_chunk(segment: Segment) -> int:
    """Latent frames decoded at a time: one for large frames, more where a frame is small."""
    pixels = segment.made_height * segment.made_width * segment.temporal
    return max(1, min(segment.columns - segment.lead, (1 << 17) // pixels))


def cost(
    segment: Segment,
    config: WanTransformerConfig,
    vae: VAEConfig,
    itemsize: int,
    solver_copies: int = 6,
    control_layers: int = 0,
    frames: int = 0,
) -> Cost:
    """Peak bytes of a request, of which `segment` is what the model makes at once, and `frames` are kept.

    Activations: residual, norm, q, k, v, output and the wider of two feed-forward tensors, counted in the compute type
    and fp32; with control_layers, two more: the control, and the residual that waits for its hint. Decoder: about ten
    of its widest tensors for one chunk. Encoder, of models that see whole videos: as much, and the frames that it
    takes. Latents: the solver's history, and what the control branch sees.
    """
    tokens, pixels = count_tokens(segment, config), segment.made_height * segment.made_width
    residuals = 8 if control_layers else 6
    decoder = segment.temporal * decode_chunk(segment) * pixels * vae.widest * 4 * 10
    seen = 2 * vae.z_dim + segment.spatial**2 if control_layers else 0
    # Of every pixel: the video and what of it stays or changes (3 each), the mask and the rounded mask; or the video.
    values = 8 if control_layers else 3 if config.in_channels > config.out_channels else 0
    return Cost(
        activations=tokens * (config.dim * (4 + residuals * itemsize) + 2 * config.ffn_dim * itemsize),
        decoder=decoder,
        latents=math.prod(segment.latent_shape(vae.z_dim * solver_copies + seen)) * 4,
        frames=frames * segment.height * segment.width * 3,
        encoder=values and decoder + segment.made_frames * pixels * values * 4,
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


def refuse(need: Cost, free: int, segment: Segment, frames: int, largest_that_fits: int) -> NoReturn:
    """Raises OutOfMemory for a request of so many frames that does not fit, naming the nearest that does."""
    parts = {name: getattr(need, name) for name in ("activations", "encoder", "decoder", "latents", "frames")}
    worst = max(parts, key=parts.get)
    hint = f"the nearest that fits is num_frames={largest_that_fits}" if largest_that_fits else "ask for a smaller size"
    raise OutOfMemory(
        f"{segment.width}x{segment.height} with {frames} frames takes about "
        f"{need.total / 2**30:.1f} GiB beside the weights ({worst}: {parts[worst] / 2**30:.1f} GiB), "
        f"and {free / 2**30:.1f} GiB are free; {hint}"
    )


def most_frames(frames: int, temporal: int, fits: Callable[[int], bool]) -> int:
    """The largest number 4k + 1 of frames up to this one for which `fits(number)`, 0 if none."""
    low, high = 0, (frames - 1) // temporal + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits((middle - 1) * temporal + 1) else (low, middle - 1)
    return (low - 1) * temporal + 1 if low else 0
