"""Estimates the device memory of a request in each offload mode (`fastvid.device.offload`), from configurations only.

A request runs in phases. Each phase needs the resident weights, the weights copied in for it, and its activations. The
largest phase is the peak.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from fastvid.device.offload import MODES, SLOTS
from fastvid.engine.decode import decode_chunk
from fastvid.errors import OutOfMemory
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.loaded import Model, Sizes
from fastvid.models.registry import EXPERTS, weigh_part
from fastvid.models.wan.animate_config import WanAnimateConfig
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.ops.quantized import Spec
from fastvid.planning import face_memory
from fastvid.planning.quantized import Workspace, with_packed, workspaces
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment

log = logging.getLogger("fastvid.plan")

STRIPES = (1, 2, 4, 8)  # possible numbers of stripes for decoding; the smallest that fits is used
CLIP_TOKENS = 257
SOLVER_COPIES = 6  # tensors of the latents' size during denoising
# Peak memory of the VAE in tensors of the widest activation's size: the decoder without its cache, the encoder with its
# caches of the previous and the current step. Measured on its operations (tests/planning/test_plan_memory.py).
DECODER_TENSORS, ENCODER_TENSORS = 6.9, 11.5
DECODER_TENSORS_22, ENCODER_TENSORS_22 = 5.4, 13.5
# Extra share of the decoder's activations that a stripe of rows keeps and copies for the next one; measured as above.
STRIPE_SHARE = 0.25
# Extra share of a band's activations for copies that include the neighboring ranks' rows; measured in
# tests/distributed/test_bands.py.
BAND_SHARE = 0.1
FP32_BYTES = 4
Quantized = Mapping[str, Mapping[str, Spec]]


@dataclass(frozen=True)
class Cost:
    """Peak bytes of each part of a request, without weights.

    activations: of one call of the transformer. decoder, encoder: of the VAE; encoder includes its input frames, and is
    0 without any. latents: with the solver's history. frames: the result, in host memory. context: keys and values of
    the text for every layer, guidance branch and expert, and what a step cache keeps. text: of the text encoder.
    graphs: held by CUDA graphs in all phases: a call's activations and copies of its inputs. face: of the encoders of a
    face.
    """

    activations: int
    decoder: int
    latents: int
    frames: int
    encoder: int = 0
    context: int = 0
    text: int = 0
    graphs: int = 0
    face: int = 0


@dataclass(frozen=True)
class Memory:
    """The memory of a request in one offload mode. phases: phase -> bytes on the device; host: bytes of weights in host
    memory; choices: sentences that describe the mode."""

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
    """The properties of a model that determine its memory.

    sizes: bytes of its weights. itemsize, vae_itemsize: bytes per element in the transformer and in the VAE. text_rows:
    text tokens. control_layers: layers of the control branch. graphs: calls are replayed as CUDA graphs. animate: of
    a model that a face drives. workspaces: see `planning.quantized`.
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
    animate: WanAnimateConfig | None = None
    workspaces: tuple[Workspace, Workspace] = (Workspace(), Workspace())

    @classmethod
    def of(cls, model: Model) -> ModelFacts:
        """The facts of a model, with or without weights."""
        return cls(
            model.transformer.config,
            model.vae.config,
            model.text_encoder.config,
            with_packed(model),
            model.dtype.itemsize,
            model.vae_dtype.itemsize,
            model.tokenizer.text_length,
            model.control_layers,
            model.placement.graphs,
            getattr(model.transformer, "animate_config", None),
            workspaces(model.checkpoint.quantized, model.dtype.itemsize),
        )

    @classmethod
    def of_configs(
        cls,
        configs: Mapping[str, Any],
        dtype: torch.dtype,
        vae_dtype: torch.dtype = torch.float32,
        quantized: Quantized = MappingProxyType({}),
    ) -> ModelFacts:
        """The facts of a model that is not loaded. configs: part name -> configuration; quantized: part name -> the
        weights that stay quantized."""
        kinds = dtype, vae_dtype
        weights = {name: weigh_part(name, one, *kinds, quantized.get(name, {})) for name, one in configs.items()}
        image = weights["image_encoder"].total if "image_encoder" in weights else 0
        experts = tuple(weights[name] for name in EXPERTS if name in weights)
        sizes = Sizes(experts, weights["text_encoder"], weights["vae"].total, image)
        transformer = configs["transformer"]
        control = len(transformer.vace_layers) if isinstance(transformer, WanVACEConfig) else 0
        animate = transformer if isinstance(transformer, WanAnimateConfig) else None
        own = getattr(transformer, "transformer", transformer), configs["vae"], configs["text_encoder"]
        beside: dict[str, Any] = {"control_layers": control, "animate": animate}
        beside["workspaces"] = workspaces(quantized, dtype.itemsize)
        return cls(*own, sizes, dtype.itemsize, vae_dtype.itemsize, **beside)


