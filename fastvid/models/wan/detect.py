"""What a set of weights is, from names and shapes alone: which published model, and the configuration that diffusers or
transformers would write for it. What shapes do not show (heads, layers of a control branch, statistics of the latents)
is taken from the published models, or has to be given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.models.wan import animate_detect, siblings, weight_names
from fastvid.models.wan.config import HEAD_DIM, LATENT_STATISTICS
from fastvid.models.wan.weight_names import DIFFUSERS, Shape

CLIP_HEADS = {1280: 16}
TASKS = ("t2v", "i2v", "flf2v", "vace", "ti2v", "animate", *siblings.TASKS)
SIZES = {(1536, 30): "1.3B", (3072, 30): "5B", (5120, 40): "14B"}  # (width, layers)
CUSTOM, STANDARD = "custom", "standard"
UNCHECKED = ("_class_name", "architectures", "model_type")  # names of classes, which differ between libraries
Config = dict[str, Any]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Identity:
    """What a set of weights is.

    part: transformer, vae, text_encoder or image_encoder. layout, prefix: how its names are written. family: "wan2.1",
    "wan2.2", or "wan" where both generations published these very shapes (T2V-14B and each T2V-A14B expert);
    "skyreels-v2" where its own layers tell.
    size: "1.3B", "5B", "14B", "xxl", "huge", "standard" (a VAE), or "custom". task: one of TASKS, None for encoders
    and VAEs. shapes: in diffusers' names.
    """

    part: str
    layout: str
    prefix: str
    family: str
    size: str
    task: str | None
    shapes: Shapes

    @property
    def is_expert(self) -> bool:
        """Whether models of this kind were published as two experts."""
        out = self.shapes.get("proj_out.weight", (0,))[0]
        small = out < 48 * math.prod(self.shapes.get("patch_embedding.weight", (0,))[2:])
        return small and self.family == "wan2.2" and self.task in ("i2v", "fun-control")

    @property
    def name(self) -> str:
        """Such as wan2.1-i2v-14B, wan2.2-vae."""
        return "-".join(filter(None, (self.family, self.task or self.part, self.task and self.size)))

    def config(self, given: Mapping[str, Any] | None = None) -> Config:
        """Its config.json in diffusers' words; `given` are values known from elsewhere, which must agree with the
        shapes. Raises CheckpointError if they do not, or if shapes alone do not tell.
        """
        given = dict(given or {})
        made = _PARTS[self.part][1](self.shapes, given)
        for key, value in made.items():
            if key not in UNCHECKED and given.get(key) is not None and _plain(given[key]) != _plain(value):
                raise CheckpointError(f"the configuration says {key}={given[key]!r}, but the weights {value!r}")
        return {**given, **{key: value for key, value in made.items() if key not in given or given[key] is None}}


def identify(shapes: Mapping[str, Sequence[int]]) -> Identity:
    """Which part of which Wan model a set of tensors is, from their names and shapes.

    Raises CheckpointError for what is none of them, listing the names that are unknown.
    """
    siblings.check_tensors(shapes)
    found = weight_names.find_part(shapes)
    made = weight_names.origins(shapes, DIFFUSERS)
    known = {name: origin.shape(shapes) for name, origin in made.items()}
    family, size, task = _PARTS[found.part][0](known)
    return Identity(found.part, found.layout, found.prefix, family, size, task, known)


# ---------------------------------------------------------------- which variant


def _transformer_variant(shapes: Shapes) -> tuple[str, str, str]:
    dim, channels = _shape(shapes, "patch_embedding.weight", 5)[:2]
    out = _shape(shapes, "proj_out.weight", 2)[0] // math.prod(shapes["patch_embedding.weight"][2:])
    size = SIZES.get((dim, _count(shapes, r"blocks\.(\d+)\.")), CUSTOM)
    image = "condition_embedder.image_embedder.norm1.weight" in shapes
    if "condition_embedder.image_embedder.pos_embed" in shapes:
        return "wan2.1", size, "flf2v"
    if "vace_patch_embedding.weight" in shapes:
        return "wan2.1", size, "vace"
    if animate_detect.MARK in shapes:
        return "wan2.2", size, "animate"
    known = siblings.Channels(channels, out, image)
    if sibling := siblings.find(shapes, known):
        return sibling[0], size, sibling[1]
    if known.is_picture:
        return ("wan2.1" if image else "wan" if size == "1.3B" else "wan2.2"), size, "i2v"
    if channels != out or image:
        extra = "with" if image else "without"
        raise CheckpointError(
            f"a Wan transformer of {channels} channels in, {out} out, {extra} picture embedding is no known variant; "
            "known are 16/16 (t2v, vace), 36/16 (i2v, flf2v), 48/48 (ti2v), and of Fun 48/16, 52/16, 100/48 and 148/48"
        )
    if out == 48:
        return "wan2.2", size, "ti2v"
    return ("wan2.1" if size == "1.3B" else "wan"), size, "t2v"


def _vae_variant(shapes: Shapes) -> tuple[str, str, None]:
    residual = weight_names.is_residual(shapes)
    published = (48, 160) if residual else (16, 96)
    z_dim, width = _shape(shapes, "post_quant_conv.weight", 5)[0], _shape(shapes, "encoder.conv_in.weight", 5)[0]
    size = STANDARD if (z_dim, width) == published else CUSTOM
    return ("wan2.2" if residual else "wan2.1"), size, None


def _text_variant(shapes: Shapes) -> tuple[str, str, None]:
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if not all(bias.format(block) in shapes for block in range(_count(shapes, r"encoder\.block\.(\d+)\."))):
        raise CheckpointError(
            "these weights are T5's encoder, not umT5's, which has a table of distances in every block"
        )
    return "umt5", ("xxl" if _shape(shapes, weight_names.SHARED, 2) == (256384, 4096) else CUSTOM), None


def _image_variant(shapes: Shapes) -> tuple[str, str, None]:
    width = _shape(shapes, "vision_model.embeddings.class_embedding", 1)[0]
    return "clip", ("huge" if width == 1280 else CUSTOM), None


# ---------------------------------------------------------------- configurations


def _transformer_config(shapes: Shapes, given: Config) -> Config:
    dim, channels, *patch = _shape(shapes, "patch_embedding.weight", 5)
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    config = {
        "_class_name": "WanTransformer3DModel",
        **_heads(dim, given),
        "in_channels": channels,
        "out_channels": _shape(shapes, "proj_out.weight", 2)[0] // math.prod(patch),
        "patch_size": patch,
        "text_dim": _shape(shapes, "condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": _shape(shapes, "condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": _shape(shapes, "blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": _count(shapes, r"blocks\.(\d+)\."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in shapes else None,
        "eps": given.get("eps", 1e-6),
        "rope_max_seq_len": given.get("rope_max_seq_len", 1024),
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": dim if "blocks.0.attn2.add_k_proj.weight" in shapes else None,
    }
    if position := shapes.get("condition_embedder.image_embedder.pos_embed"):
        config["pos_embed_seq_len"] = position[1]
    config |= siblings.config(shapes)
    if "vace_patch_embedding.weight" in shapes:
        config |= {"_class_name": "WanVACETransformer3DModel", "vace_layers": _vace_layers(shapes, given)}
        config["vace_in_channels"] = _shape(shapes, "vace_patch_embedding.weight", 5)[1]
    return config | (animate_detect.config_of(shapes, given) if animate_detect.MARK in shapes else {})


def _heads(dim: int, given: Config) -> Config:
    heads = given.get("num_attention_heads") or dim // HEAD_DIM
    if type(heads) is not int or heads < 1 or dim % heads or (dim % HEAD_DIM and "num_attention_heads" not in given):
        raise CheckpointError(
            f"num_attention_heads={heads!r} for a transformer of width {dim}: shapes do not show the number of heads; "
            f"published models have {HEAD_DIM} values a head, for others a config.json that says it is needed"
        )
    return {"num_attention_heads": heads, "attention_head_dim": dim // heads}


def _vace_layers(shapes: Shapes, given: Config) -> list[int]:
    """Evenly spaced from 0 on, as published, unless given."""
    layers, hints = _count(shapes, r"blocks\.(\d+)\."), _count(shapes, r"vace_blocks\.(\d+)\.")
    chosen = given.get("vace_layers") or list(range(0, layers, max(1, layers // hints)))
    if len(chosen) != hints:
        raise CheckpointError(
            f"vace_layers={chosen!r} for {hints} control blocks; a config.json that says it is needed"
        )
    return list(chosen)


def _vae_config(shapes: Shapes, given: Config) -> Config:
    residual, z_dim = weight_names.is_residual(shapes), _shape(shapes, "post_quant_conv.weight", 5)[0]
    base, channels = _shape(shapes, "encoder.conv_in.weight", 5)[:2]
    stages = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    blocks = _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1
    names = [_encoder_stage(i, blocks, residual) for i in range(stages)]
    config = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "z_dim": z_dim,
        "dim_mult": [_shape(shapes, f"{last}.conv2.weight", 5)[0] // base for last, _ in names],
        "num_res_blocks": blocks,
        "temperal_downsample": [f"{down}.time_conv.weight" in shapes for _, down in names[:-1]],
        "attn_scales": [],
        "dropout": given.get("dropout", 0.0),
    }
    mean, std = LATENT_STATISTICS.get(z_dim, (None, None))
    for key, value in (("latents_mean", mean), ("latents_std", std)):
        config[key] = given.get(key) or (value and list(value))
        if config[key] is None:
            raise CheckpointError(f"{key} of a VAE with {z_dim} channels is not known; it has to be in a config.json")
    return config | (_residual_extras(shapes, config, channels) if residual else {})


def _residual_extras(shapes: Shapes, config: Config, channels: int) -> Config:
    patch = math.isqrt(channels // 3)
    return {
        "decoder_base_dim": _shape(shapes, "decoder.conv_in.weight", 5)[0] // config["dim_mult"][-1],
        "is_residual": True,
        "in_channels": channels,
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 5)[0],
        "patch_size": patch,
        "scale_factor_spatial": patch * 2 ** (len(config["dim_mult"]) - 1),
        "scale_factor_temporal": 2 ** sum(config["temperal_downsample"]),
        "clip_output": False,
    }


def _encoder_stage(stage: int, blocks: int, residual: bool) -> tuple[str, str]:
    """(the last residual block of a stage, its downsampling), by name."""
    if residual:
        inner = f"encoder.down_blocks.{stage}"
        return f"{inner}.resnets.{blocks - 1}", f"{inner}.downsampler"
    first = stage * (blocks + 1)
    return f"encoder.down_blocks.{first + blocks - 1}", f"encoder.down_blocks.{first + blocks}"


def _text_config(shapes: Shapes, given: Config) -> Config:
    vocabulary, width = _shape(shapes, weight_names.SHARED, 2)
    layer = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(shapes, f"{layer}.relative_attention_bias.weight", 2)
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(shapes, f"{layer}.q.weight", 2)[0] // heads,
        "d_ff": _shape(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": given.get("relative_attention_max_distance", 128),
        "layer_norm_epsilon": given.get("layer_norm_epsilon", 1e-6),
        "feed_forward_proj": "gated-gelu",
    }


def _image_config(shapes: Shapes, given: Config) -> Config:
    inside = "vision_model.embeddings"
    width, _, patch, _ = _shape(shapes, f"{inside}.patch_embedding.weight", 4)
    heads = given.get("num_attention_heads") or CLIP_HEADS.get(width)
    if heads is None:
        raise CheckpointError(f"the heads of a CLIP encoder of width {width} are not known; a config.json is needed")
    head = shapes.get("visual_projection.weight")
    config = {
        "architectures": ["CLIPVisionModelWithProjection" if head else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_channels": shapes[f"{inside}.patch_embedding.weight"][1],
        "image_size": math.isqrt(_shape(shapes, f"{inside}.position_embedding.weight", 2)[0] - 1) * patch,
        "patch_size": patch,
        "hidden_act": given.get("hidden_act", "gelu"),
        "layer_norm_eps": given.get("layer_norm_eps", 1e-5),
    }
    return config | ({"projection_dim": head[0]} if head else {})


# Of each part: (its family, size and task; its config.json), from shapes.
_PARTS: Mapping[str, tuple[Callable[[Shapes], tuple[str, str, str | None]], Callable[[Shapes, Config], Config]]] = {
    "transformer": (_transformer_variant, _transformer_config),
    "vae": (_vae_variant, _vae_config),
    "text_encoder": (_text_variant, _text_config),
    "image_encoder": (_image_variant, _image_config),
}


def _count(shapes: Iterable[str], pattern: str) -> int:
    """One more than the largest number that stands in the names."""
    regex = re.compile(pattern)
    return max((int(found[1]) for name in shapes if (found := regex.match(name))), default=-1) + 1


def _shape(shapes: Shapes, name: str, dims: int) -> Shape:
    """The shape of a tensor that has to be there, with so many dimensions."""
    if name not in shapes:
        raise CheckpointError(f"{name} (in diffusers' names) is missing; without it the weights cannot be told")
    if len(shapes[name]) != dims or 0 in shapes[name]:
        raise CheckpointError(f"{name} has shape {list(shapes[name])}; {dims} dimensions are expected")
    return shapes[name]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
