"""The VACE transformer against diffusers' on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from torch import nn
from wan_cases import SCALES, VACE, diffusers_model, error, inputs, ours, run_ours, run_theirs

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vace import VACEContext, WanVACETransformer


@pytest.fixture(scope="module")
def theirs() -> WanVACETransformer3DModel:
    return diffusers_model("vace")


@pytest.mark.parametrize("changes", [{"vace_layers": [0]}, {"vace_layers": [0, 1, 4]}, {"cross_attn_norm": False}])
@torch.no_grad()
def test_other_configurations_equal_diffusers(changes: dict[str, Any]) -> None:
    theirs, given = diffusers_model("vace", **changes), inputs("vace")
    found = run_ours(ours(theirs), *given, scales=0.5)
    expected = run_theirs(theirs, *given, scales=[0.5] * len(theirs.config.vace_layers))
    assert error(found, expected) < 1e-6


@torch.no_grad()
def test_a_control_may_end_before_the_video(theirs: WanVACETransformer3DModel) -> None:
    *rest, control = inputs("vace")
    given = *rest, control[:, :, :2]
    assert error(run_ours(ours(theirs), *given), run_theirs(theirs, *given)) < 1e-6


@torch.no_grad()
def test_every_scale_counts(theirs: WanVACETransformer3DModel) -> None:
    given, model = inputs("vace"), ours(theirs)
    assert error(run_ours(model, *given, scales=1), run_theirs(theirs, *given, scales=None)) < 1e-6
    for i in range(3):
        scales = [scale + 1e-4 * (i == j) for j, scale in enumerate(SCALES)]
        assert error(run_ours(model, *given, scales=scales), run_theirs(theirs, *given)) > 1e-6


@torch.no_grad()
def test_without_hints_it_is_the_plain_model(theirs: WanVACETransformer3DModel) -> None:
    *given, control = inputs("vace")
    plain = WanTransformer(ours(theirs).config)
    plain.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("vace_")})
    assert torch.equal(run_ours(ours(theirs), *given, control, scales=0), plain(*given))


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(theirs: WanVACETransformer3DModel) -> None:
    given, model = inputs("vace"), ours(theirs)
    alone = run_ours(model, *(tensor[1:] for tensor in given))
    assert error(run_ours(model, *given)[1:], alone) < 1e-6


@torch.no_grad()
def test_known_tokens_may_have_timesteps_of_their_own(theirs: WanVACETransformer3DModel) -> None:
    """diffusers' model takes one timestep a sample; ours one a token too, and the same result where they are equal."""
    latents, timestep, text, control = inputs("vace")
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
    given, model = inputs("vace"), ours(theirs)
    mistake(model)
    assert error(run_ours(model, *given), run_theirs(theirs, *given)) > 1e-6


@pytest.mark.parametrize("shape", [None, (2, 9, 3, 6), (1, 9, 3, 6, 10), (2, 8, 3, 6, 10), (2, 9, 3, 5, 10)])
def test_other_controls_are_refused(theirs: WanVACETransformer3DModel, shape: tuple[int, ...] | None) -> None:
    control = None if shape is None else torch.zeros(shape)
    with pytest.raises(InvalidRequest, match=r"control \[2, 9, T, H, W\]"):
        ours(theirs).prepare_context(torch.zeros(2, 7, 20), control=control)


@pytest.mark.parametrize("size", [(4, 6, 10), (3, 10, 6), (3, 6, 8)])
def test_a_control_has_to_fit_the_latents(theirs: WanVACETransformer3DModel, size: tuple[int, int, int]) -> None:
    latents, timestep, text, _ = inputs("vace")
    model = ours(theirs)
    context = model.prepare_context(text, control=torch.zeros(2, 9, *size))
    assert isinstance(context, VACEContext)
    with pytest.raises(InvalidRequest, match=r"does not fit latents of \[3, 6, 10\]"):
        model(latents, timestep, context)


def test_scales_are_one_or_one_a_layer(theirs: WanVACETransformer3DModel) -> None:
    *_, text, control = inputs("vace")
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
        WanVACEConfig.from_dict({**VACE, **changes})


def test_a_plain_model_is_not_made_from_a_vace_file() -> None:
    with pytest.raises(CheckpointError, match="VACE"):
        WanTransformerConfig.from_dict(VACE)
