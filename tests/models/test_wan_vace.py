"""The VACE transformer against diffusers' on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from gradients import gradients
from torch import Tensor, nn

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vace import VACEContext, WanVACETransformer

SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "ffn_dim": 80,
    "num_layers": 5,
    "vace_layers": [0, 2, 3],
    "vace_in_channels": 9,
}
SCALES = [0.7, 1.3, -0.4]
SIZES = [(1, 2, 2), (3, 6, 10), (5, 14, 6)]  # latent frames, height, width


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def diffusers_model(**changes: Any) -> WanVACETransformer3DModel:
    """diffusers' model with every weight drawn, also those that start as ones or zeros."""
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        # Faint tokens, on which a wrong epsilon in a norm shows.
        for part in (model.patch_embedding, model.vace_patch_embedding, model.vace_blocks[0].proj_in):
            for parameter in part.parameters():
                parameter.mul_(0.1)
    return model


def ours(theirs: WanVACETransformer3DModel) -> WanVACETransformer:
    model = WanVACETransformer(WanVACEConfig.from_dict(dict(theirs.config)))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> WanVACETransformer3DModel:
    return diffusers_model()


def inputs(size: tuple[int, int, int] = (3, 6, 10), batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text, control."""
    generator = torch.Generator().manual_seed(sum(size))
    shapes = ((batch, 4, *size), (batch, 7, 20), (batch, 9, *size))
    latents, text, control = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, torch.rand(batch, generator=generator) * 1000, text, control


def run_theirs(model: WanVACETransformer3DModel, *given: Tensor, scales: list[float] | None = SCALES) -> Tensor:
    latents, timestep, text, control = given
    scale = None if scales is None else torch.tensor(scales, dtype=latents.dtype)
    return model(latents, timestep, text, None, control, scale, return_dict=False)[0]


def run_ours(
    model: WanVACETransformer, latents: Tensor, timestep: Tensor, text: Tensor, control: Tensor, scales: Any = SCALES
) -> Tensor:
    return model(latents, timestep, model.prepare_context(text, control=control, scales=scales))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_diffusers(theirs: WanVACETransformer3DModel, size: tuple[int, int, int]) -> None:
    given = inputs(size)
    assert error(run_ours(ours(theirs), *given), run_theirs(theirs, *given)) < 1e-6


@pytest.mark.parametrize("changes", [{"vace_layers": [0]}, {"vace_layers": [0, 1, 4]}, {"cross_attn_norm": False}])
@torch.no_grad()
def test_other_configurations_equal_diffusers(changes: dict[str, Any]) -> None:
    theirs, given = diffusers_model(**changes), inputs()
    found = run_ours(ours(theirs), *given, scales=0.5)
    expected = run_theirs(theirs, *given, scales=[0.5] * len(theirs.config.vace_layers))
    assert error(found, expected) < 1e-6


@torch.no_grad()
def test_a_control_may_end_before_the_video(theirs: WanVACETransformer3DModel) -> None:
    *rest, control = inputs()
    given = *rest, control[:, :, :2]
    assert error(run_ours(ours(theirs), *given), run_theirs(theirs, *given)) < 1e-6


@torch.no_grad()
def test_every_scale_counts(theirs: WanVACETransformer3DModel) -> None:
    given, model = inputs(), ours(theirs)
    assert error(run_ours(model, *given, scales=1), run_theirs(theirs, *given, scales=None)) < 1e-6
    for i in range(3):
        scales = [scale + 1e-4 * (i == j) for j, scale in enumerate(SCALES)]
        assert error(run_ours(model, *given, scales=scales), run_theirs(theirs, *given)) > 1e-6


@torch.no_grad()
def test_without_hints_it_is_the_plain_model(theirs: WanVACETransformer3DModel) -> None:
    *given, control = inputs()
    plain = WanTransformer(ours(theirs).config)
    plain.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("vace_")})
    assert torch.equal(run_ours(ours(theirs), *given, control, scales=0), plain(*given))


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(theirs: WanVACETransformer3DModel) -> None:
    given, model = inputs(), ours(theirs)
    alone = run_ours(model, *(tensor[1:] for tensor in given))
    assert error(run_ours(model, *given)[1:], alone) < 1e-6


@torch.no_grad()
def test_known_tokens_may_have_timesteps_of_their_own(theirs: WanVACETransformer3DModel) -> None:
    """diffusers' model takes one timestep a sample; ours one a token too, and the same result where they are equal."""
    latents, timestep, text, control = inputs()
    model = ours(theirs)
    each = timestep[:, None].expand(-1, 45)
    assert torch.equal(run_ours(model, latents, each, text, control), run_ours(model, latents, timestep, text, control))


def shifted_input(model: WanVACETransformer) -> None:
    model.vace_blocks[0].proj_in.bias.data.add_(1e-3)


def wrong_epsilon(model: WanVACETransformer) -> None:
    for block in model.vace_blocks:
        block.eps = 1e-5


def no_projection(model: WanVACETransformer) -> None:
    nn.init.eye_(model.vace_blocks[1].proj_out.weight)


@pytest.mark.parametrize("mistake", [shifted_input, wrong_epsilon, no_projection])
@torch.no_grad()
def test_a_small_mistake_would_be_seen(theirs: WanVACETransformer3DModel, mistake: Any) -> None:
    given, model = inputs(), ours(theirs)
    mistake(model)
    assert error(run_ours(model, *given), run_theirs(theirs, *given)) > 1e-6


@torch.no_grad()
def test_bf16_is_as_good_as_diffusers(theirs: WanVACETransformer3DModel) -> None:
    given = inputs()
    truth = run_theirs(theirs, *given)
    half = diffusers_model().bfloat16()
    for name, parameter in half.named_parameters():
        if set(WanVACETransformer.FP32_PARTS) & set(name.split(".")):
            parameter.data = theirs.get_parameter(name).data
    model = WanVACETransformer(WanVACEConfig.from_dict(dict(half.config)))
    model.load_state_dict(half.state_dict(), assign=True)
    latents, timestep, text, control = given
    allowed = error(run_theirs(half, latents.bfloat16(), timestep, text.bfloat16(), control.bfloat16()), truth)
    assert 0 < error(run_ours(model, *given), truth) <= 2 * allowed


def test_gradients_equal_diffusers(theirs: WanVACETransformer3DModel) -> None:
    given, model = inputs(), ours(theirs).train()
    theirs.zero_grad()
    run_theirs(theirs, *given).square().mean().backward()
    run_ours(model, *given).square().mean().backward()
    found = gradients(model)
    for name, parameter in theirs.named_parameters():
        assert error(found.pop(name), parameter.grad) < 1e-4, name
    assert not found


# What the published config.json files say.
SMALLER = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2))}
PUBLISHED = [("vace-1.3b", SMALLER, 1264, 2.154), ("vace-14b", {"vace_layers": list(range(0, 40, 5))}, 1331, 17.3376)]


