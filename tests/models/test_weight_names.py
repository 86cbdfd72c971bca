"""Names of weights in both layouts: the maps against diffusers' own converters on the published configurations, there
and back with nothing left over; and what a set of weights is told to be, from names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.wan import sibling_names
from fastvid.models.wan.config import LATENT_STATISTICS
from fastvid.models.wan.detect import identify
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL, PREFIXES, Origin, find_part, origins, rules

Shapes = dict[str, tuple[int, ...]]
B14 = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
B1_3 = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
VACE_1_3 = {**B1_3, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
VAE_2_2 = {
    **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12},
    **{"out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    **{"latents_mean": list(LATENT_STATISTICS[48][0]), "latents_std": list(LATENT_STATISTICS[48][1])},
}
# name -> (class, config, tensors of the published file); `wan.md`'s counts leave out what only diffusers has
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "wan2.1-t2v-1.3B": ("WanTransformer3DModel", B1_3, 825),
    "wan-t2v-14B": ("WanTransformer3DModel", B14, 1095),
    "wan2.1-i2v-14B": ("WanTransformer3DModel", {**B14, **IMAGE}, 1303),
    "wan2.1-flf2v-14B": ("WanTransformer3DModel", {**B14, **IMAGE, "pos_embed_seq_len": 514}, 1304),
    "wan2.2-i2v-14B": ("WanTransformer3DModel", {**B14, "in_channels": 36}, 1095),
    "wan2.2-ti2v-5B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        825,
    ),
    "wan2.1-vace-1.3B": ("WanVACETransformer3DModel", VACE_1_3, 1264),
    "wan2.1-vace-14B": (
        "WanVACETransformer3DModel",
        {**B14, "vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96},
        1331,
    ),
    "wan2.1-vae": ("AutoencoderKLWan", {}, 194),
    "wan2.2-vae": ("AutoencoderKLWan", VAE_2_2, 196),
    "umt5-text_encoder": ("UMT5EncoderModel", {}, 242),
    "clip-image_encoder": ("CLIPVisionModelWithProjection", {}, 520),
}
TRANSFORMERS = [name for name, (kind, _, _) in PUBLISHED.items() if "Transformer" in kind]


def build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A module of diffusers or transformers, on the meta device."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if kind == "UMT5EncoderModel":
            inner = transformers.UMT5Config(
                **{"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24},
                **{"num_heads": 64, "feed_forward_proj": "gated-gelu"},
            )
            return transformers.UMT5EncoderModel(inner)
        if kind == "CLIPVisionModelWithProjection":
            inner = transformers.CLIPVisionConfig(
                **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024},
                **{"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"},
            )
            return transformers.CLIPVisionModelWithProjection(inner)
        return getattr(diffusers, kind)(**config)


@cache
def shapes_of(name: str) -> Shapes:
    """Names and shapes as the published diffusers file has them."""
    kind, config, _ = PUBLISHED[name]
    shapes = {key: tuple(tensor.shape) for key, tensor in build(kind, config).state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # the file holds it once
    return {key: shape for key, shape in shapes.items() if "position_ids" not in key and "norm_added_q" not in key}


def mapped(shapes: Shapes, to: str) -> Shapes:
    return {name: origin.shape(shapes) for name, origin in origins(shapes, to).items()}


def published_names(name: str) -> Shapes:
    """CLIP's names with the prefix of the published file, whatever the installed transformers calls them."""
    return mapped(shapes_of(name), DIFFUSERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_and_back(name: str) -> None:
    shapes = published_names(name)
    assert len(shapes) == len(shapes_of(name)) == PUBLISHED[name][2]
    original = mapped(shapes, ORIGINAL)
    assert find_part(original).layout == ORIGINAL
    assert mapped(original, DIFFUSERS) == shapes
    assert mapped(original, ORIGINAL) == original
    used = [source for origin in origins(shapes, ORIGINAL).values() for source in origin.names]
    assert sorted(used) == sorted(shapes), "every tensor is used, once"


@pytest.mark.parametrize("name", [*TRANSFORMERS, "wan2.1-vae"])
def test_the_map_is_that_of_diffusers(name: str) -> None:
    from diffusers.loaders import single_file_utils as reference

    convert = (
        reference.convert_wan_vae_to_diffusers if "vae" in name else reference.convert_wan_transformer_to_diffusers
    )
    original = {key: i for i, key in enumerate(mapped(shapes_of(name), ORIGINAL))}
    theirs = convert(dict(original))
    ours = {key: original[origin.names[0]] for key, origin in origins(original, DIFFUSERS).items()}
    for table in (ours, theirs):  # the one name that only the script in diffusers' repository knows
        table.pop("condition_embedder.image_embedder.pos_embed", None)
        table.pop("img_emb.emb_pos", None)
    assert ours == theirs


def test_the_map_of_the_residual_vae() -> None:
    """diffusers has no converter for it; the table was made by loading one state dict into both networks."""
    table = (Path(__file__).parents[1] / "data" / "wan22_vae_keys.tsv").read_text().splitlines()
    pairs = dict(line.split("\t") for line in table)
    shapes = shapes_of("wan2.2-vae")
    assert {key: made.names[0] for key, made in origins(shapes, ORIGINAL).items()} == pairs
    assert sorted(pairs.values()) == sorted(shapes)


# As the original repositories print them.
SAMPLES = {
    "wan2.1-flf2v-14B": {
        "blocks.39.self_attn.norm_k.weight": "blocks.39.attn1.norm_k.weight",
        "blocks.0.cross_attn.norm_k_img.weight": "blocks.0.attn2.norm_added_k.weight",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.modulation": "scale_shift_table",
        "blocks.7.modulation": "blocks.7.scale_shift_table",
        "blocks.7.norm3.bias": "blocks.7.norm2.bias",
    },
    "wan2.1-vae": {
        "conv1.weight": "quant_conv.weight",
        "decoder.upsamples.7.time_conv.bias": "decoder.up_blocks.1.upsamplers.0.time_conv.bias",
        "decoder.upsamples.14.residual.6.weight": "decoder.up_blocks.3.resnets.2.conv2.weight",
        "encoder.downsamples.8.resample.1.weight": "encoder.down_blocks.8.resample.1.weight",
    },
    "wan2.2-vae": {
        "encoder.downsamples.1.downsamples.2.time_conv.weight": "encoder.down_blocks.1.downsampler.time_conv.weight",
        "decoder.upsamples.2.upsamples.3.resample.1.bias": "decoder.up_blocks.2.upsampler.resample.1.bias",
        "decoder.upsamples.3.upsamples.0.shortcut.bias": "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
    },
    "umt5-text_encoder": {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
        "blocks.23.ffn.gate.0.weight": "encoder.block.23.layer.1.DenseReluDense.wi_0.weight",
        "blocks.5.ffn.fc2.weight": "encoder.block.5.layer.1.DenseReluDense.wo.weight",
        "blocks.5.norm2.weight": "encoder.block.5.layer.1.layer_norm.weight",
        "blocks.1.pos_embedding.embedding.weight": (
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
    },
    "clip-image_encoder": {
        "visual.pre_norm.bias": "vision_model.pre_layrnorm.bias",
        "visual.transformer.31.mlp.2.weight": "vision_model.encoder.layers.31.mlp.fc2.weight",
        "visual.patch_embedding.weight": "vision_model.embeddings.patch_embedding.weight",
    },
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str) -> None:
    made = origins(published_names(name), ORIGINAL)
    assert {key: made[key].names for key in SAMPLES[name]} == {key: (v,) for key, v in SAMPLES[name].items()}


@pytest.mark.parametrize("layout", [DIFFUSERS, ORIGINAL])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_variant_is_told_by_names_and_shapes(name: str, layout: str) -> None:
    shapes = mapped(shapes_of(name), layout)
    found = identify(shapes)
    assert (found.name, found.layout, found.prefix) == (name, layout, "")
    assert found.size != "custom" and found.shapes == published_names(name)
    kind, config, _ = PUBLISHED[name]
    module = build(kind, config)
    written = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    for key, value in found.config().items():
        if key not in ("_class_name", "architectures", "attn_scales", "clip_output", "feed_forward_proj"):
            assert as_list(written[key]) == as_list(value), key


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("prefix", [prefix for prefix in PREFIXES if prefix])
def test_prefixes_are_found(prefix: str) -> None:
    shapes = mapped(shapes_of("wan2.1-t2v-1.3B"), ORIGINAL)
    found = identify({prefix + name: shape for name, shape in shapes.items()})
    assert (found.prefix, found.name) == (prefix, "wan2.1-t2v-1.3B")


SMALL_VAES = [
    {"base_dim": 8, "num_res_blocks": n, "dim_mult": list(mult), "temperal_downsample": list(down)}
    for n in (1, 2, 3)
    for mult, down in (((1, 2, 4, 4), (False, True, True)), ((1, 1), (True,)), ((2, 4, 4), (True, False)))
]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("config", SMALL_VAES, ids=str)
def test_other_vaes(config: dict[str, Any], residual: bool) -> None:
    if residual:
        keep = {key: VAE_2_2[key] for key in VAE_2_2 if key not in ("base_dim", "decoder_base_dim")}
        config = {**keep, **config, "decoder_base_dim": 16}
    module = build("AutoencoderKLWan", config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    original = mapped(shapes, ORIGINAL)
    assert mapped(original, DIFFUSERS) == shapes
    found = identify(original).config()
    assert {key: as_list(value) for key, value in config.items() if key in found and key != "scale_factor_spatial"} == {
        key: found[key] for key in config if key in found and key != "scale_factor_spatial"
    }


# ---------------------------------------------------------------- values


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_values_come_back(rows: int, columns: int, patch: int, seed: int) -> None:
    """CLIP's weights, the only ones that are more than renamed: the same bytes after both maps."""
    torch.manual_seed(seed)
    width = rows * columns
    tensors = {
        "visual.cls_embedding": torch.randn(1, 1, width),
        "visual.pos_embedding": torch.randn(1, 5, width),
        "visual.head": torch.randn(width, rows),
        "visual.patch_embedding.weight": torch.randn(width, 3, patch, patch),
        "visual.transformer.0.attn.to_qkv.weight": torch.randn(3 * width, width),
        "visual.transformer.0.attn.to_qkv.bias": torch.randn(3 * width),
    }
    there = apply(tensors, DIFFUSERS)
    assert there["vision_model.embeddings.class_embedding"].shape == (width,)
    assert there["vision_model.embeddings.position_embedding.weight"].shape == (5, width)
    projection = there["visual_projection.weight"]
    x = torch.randn(2, width)
    assert torch.equal(projection, tensors["visual.head"].T)
    joined = x @ tensors["visual.transformer.0.attn.to_qkv.weight"].T
    attention = "vision_model.encoder.layers.0.self_attn"
    parts = [x @ there[f"{attention}.{name}_proj.weight"].T for name in "qkv"]
    torch.testing.assert_close(joined, torch.cat(parts, 1))
    back = apply(there, ORIGINAL)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def apply(tensors: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    made = origins(tensors, to)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    result = {name: origin.make(tensors.__getitem__) for name, origin in made.items()}
    assert all(tuple(result[name].shape) == origin.shape(shapes) for name, origin in made.items())
    return result


def test_flat_module_names() -> None:
    """Kohya's LoRA files write "_" for every dot, in either layout."""
    table = rules("transformer")
    for name in ("blocks.12.attn2.add_k_proj", "condition_embedder.time_proj", "blocks.3.ffn.net.0.proj", "proj_out"):
        original = table.module(name, ORIGINAL)
        assert table.unflatten(name.replace(".", "_")) == table.unflatten(original.replace(".", "_")) == name
    assert table.unflatten("blocks_1_self_attn_x") is None


# ---------------------------------------------------------------- what is wrong


def changed(name: str, layout: str = ORIGINAL, **changes: Any) -> Shapes:
    shapes = {**mapped(shapes_of(name), layout), **{key.replace("__", "."): v for key, v in changes.items()}}
    return {key: shape for key, shape in shapes.items() if shape is not None}


T2V = "wan2.1-t2v-1.3B"
WRONG = [
    ({}, "no part of a Wan model"),
    ({"unet.conv.weight": (1,)}, "no part of a Wan model .*: unet.conv.weight"),
    (lambda: changed(T2V, extra__weight=(1,)), "a Wan transformer in original names does not have: extra.weight"),
    (lambda: changed(T2V, blocks__0__self_attn__q__scale_weight=()), "quantized weights that are not there"),
    (lambda: changed(T2V, scaled_fp8=(0,)), "quantized weights that are not there: scaled_fp8"),
    (lambda: changed(T2V, patch_embedding__weight=None), "patch_embedding.weight .* is missing"),
    (lambda: changed(T2V, patch_embedding__weight=(1536, 64)), r"shape \[1536, 64\]; 5 dimensions"),
    (lambda: changed(T2V, patch_embedding__weight=(1536, 33, 1, 2, 2)), "33 channels in, 16 out, without .* 36/16"),
    (lambda: changed(T2V) | changed("wan2.1-vae"), "several parts: transformer .*, vae"),
    (lambda: changed(T2V) | changed(T2V, DIFFUSERS), "several parts"),
    (
        lambda: changed(
            "clip-image_encoder", DIFFUSERS, vision_model__encoder__layers__3__self_attn__k_proj__bias=None
        ),
        None,
    ),
]


@pytest.mark.parametrize(("given_shapes", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_told(given_shapes: Any, message: str | None) -> None:
    shapes = given_shapes() if callable(given_shapes) else given_shapes
    if message is None:
        with pytest.raises(CheckpointError, match=r"to_qkv\.bias needs q, k and v; only .*q_proj.bias, .*v_proj.bias"):
            origins(shapes, ORIGINAL)
        return
    with pytest.raises(CheckpointError, match=message):
        identify(shapes)


def test_what_files_hold_besides() -> None:
    shapes = shapes_of("umt5-text_encoder")
    comfy = {**shapes, "encoder.embed_tokens.weight": shapes["shared.weight"], "spiece_model": (4548313,)}
    assert origins(comfy, DIFFUSERS).keys() == shapes.keys()
    untied = {name.replace("shared.", "encoder.embed_tokens."): shape for name, shape in shapes.items()}
    assert origins(untied, DIFFUSERS)["shared.weight"] == Origin(("encoder.embed_tokens.weight",))
    clip = {**mapped(shapes_of("clip-image_encoder"), ORIGINAL), "textual.head.weight": (1,), "log_scale": ()}
    assert len(origins(clip, DIFFUSERS)) == 520
    assert origins(clip, ORIGINAL).keys() == clip.keys(), "original names that stay are all kept"


@pytest.mark.parametrize(
    ("given_config", "message"),
    [
        ({"ffn_dim": 1}, "says ffn_dim=1, but the weights 8960"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 for a transformer of width 1536"),
        ({"num_layers": 31}, "num_layers=31, but the weights 30"),
    ],
)
def test_a_configuration_must_agree(given_config: dict[str, Any], message: str) -> None:
    found = identify(shapes_of(T2V))
    with pytest.raises(CheckpointError, match=message):
        found.config(given_config)
    assert found.config({"num_attention_heads": 24, "eps": 1e-5})["attention_head_dim"] == 64


def test_what_shapes_do_not_show() -> None:
    small = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 8}
    shapes = {name: tuple(t.shape) for name, t in build("WanTransformer3DModel", small).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"shapes do not show the number of heads.*128"):
        identify(shapes).config()
    assert identify(shapes).config({"num_attention_heads": 2})["attention_head_dim"] == 24
    vae = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    shapes = {name: tuple(t.shape) for name, t in build("AutoencoderKLWan", vae).state_dict().items()}
    with pytest.raises(CheckpointError, match="latents_mean of a VAE with 4 channels is not known"):
        identify(shapes).config()
    vace = {**small, "vace_layers": [0, 1], "vace_in_channels": 96}
    shapes = {name: tuple(t.shape) for name, t in build("WanVACETransformer3DModel", vace).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"vace_layers=\[0, 1, 2\] for 2 control blocks"):
        identify(shapes).config({"num_attention_heads": 2})


def test_every_rule_has_a_name() -> None:
    """No rule is there for nothing: each stands for a tensor of some published file."""
    names = {name for model in TRANSFORMERS for name in shapes_of(model)}
    stems = {re.sub(r"blocks\.\d+", "blocks.#", re.sub(r"\.(weight|bias)$", "", name)) for name in names}
    siblings = set(sibling_names.TRANSFORMER.values())
    assert set(rules("transformer").table.values()) - siblings - stems == {
        f"vace_blocks.#.attn2.{name}" for name in ("add_k_proj", "add_v_proj", "norm_added_k")
    }
