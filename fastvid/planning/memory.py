"""What a request takes of a device's memory with each way of offloading, from configurations alone: nothing is loaded.

A request runs in phases; in each, what stays on the device, what visits it and what is computed stand side by side, and
the largest phase is the peak. See `fastvid.device.offload` for the ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from fastvid.device.offload import MODES, SLOTS
from fastvid.errors import OutOfMemory
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.loaded import Sizes
from fastvid.models.wan.config import VAEConfig, WanTransformerConfig, WanVAE22Config
from fastvid.planning import vae_memory
from fastvid.requests.timeline import Segment

# Tensors as large as the widest activation that one step of the VAE holds at its peak: of the decoder beside its cache,
# of the encoder the caches of the step before and of this one among them; measured on its operations
# (tests/planning/test_plan_memory.py).
DECODER_TENSORS, ENCODER_TENSORS = 6.9, 11.5
DECODER_TENSORS_22, ENCODER_TENSORS_22 = 5.4, 13.5
# Of a decoder's activations, what a stripe of rows holds for the next one and in copies; measured as above.
STRIPE_SHARE = 0.25
# What a rank of several holds beside its band's activations, in copies with its neighbours' rows; measured as above
# (tests/distributed/test_bands.py).
BAND_SHARE = 0.1
FP32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Bytes at the peak of each part of a request, beside weights.

    activations: of one call of the transformer. decoder, encoder: of the VAE, the encoder with the frames it is given;
    0 where there are no pictures. text: of the text encoder. latents: the solver's history. context: keys and values of
    the text for every layer, guidance branch and expert. frames: what comes out, in host memory. graphs: what replayed
    calls keep, in all phases: a call's activations, and copies of what it is given.
    """

    activations: int
    decoder: int
    latents: int
    frames: int
    encoder: int = 0
    context: int = 0
    text: int = 0
    graphs: int = 0

    @property
    def total(self) -> int:
        """What must fit beside the weights if those stay."""
        return self.graphs + self.latents + self.frames + max(self.text, self.encoder, self.context + self.working)

    @property
    def working(self) -> int:
        return max(self.activations, self.decoder)


