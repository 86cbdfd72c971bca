"""How much device memory a request takes with each way of offloading, computed from configurations alone.

A request runs in phases. In each, the weights that stay on the device, those that visit it and the tensors that are
computed exist at the same time; the largest phase is the peak. `fastvid.device.offload` has the ways of offloading.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from fastvid.device.offload import MODES, SLOTS
from fastvid.engine.decode import decode_chunk
from fastvid.errors import OutOfMemory
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.loaded import Model, Sizes
from fastvid.models.registry import EXPERTS, weigh_part
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment

log = logging.getLogger("fastvid.plan")

STRIPES = (1, 2, 4, 8)  # in which frames may be decoded: the fewest that fit
CLIP_TOKENS = 257
SOLVER_COPIES = 6  # tensors like the latents that denoising holds
# How many tensors of the widest activation's size the VAE holds at its peak: the decoder beside its cache, the encoder
# with its caches of the previous and of this step. Measured on its operations (tests/planning/test_plan_memory.py).
DECODER_TENSORS, ENCODER_TENSORS = 6.9, 11.5
DECODER_TENSORS_22, ENCODER_TENSORS_22 = 5.4, 13.5
# The share of a decoder's activations that a stripe of rows keeps for the next one and copies; measured as above.
STRIPE_SHARE = 0.25
# The share of its band's activations that a rank holds again, in copies with its neighbours' rows; measured in
# tests/distributed/test_bands.py.
BAND_SHARE = 0.1
FP32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Peak bytes of each part of a request, weights not counted.

    activations: of one call of the transformer. decoder, encoder: of the VAE; the encoder's with the frames it reads, 0
    if there are none. latents: with the solver's history. frames: the result, in host memory. context: keys and values
    of the text for every layer, guidance branch and expert. text: of the text encoder. graphs: what CUDA graphs keep in
    all phases: a call's activations and copies of its inputs.
    """

    activations: int
    decoder: int
    latents: int
    frames: int
    encoder: int = 0
    context: int = 0
    text: int = 0
    graphs: int = 0


