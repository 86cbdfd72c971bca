"""Every published Wan model: found by its configurations and its name, its recipe as published, and what can't run yet
described before it is refused. The files are headers with holes behind them: real shapes, no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastvid.api import inspect
from fastvid.errors import CheckpointError
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.safetensors import read_header
from fastvid.models.common.clip import CLIP_HUGE, CLIPVisionEncoder
from fastvid.models.common.umt5 import UMT5_XXL
from fastvid.models.preset import EXPERIMENTAL, NATIVE, REFUSED, REIMPOSED
from fastvid.models.registry import KINDS
from fastvid.models.wan.config import WAN22_VAE, WanVAEConfig
from fastvid.models.wan.presets import VARIANTS
from fastvid.models.wan.variants import find_preset, find_variants
from fastvid.models.wan.weight_names import ORIGINAL, origins
from fastvid.ops import reference
from fastvid.sampling.sigmas import make_sigmas, shift_sigmas, timesteps

RECIPES = {variant.preset.name: variant.preset for variant in VARIANTS}
COMMON = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "patch_size": [1, 2, 2], "eps": 1e-6}
COMMON |= {"in_channels": 16, "out_channels": 16, "image_dim": None, "added_kv_proj_dim": None, "cross_attn_norm": True}
SMALL = {**COMMON, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
LARGE = {**COMMON, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
MIDDLE = {**COMMON, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "pos_embed_seq_len": None}
MIDDLE |= {"in_channels": 48, "out_channels": 48}
PICTURE = {**LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
VACE_SMALL = {**SMALL, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
VACE_LARGE = {**LARGE, "vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96}


class Published(NamedTuple):
    """folder: as the hub names it. tensors, billions: of (each) transformer."""

    folder: str
    variant: str
    config: Mapping[str, Any]
    tensors: int
    billions: float
    pipeline: str = "WanPipeline"
    boundary: float | None = None


I2V, VACE = "WanImageToVideoPipeline", "WanVACEPipeline"
PUBLISHED = [
    Published("Wan2.1-T2V-1.3B-Diffusers", "wan2.1-t2v-1.3b", SMALL, 825, 1.4190),
    Published("Wan2.1-T2V-14B-Diffusers", "wan2.1-t2v-14b", LARGE, 1095, 14.2885),
    Published("Wan2.1-I2V-14B-480P-Diffusers", "wan2.1-i2v-14b-480p", PICTURE, 1303, 16.3949, I2V),
    Published(
        "models--Wan-AI--Wan2.1-I2V-14B-720P-Diffusers/snapshots/8823af45fc",
        *("wan2.1-i2v-14b-720p", PICTURE, 1303, 16.3949, I2V),
    ),
    Published(
        "Wan2.1-FLF2V-14B-720P-diffusers",
        *("wan2.1-flf2v-14b", {**PICTURE, "pos_embed_seq_len": 514}, 1304, 16.3955, I2V),
    ),
    Published("Wan2.1-VACE-1.3B-diffusers", "wan2.1-vace-1.3b", VACE_SMALL, 1264, 2.154, VACE),
    Published("Wan2.1-VACE-14B-diffusers", "wan2.1-vace-14b", VACE_LARGE, 1331, 17.3376, VACE),
    Published("Wan2.2-T2V-A14B-Diffusers", "wan2.2-t2v-a14b", LARGE, 1095, 14.2885, "WanPipeline", 0.875),
    Published(
        "Wan2.2-I2V-A14B-Diffusers",
        *("wan2.2-i2v-a14b", {**LARGE, "in_channels": 36}, 1095, 14.2889, I2V, 0.9),
    ),
    Published("Wan2.2-TI2V-5B-Diffusers", "wan2.2-ti2v-5b", MIDDLE, 825, 4.9998),
    Published(
        "FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        *("fastwan2.2-ti2v-5b", MIDDLE, 825, 4.9998, "WanDMDPipeline"),
    ),
    Published(
        "SFWan2.1-T2V-1.3B-Diffusers",
        *("self-forcing-1.3b", SMALL, 825, 1.4190, "WanCausalDMDPipeline"),
    ),
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file in bf16 that takes no space on the disk: its header, and a hole where the data would be."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published transformer, as diffusers has them."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    with torch.device("meta"):
        model = (WanVACETransformer3DModel if "vace_layers" in config else WanTransformer3DModel)(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the models have in common: both VAEs, the encoders of text and pictures, a tokenizer, a scheduler."""
    folder = tmp_path_factory.mktemp("shared")
    vae22 = asdict(WAN22_VAE) | {"is_residual": True, "in_channels": 12, "out_channels": 12}
    own = (
        ("text_encoder", "text_encoder", asdict(UMT5_XXL)),
        ("image_encoder", "image_encoder", asdict(CLIP_HUGE) | {"hidden_act": "gelu"}),
    )
    for name, kind, config in (("vae", "vae", {}), ("vae22", "vae", vae22), *own):
        write(folder / name / "config.json", config)
        with torch.device("meta"):
            module = KINDS[kind].build(KINDS[kind].read_config(config), reference)
        write_hollow(folder / name / "model.safetensors", {k: tuple(v.shape) for k, v in module.state_dict().items()})
    model = {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<pad>"}
    write(folder / "tokenizer" / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    write(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": 512, "pad_token": "<pad>"})
    write(folder / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    return folder


def publish(model: Published, folder: Path, shared: Path) -> dict[str, tuple[int, ...]]:
    """The folder of a published model; returns its transformer's shapes."""
    kind = "WanVACETransformer3DModel" if "vace_layers" in model.config else "WanTransformer3DModel"
    shapes = shapes_of(model.config)
    write(folder / "transformer" / "config.json", {"_class_name": kind, **model.config, "rope_max_seq_len": 1024})
    write_hollow(folder / "transformer" / "diffusion_pytorch_model.safetensors", shapes)
    parts = {"transformer": kind, "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel", "tokenizer": "T5"}
    if model.boundary is not None:
        (folder / "transformer_2").symlink_to(folder / "transformer")
        parts["transformer_2"] = kind
    sees = ["image_encoder"] if model.config["image_dim"] else []
    parts |= {name: "CLIPVisionModelWithProjection" for name in sees}
    for name in ("text_encoder", "tokenizer", "scheduler", *sees):
        (folder / name).symlink_to(shared / name)
    five = model.config["in_channels"] == 48
    (folder / "vae").symlink_to(shared / ("vae22" if five else "vae"))
    index = {"_class_name": model.pipeline, "boundary_ratio": model.boundary, "expand_timesteps": five}
    write(folder / "model_index.json", index | {name: ["library", value] for name, value in parts.items()})
    return shapes


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.variant)
def test_a_published_model_is_known(model: Published, shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / model.folder
    shapes = publish(model, folder, shared)
    found = json.loads(json.dumps(inspect(str(folder))))
    assert len(shapes) == model.tensors
    experts = ["transformer", "transformer_2"] if model.boundary else ["transformer"]
    sees = ["image_encoder"] if model.config["image_dim"] else []
    assert list(found["parts"]) == [*experts, "vae", "text_encoder", *sees]
    for name in experts:
        assert found["parts"][name]["parameters"] == pytest.approx(model.billions * 1e9, rel=2e-4)
        assert found["parts"][name]["dtypes"] == ["BF16"]
    assert found["parts"]["vae"]["parameters"] == pytest.approx(
        704.69e6 if "5b" in model.variant else 126.89e6, rel=1e-4
    )
    assert found["recipe"]["name"] == model.variant and found["recipe"]["boundary_ratio"] == model.boundary
    recipe = RECIPES[model.variant]
    if recipe.sigmas is None:  # else its levels are fixed
        recipe = replace(recipe, flow_shift=3.0)  # as the folder's scheduler says
    assert found["recipe"] == json.loads(json.dumps(asdict(recipe)))
    open_checkpoint(folder).check()


def write_original(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A hollow file of the original layout."""
    write_hollow(path, {name: origin.shape(shapes) for name, origin in origins(shapes, ORIGINAL).items()})


@pytest.mark.slow
@pytest.mark.parametrize("model", [m for m in PUBLISHED if "DMD" not in m.pipeline], ids=lambda model: model.variant)
def test_a_published_original_folder_is_known(model: Published, shared: Path, tmp_path: Path) -> None:
    """By names, shapes and the folder's name alone: it gets the recipe that the diffusers folder gets."""
    folder, shapes = tmp_path / re.sub("(?i)-diffusers", "", model.folder), shapes_of(model.config)
    for inner in ("high_noise_model", "low_noise_model") if model.boundary else ("",):
        write_original(folder / inner / "diffusion_pytorch_model.safetensors", shapes)
    vae = ("vae22", "Wan2.2_VAE") if "5b" in model.variant else ("vae", "Wan2.1_VAE")
    for source, target in (vae, ("text_encoder", "models_t5_umt5-xxl-enc-bf16")):
        header = read_header(shared / source / "model.safetensors")
        write_original(folder / f"{target}.safetensors", {name: entry.shape for name, entry in header.items()})
    if model.config["image_dim"]:
        with torch.device("meta"):
            clip = CLIPVisionEncoder(CLIP_HUGE).state_dict()
        write_original(folder / "models_clip.safetensors", {name: tuple(value.shape) for name, value in clip.items()})
    (folder / "google").mkdir()
    (folder / "google" / "umt5-xxl").symlink_to(shared / "tokenizer")
    found = inspect(str(folder))
    assert (found["recipe"], found["pipeline"]) == (asdict(RECIPES[model.variant]), model.pipeline)
    experts = ["transformer", "transformer_2"] if model.boundary else ["transformer"]
    sees = ["image_encoder"] if model.config["image_dim"] else []
    assert list(found["parts"]) == [*experts, "vae", "text_encoder", *sees]
    for name in experts:
        assert found["parts"][name]["parameters"] == pytest.approx(model.billions * 1e9, rel=2e-4)
    open_checkpoint(folder).check()


# Steps, shift, guidance, second guidance, boundary, frames, fps, first size.
# Sources: Wan2.1 `generate.py`, Wan2.2 `wan/configs/`, FastVideo, Self-Forcing, CausVid, LongLive.
PUBLISHED_RECIPES = {
    "wan2.1-t2v-1.3b": (50, 5, 5, None, None, 81, 16, "832x480"),
    "wan2.1-t2v-14b": (50, 5, 5, None, None, 81, 16, "1280x720"),
    "wan2.1-i2v-14b-480p": (40, 3, 5, None, None, 81, 16, "832x480"),
    "wan2.1-i2v-14b-720p": (40, 5, 5, None, None, 81, 16, "1280x720"),
    "wan2.1-flf2v-14b": (50, 16, 5, None, None, 81, 16, "1280x720"),
    "wan2.1-vace-1.3b": (50, 16, 5, None, None, 81, 16, "832x480"),
    "wan2.1-vace-14b": (50, 16, 5, None, None, 81, 16, "1280x720"),
    "wan2.2-t2v-a14b": (40, 12, 4, 3, 0.875, 81, 16, "1280x720"),
    "wan2.2-i2v-a14b": (40, 5, 3.5, 3.5, 0.9, 81, 16, "1280x720"),
    "wan2.2-ti2v-5b": (50, 5, 5, None, None, 121, 24, "1280x704"),
    "fastwan2.1-t2v-1.3b": (3, 8, 1, None, None, 61, 16, "832x448"),
    "fastwan2.1-t2v-14b": (3, 8, 1, None, None, 61, 16, "832x448"),
    "fastwan2.2-ti2v-5b": (3, 5, 1, None, None, 121, 24, "1280x704"),
    "self-forcing-1.3b": (4, 5, 1, None, None, 81, 16, "832x480"),
    "causal-forcing-1.3b": (4, 5, 1, None, None, 81, 16, "832x480"),
    "causal-forcing-framewise-1.3b": (4, 5, 1, None, None, 81, 16, "832x480"),
    "causvid-1.3b": (3, 8, 1, None, None, 81, 16, "832x480"),
    "longlive-1.3b": (4, 5, 1, None, None, 477, 16, "832x480"),
    "longlive2-5b": (4, 5, 1, None, None, 509, 24, "1280x704"),
    "embedded": (20, 3, 3, None, None, 17, 16, "64x64"),
}


def test_recipes_are_as_published() -> None:
    for name, expected in PUBLISHED_RECIPES.items():
        r = RECIPES[name]
        scales = (r.guidance_scale, r.guidance_scale_2, r.boundary_ratio)
        assert (r.num_inference_steps, r.flow_shift, *scales, r.num_frames, r.fps, r.sizes[0]) == expected, name
        assert f"{r.width}x{r.height}" == r.sizes[0] and (r.num_frames - 1) % r.temporal == 0
        assert r.height % r.spatial_multiple == r.width % r.spatial_multiple == 0
        assert r.sigmas is None or len(r.sigmas) == r.num_inference_steps
        assert r.solver != "redraw" or r.guidance_scale == 1
    assert RECIPES.keys() == PUBLISHED_RECIPES.keys() and len(VARIANTS) == len(RECIPES)
    latents = {name: (RECIPES[name].num_frames - 1) // 4 + 1 for name in RECIPES}
    assert (latents["self-forcing-1.3b"], latents["longlive-1.3b"], latents["longlive2-5b"]) == (21, 120, 128)


# Frames a block, attention window, sink (latent frames), timestep of the pass for the cache, cache made again for a new
# prompt, a first picture in the first block. Self-Forcing, CausVid: 32760 tokens of 1560 a frame.
PUBLISHED_ROLLOUTS = {
    "self-forcing-1.3b": (3, 21, 0, 0, False, False),
    "causal-forcing-1.3b": (3, 21, 0, 0, False, False),
    "causal-forcing-framewise-1.3b": (1, 21, 0, 0, False, False),
    "causvid-1.3b": (3, 21, 0, 0, False, False),
    "longlive-1.3b": (3, 12, 3, 0, True, False),
    "longlive2-5b": (8, 32, 8, 0, False, True),
}


def test_rollouts_are_as_published() -> None:
    assert {n: astuple(r.rollout) for n, r in RECIPES.items() if r.rollout is not None} == PUBLISHED_ROLLOUTS
    for name, (block, *_) in PUBLISHED_ROLLOUTS.items():
        r = RECIPES[name]
        assert ((r.num_frames - 1) // 4 + 1) % block == 0 and r.carries and r.context % block == 0 or block == 1


def test_negative_prompts() -> None:
    starts = {"wan2.1-t2v-14b": "色调艳丽，过曝", "wan2.1-i2v-14b-720p": "镜头晃动，色调艳丽"}
    starts |= {"wan2.1-flf2v-14b": "镜头切换，镜头晃动，色调艳丽", "wan2.2-i2v-a14b": "色调艳丽", "embedded": ""}
    for name, start in starts.items():
        assert RECIPES[name].negative_prompt.startswith(start)
        assert name == "embedded" or RECIPES[name].negative_prompt.endswith("三条腿，背景人很多，倒着走")


def test_tables_are_as_published() -> None:
    """Wan2.1 fm_solvers_unipc.py; Self-Forcing's [1000, 750, 500, 250] on its shifted table; CausVid's own steps."""
    r = RECIPES["wan2.1-t2v-14b"]
    told = timesteps(make_sigmas(r.num_inference_steps, r.flow_shift, r.solver), r.solver).tolist()
    assert told[:4] == [999, 995, 991, 987] and told[-3:] == [241, 172, 92] and len(told) == 50
    for name, high in (("wan2.2-t2v-a14b", 26), ("wan2.2-i2v-a14b", 15)):
        r = RECIPES[name]
        told = timesteps(make_sigmas(r.num_inference_steps, r.flow_shift, r.solver), r.solver)
        assert (told >= r.boundary_ratio * 1000).sum() == high
    r = RECIPES["longlive2-5b"]
    told = timesteps(make_sigmas(r.num_inference_steps, r.flow_shift, r.solver), r.solver)
    assert told.tolist() == [999, 937, 833, 624]  # from 0.999, so not quite Self-Forcing's
    warped = shift_sigmas(np.array([1000, 750, 500, 250]) / 1000, RECIPES["self-forcing-1.3b"].flow_shift)
    for name in ("self-forcing-1.3b", "causal-forcing-1.3b", "causal-forcing-framewise-1.3b", "longlive-1.3b"):
        r = RECIPES[name]
        assert np.allclose(r.sigmas, warped, rtol=0, atol=1e-15) and not r.whole_timesteps and r.solver == "redraw"
    assert np.allclose(1000 * warped, [1000, 937.5, 833.33, 625], atol=0.005)


@pytest.mark.parametrize("name", ["causvid-1.3b", "fastwan2.1-t2v-1.3b", "fastwan2.1-t2v-14b", "fastwan2.2-ti2v-5b"])
def test_dmd_levels_are_the_nearest_ones_of_the_shifted_table(name: str) -> None:
    """FastVideo's scheduler: 1000 steps, shifted by 8, in float32; x0 and noise take the nearest to what is told."""
    recipe, steps = RECIPES[name], np.arange(1000, 0, -1, dtype=np.float32) / 1000
    table = 8 * steps / (1 + 7 * steps)
    nearest = [table[np.abs(1000 * table - told).argmin()] for told in (1000, 757, 522)]
    assert np.allclose(recipe.sigmas, nearest, rtol=0, atol=1e-7)
    assert recipe.whole_timesteps and recipe.solver == "redraw" and recipe.num_inference_steps == 3
    assert timesteps(recipe.sigmas, "redraw").round().tolist() == [1000, 757, 522]


def test_patterns_are_declared() -> None:
    words = {NATIVE, REIMPOSED, EXPERIMENTAL, REFUSED}
    assert all(set(asdict(recipe.patterns).values()) <= words for recipe in RECIPES.values())
    native = {
        "embedded": {"first", "prefix", "suffix", "both_ends", "keyframe", "spatial_mask", "staggered"},
        "wan2.1-vace-14b": {"first", "prefix", "suffix", "both_ends", "keyframe", "spatial_mask"},
        "wan2.1-t2v-14b": set(),
        "wan2.2-t2v-a14b": set(),
        "wan2.1-i2v-14b-480p": {"first"},
        "wan2.2-i2v-a14b": {"first"},
        "wan2.2-ti2v-5b": {"first"},
        "wan2.1-flf2v-14b": {"both_ends"},
        "self-forcing-1.3b": {"prefix"},
        "causal-forcing-framewise-1.3b": {"first", "prefix"},
        "longlive2-5b": {"first", "prefix"},
    }
    for name, expected in native.items():
        assert {key for key, word in asdict(RECIPES[name].patterns).items() if word == NATIVE} == expected
    assert all(recipe.patterns.staggered == REFUSED for recipe in RECIPES.values() if recipe.boundary_ratio)
    assert RECIPES["self-forcing-1.3b"].patterns.suffix == REFUSED


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (SMALL, "", "wan2.1-t2v-1.3b"),
        (SMALL, "my-model", "wan2.1-t2v-1.3b"),
        (SMALL, "FastWan2.1-T2V-1.3B-Diffusers WanPipeline", "fastwan2.1-t2v-1.3b"),
        (SMALL, "x WanDMDPipeline", "fastwan2.1-t2v-1.3b"),
        (SMALL, "self_forcing", "self-forcing-1.3b"),
        (SMALL, "Causal-Forcing-chunkwise", "causal-forcing-1.3b"),
        (SMALL, "causal_forcing_framewise", "causal-forcing-framewise-1.3b"),
        (SMALL, "CausVid", "causvid-1.3b"),
        (SMALL, "LongLive-1.3B", "longlive-1.3b"),
        (MIDDLE, "LongLive-2.0-5B", "longlive2-5b"),
        (LARGE, "FastWan2.1-T2V-14B-480P-Diffusers", "fastwan2.1-t2v-14b"),
        (PICTURE, "anything", "wan2.1-i2v-14b-480p"),
    ],
)
def test_variants_of_one_shape_are_told_by_name(config: dict[str, Any], name: str, expected: str) -> None:
    vae = WAN22_VAE if config is MIDDLE else WanVAEConfig()
    assert find_preset(config, vae, {}, {}, name).name == expected


def test_alternatives_are_shown(shared: Path, tmp_path: Path) -> None:
    publish(PUBLISHED[0], tmp_path / "plain", shared)
    found = inspect(str(tmp_path / "plain"))
    assert found["recipe"]["name"] == "wan2.1-t2v-1.3b"
    same = {v.preset.name for v in VARIANTS if v.signature == VARIANTS[1].signature} - {"wan2.1-t2v-1.3b"}
    assert set(found["alternatives"]) == same and "self-forcing-1.3b" in same


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, REIMPOSED),
        ({"image_dim": 1280, "in_channels": 36}, EXPERIMENTAL),
        ({"in_channels": 36}, NATIVE),
        ({"vace_layers": [0]}, NATIVE),
    ],
)
def test_other_sizes_take_known_frames_as_their_class_does(changes: dict[str, Any], first: str) -> None:
    config = {**SMALL, "num_layers": 3, **changes}
    positions = {"pos_embed_seq_len": 514} if "image_dim" in changes else {}
    recipe = find_preset({**config, **positions}, WanVAEConfig(), {})
    assert (recipe.name, recipe.patterns.first) == ("wan-custom", first)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": "30"}, "num_layers is '30'; a positive whole number"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"patch_size": [1, 2]}, "three positive whole numbers"),
        ({"patch_size": 2}, "three positive whole numbers"),
    ],
)
def test_broken_configurations_are_told(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        find_preset({**SMALL, **changes}, WanVAEConfig(), {})


def test_the_file_beats_the_recipe_on_the_boundary() -> None:
    def boundary(index: dict[str, Any], experts: int = 2) -> float | None:
        return find_preset(LARGE, WanVAEConfig(), {}, index, experts=experts).boundary_ratio

    assert boundary({}) == boundary({"boundary_ratio": None}) == 0.875
    assert boundary({"boundary_ratio": 0.5}) == 0.5 and boundary({"boundary_ratio": 1}) == 1.0
    assert boundary({}, experts=1) is None
    assert find_variants(VARIANTS[8].signature)[0].preset.name == "wan2.2-t2v-a14b"
