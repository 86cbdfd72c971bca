"""The CLIP vision encoder against transformers' on random weights, and its preprocessing against CLIPImageProcessor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig as TheirConfig
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from fastvid.engine.pixels import clip_pixels
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import safetensors
from fastvid.models.common.clip import CLIP_HUGE, CLIPVisionConfig, CLIPVisionEncoder

try:  # its name without torchvision
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "gelu",
    "projection_dim": 20,
}


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def transformers_model(kind: Any = CLIPVisionModel, **changes: Any) -> Any:
    """transformers' model with every weight drawn, also those that start as ones or zeros."""
    torch.manual_seed(0)
    model = kind(TheirConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def theirs() -> CLIPVisionModel:
    return transformers_model()


def ours(theirs: CLIPVisionModel) -> CLIPVisionEncoder:
    model = CLIPVisionEncoder(CLIPVisionConfig.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def pixels(size: int = 28, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def run_theirs(model: CLIPVisionModel, x: Tensor) -> Tensor:
    """What diffusers' WanImageToVideoPipeline takes."""
    return model(pixel_values=x, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_hidden_layers": 2}, {"image_size": 31}, {"patch_size": 28}, {"layer_norm_eps": 1e-3}],
)
@torch.no_grad()
def test_equals_transformers(changes: dict[str, Any]) -> None:
    theirs = transformers_model(**changes)
    x = pixels(changes.get("image_size", 28))
    found = ours(theirs)(x)
    assert found.shape == (2, CLIPVisionConfig.from_dict(theirs.config.to_dict()).tokens, 48)
    assert error(found, run_theirs(theirs, x)) < 1e-6


@torch.no_grad()
def test_a_small_mistake_would_be_seen(theirs: CLIPVisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = run_theirs(theirs, pixels())
    wrong = ours(theirs)
    for layer in wrong.encoder.layers:
        layer.layer_norm1.eps = layer.layer_norm2.eps = 1e-6
    assert error(wrong(pixels()), right) > 1e-6
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))
    assert error(ours(theirs)(pixels()), right) > 1e-6


@torch.no_grad()
def test_the_last_layer_and_norm_are_left_out(theirs: CLIPVisionModel) -> None:
    model = ours(theirs)
    before = model(pixels())
    for part in (model.encoder.layers[-1], model.post_layernorm):
        for parameter in part.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(model(pixels()), before)


@torch.no_grad()
def test_bf16_is_as_good_as_transformers(theirs: CLIPVisionModel) -> None:
    truth = run_theirs(theirs, pixels())
    half = transformers_model().bfloat16()
    found, allowed = ours(theirs).bfloat16()(pixels()), error(run_theirs(half, pixels()), truth)
    assert found.dtype == torch.bfloat16
    assert 0 < error(found, truth) <= 2 * allowed


def test_the_published_model() -> None:
    """ViT-H/14: names and shapes are transformers', and its tokens are those that I2V models take."""
    config = CLIP_HUGE
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    with torch.device("meta"):
        theirs = CLIPVisionModel(TheirConfig(**settings, hidden_act="gelu", projection_dim=1024))
        model = CLIPVisionEncoder(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 630_766_080
    assert config.tokens == 257


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
@torch.no_grad()
def test_files_of_both_classes_load(theirs: CLIPVisionModel, kind: Any, tmp_path: Path) -> None:
    """With the prefix that CLIPVisionModelWithProjection writes, its projection, and an old buffer."""
    state = theirs.state_dict()
    if kind is CLIPVisionModelWithProjection:
        whole = transformers_model(kind)
        whole.vision_model.load_state_dict(state)
        state = {**whole.state_dict(), "vision_model.embeddings.position_ids": torch.arange(17.0)[None]}
        assert "visual_projection.weight" in state and "vision_model.pre_layrnorm.weight" in state
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = CLIPVisionEncoder(CLIPVisionConfig.from_dict(theirs.config.to_dict()))
    safetensors.load_into(model, [tmp_path / "model.safetensors"])
    assert torch.equal(model(pixels()), ours(theirs)(pixels()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"num_channels": 1}, "num_channels=1"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
        ({"patch_size": 29}, "at least patch_size"),
        ({"num_hidden_layers": 1}, "last layer is left out"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
    ],
)
def test_configurations_that_are_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CLIPVisionConfig.from_dict({**SMALL, **changes})


@pytest.mark.parametrize("shape", [(2, 3, 28, 27), (3, 28, 28), (1, 1, 28, 28)])
def test_other_pixels_are_refused(theirs: CLIPVisionModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"\[B, 3, 28, 28\]"):
        ours(theirs)(torch.zeros(shape))


# ---------------------------------------------------------------- preprocessing

# What the published image_processor/preprocessor_config.json says.
PROCESSOR = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 3}


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(480, 832), (833, 481), (224, 224), (100, 37), (225, 224), (224, 301), (64, 64)])
def test_preprocessing_equals_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = CLIPImageProcessor(**PROCESSOR)(images=Image.fromarray(image), return_tensors="pt").pixel_values
    found = clip_pixels(torch.from_numpy(image)[None])
    assert found.dtype == torch.float32 and found.shape == (1, 3, 224, 224)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(4, 4, 3), (1, 3, 4, 4), (1, 4, 4, 1)])
def test_pictures_of_another_layout_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        clip_pixels(torch.zeros(shape, dtype=torch.uint8))