@dataclass(frozen=True)
class Needs:
    """The quantities of a request that determine its memory.

    segment: the frames that the model denoises at once. texts: prompts, 2 with guidance. pictures: images encoded by
    CLIP. encoded: frames that the VAE encodes at once. frames: frames kept in host memory. cached: tokens in the KV
    cache. stripes: of rows, for decoding. sharers: ranks that share the tokens; bands: ranks that share the VAE's rows.
    chunk: latent frames decoded at once, 0 for the least. batch: prompts in one call of the transformer. reused:
    tensors of the tokens' size that a step cache keeps.
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
    chunk: int = 0
    batch: int = 1
    reused: int = 0

    def memory(self, mode: str) -> Memory:
        """Memory by phase in one of `offload.MODES`."""
        return memory_of(self.model.sizes, self.cost(), mode)

    def cost(self) -> Cost:
        """Peak bytes without the weights."""
        model, segment, config, vae = self.model, self.segment, self.model.transformer, self.model.vae
        tokens = share_of(count_tokens(segment.seen, config), segment.columns // config.patch_size[0], self.sharers)
        activations = self.batch * activation_bytes(tokens, config, model.itemsize, model.control_layers)
        activations += model.workspaces[0].bytes(self.batch * tokens)
        control = 2 * vae.z_dim + segment.spatial**2 if model.control_layers else 0  # channels of the branch's input
        control += face_memory.channels(model.animate)
        return Cost(
            activations=activations,
            decoder=self._decoder_bytes(),
            latents=math.prod(segment.latent_shape(vae.z_dim * SOLVER_COPIES + control)) * 4,
            frames=self.frames * segment.height * segment.width * 3,
            encoder=self._encoder_bytes(),
            context=self._context_bytes(self.texts, len(model.sizes.experts))
            + context_bytes(-(-self.cached // self.sharers), self.texts, 1, config, model.itemsize)
            + face_memory.token_bytes(model.animate, segment.columns, self.texts, model.itemsize)
            + self.reused * tokens * config.dim * model.itemsize,
            text=text_bytes(model.text_rows, model.text, model.itemsize) + model.workspaces[1].bytes(model.text_rows),
            graphs=activations + self._graph_inputs(control) * len(model.sizes.experts) if model.graphs else 0,
            face=face_memory.encoder_bytes(model.animate, segment.model_frames, model.itemsize),
        )

    def _decoder_bytes(self) -> int:
        model, segment = self.model, self.segment
        height, width = segment.model_height, segment.model_width
        frames = segment.temporal * min(self.chunk or decode_chunk(segment), segment.columns - segment.lead)
        return decoder_bytes(model.vae, height, width, frames, self.stripes, self.bands, model.vae_itemsize)

    def _encoder_bytes(self) -> int:
        model, segment = self.model, self.segment
        concatenated = model.transformer.in_channels > model.transformer.out_channels
        if model.control_layers or (concatenated and self.pictures):
            input_frames = segment.model_frames
        else:
            input_frames = max(self.encoded, min(self.pictures, 1))
        if not input_frames:
            return 0
        masks = 2 if model.control_layers else 0  # the original and the rounded one
        height, width = segment.model_height, segment.model_width
        chunk = min(segment.temporal * decode_chunk(segment), input_frames)
        return encoder_bytes(model.vae, height, width, chunk, input_frames, masks, self.bands, model.vae_itemsize)

    def _context_bytes(self, texts: int, experts: int) -> int:
        model = self.model
        image_tokens = self.pictures * CLIP_TOKENS if model.transformer.image_dim else 0
        return context_bytes(model.text_rows + image_tokens, texts, experts, model.transformer, model.itemsize)

    def _graph_inputs(self, control: int) -> int:
        """Bytes of a CUDA graph's input buffers."""
        channels = 2 * self.model.vae.z_dim + self.model.transformer.in_channels + control
        return self._context_bytes(1, 1) + math.prod(self.segment.latent_shape(channels)) * 4


def choose_offload(
    configs: Mapping[str, Any],
    request: Resolved,
    capacity: int,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
    quantized: Quantized = MappingProxyType({}),
) -> str:
    """The mode with the least offloading in which a request's whole clip fits into `capacity` bytes of a device.

    configs, quantized: see `ModelFacts.of_configs`. Decoding in stripes is considered only if no mode fits without. If
    nothing fits, returns the mode with the most offloading: smaller requests may fit, and planning refuses those that
    do not.
    """
    needs = whole_needs(ModelFacts.of_configs(configs, dtype, vae_dtype, quantized), request)
    for stripes in (1, STRIPES[-1]):
        for mode in MODES:
            taken = replace(needs, stripes=stripes).memory(mode).device
            if taken <= capacity:
                log.info("offload=%s: the default request needs %s of %s", mode, _gib(taken), _gib(capacity))
                return mode
    log.info("offload=%s: the default request needs more than %s", MODES[-1], _gib(capacity))
    return MODES[-1]


def whole_needs(model: ModelFacts, request: Resolved) -> Needs:
    """What a request needs as a single segment, with the pictures that the model is made for."""
    config = model.transformer
    pictures = 1 + bool(config.pos_embed_seq_len) if config.in_channels > config.out_channels else 0
    return Needs(model, whole_clip(request, model.vae), 1 + request.guided(len(model.sizes.experts)), pictures)


