"""What a model is asked for when the caller does not say: one named recipe for each variant that was published or that
ships with the package, and a general one for other sizes of the same class.

Sources: Wan2.1 `generate.py` and `wan/configs/`, Wan2.2 `wan/configs/`, and for the distilled models the configurations
of FastVideo, Self-Forcing, CausVid and LongLive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.models import preset as patterns
from fastvid.models.common.clip import CLIP_HUGE
from fastvid.models.common.umt5 import UMT5_XXL
from fastvid.models.preset import Preset, Rollout, Signature, Variant
from fastvid.models.wan.config import HEAD_DIM, WAN22_VAE, WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.sampling.schedulers import SOURCE, Scheduler, read_scheduler

# Wan2.1 `wan/configs/shared_config.py`, sample_neg_prompt; the models that take pictures put more in front.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
I2V_NEGATIVE_PROMPT = "镜头晃动，" + WAN_NEGATIVE_PROMPT
FLF2V_NEGATIVE_PROMPT = "镜头切换，" + I2V_NEGATIVE_PROMPT

SIZES_480P, SIZES_720P, SIZES_5B = ("832x480", "480x832"), ("1280x720", "720x1280"), ("1280x704", "704x1280")
SIZES_14B = (*SIZES_720P, *SIZES_480P)


def _sized(preset: Preset, sizes: tuple[str, ...], **changes: Any) -> Preset:
    """The preset at other sizes, the first of which it takes unless told otherwise."""
    width, height = map(int, sizes[0].split("x"))
    return replace(preset, width=width, height=height, sizes=sizes, **changes)


# ---------------------------------------------------------------- the published models

SMALL, LARGE, MIDDLE = Signature(1536, 30), Signature(5120, 40), Signature(3072, 30, in_channels=48, out_channels=48)
PICTURE = LARGE._replace(in_channels=36, image=True)

EMBEDDED = _sized(
    Preset("embedded"),
    ("64x64", "160x96", "96x160"),
    num_inference_steps=20,
    flow_shift=3.0,
    guidance_scale=3.0,
    known_guidance_scale=1.5,
    edit_strength=0.4,  # most edits show what they shall from 0.2 on, and things leave their path from 0.6 on
    num_frames=17,
    per_token_timesteps=True,
    window=9,
    overlap=3,
    context=3,
    carries=True,
    anchor=16,
    patterns=patterns.EVERYTHING,
)
# Shifts are the original code's. Most published diffusers folders say 3 instead, which is what they run with.
WAN_1_3B = Preset("wan2.1-t2v-1.3b", sizes=SIZES_480P, negative_prompt=WAN_NEGATIVE_PROMPT)
WAN_14B = _sized(WAN_1_3B, SIZES_14B, name="wan2.1-t2v-14b")
WAN_I2V_480P = replace(
    WAN_1_3B,
    name="wan2.1-i2v-14b-480p",
    num_inference_steps=40,
    flow_shift=3.0,
    negative_prompt=I2V_NEGATIVE_PROMPT,
    context=1,
    patterns=patterns.PICTURE,
)
WAN_I2V_720P = _sized(WAN_I2V_480P, SIZES_720P, name="wan2.1-i2v-14b-720p", flow_shift=5.0)
WAN_FLF2V = replace(
    WAN_I2V_720P,
    name="wan2.1-flf2v-14b",
    num_inference_steps=50,
    flow_shift=16.0,
    negative_prompt=FLF2V_NEGATIVE_PROMPT,
    patterns=patterns.TWO_PICTURES,
)
WAN_VACE_1_3B = replace(WAN_1_3B, name="wan2.1-vace-1.3b", flow_shift=16.0, context=4, patterns=patterns.CONTROL)
WAN_VACE_14B = _sized(WAN_VACE_1_3B, SIZES_14B, name="wan2.1-vace-14b")
WAN_T2V_A14B = replace(
    WAN_14B,
    name="wan2.2-t2v-a14b",
    num_inference_steps=40,
    flow_shift=12.0,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    boundary_ratio=0.875,
    patterns=patterns.one_level(patterns.TEXT_ONLY),
)
WAN_I2V_A14B = replace(
    WAN_T2V_A14B,
    name="wan2.2-i2v-a14b",
    flow_shift=5.0,
    guidance_scale=3.5,
    guidance_scale_2=3.5,
    boundary_ratio=0.9,
    context=1,
    patterns=patterns.one_level(patterns.PICTURE),
)
WAN_TI2V_5B = _sized(
    WAN_1_3B,
    SIZES_5B,
    name="wan2.2-ti2v-5b",
    fps=24.0,
    num_frames=121,
    per_token_timesteps=True,
    spatial_multiple=32,
    window=31,
    context=1,
    patterns=patterns.FIRST_FRAME,
)

# ---------------------------------------------------------------- distilled from them

# The model is told 1000, 757, 522; x0 and new noise are reckoned with the nearest levels of a table of 1000 steps that
# is shifted by 8, which are its steps 1000, 280 and 120: FastVideo `fastvideo/pipelines/stages/denoising.py`,
# DmdDenoisingStage (by 8 for the 5B too), and CausVid `causvid/models/wan/wan_wrapper.py` with `flow_match.py`.
DMD: dict[str, Any] = {
    **{"num_inference_steps": 3, "sigmas": (1.0, 28 / 37, 12 / 23), "whole_timesteps": True},
    **{"guidance_scale": 1.0, "solver": "redraw"},
}
# 1000, 750, 500, 250 on the table that is shifted by 5, which the model is told as they are: Self-Forcing
# `configs/self_forcing_dmd.yaml` (warp_denoising_step), `pipeline/causal_inference.py`.
SELF_FORCING_SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)

FASTWAN_1_3B = _sized(
    WAN_1_3B,
    ("832x448",),
    name="fastwan2.1-t2v-1.3b",
    flow_shift=8.0,
    num_frames=61,
    patterns=patterns.FEW_STEPS,
    **DMD,
)
FASTWAN_14B = replace(FASTWAN_1_3B, name="fastwan2.1-t2v-14b")
FASTWAN_5B = replace(
    WAN_TI2V_5B,
    name="fastwan2.2-ti2v-5b",
    patterns=replace(patterns.FIRST_FRAME, first=patterns.EXPERIMENTAL, staggered=patterns.REFUSED),
    **DMD,
)
# The KV cache of `pipeline/causal_inference.py` holds 32760 tokens, which are 21 latent frames, all that it makes at
# once; longer videos go on with the latest 21. Its first picture needs independent_first_frame, which its released
# configuration has not.
SELF_FORCING = _sized(
    FASTWAN_1_3B,
    SIZES_480P[:1],
    name="self-forcing-1.3b",
    num_inference_steps=4,
    flow_shift=5.0,
    sigmas=SELF_FORCING_SIGMAS,
    whole_timesteps=False,
    num_frames=81,
    rollout=Rollout(window=21),
    context=3,
    carries=True,
    patterns=patterns.CAUSAL,
)
# thu-ml/Causal-Forcing `configs/causal_forcing_dmd_chunkwise.yaml` and `_framewise.yaml`.
CAUSAL_FORCING = replace(SELF_FORCING, name="causal-forcing-1.3b")
CAUSAL_FORCING_FRAMEWISE = replace(
    CAUSAL_FORCING,
    name="causal-forcing-framewise-1.3b",
    rollout=Rollout(frames_per_block=1, window=21),
    patterns=replace(patterns.CAUSAL, first=patterns.NATIVE),
)
# `configs/wan_causal_dmd.yaml` (no warp), `causvid/models/wan/causal_inference.py` (32760 tokens).
CAUSVID = replace(SELF_FORCING, name="causvid-1.3b", flow_shift=8.0, **DMD)
# Branch v1.0: `configs/longlive_inference.yaml` (120 latent frames), `pipeline/interactive_causal_inference.py`.
LONGLIVE = replace(SELF_FORCING, name="longlive-1.3b", num_frames=477, rollout=Rollout(window=12, sink=3, recache=True))
# Branch main: `configs/inference.yaml` (128 latent frames), `pipeline/causal_diffusion_inference.py`,
# `utils/i2v_conditioning.py`. A new prompt leaves its cache as it is. What it does beside that at a cut between shots,
# a second sink and a leap of the positions by 8, is not done here.
LONGLIVE_2 = replace(
    FASTWAN_5B,
    name="longlive2-5b",
    num_inference_steps=4,
    sigmas=None,
    whole_timesteps=False,
    solver="unipc",
    num_frames=509,
    rollout=Rollout(frames_per_block=8, window=32, sink=8, picture_in_block=True),
    context=8,
    carries=True,
    patterns=replace(patterns.CAUSAL, first=patterns.NATIVE),
)

VARIANTS: tuple[Variant, ...] = (
    Variant(EMBEDDED, Signature(256, 6, text_dim=128)),
    Variant(WAN_1_3B, SMALL),
    Variant(WAN_14B, LARGE),
    Variant(WAN_I2V_480P, PICTURE, ("I2V-14B-480P", "I2V-480P-14B")),
    Variant(WAN_I2V_720P, PICTURE, ("I2V-14B-720P", "I2V-720P-14B")),
    Variant(WAN_FLF2V, PICTURE._replace(positions=True)),
    Variant(WAN_VACE_1_3B, SMALL._replace(control=True)),
    Variant(WAN_VACE_14B, LARGE._replace(control=True)),
    Variant(WAN_T2V_A14B, LARGE._replace(experts=2)),
    Variant(WAN_I2V_A14B, LARGE._replace(in_channels=36, experts=2)),
    Variant(WAN_TI2V_5B, MIDDLE),
    Variant(FASTWAN_1_3B, SMALL, ("FastWan", "WanDMDPipeline")),
    Variant(FASTWAN_14B, LARGE, ("FastWan", "WanDMDPipeline")),
    Variant(FASTWAN_5B, MIDDLE, ("FastWan", "WanDMDPipeline")),
    Variant(SELF_FORCING, SMALL, ("Self-Forcing", "SFWan", "WanCausalDMDPipeline")),
    Variant(CAUSAL_FORCING_FRAMEWISE, SMALL, ("Causal-Forcing-framewise",)),
    Variant(CAUSAL_FORCING, SMALL, ("Causal-Forcing",)),
    Variant(CAUSVID, SMALL, ("CausVid",)),
    Variant(LONGLIVE, SMALL, ("LongLive",)),
    Variant(LONGLIVE_2, MIDDLE, ("LongLive",)),
)

# ---------------------------------------------------------------- which one a folder holds


def read_signature(transformer: Mapping[str, Any], experts: int = 1) -> Signature:
    """The signature of a transformer/config.json. Raises CheckpointError where its sizes are no whole numbers."""
    keys = ("num_attention_heads", "attention_head_dim", "num_layers", "text_dim", "in_channels")
    heads, head_dim, layers, text, channels = (_whole(transformer, k, getattr(WanTransformerConfig, k)) for k in keys)
    out = channels if transformer.get("out_channels", 0) is None else _whole(transformer, "out_channels", 16)
    image, positions, control = (bool(transformer.get(k)) for k in ("image_dim", "pos_embed_seq_len", "vace_layers"))
    control = control or transformer.get("_class_name") == "WanVACETransformer3DModel"
    return Signature(heads * head_dim, layers, text, channels, out, image, image and positions, control, experts)


def find_variants(signature: Signature, name: str = "") -> list[Variant]:
    """The variants of this signature, the one that is meant first. name: what folder and pipeline are called."""
    found = [variant for variant in VARIANTS if variant.signature == signature]
    told = [variant for variant in found if is_called(variant, name)]
    return sorted(found, key=lambda variant: variant not in told[:1])


def is_called(variant: Variant, name: str) -> bool:
    """Whether the name of a folder or pipeline has a hint of a variant."""
    return any(_plain(hint) in _plain(name) for hint in variant.hints)


def find_preset(
    transformer: Mapping[str, Any],
    vae: WanVAEConfig,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
    name: str = "",
    experts: int = 1,
    own: bool = True,
) -> Preset:
    """The preset of a model, by its sizes; the general one for sizes unknown here.

    transformer, scheduler, index: what transformer/config.json, scheduler_config.json and model_index.json say.
    name: what the folder and the pipeline are called. experts: how many transformers there are. own: the scheduler's
    file is the model's own; else it only gives models of unknown sizes their shift.
    What the files say of the scheduler, the boundary and timesteps beats the preset.
    """
    index, signature = index or {}, read_signature(transformer, experts)
    variants = find_variants(signature, name)
    preset = variants[0].preset if variants else _custom(signature)
    if own or not variants:
        preset = _scheduled(preset, read_scheduler(scheduler, _scheduler_class(index)))
    expand = index.get("expand_timesteps")
    if isinstance(expand, bool):
        known = patterns.FIRST_FRAME if expand and not variants and experts == 1 else preset.patterns
        preset = replace(preset, per_token_timesteps=expand, patterns=known)
    preset = replace(preset, boundary_ratio=_boundary(index.get("boundary_ratio"), preset, experts))
    return _fit(preset, vae, _patch_size(transformer))


def _scheduled(preset: Preset, scheduler: Scheduler) -> Preset:
    """The preset with what the model's own scheduler file says. Noise levels that a model of few steps was trained with
    stay, which is said."""
    if preset.sigmas is not None:
        if scheduler.class_name or scheduler.flow_shift is not None:
            notices.warn(
                f"{preset.name} runs with the {len(preset.sigmas)} noise levels that it was trained with, not with "
                f"{scheduler.class_name or 'the shift'} of {SOURCE}; give solver= and flow_shift= for something else"
            )
        return preset
    shift = preset.flow_shift if scheduler.flow_shift is None else scheduler.flow_shift
    kept = scheduler if scheduler.table or scheduler.problem else None
    return replace(preset, flow_shift=shift, solver=scheduler.solver or preset.solver, scheduler=kept)


def _scheduler_class(index: Mapping[str, Any]) -> str | None:
    named = index.get("scheduler")
    return named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else None


def _custom(signature: Signature) -> Preset:
    preset = Preset("wan-custom")
    if signature.control:
        preset = replace(preset, patterns=patterns.CONTROL)
    elif signature.image or signature.in_channels > signature.out_channels:
        picture = patterns.TWO_PICTURES if signature.positions else patterns.PICTURE
        preset = replace(preset, patterns=picture, context=1)
    if signature.experts > 1:
        one_level = patterns.one_level(preset.patterns)
        preset = replace(preset, guidance_scale_2=preset.guidance_scale, patterns=one_level)
    return preset


def _fit(preset: Preset, vae: WanVAEConfig, patch_size: tuple[int, int, int]) -> Preset:
    """The preset with its sizes rounded up to what this VAE and these patches can make."""
    multiple = vae.spatial_scale * patch_size[1]
    return replace(
        preset,
        height=ceil(preset.height / multiple) * multiple,
        width=ceil(preset.width / multiple) * multiple,
        spatial_multiple=multiple,
        temporal=vae.temporal_scale * patch_size[0],
    )


def _boundary(given: Any, preset: Preset, experts: int) -> float | None:
    """boundary_ratio of model_index.json, the preset's if it says nothing; None for a model with one transformer."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1):
        raise CheckpointError(f"model_index.json: boundary_ratio is {given!r}; a number from 0 to 1 is needed")
    if experts == 1:
        if given is not None:
            raise CheckpointError(f"model_index.json: boundary_ratio is {given!r}, but there is no transformer_2")
        return None
    if given is None and preset.boundary_ratio is None:
        raise CheckpointError(
            "model_index.json names a transformer_2 but no boundary_ratio; a number from 0 to 1 is needed"
        )
    return preset.boundary_ratio if given is None else float(given)


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"transformer/config.json: {key} is {value!r}; a positive whole number is needed")
    return value