@pytest.mark.parametrize(("name", "config", "tensors", "billions"), PUBLISHED)
def test_published_models(name: str, config: dict[str, Any], tensors: int, billions: float) -> None:
    """Names and shapes are diffusers', their number that of the published files."""
    with torch.device("meta"):
        theirs = WanVACETransformer3DModel(**config)
        model = WanVACETransformer(WanVACEConfig.from_dict(dict(theirs.config)))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(shape.numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("shape", [None, (2, 9, 3, 6), (1, 9, 3, 6, 10), (2, 8, 3, 6, 10), (2, 9, 3, 5, 10)])
def test_other_controls_are_refused(theirs: WanVACETransformer3DModel, shape: tuple[int, ...] | None) -> None:
    control = None if shape is None else torch.zeros(shape)
    with pytest.raises(InvalidRequest, match=r"control \[2, 9, T, H, W\]"):
        ours(theirs).prepare_context(torch.zeros(2, 7, 20), control=control)


@pytest.mark.parametrize("size", [(4, 6, 10), (3, 10, 6), (3, 6, 8)])
def test_a_control_has_to_fit_the_latents(theirs: WanVACETransformer3DModel, size: tuple[int, int, int]) -> None:
    latents, timestep, text, _ = inputs()
    model = ours(theirs)
    context = model.prepare_context(text, control=torch.zeros(2, 9, *size))
    assert isinstance(context, VACEContext)
    with pytest.raises(InvalidRequest, match=r"does not fit latents of \[3, 6, 10\]"):
        model(latents, timestep, context)


def test_scales_are_one_or_one_a_layer(theirs: WanVACETransformer3DModel) -> None:
    *_, text, control = inputs()
    with pytest.raises(InvalidRequest, match=r"one number, or 3 .*, not 2"):
        ours(theirs).prepare_context(text, control=control, scales=[1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vace_layers": []}, "ascends from 0"),
        ({"vace_layers": None}, "ascends from 0"),
        ({"vace_layers": [1, 2]}, "ascends from 0"),
        ({"vace_layers": [0, 3, 2]}, "ascends from 0"),
        ({"vace_layers": [0, 2, 2]}, "ascends from 0"),
        ({"vace_layers": [0, 5]}, "below num_layers=5"),
        ({"vace_layers": [0, 2.0]}, "ascends from 0"),
        ({"vace_in_channels": 0}, "positive"),
        ({"vace_in_channels": True}, "positive"),
        ({"qk_norm": None}, "rms_norm_across_heads"),
    ],
)
def test_configurations_that_are_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        WanVACEConfig.from_dict({**SMALL, **changes})


def test_a_plain_model_is_not_made_from_a_vace_file() -> None:
    with pytest.raises(CheckpointError, match="VACE"):
        WanTransformerConfig.from_dict(SMALL)
