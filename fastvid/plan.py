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

from fastvid import plan_memory
from fastvid.models.checkpoint import weigh_part
from fastvid.models.clip import CLIPVisionConfig
from fastvid.models.umt5 import UMT5Config
from fastvid.models.wan import WanTransformerConfig
from fastvid.models.wan_vae22 import VAEConfig
from fastvid.offload import MODES
from fastvid.plan_memory import Cost, Memory, Sizes
from fastvid.requests import Resolved
from fastvid.timeline import Timeline

CLIP_TOKENS = 257


@dataclass(frozen=True)
class Plan:
    """What running a request takes. Sizes in pixels, bytes, and floating point operations.

    offload: how weights share the device, choices: the same in sentences. bytes_device: on the device at the peak,
    weights included; bytes_host: of weights at home in host memory. bytes_free: what can still be taken there now.
    """

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
    bytes_encoder: int
    bytes_context: int
    bytes_device: int
    bytes_host: int
    offload: str
    choices: tuple[str, ...]
    device: str
    dtype: str
    backends: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        lists = {"latent_shape": list(self.latent_shape), "choices": list(self.choices)}
        return {**asdict(self), **lists, "backends": dict(self.backends)}


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
    timeline: Timeline,
    config: WanTransformerConfig,
    vae: VAEConfig,
    itemsize: int,
    solver_copies: int = 6,
    *,
    text: UMT5Config | None = None,
    rows: int = 512,
    texts: int = 2,
    experts: int = 1,
    pictures: int = 0,
    on_cpu: bool = False,
) -> Cost:
    """Peak bytes of a whole-clip request, weights left out; see `plan_memory.Cost`.

    rows: of text that the transformer sees; texts: 2 with guidance; pictures: how many are given.
    """
    pixels, chunk = timeline.made_height * timeline.made_width, timeline.temporal * decode_chunk(timeline)
    concatenated = config.in_channels > config.out_channels
    given = (timeline.made_frames if concatenated else 1) if pictures else 0
    seen = pictures * CLIP_TOKENS if config.image_dim else 0
    return Cost(
        activations=plan_memory.activation_bytes(count_tokens(timeline, config), config, itemsize),
        decoder=plan_memory.decoder_bytes(pixels, vae, chunk, on_cpu),
        latents=math.prod(timeline.latent_shape(vae.z_dim)) * 4 * solver_copies,
        frames=timeline.num_frames * timeline.height * timeline.width * 3,
        encoder=plan_memory.encoder_bytes(pixels, vae, min(chunk, given), given) if given else 0,
        context=plan_memory.context_bytes(rows + seen, texts, experts, config, itemsize),
        text=plan_memory.text_bytes(rows, text, itemsize) if text else 0,
    )


def fit(
    request: Resolved,
    transformer: WanTransformerConfig,
    vae: VAEConfig,
    text_encoder: UMT5Config,
    image_encoder: CLIPVisionConfig | None = None,
    *,
    capacity: int,
    experts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    pictures: int = 0,
) -> tuple[Memory, dict[str, Memory]]:
    """Whether and how a model that need not be loaded, nor be here, makes a request in `capacity` bytes of a device.

    dtype: of transformer and text encoder; the VAE and the image encoder are in fp32. Returns the choice, and every
    way of offloading by its name. Raises OutOfMemory if none of them fits.
    """
    one, text = weigh_part("transformer", transformer, dtype), weigh_part("text_encoder", text_encoder, dtype)
    image = weigh_part("image_encoder", image_encoder, dtype).total if image_encoder else 0
    sizes = Sizes((one,) * experts, text, weigh_part("vae", vae, dtype).total, image)
    timeline = lay_out(request, vae)
    guided = any(scale != 1 for scale in request.guidance_scales(experts))
    options = {"text": text_encoder, "texts": 1 + guided, "experts": experts, "pictures": pictures}

    def chosen(t: Timeline) -> Memory:
        return plan_memory.choose(sizes, cost(t, transformer, vae, dtype.itemsize, **options), capacity)

    found = chosen(timeline)
    if found.device > capacity:
        hint = nearest(timeline, lambda t: chosen(t).device <= capacity)
        plan_memory.refuse(found, found.device, capacity, timeline, hint)
    need = cost(timeline, transformer, vae, dtype.itemsize, **options)
    return found, {mode: plan_memory.memory(sizes, need, mode) for mode in MODES}


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return int(torch.cuda.mem_get_info(device)[0]) + kept
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


def nearest(timeline: Timeline, fits: Any) -> str:
    """The end of a sentence that says which request would fit."""
    frames = most_frames(timeline, fits)
    return f"the nearest that fits is num_frames={frames}" if frames else "ask for a smaller size"


def most_frames(timeline: Timeline, fits: Any) -> int:
    """The largest number of frames up to the timeline's for which `fits(timeline)`, 0 if none."""
    low, high = 0, timeline.columns
    while low < high:
        middle = (low + high + 1) // 2
        frames = (middle - 1) * timeline.temporal + 1
        ok = fits(replace(timeline, num_frames=frames, made_frames=frames))
        low, high = (middle, high) if ok else (low, middle - 1)
    return (low - 1) * timeline.temporal + 1 if low else 0