def _patch_size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    value = config.get("patch_size", (1, 2, 2))
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise CheckpointError(
            f"transformer/config.json: patch_size is {value!r:.80}; three positive whole numbers are needed"
        )
    return value[0], value[1], value[2]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


# ---------------------------------------------------------------- configurations of the published models

# What shapes and `Signature` do not say: Wan2.1 and Wan2.2 `wan/configs/` and the config.json files on the hub.
FFN_DIM = {1536: 8960, 3072: 14336, 5120: 13824}  # by width
VACE_STEP = {1536: 2, 5120: 5}  # every so many blocks there is a control block
TWO_PICTURES = 514  # CLIP tokens of a first and a last picture
TEXT_LENGTH = 512

PUBLISHED = tuple(variant.preset.name for variant in VARIANTS if variant.preset is not EMBEDDED)
"""The models that are known by name. The embedded one is there as files."""


def published_configs(name: str) -> tuple[Preset, dict[str, Any]]:
    """The preset of a published model, and the configuration of each of its parts, as a checkpoint names them."""
    variant = next(variant for variant in VARIANTS if variant.preset.name == name)
    signature = variant.signature
    transformer, text = transformer_config(signature), UMT5_XXL
    configs: dict[str, Any] = {"transformer": transformer}
    if signature.experts > 1:
        configs["transformer_2"] = transformer
    configs |= {"vae": WAN22_VAE if signature.out_channels == 48 else WanVAEConfig(), "text_encoder": text}
    return variant.preset, configs | ({"image_encoder": CLIP_HUGE} if signature.image else {})


def transformer_config(signature: Signature) -> WanTransformerConfig | WanVACEConfig:
    dim = signature.dim
    made = WanTransformerConfig(
        num_attention_heads=dim // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        in_channels=signature.in_channels,
        out_channels=signature.out_channels,
        text_dim=signature.text_dim,
        ffn_dim=FFN_DIM[dim],
        num_layers=signature.num_layers,
        image_dim=CLIP_HUGE.hidden_size if signature.image else 0,
        added_kv_proj_dim=dim if signature.image else 0,
        pos_embed_seq_len=TWO_PICTURES if signature.positions else 0,
    )
    return WanVACEConfig(made, tuple(range(0, signature.num_layers, VACE_STEP[dim]))) if signature.control else made
