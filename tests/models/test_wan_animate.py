"""The Wan-Animate transformer and its encoders of a face against diffusers' on random weights, and its files' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from animate_models import TINY, original_names
from diffusers import WanAnimateTransformer3DModel
from torch import Tensor

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.residual import Stream
from fastvid.models.registry import build_empty, target_dtype
from fastvid.models.wan import detect, variants, weight_names
from fastvid.models.wan.animate import WanAnimateTransformer
from fastvid.models.wan.animate_config import WanAnimateConfig
from fastvid.models.wan.transformer import Modulation
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL


def shaken(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> WanAnimateTransformer3DModel:
    torch.manual_seed(0)
    return shaken(WanAnimateTransformer3DModel(**TINY))


@pytest.fixture(scope="module")
def ours(theirs: WanAnimateTransformer3DModel) -> WanAnimateTransformer:
    model = WanAnimateTransformer(WanAnimateConfig.from_dict(dict(theirs.config))).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def inputs(batch: int = 2) -> dict[str, Tensor]:
    """At sizes that nothing divides: 3 latent frames of 6 x 10, of which the pose has 2; 5 frames of a face."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"x": (36, 3, 6, 10), "text": (512, 32), "image": (7, 32), "pose": (16, 2, 6, 10), "face": (3, 5, 32, 32)}
    made = {name: torch.randn(batch, *shape, generator=draw) for name, shape in shapes.items()}
    return made | {"timestep": torch.tensor([500.0, 20.0])[:batch], "face": made["face"].clamp(-1, 1)}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def run_ours(model: WanAnimateTransformer, given: dict[str, Tensor]) -> Tensor:
    context = model.prepare_context(given["text"], given["image"], pose=given["pose"], face=given["face"])
    return model(given["x"], given["timestep"], context)