@dataclass(frozen=True)
class Memory:
    """A request with one way of offloading. phases: bytes on the device in each; host: bytes of weights kept in host
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
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class ModelFacts:
    """What memory depends on of a model, loaded or known from its configurations.

    sizes: bytes of its weights. itemsize, vae_itemsize: bytes of a number in the transformer and in the VAE. text_rows:
    tokens of text. control_layers: of a control branch. graphs: its calls are replayed as CUDA graphs.
    """

    transformer: WanTransformerConfig
    vae: WanVAEConfig
    text: UMT5Config
    sizes: Sizes
    itemsize: int
    vae_itemsize: int = FP32_BYTES
    text_rows: int = 512
    control_layers: int = 0
    graphs: bool = False

    @classmethod
    def of(cls, model: Model) -> ModelFacts:
        """The facts of a loaded model, or of one without weights."""
        return cls(
            model.transformer.config,
            model.vae.config,
            model.text_encoder.config,
            model.sizes,
            model.dtype.itemsize,
            model.vae_dtype.itemsize,
            model.tokenizer.text_length,
            model.control_layers,
            model.placement.graphs,
        )

    @classmethod
    def of_configs(
        cls, configs: Mapping[str, Any], dtype: torch.dtype, vae_dtype: torch.dtype = torch.float32
    ) -> ModelFacts:
        """The facts of a model that is not loaded, from the configurations of its parts by name."""
        weights = {name: weigh_part(name, config, dtype, vae_dtype) for name, config in configs.items()}
        image = weights["image_encoder"].total if "image_encoder" in weights else 0
        experts = tuple(weights[name] for name in EXPERTS if name in weights)
        sizes = Sizes(experts, weights["text_encoder"], weights["vae"].total, image)
        transformer = configs["transformer"]
        control = len(transformer.vace_layers) if isinstance(transformer, WanVACEConfig) else 0
        transformer = transformer.transformer if isinstance(transformer, WanVACEConfig) else transformer
        vae, text = configs["vae"], configs["text_encoder"]
        return cls(transformer, vae, text, sizes, dtype.itemsize, vae_dtype.itemsize, control_layers=control)


@dataclass(frozen=True)
class Needs:
    """What a request asks of a model, as numbers.

    segment: the frames that are with the model at once. texts: prompts that it reads, 2 with guidance. pictures: those
    that CLIP sees. encoded: frames that the VAE encodes at once. frames: those that are kept in host memory. cached:
    tokens in the KV cache. stripes: of rows in which frames are decoded. sharers: ranks that share the tokens; bands:
    ranks that share the rows of frames in the VAE.
    """

    model: ModelFacts
    segment: Segment
    texts: int = 2
    pictures: int = 0
    encoded: int = 0
    frames: int = 0
    cached: int = 0
    stripes: int = 1
    sharers: int = 1
    bands: int = 1

    def memory(self, mode: str) -> Memory:
        """Memory by phase with one of `offload.MODES`."""
        return memory_of(self.model.sizes, self.cost(), mode)

    def cost(self) -> Cost:
        """Peak bytes beside the weights."""
        model, segment, config, vae = self.model, self.segment, self.model.transformer, self.model.vae
        tokens = share_of(count_tokens(segment, config), segment.columns // config.patch_size[0], self.sharers)
        activations = activation_bytes(tokens, config, model.itemsize, model.control_layers)
        control = 2 * vae.z_dim + segment.spatial**2 if model.control_layers else 0  # channels of the branch's input
        return Cost(
            activations=activations,
            decoder=self._decoder_bytes(),
            latents=math.prod(segment.latent_shape(vae.z_dim * SOLVER_COPIES + control)) * 4,
            frames=self.frames * segment.height * segment.width * 3,
            encoder=self._encoder_bytes(),
            context=self._context_bytes(self.texts, len(model.sizes.experts))
            + context_bytes(-(-self.cached // self.sharers), self.texts, 1, config, model.itemsize),
            text=text_bytes(model.text_rows, model.text, model.itemsize),
            graphs=activations + self._graph_inputs(control) * len(model.sizes.experts) if model.graphs else 0,
        )

    @property
    def _chunk(self) -> int:
        """Frames that are decoded at a time."""
        return self.segment.temporal * decode_chunk(self.segment)

    def _decoder_bytes(self) -> int:
        model, segment = self.model, self.segment
        height, width = segment.made_height, segment.made_width
        return decoder_bytes(model.vae, height, width, self._chunk, self.stripes, self.bands, model.vae_itemsize)

    def _encoder_bytes(self) -> int:
        model, segment = self.model, self.segment
        concatenated = model.transformer.in_channels > model.transformer.out_channels
        if model.control_layers or (concatenated and self.pictures):
            given = segment.made_frames
        else:
            given = max(self.encoded, min(self.pictures, 1))
        if not given:
            return 0
        masks = 2 if model.control_layers else 0  # as given, and rounded
        height, width, chunk = segment.made_height, segment.made_width, min(self._chunk, given)
        return encoder_bytes(model.vae, height, width, chunk, given, masks, self.bands, model.vae_itemsize)

    def _context_bytes(self, texts: int, experts: int) -> int:
        model = self.model
        seen = self.pictures * CLIP_TOKENS if model.transformer.image_dim else 0
        return context_bytes(model.text_rows + seen, texts, experts, model.transformer, model.itemsize)

    def _graph_inputs(self, control: int) -> int:
        """Bytes of the copies that a replayed call has of its inputs."""
        channels = 2 * self.model.vae.z_dim + self.model.transformer.in_channels + control
        return self._context_bytes(1, 1) + math.prod(self.segment.latent_shape(channels)) * 4


def choose_offload(
    configs: Mapping[str, Any],
    request: Resolved,
    capacity: int,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
) -> str:
    """The least offloading with which a request's whole clip fits into `capacity` bytes of a device.

    configs: of the model's parts by name. Frames are decoded in stripes only if no way of offloading suffices. The most
    offloading if nothing fits: smaller requests may, and others are refused when they are planned.
    """
    model = ModelFacts.of_configs(configs, dtype, vae_dtype)
    config = model.transformer
    pictures = 1 + bool(config.pos_embed_seq_len) if config.in_channels > config.out_channels else 0
    needs = Needs(model, whole_clip(request, model.vae), 1 + request.guided(len(model.sizes.experts)), pictures)
    for stripes in (1, STRIPES[-1]):
        for mode in MODES:
            taken = replace(needs, stripes=stripes).memory(mode).device
            if taken <= capacity:
                log.info("offload=%s: it takes %s of the %s that are there", mode, _gib(taken), _gib(capacity))
                return mode
    log.info("offload=%s: the default request takes more than the %s that are there", MODES[-1], _gib(capacity))
    return MODES[-1]


def whole_clip(request: Resolved, vae: WanVAEConfig) -> Segment:
    """A request as one segment that the model makes at once."""
    return Segment(
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


def refuse(needs: Needs, mode: str, taken: int, capacity: int, num_frames: int, hint: str) -> NoReturn:
    """Raise OutOfMemory for a request that takes more than there is. hint: the nearest request that fits."""
    how, segment = ("" if mode == "none" else f" with offload={mode!r}"), needs.segment
    raise OutOfMemory(
        f"{segment.width}x{segment.height} with {num_frames} frames takes about {_gib(taken)}{how}, "
        f"weights included ({needs.memory(mode).largest_phase} takes the most), and {_gib(capacity)} are there; {hint}"
    )


# ---------------------------------------------------------------- bytes of each part


def count_tokens(segment: Segment, config: WanTransformerConfig) -> int:
    """Tokens of the whole segment."""
    shape = segment.latent_shape(1)[1:]
    return math.prod(n // p for n, p in zip(shape, config.patch_size, strict=True))


def share_of(tokens: int, frames: int, sharers: int) -> int:
    """The most tokens that one rank has if so many share each frame's."""
    return frames * -(-tokens // frames // sharers)


def activation_bytes(tokens: int, config: WanTransformerConfig, itemsize: int, control_layers: int = 0) -> int:
    """Peak of one call of the transformer on `tokens`, without a matrix of attention scores.

    Attention holds the residual, the product of queries, keys and values, one of these after norm and rotation, and
    fp32 copies of another. The feed-forward holds residual, norm, and the hidden tensor before and after GELU. Both
    hold the rotary table. A control branch adds a residual and a hint.
    """
    attention = config.dim * (12 + 5 * itemsize)
    feed_forward = 2 * (config.dim + config.ffn_dim) * itemsize
    control = 2 * config.dim * itemsize if control_layers else 0
    return tokens * (max(attention, feed_forward) + control + 4 * config.attention_head_dim)


def context_bytes(rows: int, texts: int, experts: int, config: WanTransformerConfig, itemsize: int) -> int:
    """Keys and values of `rows` of text and pictures for every layer, guidance branch and expert."""
    return 2 * config.num_layers * rows * config.dim * itemsize * texts * experts


def text_bytes(rows: int, config: UMT5Config, itemsize: int) -> int:
    """Peak of the text encoder on a prompt of `rows` tokens: scores and softmax of all heads, or the feed-forward."""
    scores = rows * config.num_heads * (3 * itemsize + 8)
    return rows * (max(scores, 3 * config.d_ff * itemsize) + config.d_model * (8 + 4 * itemsize))


def band_height(vae: WanVAEConfig, height: int, bands: int) -> int:
    """The most rows of pixels of one rank where `bands` ranks share a frame: its own and those of neighbours that it
    sees."""
    rows = height // vae.spatial_scale
    return height if bands == 1 else min(rows, -(-rows // bands) + 1) * vae.spatial_scale


def decoder_bytes(
    vae: WanVAEConfig,
    height: int,
    width: int,
    frames: int,
    stripes: int = 1,
    bands: int = 1,
    itemsize: int = FP32_BYTES,
) -> int:
    """Peak of decoding `frames` pixel frames of a stream at once: the feature cache, which does not grow with their
    number, and activations, of which each of the `stripes` holds a part. bands: ranks that share the rows; each gathers
    all 8-bit frames, and holds them twice meanwhile. itemsize: bytes of a number."""
    tensors = DECODER_TENSORS_22 if vae.is_residual else DECODER_TENSORS
    share = 1 / stripes + (STRIPE_SHARE if stripes > 1 else 0) + (BAND_SHARE if bands > 1 else 0)
    rows = band_height(vae, height, bands)
    activations = frames * rows * width * vae.widest * itemsize * tensors * share
    gathered = 2 * 3 * frames * height * width if bands > 1 else 0
    return cache_bytes(vae, rows, width, itemsize) + math.ceil(activations) + gathered


def encoder_bytes(
    vae: WanVAEConfig,
    height: int,
    width: int,
    frames: int,
    given: int,
    masks: int = 0,
    bands: int = 1,
    itemsize: int = FP32_BYTES,
) -> int:
    """Peak of encoding `given` pixel frames, `frames` of them at once. All are held twice in fp32, as they come and in
    the VAE's range, with so many `masks` of one channel. bands: ranks that share the rows. itemsize: bytes of a
    number."""
    widest, tensors = float(vae.base_dim), ENCODER_TENSORS
    if vae.is_residual:
        widest, tensors = vae.base_dim / vae.patch_size**2, ENCODER_TENSORS_22
    tensors *= 1 + (BAND_SHARE if bands > 1 else 0)
    activations = frames * band_height(vae, height, bands) * width * widest * itemsize * tensors
    return math.ceil(activations) + given * height * width * (2 * 3 + masks) * 4


def cache_bytes(config: WanVAEConfig, height: int, width: int, itemsize: int = FP32_BYTES) -> int:
    """Bytes of the decoder's feature cache for frames of height x width: the last two input frames of every layer that
    looks back in time."""
    pixels = height * width // config.spatial_scale**2
    mults, upsampled = config.dim_mult[::-1], config.temperal_downsample[::-1]
    dims = [config.decoder_dim * m for m in (mults[0], *mults)]
    halved = not config.is_residual  # its upsamplers halve the channels
    values = pixels * (config.z_dim + 4 * dims[0])
    for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        c_in = c_in // 2 if halved and i else c_in
        looks_back = i < len(upsampled) and upsampled[i]
        values += pixels * 4**i * (c_in + c_out * (2 * config.num_res_blocks + 1 + looks_back))
    values += pixels * 4 ** (len(mults) - 1) * dims[-1]
    return 2 * values * itemsize


# ---------------------------------------------------------------- ways of offloading


def memory_of(sizes: Sizes, cost: Cost, mode: str) -> Memory:
    """What a request takes with one of `offload.MODES`."""
    stays, text, image, host = _weight_bytes(sizes, mode)
    stays += cost.graphs
    during = stays + cost.latents
    phases = {"text": stays + text + cost.text}
    if cost.encoder:
        phases["pictures"] = during + max(image, cost.encoder)
    phases["denoising"] = during + cost.context + cost.activations
    phases["decoding"] = during + cost.context + cost.decoder
    return Memory(mode, phases, host, _choices(sizes, mode))


def _weight_bytes(sizes: Sizes, mode: str) -> tuple[int, int, int, int]:
    """Bytes of weights that stay on the device, that the text encoder and the image encoder bring, and in host
    memory."""
    if mode == "none":
        return sizes.total, 0, 0, 0
    away = sizes.text.total + sizes.image
    experts = sum(expert.total for expert in sizes.experts)
    if mode == "blocks":
        stays = max(expert.streamed for expert in sizes.experts) + sizes.vae
        return stays, sizes.text.streamed, sizes.image, away + experts
    stays = max(expert.total for expert in sizes.experts) + sizes.vae
    return stays, sizes.text.total, sizes.image, away + (experts if len(sizes.experts) > 1 else 0)


def _choices(sizes: Sizes, mode: str) -> tuple[str, ...]:
    if mode == "none":
        return ("every part stays on the device",)
    choices = []
    if mode == "text":
        choices.append(f"the text encoder ({_gib(sizes.text.total)}) is on the device only while it reads a prompt")
    if sizes.image:
        choices.append(f"the image encoder ({_gib(sizes.image)}) is on the device only while it looks at pictures")
    if len(sizes.experts) > 1:
        choices.append(f"of {len(sizes.experts)} experts only the one in use takes memory of the device")
    if mode == "blocks":
        for name, part in (("transformer", sizes.experts[0]), ("text encoder", sizes.text)):
            count = len(part.blocks)
            choices.append(
                f"{name} blocks are streamed from host memory: {min(SLOTS, count)} of {count} on the device at a time"
            )
    return tuple(choices)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
