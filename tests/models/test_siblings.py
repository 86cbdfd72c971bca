"""Siblings of Wan told from their tensors, names and `variant=`; those that are not supported are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fun_models import write_fun

from fastvid.api import inspect
from fastvid.errors import CheckpointError
from fastvid.models.registry import build_empty
from fastvid.models.wan import fun_presets, variants
from fastvid.models.wan.detect import identify
from fastvid.models.wan.presets import LARGE, PICTURE, SMALL
from fastvid.models.wan.variants import find_variants, published_configs, transformer_config

# Tensors and billions of parameters of published transformers (in original names, which count as many), and what they
# are by their tensors. None: not published anywhere that we know of.
PUBLISHED: Mapping[str, tuple[int | None, float | None, str]] = {
    "wan2.1-fun-inp-1.3b": (983, 1.5644, "wan2.1-i2v-1.3B"),
    "wan2.1-fun-inp-14b": (1303, None, "wan2.1-i2v-14B"),
    "wan2.2-fun-inp-a14b": (1095, None, "wan2.2-i2v-14B"),
    "wan2.2-fun-inp-5b": (825, None, "wan2.2-fun-inp-5B"),
    "wan2.1-fun-control-1.3b": (983, None, "wan2.1-fun-control-1.3B"),
    "wan2.1-fun-control-14b": (1303, None, "wan2.1-fun-control-14B"),
    "wan2.1-fun-v1.1-control-1.3b": (985, 1.5646, "wan2.1-fun-control-1.3B"),
    "wan2.1-fun-v1.1-control-14b": (1305, 16.3955, "wan2.1-fun-control-14B"),
    "wan2.2-fun-control-a14b": (1097, 14.2896, "wan2.2-fun-control-14B"),
    "wan2.2-fun-control-5b": (None, None, "wan2.2-fun-control-5B"),
    "wan2.2-vace-fun-a14b": (None, None, "wan2.1-vace-14B"),
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    module = build_empty("transformer", published_configs(name)[1]["transformer"])
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_transformers(name: str) -> None:
    tensors, billions, told = PUBLISHED[name]
    shapes = shapes_of(name)
    identity = identify(shapes)
    assert identity.name == told and (tensors is None or len(shapes) == tensors)
    if billions:
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9
        assert parameters == pytest.approx(billions, abs=1e-4)
    preset, configs = published_configs(name)
    assert ("transformer_2" in configs) == (preset.boundary_ratio is not None)
    assert identity.is_expert == (preset.boundary_ratio is not None and identity.task != "vace")
    config = identity.config({"vace_layers": list(range(0, 40, 5))} if identity.task == "vace" else {})
    signature = variants.read_signature(config, len([part for part in configs if part.startswith("transformer")]))
    assert name in [variant.preset.name for variant in find_variants(signature, "wan2.1 Fun InP")]


# Steps, shift, guidance, second guidance, boundary, frames, fps, first size, solver: VideoX-Fun's examples.
RECIPES: Mapping[str, tuple[Any, ...]] = {
    "wan2.1-fun-inp-1.3b": (50, 5, 6, None, None, 81, 16, "832x480", "euler"),
    "wan2.1-fun-inp-14b": (50, 5, 6, None, None, 81, 16, "832x480", "euler"),
    "wan2.2-fun-inp-a14b": (50, 5, 6, 6, 0.9, 81, 16, "832x480", "euler"),
    "wan2.2-fun-inp-5b": (50, 5, 6, None, None, 121, 24, "1280x704", "euler"),
    "wan2.1-fun-control-1.3b": (50, 5, 6, None, None, 81, 16, "832x480", "euler"),
    "wan2.1-fun-control-14b": (50, 5, 6, None, None, 81, 16, "832x480", "euler"),
    "wan2.1-fun-v1.1-control-1.3b": (50, 5, 6, None, None, 81, 16, "832x480", "euler"),
    "wan2.1-fun-v1.1-control-14b": (50, 5, 6, None, None, 81, 16, "832x480", "euler"),
    "wan2.2-fun-control-a14b": (50, 5, 6, 6, 0.9, 81, 16, "832x480", "euler"),
    "wan2.2-fun-control-5b": (50, 5, 6, None, None, 121, 24, "1280x704", "euler"),
    "wan2.2-vace-fun-a14b": (50, 12, 5, 5, 0.875, 81, 16, "1280x720", "unipc"),
}


def test_recipes_are_as_published() -> None:
    made = {variant.preset.name: variant.preset for variant in fun_presets.VARIANTS}
    assert made.keys() == RECIPES.keys() == PUBLISHED.keys()
    for name, expected in RECIPES.items():
        p = made[name]
        scales = p.guidance_scale, p.guidance_scale_2, p.boundary_ratio
        values = p.num_inference_steps, p.flow_shift, *scales, p.num_frames, p.fps, p.sizes[0], p.solver
        assert values == expected, name
        assert f"{p.width}x{p.height}" == p.sizes[0]


def test_levels_are_those_of_the_scheduler_that_the_authors_run() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(50)
    scheduler = fun_presets.FUN.scheduler
    assert scheduler is not None and scheduler.sigmas(50, 5.0) == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-5)


# ---------------------------------------------------------------- the same tensors

SMALL_PICTURE = PICTURE._replace(dim=SMALL.dim, num_layers=SMALL.num_layers)


@pytest.mark.parametrize(
    ("signature", "name", "expected"),
    [
        (PICTURE, "wan2.1_i2v_480p_14B_fp16.safetensors", "wan2.1-i2v-14b-480p"),
        (PICTURE, "Wan2.1-Fun-V1.1-14B-InP", "wan2.1-fun-inp-14b"),
        (PICTURE, "Wan2_1-Fun-InP-14B_fp8.safetensors", "wan2.1-fun-inp-14b"),
        (PICTURE, "converted WanFunInpaintPipeline", "wan2.1-fun-inp-14b"),
        (LARGE._replace(in_channels=36, experts=2), "wan2.2_i2v_high_noise_14B", "wan2.2-i2v-a14b"),
        (LARGE._replace(in_channels=36, experts=2), "wan2.2_fun_inpaint_high_noise_14B_fp8", "wan2.2-fun-inp-a14b"),
        (SMALL_PICTURE, "wan2.1_fun_inp_1.3B_bf16.safetensors", "wan2.1-fun-inp-1.3b"),
        (LARGE, "wan2.1_t2v_14B_bf16.safetensors", "wan2.1-t2v-14b"),
    ],
)
def test_names_tell_what_tensors_cannot(signature: Any, name: str, expected: str) -> None:
    assert find_variants(signature, name)[0].preset.name == expected


def test_where_no_name_tells_it_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match="may be wan2.1-fun-inp-1.3b.*, which have the same .* variant=NAME"):
        find_variants(SMALL_PICTURE, "model.safetensors")
    assert find_variants(SMALL_PICTURE, "model", "wan2.1-fun-inp-1.3b")[0].preset.name == "wan2.1-fun-inp-1.3b"
    # Of another width or number of layers, but the same kind.
    assert find_variants(SMALL_PICTURE._replace(dim=48), "", "wan2.1-fun-inp-14b")[0].preset.name.endswith("14b")
    with pytest.raises(CheckpointError, match=r"another kind \(channels in 48 against 36\); these may be .*fun-inp"):
        find_variants(SMALL_PICTURE, "", "wan2.1-fun-control-1.3b")


def test_neither_small_nor_large_latents_make_experts() -> None:
    """36 channels at width 1536 without a picture embedding, and 100 channels, were never published as two experts."""
    small = shapes_of("wan2.1-fun-inp-1.3b")
    bare = {k: v for k, v in small.items() if "image_embedder" not in k and "add_" not in k and "norm_added" not in k}
    assert identify(bare).name == "wan-i2v-1.3B" and not identify(bare).is_expert
    assert not identify(shapes_of("wan2.2-fun-inp-5b")).is_expert
    assert identify(shapes_of("wan2.2-fun-inp-a14b")).is_expert


def test_a_fun_inp_5b_of_another_size_is_one_too(tmp_path: Path) -> None:
    """No name has to tell it: tokens have their own timesteps, and no picture is needed."""
    write_fun(tmp_path / "model", "inp-5b")
    recipe = inspect(str(tmp_path / "model"))["recipe"]
    assert recipe["name"] == "wan-custom" and recipe["per_token_timesteps"] and recipe["pictures_optional"]
    assert (recipe["guidance_scale"], recipe["fps"], recipe["num_frames"]) == (6.0, 24.0, 121)


# ---------------------------------------------------------------- not supported


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        ("control_adapter.conv.weight", "Fun-Camera"),
        ("model.diffusion_model.control_adapter.conv.weight", "Fun-Camera"),
        ("blocks.3.block.attn.to_q.weight", "Wan-Animate 2"),
        ("casual_audio_encoder.weights", "Wan2.2-S2V"),
        ("patch_embedding_mask.weight", "SCAIL-2"),
        ("patch_embedding_pose.weight", "SCAIL"),
    ],
)
def test_models_refused_by_their_tensors(tensor: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=rf"these weights are {match}.*fastvid does not run it"):
        identify({**shapes_of("wan2.1-fun-control-1.3b"), tensor: (2, 2)})


def test_vace_with_a_picture_embedding_is_refused() -> None:
    with pytest.raises(CheckpointError, match="VACE model with a picture embedding"):
        identify({"vace_blocks.0.norm3.bias": (8,), "img_emb.proj.0.weight": (8,)})


@pytest.mark.parametrize("name", ["phantom_wan_14B.safetensors", "Wan2.1-Phantom-14B", "Wan2.2-S2V-14B"])
def test_models_refused_by_their_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="by its name; fastvid does not run it.*variant=NAME"):
        find_variants(LARGE, name)
    assert find_variants(LARGE, name, "wan2.1-t2v-14b")[0].preset.name == "wan2.1-t2v-14b"


@pytest.mark.parametrize("name", ["my_t2v_of_cameras", "functional", "wan2.1_t2v_14B", "animate_20260101", "ts2v"])
def test_other_names_are_not(name: str) -> None:
    assert find_variants(LARGE, name)[0].preset.name == "wan2.1-t2v-14b"


def test_a_reference_is_part_of_the_config() -> None:
    signature = variants.read_signature({"in_channels": 48, "image_dim": 1280, "add_ref_conv": True})
    assert signature.extra == "reference"
    assert type(transformer_config(LARGE._replace(extra="reference"))).__name__ == "WanFunConfig"