def whole_clip(request: Resolved, vae: WanVAEConfig) -> Segment:
    """A request as a single segment that the model denoises at once."""
    return Segment(
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        model_frames=request.model_frames,
        model_height=request.model_height,
        model_width=request.model_width,
        spatial=vae.spatial_scale,
        temporal=vae.temporal_scale,
        lead=len(request.reference_images or ()) + request.is_animated,
    )


def refuse(needs: Needs, mode: str, taken: int, capacity: int, num_frames: int, hint: str) -> NoReturn:
    """Raise OutOfMemory for a request that needs more memory than available. hint: the nearest request that fits."""
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
    """The most tokens of any rank if `sharers` ranks share those of each frame."""
    return frames * -(-tokens // frames // sharers)


def activation_bytes(tokens: int, config: WanTransformerConfig, itemsize: int, control_layers: int = 0) -> int:
    """Peak bytes of one transformer call on `tokens`; attention scores are never materialized.

    Attention holds the residual, the fused q/k/v projection, one of q/k/v after norm and rotation, and fp32 copies of
    another one. The feed-forward holds the residual, the norm, and the hidden tensor before and after GELU. Both hold
    the rotary table. A control branch adds a residual and a hint.
    """
    attention = config.dim * (12 + 5 * itemsize)
    feed_forward = 2 * (config.dim + config.ffn_dim) * itemsize
    control = 2 * config.dim * itemsize if control_layers else 0
    return tokens * (max(attention, feed_forward) + control + 4 * config.attention_head_dim)


def context_bytes(rows: int, texts: int, experts: int, config: WanTransformerConfig, itemsize: int) -> int:
    """Bytes of keys and values of `rows` text and image tokens for every layer, guidance branch and expert."""
    return 2 * config.num_layers * rows * config.dim * itemsize * texts * experts


def text_bytes(rows: int, config: UMT5Config, itemsize: int) -> int:
    """Peak bytes of the text encoder on a prompt of `rows` tokens: scores and softmax of all heads, or feed-forward."""
    scores = rows * config.num_heads * (3 * itemsize + 8)
    return rows * (max(scores, 3 * config.d_ff * itemsize) + config.d_model * (8 + 4 * itemsize))


def band_height(vae: WanVAEConfig, height: int, bands: int) -> int:
    """The most pixel rows of any rank if `bands` ranks share a frame, including the rows of neighbors that it reads."""
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
    """Peak bytes of decoding `frames` pixel frames of a stream at once: the feature cache, whose size does not depend
    on `frames`, and the activations of one stripe. bands: ranks that share the rows; each gathers all 8-bit frames, and
    temporarily holds them twice. itemsize: bytes per element."""
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
    """Peak bytes of encoding `given` pixel frames, `frames` at once. The input is held twice in fp32 (before and after
    scaling to the VAE's range), with `masks` one-channel masks. bands: ranks that share the rows. itemsize: bytes per
    element."""
    widest, tensors = float(vae.base_dim), ENCODER_TENSORS
    if vae.is_residual:
        widest, tensors = vae.base_dim / vae.patch_size**2, ENCODER_TENSORS_22
    tensors *= 1 + (BAND_SHARE if bands > 1 else 0)
    activations = frames * band_height(vae, height, bands) * width * widest * itemsize * tensors
    return math.ceil(activations) + given * height * width * (2 * 3 + masks) * 4


def cache_bytes(config: WanVAEConfig, height: int, width: int, itemsize: int = FP32_BYTES) -> int:
    """Bytes of the decoder's feature cache for frames of height x width: the last two input frames of every temporal
    convolution."""
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


# ---------------------------------------------------------------- offload modes


def memory_of(sizes: Sizes, cost: Cost, mode: str) -> Memory:
    """The memory of a request in one of `offload.MODES`."""
    resident, text, image, host = _weight_bytes(sizes, mode)
    resident += cost.graphs
    common = resident + cost.latents
    phases = {"text": resident + text + cost.text}
    if cost.encoder:
        phases["pictures"] = common + max(image, cost.encoder)
    if cost.face:
        phases["the face"] = common + cost.context + cost.face
    phases["denoising"] = common + cost.context + cost.activations
    phases["decoding"] = common + cost.context + cost.decoder
    return Memory(mode, phases, host, _choices(sizes, mode))


def _weight_bytes(sizes: Sizes, mode: str) -> tuple[int, int, int, int]:
    """Bytes of weights: resident on the device, of the text encoder while it is there, of the image encoder while it is
    there, and in host memory."""
    if mode == "none":
        return sizes.total, 0, 0, 0
    offloaded = sizes.text.total + sizes.image
    experts = sum(expert.total for expert in sizes.experts)
    if mode == "blocks":
        resident = max(expert.streamed for expert in sizes.experts) + sizes.vae
        return resident, sizes.text.streamed, sizes.image, offloaded + experts
    resident = max(expert.total for expert in sizes.experts) + sizes.vae
    return resident, sizes.text.total, sizes.image, offloaded + (experts if len(sizes.experts) > 1 else 0)


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