@dataclass(frozen=True)
class Memory:
    """A request with one way of offloading. phases: bytes on the device in each; host: bytes of weights at home in host
    memory; choices: what happens, in sentences."""

    offload: str
    phases: Mapping[str, int]
    host: int
    choices: tuple[str, ...]

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase in which that is."""
        return max(self.phases, key=lambda name: self.phases[name])


def activation_bytes(tokens: int, config: WanTransformerConfig, itemsize: int, control_layers: int = 0) -> int:
    """Peak of one call of the transformer on `tokens` N of width d, attention without a matrix of N x N.

    Attention: residual, the product of queries, keys and values, and one of these made ready, in the compute type, and
    what the other takes in fp32 meanwhile. Feed-forward: residual, norm, hidden tensor before and after GELU. And the
    rotary table. A control branch has a residual and a hint of its own.
    """
    attention = config.dim * (12 + 5 * itemsize)
    feed_forward = 2 * (config.dim + config.ffn_dim) * itemsize
    control = 2 * config.dim * itemsize if control_layers else 0
    return tokens * (max(attention, feed_forward) + control + 4 * config.attention_head_dim)


def context_bytes(rows: int, texts: int, experts: int, config: WanTransformerConfig, itemsize: int) -> int:
    """Keys and values of `rows` of text and pictures, of every layer, guidance branch and expert."""
    return 2 * config.num_layers * rows * config.dim * itemsize * texts * experts


def text_bytes(rows: int, config: UMT5Config, itemsize: int) -> int:
    """Peak of the text encoder on one prompt of `rows` tokens: scores and softmax of all heads, or feed-forward."""
    scores = rows * config.num_heads * (3 * itemsize + 8)
    return rows * (max(scores, 3 * config.d_ff * itemsize) + config.d_model * (8 + 4 * itemsize))


def band_height(vae: VAEConfig, height: int, bands: int) -> int:
    """Rows of pixels that a rank works on at most where `bands` ranks share a frame's: its own, and those of its
    neighbours that it sees."""
    rows = height // vae.spatial_scale
    return height if bands == 1 else min(rows, -(-rows // bands) + 1) * vae.spatial_scale


def decoder_bytes(
    vae: VAEConfig,
    height: int,
    width: int,
    frames: int,
    stripes: int = 1,
    bands: int = 1,
    itemsize: int = FP32_BYTES,
) -> int:
    """Peak of decoding `frames` pixel frames of a stream at once, `itemsize` bytes a number: the feature cache, which
    does not grow with them, and activations, of which `stripes` hold a part at a time. bands: ranks that share the
    rows; each has all of the 8-bit frames at the end, twice while they are put together."""
    tensors = DECODER_TENSORS_22 if isinstance(vae, WanVAE22Config) else DECODER_TENSORS
    share = 1 / stripes + (STRIPE_SHARE if stripes > 1 else 0) + (BAND_SHARE if bands > 1 else 0)
    rows = band_height(vae, height, bands)
    activations = frames * rows * width * vae.widest * itemsize * tensors * share
    gathered = 2 * 3 * frames * height * width if bands > 1 else 0
    return vae_memory.cache_bytes(vae, rows, width, itemsize) + math.ceil(activations) + gathered


def encoder_bytes(
    vae: VAEConfig,
    height: int,
    width: int,
    frames: int,
    given: int,
    masks: int = 0,
    bands: int = 1,
    itemsize: int = FP32_BYTES,
) -> int:
    """Peak of encoding `frames` of `given` pixel frames at once, `itemsize` bytes a number; the frames are there twice
    in fp32, as they come and in the VAE's range, and so many masks of one channel beside them. bands: ranks that share
    the rows."""
    patched = isinstance(vae, WanVAE22Config)
    widest = vae.base_dim / (vae.patch_size**2 if patched else 1)
    tensors = (ENCODER_TENSORS_22 if patched else ENCODER_TENSORS) * (1 + (BAND_SHARE if bands > 1 else 0))
    activations = frames * band_height(vae, height, bands) * width * widest * itemsize * tensors
    return math.ceil(activations) + given * height * width * (2 * 3 + masks) * 4


def memory(sizes: Sizes, cost: Cost, mode: str) -> Memory:
    """What a request takes with one of `offload.MODES`."""
    stays, text, image, host = _places(sizes, mode)
    stays += cost.graphs
    during = stays + cost.latents
    phases = {"text": stays + text + cost.text}
    if cost.encoder:
        phases["pictures"] = during + max(image, cost.encoder)
    phases["denoising"] = during + cost.context + cost.activations
    phases["decoding"] = during + cost.context + cost.decoder
    return Memory(mode, phases, host, _choices(sizes, mode))


def choose(sizes: Sizes, cost: Cost, capacity: int) -> Memory:
    """The least offloading that fits into `capacity` bytes; the most there is if nothing does."""
    made = [memory(sizes, cost, mode) for mode in MODES]
    return next((m for m in made if m.device <= capacity), made[-1])


def refuse(found: Memory, needed: int, capacity: int, segment: Segment, hint: str) -> NoReturn:
    """Raises OutOfMemory for a request that needs more than there is, naming the phase that is the largest and the
    nearest request that fits."""
    how = "" if found.offload == "none" else f" with offload={found.offload!r}"
    raise OutOfMemory(
        f"{segment.width}x{segment.height} with {segment.num_frames} frames takes about {_gib(needed)}{how}, "
        f"weights included ({found.worst} takes the most), and {_gib(capacity)} are there; {hint}"
    )


def _places(sizes: Sizes, mode: str) -> tuple[int, int, int, int]:
    """Bytes that stay on the device, that the text encoder and the image encoder bring along, and in host memory."""
    if mode == "none":
        return sizes.total, 0, 0, 0
    away = sizes.text.total + sizes.image
    experts = sum(expert.total for expert in sizes.experts)
    if mode == "blocks":
        stays = max(expert.streamed for expert in sizes.experts) + sizes.vae
        return stays, sizes.text.streamed, sizes.image, away + experts
    taking_turns = len(sizes.experts) > 1
    stays = max(expert.total for expert in sizes.experts) + sizes.vae
    return stays, sizes.text.total, sizes.image, away + (experts if taking_turns else 0)


def _choices(sizes: Sizes, mode: str) -> tuple[str, ...]:
    if mode == "none":
        return ("every part stays on the device",)
    said = []
    if mode == "text":
        said.append(f"the text encoder ({_gib(sizes.text.total)}) is on the device only while it reads a prompt")
    if sizes.image:
        said.append(f"the image encoder ({_gib(sizes.image)}) is on the device only while it looks at pictures")
    if len(sizes.experts) > 1:
        said.append(f"of {len(sizes.experts)} experts only the one in use takes memory of the device")
    if mode == "blocks":
        for name, part in (("transformer", sizes.experts[0]), ("text encoder", sizes.text)):
            count = len(part.blocks)
            said.append(
                f"{name} blocks are streamed from host memory: {min(SLOTS, count)} of {count} on the device at a time"
            )
    return tuple(said)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
