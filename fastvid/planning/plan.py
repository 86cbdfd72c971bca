"""What a request will cost, before anything is computed: sizes, model calls, arithmetic, memory, and the choices made.

A request that does not fit is refused here, with the number that does not fit and the nearest request that does.
Formulas for arithmetic: N tokens, width d, ffn f, L text rows; linear 2N(6d^2 + 2df), self-attention 4 N^2 d,
cross-attention 4 N L d, a layer and call each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fastvid.device.offload import MODES
from fastvid.engine.decode import decode_chunk
from fastvid.models.common.clip import CLIPVisionConfig
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.loaded import Sizes
from fastvid.models.registry import weigh_part
from fastvid.models.wan.config import VAEConfig, WanTransformerConfig, WanVACEConfig
from fastvid.planning import memory
from fastvid.planning.memory import Cost, Memory
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment

CLIP_TOKENS = 257
STRIPES = (1, 2, 4, 8)  # in which frames may be decoded: the fewest that fit


def whole_clip(request: Resolved, vae: VAEConfig) -> Segment:
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


def count_tokens(segment: Segment, config: WanTransformerConfig) -> int:
    """Tokens of the whole clip."""
    shape = segment.latent_shape(1)[1:]
    return math.prod(n // p for n, p in zip(shape, config.patch_size, strict=True))


def share_of(tokens: int, frames: int, sharers: int) -> int:
    """The most tokens that one rank has where so many share each frame's."""
    return frames * -(-tokens // frames // sharers)


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


def attention_flops(
    tokens: int, text_rows: int, config: WanTransformerConfig, control_layers: int = 0, keys: int | None = None
) -> float:
    """Of these, those of attention."""
    return (config.num_layers + control_layers) * 4.0 * tokens * ((keys or tokens) + text_rows) * config.dim


def cost(
    segment: Segment,
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
    encoded: int = 0,
    control_layers: int = 0,
    frames: int = 0,
    cache: int = 0,
    stripes: int = 1,
    graphs: bool = False,
    sharers: int = 1,
    bands: int = 1,
    vae_itemsize: int = 4,
) -> Cost:
    """Peak bytes of a request, weights left out; see `plan_memory.Cost`. segment: what the model makes at once.

    rows: of text that the transformer sees; texts: 2 with guidance; pictures: how many CLIP looks at; encoded: frames
    that are encoded at once beside them; frames: those that are kept; cache: tokens in a KV cache; stripes: of rows in
    which frames are decoded; graphs: calls are replayed (see `fastvid.device.cuda_graphs`); sharers: ranks that share
    the tokens; bands: ranks that share the rows of frames that are encoded and decoded; itemsize, vae_itemsize: bytes
    of a number in the transformer and in the VAE.
    """
    frame, chunk = (segment.made_height, segment.made_width), segment.temporal * decode_chunk(segment)
    concatenated = config.in_channels > config.out_channels
    given = segment.made_frames if control_layers or (concatenated and pictures) else max(encoded, min(pictures, 1))
    seen = pictures * CLIP_TOKENS if config.image_dim else 0
    seen_by_control = 2 * vae.z_dim + segment.spatial**2 if control_layers else 0
    masks = 2 if control_layers else 0  # as given and rounded
    tokens = share_of(count_tokens(segment, config), segment.columns // config.patch_size[0], sharers)
    activations = memory.activation_bytes(tokens, config, itemsize, control_layers)
    inputs = memory.context_bytes(rows + seen, 1, 1, config, itemsize)
    inputs += math.prod(segment.latent_shape(2 * vae.z_dim + config.in_channels + seen_by_control)) * 4
    shared = {"bands": bands, "itemsize": vae_itemsize}
    return Cost(
        activations=activations,
        decoder=memory.decoder_bytes(vae, *frame, chunk, stripes, **shared),
        latents=math.prod(segment.latent_shape(vae.z_dim * solver_copies + seen_by_control)) * 4,
        frames=frames * segment.height * segment.width * 3,
        encoder=memory.encoder_bytes(vae, *frame, min(chunk, given), given, masks, **shared) if given else 0,
        context=memory.context_bytes(rows + seen, texts, experts, config, itemsize)
        + memory.context_bytes(-(-cache // sharers), texts, 1, config, itemsize),
        text=memory.text_bytes(rows, text, itemsize) if text else 0,
        graphs=activations + inputs * experts if graphs else 0,
    )


def fit(
    request: Resolved,
    transformer: WanTransformerConfig | WanVACEConfig,
    vae: VAEConfig,
    text_encoder: UMT5Config,
    image_encoder: CLIPVisionConfig | None = None,
    *,
    capacity: int,
    experts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    pictures: int = 0,
    vae_dtype: torch.dtype = torch.float32,
) -> tuple[Memory, dict[str, Memory]]:
    """Whether and how a model that need not be loaded, nor be here, makes a request in `capacity` bytes of a device.

    dtype: of transformer and text encoder; vae_dtype: of the VAE; the image encoder is in fp32. Returns the choice,
    and every way of offloading by its name. Raises OutOfMemory if none of them fits.
    """
    one, text = weigh_part("transformer", transformer, dtype), weigh_part("text_encoder", text_encoder, dtype)
    control = len(transformer.vace_layers) if isinstance(transformer, WanVACEConfig) else 0
    transformer = transformer.transformer if isinstance(transformer, WanVACEConfig) else transformer
    image = weigh_part("image_encoder", image_encoder, dtype).total if image_encoder else 0
    sizes = Sizes((one,) * experts, text, weigh_part("vae", vae, dtype, vae_dtype).total, image)
    segment = whole_clip(request, vae)
    options = {"text": text_encoder, "texts": 1 + request.guided(experts), "experts": experts, "pictures": pictures}
    options |= {"control_layers": control, "vae_itemsize": vae_dtype.itemsize}

    def chosen(t: Segment) -> Memory:
        made = memory.choose(sizes, cost(t, transformer, vae, dtype.itemsize, **options), capacity)
        if made.device > capacity:  # nothing more to put away: frames in stripes
            striped = cost(t, transformer, vae, dtype.itemsize, stripes=STRIPES[-1], **options)
            made = memory.choose(sizes, striped, capacity)
        return made

    found = chosen(segment)
    if found.device > capacity:
        hint = nearest(
            segment.num_frames,
            segment.temporal,
            lambda n: chosen(replace(segment, num_frames=n, made_frames=n)).device <= capacity,
        )
        memory.refuse(found, found.device, capacity, segment, hint)
    need = cost(segment, transformer, vae, dtype.itemsize, **options)
    return found, {mode: memory.memory(sizes, need, mode) for mode in MODES}


def nearest(frames: int, temporal: int, fits: Callable[[int], bool]) -> str:
    """The end of a sentence that says how many frames, up to these, would fit."""
    most = most_frames(frames, temporal, fits)
    return f"the nearest that fits is num_frames={most}" if most else "ask for a smaller size"


def most_frames(frames: int, temporal: int, fits: Callable[[int], bool]) -> int:
    """The largest number 4k + 1 of frames up to this one for which `fits(number)`, 0 if none."""
    low, high = 0, (frames - 1) // temporal + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits((middle - 1) * temporal + 1) else (low, middle - 1)
    return (low - 1) * temporal + 1 if low else 0