@torch.no_grad()
def run_theirs(model: WanAnimateTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    names = ("x", "timestep", "text", "image", "pose", "face")
    return model(*(given[name] for name in names)).sample


def test_the_transformer_equals_diffusers(theirs: Any, ours: WanAnimateTransformer) -> None:
    assert error(run_ours(ours, inputs()), run_theirs(theirs, inputs())) < 1e-5


def test_every_input_counts(theirs: Any, ours: WanAnimateTransformer) -> None:
    expected = run_theirs(theirs, inputs())
    for name in ("x", "text", "image", "pose", "face", "timestep"):
        given = inputs()
        given[name] = given[name].flip(-1)
        assert error(run_ours(ours, given), expected) > 1e-5, name


def test_a_face_of_one_frame_is_the_same_in_all(theirs: Any, ours: WanAnimateTransformer) -> None:
    given = inputs() | {"face": torch.full((2, 3, 1, 32, 32), -1.0)}
    expected = run_theirs(theirs, given | {"face": torch.full((2, 3, 5, 32, 32), -1.0)})
    assert error(run_ours(ours, given), expected) < 1e-5


@torch.no_grad()
def test_the_parts_equal_diffusers(theirs: Any, ours: WanAnimateTransformer) -> None:
    faces = torch.rand(7, 3, 32, 32) * 2 - 1
    motion = theirs.motion_encoder(faces)
    assert error(ours.motion_encoder(faces), motion) < 1e-5
    tokens = theirs.face_encoder(motion[None, :5])
    assert error(ours.face_encoder(motion[None, :5]), tokens) < 1e-5
    x, block, rows = torch.randn(1, 2 * 15, 48), ours.face_adapter[1], torch.zeros(1, 6, 48)
    stream = Stream(x, torch.zeros_like(x), torch.ones(1, 48))
    added = block(stream, Modulation(rows, torch.zeros(1, 1, dtype=torch.int64)), block.project_face(tokens)).take()[1]
    assert error(added, theirs.face_adapter[1](x, tokens)) < 1e-5


@torch.no_grad()
def test_in_bf16_it_is_as_near_to_fp32_as_diffusers(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    low = {name: value.bfloat16() for name, value in inputs().items()} | {"timestep": inputs()["timestep"]}
    exact = run_theirs(theirs, {name: value.float() for name, value in low.items()})
    half = WanAnimateTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    model = WanAnimateTransformer(WanAnimateConfig.from_dict(dict(theirs.config))).eval()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(target_dtype(model, name, torch.bfloat16))
    model.load_state_dict(theirs.state_dict())
    found = run_ours(model, low)
    assert found.dtype == torch.bfloat16
    assert error(found.float(), exact) < 1.2 * error(run_theirs(half, low).float(), exact)


def test_what_does_not_fit_is_refused(ours: WanAnimateTransformer) -> None:
    given = inputs()
    with pytest.raises(InvalidRequest, match=r"a pose \[2, 16, T, H, W\] is needed"):
        ours.prepare_context(given["text"], given["image"], face=given["face"])
    with pytest.raises(InvalidRequest, match=r"a face \[2, 3, 5, 32, 32\], or of 1 frame"):
        ours.prepare_context(given["text"], given["image"], pose=given["pose"], face=given["face"][:, :, :4])
    longer = {name: given[name][:, :, :2] if name == "x" else given[name] for name in given}
    with pytest.raises(InvalidRequest, match="does not fit latents of"):
        run_ours(ours, longer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 5}, "multiple of inject_face_latents_blocks=2"),
        ({"motion_encoder_size": 48}, "power of 2"),
        ({"motion_encoder_size": 64}, "says nothing of side 64"),
        ({"motion_encoder_channel_sizes": {"a": 3}}, "sides and channels"),
        ({"motion_dim": 0}, "positive"),
        ({"in_channels": 32}, "in_channels is 32"),
        ({"latent_channels": 8}, "latent_channels 8"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_other_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        WanAnimateConfig.from_dict({**TINY, "in_channels": 36, **changes})


def test_the_published_model_has_its_size() -> None:
    preset, configs = variants.published_configs("wan2.2-animate-14b")
    module = build_empty("transformer", configs["transformer"])
    assert sum(parameter.numel() for parameter in module.parameters()) == 17_274_816_884
    assert len(module.state_dict()) == 1443
    assert (preset.num_inference_steps, preset.flow_shift, preset.guidance_scale, preset.fps) == (20, 5.0, 1.0, 30.0)


def test_names_of_both_layouts(theirs: Any) -> None:
    """The original names are made by hand here: see `animate_models.original_names`."""
    state = theirs.state_dict()
    original = original_names(state)
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    made = weight_names.origins(shapes, DIFFUSERS)
    assert made.keys() == state.keys()
    assert all(torch.equal(origin.make(original.__getitem__), state[name]) for name, origin in made.items())
    back = weight_names.origins({name: tuple(tensor.shape) for name, tensor in state.items()}, ORIGINAL)
    # The number of the last convolution is the published model's; kernels of the blur are not weights.
    wanted = {re.sub(r"convs\.4\.weight", "convs.8.weight", name) for name in original if not name.endswith("kernel")}
    assert back.keys() == wanted


def test_files_are_told_by_their_tensors(theirs: Any) -> None:
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        names = original_names(theirs.state_dict()).items()
        identity = detect.identify({prefix + name: tuple(tensor.shape) for name, tensor in names})
        assert (identity.name, identity.layout) == ("wan2.2-animate-custom", ORIGINAL)
    config = identity.config({"num_attention_heads": 2})
    assert WanAnimateConfig.from_dict(config | {"motion_encoder_batch_size": 4}) == WanAnimateConfig.from_dict(
        dict(theirs.config)
    )


def test_published_files_are_told_without_a_config() -> None:
    """As the original repository and ComfyUI have them."""
    with torch.device("meta"):
        names = original_names(WanAnimateTransformer3DModel(added_kv_proj_dim=5120).state_dict())
    assert len(names) == 1441
    identity = detect.identify({f"model.diffusion_model.{name}": tuple(one.shape) for name, one in names.items()})
    config, published = identity.config(), variants.published_configs("wan2.2-animate-14b")[1]["transformer"]
    made = WanAnimateConfig.from_dict(config | {"motion_encoder_channel_sizes": None})
    assert (identity.name, made) == ("wan2.2-animate-14B", published)
    assert WanAnimateConfig.from_dict(config).widths == published.widths == (32, 64, 128, 256, 512, 512, 512, 512)
