"""What a config does not say is what the class that it names takes: diffusers' and transformers' signatures."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers

from fastvid.errors import CheckpointError, FastvidWarning
from fastvid.loaders.checkpoint import _check_image_processor
from fastvid.loaders.layouts import make_image_processor
from fastvid.models.common.clip import CLIPVisionConfig
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.description import flat_config
from fastvid.models.registry import KINDS
from fastvid.models.wan.config import LATENT_STATISTICS, WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.models.wan.variants import find_preset, read_signature

VACE = {"_class_name": "WanVACETransformer3DModel"}


def plain(value: Any) -> Any:
    """0 stands for what diffusers has as None."""
    return list(value) if isinstance(value, tuple) else value or 0


@pytest.mark.parametrize(
    ("part", "config", "theirs"),
    [
        ("transformer", {}, "WanTransformer3DModel"),
        ("transformer", VACE, "WanVACETransformer3DModel"),
        ("transformer", {"_class_name": "SkyReelsV2Transformer3DModel"}, "SkyReelsV2Transformer3DModel"),
        ("vae", {}, "AutoencoderKLWan"),
    ],
)
def test_defaults_of_diffusers(part: str, config: dict[str, Any], theirs: str) -> None:
    signature = inspect.signature(getattr(diffusers, theirs).__init__).parameters
    ours = flat_config(KINDS[part].read_config(config))
    unset = {"patch_size"} if part == "vae" else set()  # None, which is 1
    assert {key: plain(value) for key, value in ours.items() if key not in unset} == {
        key: plain(signature[key].default) for key in ours if key not in unset
    }
    assert set(ours) <= set(signature)


def test_defaults_of_transformers() -> None:
    for ours, theirs in ((UMT5Config, transformers.UMT5Config), (CLIPVisionConfig, transformers.CLIPVisionConfig)):
        values = asdict(ours())
        assert values == {key: getattr(theirs(), key) for key in values}
    assert UMT5Config.from_dict({}) == UMT5Config()
    with pytest.raises(CheckpointError, match="hidden_act='quick_gelu'"):  # transformers' default, which is not done
        CLIPVisionConfig.from_dict({})


def test_channels_out_are_16_or_those_of_the_input() -> None:
    """diffusers: absent is 16, null is in_channels."""
    for config, out in (({"in_channels": 36}, 16), ({"in_channels": 36, "out_channels": None}, 36)):
        assert WanTransformerConfig.from_dict(config).out_channels == out
        assert read_signature(config).out_channels == out


def test_vace_layers_by_the_class_alone() -> None:
    config = KINDS["transformer"].read_config(VACE)
    assert isinstance(config, WanVACEConfig) and config.vace_layers == (0, 5, 10, 15, 20, 25, 30, 35)
    assert find_preset(VACE, WanVAEConfig(), {}).name == "wan2.1-vace-14b"


@pytest.mark.parametrize("empty", [{}, {"latents_mean": None, "latents_std": None}])
@pytest.mark.parametrize("channels", [16, 48])
def test_statistics_of_latents(channels: int, empty: dict[str, Any]) -> None:
    """diffusers' defaults for 16 channels; for 48, where diffusers has none, the published ones."""
    config = WanVAEConfig.from_dict({"z_dim": channels, **empty})
    assert (config.latents_mean, config.latents_std) == LATENT_STATISTICS[channels]
    for other in (8, [48], "48"):
        with pytest.raises(CheckpointError, match="z_dim"):
            WanVAEConfig.from_dict({"z_dim": other, **empty})


def test_defaults_of_a_residual_vae() -> None:
    """diffusers has one class for both generations: is_residual alone changes no other default."""
    made = WanVAEConfig.from_dict({"is_residual": True})
    assert asdict(made) == asdict(WanVAEConfig()) | {"is_residual": True}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_dtype", "float16"),
        ("architectures", ["WanTransformer3DModel"]),
        ("gradient_checkpointing", True),
        ("quantization_config", {"quant_method": "x"}),
        ("transformers_version", "4.0"),
        ("model_type", "t2v"),
        ("text_len", 512),
        ("text_len", None),
        ("window_size", [-1, -1]),
        ("qk_norm", True),
        ("dropout", 0.1),
    ],
)
def test_keys_without_effect(key: str, value: Any) -> None:
    assert WanTransformerConfig.from_dict({key: value}) == WanTransformerConfig()


@pytest.mark.parametrize(("key", "value"), [("text_len", 226), ("window_size", [7, 7]), ("sink_size", 3)])
def test_keys_of_the_original_repositories_with_an_effect(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key):
        WanTransformerConfig.from_dict({key: value})


def test_what_a_vae_does_not_know_is_said() -> None:
    with pytest.warns(FastvidWarning, match="scaling_factor"):
        WanVAEConfig.from_dict({"scaling_factor": 0.18215})


def test_pictures_are_prepared_by_transformers_defaults(tmp_path: Path) -> None:
    """An image_processor that says anything else is told of; what it leaves out is not."""
    theirs = transformers.CLIPImageProcessor().to_dict()
    ours = make_image_processor()
    assert {key: plain(theirs[key]) for key in ours} == {key: plain(value) for key, value in ours.items()}
    path = tmp_path / "image_processor/preprocessor_config.json"
    path.parent.mkdir()
    encoder = CLIPVisionConfig(image_size=28)
    odd: dict[str, Any]
    for odd in ({"do_center_crop": False}, {"size": {"height": 28, "width": 28}}, {"image_mean": [0.5, 0.5, 0.5]}):
        path.write_text(json.dumps(odd))
        with pytest.warns(FastvidWarning, match=next(iter(odd))):
            _check_image_processor(tmp_path, encoder)
    for same in ({}, make_image_processor(28), {"size": 28, "crop_size": 28}, {"do_resize": None}):
        path.write_text(json.dumps(same))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _check_image_processor(tmp_path, encoder)
