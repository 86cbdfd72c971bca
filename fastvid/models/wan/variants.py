"""Which variant a model is: the table of all named ones, the preset of a folder or file, and the configurations of the
published models. Of variants with the same tensors, the name of the folder, file or class tells, or `variant=` of
`fastvid.load`.
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
from fastvid.models.preset import Preset, Signature, Variant
from fastvid.models.wan import animate_presets, fun_presets, presets, siblings, skyreels_presets
from fastvid.models.wan.animate_config import MARK, WanAnimateConfig
from fastvid.models.wan.config import (
    HEAD_DIM,
    WAN22_VAE,
    WanFunConfig,
    WanTransformerConfig,
    WanVACEConfig,
    WanVAEConfig,
)
from fastvid.sampling.schedulers import SOURCE, Scheduler, read_scheduler

VARIANTS: tuple[Variant, ...] = (
    *presets.VARIANTS,
    *fun_presets.VARIANTS,
    *skyreels_presets.VARIANTS,
    *animate_presets.VARIANTS,
)
EXTRAS: Mapping[str, str] = {"reference": "add_ref_conv", "fps": "inject_sample_info", animate_presets.EXTRA: MARK}
"""Layers that only some siblings have (`Signature.extra`), and the key of a transformer's config.json that says so."""

LONG_WORD = 6  # letters of a word that is not part of others by chance

# ---------------------------------------------------------------- which one a folder holds


def read_signature(transformer: Mapping[str, Any], experts: int = 1) -> Signature:
    """The signature of a transformer/config.json. Raises CheckpointError where its sizes are no whole numbers."""
    keys = ("num_attention_heads", "attention_head_dim", "num_layers", "text_dim", "in_channels")
    heads, head_dim, layers, text, channels = (_whole(transformer, k, getattr(WanTransformerConfig, k)) for k in keys)
    out = channels if transformer.get("out_channels", 0) is None else _whole(transformer, "out_channels", 16)
    image, positions, control = (bool(transformer.get(k)) for k in ("image_dim", "pos_embed_seq_len", "vace_layers"))
    control = control or transformer.get("_class_name") == "WanVACETransformer3DModel"
    extra = next((word for word, key in EXTRAS.items() if transformer.get(key)), "")
    known = heads * head_dim, layers, text, channels, out, image, image and positions, control, experts
    return Signature(*known, extra)


def find_variants(signature: Signature, name: str = "", chosen: str | None = None) -> list[Variant]:
    """The variants of this signature, the one that is meant first. name: what folder, pipeline and transformer are
    called. chosen: `variant=` of `fastvid.load`; it may also be of another width or number of layers.

    Raises CheckpointError if the chosen one does not fit, and if only a name can tell, which is missing.
    """
    found = [variant for variant in VARIANTS if variant.signature == signature]
    if chosen is None:
        siblings.check_name(name)
    else:
        variant = next(variant for variant in VARIANTS if variant.preset.name == chosen)
        if _alike(variant.signature) != _alike(signature):
            raise CheckpointError(_not_alike(variant, signature))
        return [variant, *(other for other in found if other is not variant)]
    found = found or _of_other_size(signature, name)
    called = sorted((v for v in found if is_called(v, name)), key=lambda v: not v.by_name)  # siblings' names say more
    meant = called or _unnamed(found, name)
    if found and not meant:
        names = " or ".join(variant.preset.name for variant in found)
        raise CheckpointError(f"these weights may be {names}, which have the same tensors: say which by variant=NAME")
    return sorted(found, key=lambda variant: variant not in meant[:1])


def _of_other_size(signature: Signature, name: str) -> list[Variant]:
    """The siblings that a name or layers of their own tell, of a width or depth that was not published."""
    alike = [variant for variant in VARIANTS if _alike(variant.signature) == _alike(signature)]
    return [v for v in alike if signature.extra or (v.by_name and is_called(v, name))]


def _unnamed(found: list[Variant], name: str) -> list[Variant]:
    """The variants that need no name. None if the name has the first word of another one's hint, such as "SkyReels",
    but not all: then it is doubtful which is meant."""
    first_words = {hint.split()[0] for variant in found if variant.by_name for hint in variant.hints if " " in hint}
    if any(_plain(word) in _plain(name) for word in first_words if len(word) >= LONG_WORD):
        return []
    return [variant for variant in found if not variant.by_name]


def _alike(signature: Signature) -> Signature:
    """The signature without sizes, which a smaller or pruned model of the same kind does not share."""
    return signature._replace(dim=0, num_layers=0, text_dim=0)


def _not_alike(variant: Variant, signature: Signature) -> str:
    wanted, given = variant.signature._asdict(), signature._asdict()
    differing = [key for key in wanted if key in _SHOWN and wanted[key] != given[key]]
    told = ", ".join(f"{_SHOWN[key]} {wanted[key] or 'none'} against {given[key] or 'none'}" for key in differing)
    fitting = [v.preset.name for v in VARIANTS if _alike(v.signature) == _alike(signature)]
    listed = f"; these may be {', '.join(fitting)}" if fitting else ""
    return f"variant={variant.preset.name}: the weights are of another kind ({told}){listed}"


_SHOWN = {
    "in_channels": "channels in",
    "out_channels": "channels out",
    "image": "CLIP tokens",
    "positions": "positions of two pictures",
    "control": "control branch",
    "experts": "transformers",
    "extra": "extra layers",
}


def is_called(variant: Variant, name: str) -> bool:
    """Whether the name of a folder or pipeline has a hint of a variant: all words of it."""
    plain = _plain(name)
    return any(all(_plain(word) in plain for word in hint.split()) for hint in variant.hints)


def find_preset(
    transformer: Mapping[str, Any],
    vae: WanVAEConfig,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
    name: str = "",
    experts: int = 1,
    own: bool = True,
    chosen: str | None = None,
) -> Preset:
    """The preset of a model, by its sizes; the general one for sizes unknown here.

    transformer, scheduler, index: what transformer/config.json, scheduler_config.json and model_index.json say.
    name, chosen: see `find_variants`. experts: how many transformers there are. own: the scheduler's file is the
    model's own; else it only gives models of unknown sizes their shift.
    What the files say of the scheduler, the boundary and timesteps beats the preset.
    """
    index, signature = index or {}, read_signature(transformer, experts)
    variants = find_variants(signature, name, chosen)
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
    channels = siblings.Channels(signature.in_channels, signature.out_channels, signature.image)
    if signature.control:
        preset = replace(preset, patterns=patterns.CONTROL)
    elif channels.is_inpaint:
        preset = replace(fun_presets.INP_5B, name=preset.name)
    elif channels.is_control:
        known = fun_presets.START if signature.image else fun_presets.MASKED
        preset = replace(fun_presets.FUN, name=preset.name, patterns=known)
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

PUBLISHED = tuple(variant.preset.name for variant in VARIANTS if variant.preset is not presets.EMBEDDED)
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


def transformer_config(
    signature: Signature,
) -> WanTransformerConfig | WanVACEConfig | WanFunConfig | WanAnimateConfig:
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
        inject_sample_info=signature.extra == "fps",
    )
    if signature.extra == animate_presets.EXTRA:
        return WanAnimateConfig(made)
    if signature.extra == "reference":
        return WanFunConfig(made, signature.out_channels)
    return WanVACEConfig(made, tuple(range(0, signature.num_layers, VACE_STEP[dim]))) if signature.control else made
