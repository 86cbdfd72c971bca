"""SkyReels V2 in every layout in which it is published, and which of its models a name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skyreels_cases as cases
from test_single_files import comfy

import fastvid
from fastvid.api import inspect
from fastvid.errors import CheckpointError
from fastvid.loaders.convert import convert
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.skyreels_presets import VARIANTS
from fastvid.models.wan.variants import find_preset, published_configs

COMMON = {"attention_head_dim": 128, "text_dim": 4096, "in_channels": 16, "out_channels": 16}
SMALL = {**COMMON, "num_attention_heads": 12, "num_layers": 30}
LARGE = {**COMMON, "num_attention_heads": 40, "num_layers": 40}
SEES = {"in_channels": 36, "image_dim": 1280}
HEADS = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1}
ASKED: dict[str, Any] = {
    **{"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 3, "seed": 1, "flow_shift": 5.0},
    **{"ar_step": 1, "fps": 16},
}


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({**SMALL, "inject_sample_info": True}, "anything", "df-1.3b-540p"),
        ({**SMALL, **SEES}, "Wan2_1-SkyReels-V2-I2V-1_3B-540P_fp32.safetensors WanModel", "i2v-1.3b-540p"),
        (LARGE, "SkyReels-V2-DF-14B-540P-Diffusers SkyReelsV2DiffusionForcingPipeline", "df-14b-540p"),
        (LARGE, "models--Skywork--SkyReels-V2-DF-14B-720P-Diffusers x", "df-14b-720p"),
        (LARGE, "mine SkyReelsV2DiffusionForcingImageToVideoPipeline", "df-14b-540p"),
        (LARGE, "mine-720p SkyReelsV2DiffusionForcingPipeline SkyReelsV2Transformer3DModel", "df-14b-720p"),
        (LARGE, "Wan2_1-SkyReels-V2-T2V-14B-720P_fp8_e4m3fn.safetensors", "t2v-14b-720p"),
        (LARGE, "mine SkyReelsV2Pipeline SkyReelsV2Transformer3DModel", "t2v-14b-540p"),
        (LARGE, "skyreels_v2_df_14b.gguf", "df-14b-540p"),
        ({**LARGE, **SEES}, "SkyReels-V2-I2V-14B-720P", "i2v-14b-720p"),
        ({**LARGE, **SEES}, "mine SkyReelsV2ImageToVideoPipeline", "i2v-14b-540p"),
    ],
)
def test_names_tell(config: dict[str, Any], name: str, expected: str) -> None:
    assert find_preset(config, WanVAEConfig(), {}, {}, name).name == f"skyreels-v2-{expected}"


def test_what_no_name_tells_is_wans_or_asked_for() -> None:
    assert find_preset(LARGE, WanVAEConfig(), {}, {}, "my model").name == "wan2.1-t2v-14b"
    with pytest.raises(CheckpointError, match="skyreels-v2-df-14b-540p or .*say which by variant=NAME"):
        find_preset(LARGE, WanVAEConfig(), {}, {}, "SkyReels-V2-14B")
    with pytest.raises(CheckpointError, match="skyreels-v2-i2v-1.3b-540p.*say which by variant=NAME"):
        find_preset({**SMALL, **SEES}, WanVAEConfig(), {}, {}, "my model")
    chosen = find_preset(LARGE, WanVAEConfig(), {}, {}, "SkyReels-V2-14B", chosen="skyreels-v2-df-14b-720p")
    assert chosen.name == "skyreels-v2-df-14b-720p"


# Steps, shift, guidance, frames, first size: the tables of SkyReels-V2's README.
RECIPES = {
    "df-1.3b-540p": (50, 8, 6, 97, "960x544"),
    "df-14b-540p": (50, 8, 6, 97, "960x544"),
    "df-14b-720p": (50, 8, 6, 121, "1280x720"),
    "t2v-14b-540p": (50, 8, 6, 97, "960x544"),
    "t2v-14b-720p": (50, 8, 6, 121, "1280x720"),
    "i2v-1.3b-540p": (50, 5, 5, 97, "960x544"),
    "i2v-14b-540p": (50, 5, 5, 97, "960x544"),
    "i2v-14b-720p": (50, 5, 5, 121, "1280x720"),
}


def test_recipes_are_as_published() -> None:
    presets = [variant.preset for variant in VARIANTS]
    assert {preset.name for preset in presets} == {f"skyreels-v2-{name}" for name in RECIPES}
    for preset in presets:
        made = preset.num_inference_steps, preset.flow_shift, preset.guidance_scale, preset.num_frames, preset.sizes[0]
        assert made == RECIPES[preset.name.removeprefix("skyreels-v2-")]
        assert preset.fps == 24 and preset.window == (preset.num_frames - 1) // 4 + 1
        forcing = preset.forcing
        assert (forcing is not None) == ("-df-" in preset.name)
        assert forcing is None or (forcing.base_num_frames, forcing.overlap_history) == (preset.num_frames, 17)
        assert published_configs(preset.name)[1]["transformer"].inject_sample_info == (preset is presets[0])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "SkyReels-V2-DF-1.3B-540P-Diffusers"
    cases.make(folder=folder, **HEADS)
    return folder


@pytest.fixture(scope="module")
def truth(published: Path) -> np.ndarray:
    made = frames(published)
    assert made.std() > 1
    return made


def frames(model: Path) -> np.ndarray:
    pipe = fastvid.load(str(model), device="cpu")
    assert pipe.describe()["variant"] == "skyreels-v2-df-1.3b-540p"
    return pipe.generate("a red circle", **ASKED).frames


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_the_original_folder(published: Path, truth: np.ndarray, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    convert(published, folder, "original")
    (folder / "diffusers_extras.json").unlink()
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)
    assert (frames(folder) == truth).all()
    assert inspect(str(folder))["recipe"]["flow_shift"] == 8
    convert(folder, tmp_path / "back")
    assert (frames(tmp_path / "back") == truth).all()


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
@pytest.mark.parametrize(("name", "expected"), [("DF-14B-540P", "df-14b-540p"), ("T2V-14B-540P", "t2v-14b-540p")])
def test_a_converted_folder_tells_itself_by_its_classes(tmp_path: Path, name: str, expected: str) -> None:
    """Published original folders have to be converted: their encoders are pickles."""
    folder = tmp_path / f"SkyReels-V2-{name}"
    cases.make("SkyReelsV2Pipeline", folder=tmp_path / "theirs", inject_sample_info=False, **HEADS)
    convert(tmp_path / "theirs", folder, "original")
    (folder / "diffusers_extras.json").unlink()
    convert(folder, tmp_path / "mine")
    found = inspect(str(tmp_path / "mine"))
    assert (found["recipe"]["name"], found["recipe"]["flow_shift"]) == (f"skyreels-v2-{expected}", 8)
    classes = {"df": "SkyReelsV2DiffusionForcingPipeline", "t2v": "SkyReelsV2Pipeline"}
    assert found["pipeline"] == classes[expected.split("-")[0]] and found["problems"] == []
    assert found["parts"]["transformer"]["class"] == "SkyReelsV2Transformer3DModel"
    assert inspect(str(folder))["recipe"]["name"] == f"skyreels-v2-{expected}"


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file(published: Path, truth: np.ndarray, tmp_path: Path, prefix: str) -> None:
    file = comfy(published, tmp_path, "Skyreels/Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32.safetensors", prefix)
    assert (frames(file) == truth).all()


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("SkyReelsV2DiffusionForcingPipeline", {}, "df-14b-540p"),
        ("SkyReelsV2DiffusionForcingVideoToVideoPipeline", {}, "df-14b-540p"),
        ("SkyReelsV2Pipeline", {}, "t2v-14b-540p"),
        ("SkyReelsV2ImageToVideoPipeline", {**SEES, "image_dim": 16, "added_kv_proj_dim": 48}, "i2v-1.3b-540p"),
    ],
)
def test_every_class_of_pipeline(tmp_path: Path, kind: str, changes: dict[str, Any], expected: str) -> None:
    cases.make(kind, folder=tmp_path / "mine", inject_sample_info=False, **changes)
    pipe = fastvid.load(str(tmp_path / "mine"), device="cpu")
    assert pipe.describe()["variant"] == f"skyreels-v2-{expected}"
    image = {"image": cases.picture(1)} if "image_dim" in changes else {}
    options = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 2, "seed": 1}
    assert pipe.generate("a red circle", **options, **image).frames.std() > 1
