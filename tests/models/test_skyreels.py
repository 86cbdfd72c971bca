"""SkyReels V2's transformer against diffusers': the frame rate, a timestep a frame, causal blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wan_cases import COMMON, T2V, error, inputs, ours

from fastvid.errors import CheckpointError
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.models.registry import build_empty, kind_of
from fastvid.models.wan.skyreels import SkyReelsTransformer
from fastvid.models.wan.transformer import WanTransformer

SIZE = (5, 6, 10)


def theirs(**changes: Any) -> Any:
    """diffusers' model with every weight drawn."""
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    model = SkyReelsV2Transformer3DModel(**{**T2V, "inject_sample_info": True, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def wanted(model: Any, latents: Any, times: Any, text: Any, fps: int = 24, block: int = 1) -> Any:
    model._set_ar_attention(block)
    options: dict[str, Any] = {"fps": [int(fps != 16)], "enable_diffusion_forcing": times.ndim == 2}
    return model(latents, times, text, **options).sample


@torch.no_grad()
@pytest.mark.parametrize("timesteps", ["sample", "frame"])
@pytest.mark.parametrize("fps", [16, 24])
def test_a_frame_rate_shifts_the_modulation_of_every_timestep_as_published(timesteps, fps):
    model = theirs()
    latents, times, text = inputs(size=SIZE, timesteps=timesteps, batch=1)
    mine = ours(model)
    made = mine(latents, times, mine.prepare_context(text, fps=fps))
    assert error(made, wanted(model, latents, times, text, fps)) < 1e-5
    assert error(made, wanted(model, latents, times, text, 40 - fps)) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_causal_blocks_are_the_published_mask(block, sampled):
    model, frames = theirs(inject_sample_info=sampled), 6
    latents, times, text = inputs(size=(frames, 4, 6), timesteps="frame", batch=1)
    mine = ours(model)
    assert isinstance(mine, SkyReelsTransformer) == sampled
    made = mine(latents, times, text, cache=CausalBlocks(frames, block))
    if block > 1:  # they mask blocks of one frame nowhere
        assert error(made, wanted(model, latents, times, text, block=block)) < 1e-5
    full = mine(latents, times, text)
    assert error(full, wanted(model, latents, times, text)) < 1e-5
    assert error(made[:, :, :-block], full[:, :, :-block]) > 1e-3


@torch.no_grad()
def test_later_blocks_change_nothing_before_them_and_the_last_may_be_shorter():
    mine = ours(theirs())
    latents, times, text = inputs(size=(5, 4, 6), timesteps="frame", batch=1)
    seen = mine(latents, times, text, cache=CausalBlocks(5, 2))
    alone = mine(latents[:, :, :4], times[:, :4], text, cache=CausalBlocks(4, 2))
    torch.testing.assert_close(seen[:, :, :4], alone, rtol=1e-4, atol=1e-5)


def test_the_published_sizes():
    sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    config = {"_class_name": "SkyReelsV2Transformer3DModel", **sizes, "inject_sample_info": True}
    module = build_empty("transformer", kind_of("transformer").read_config(config))
    assert isinstance(module, SkyReelsTransformer)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(1.4355e9, rel=1e-4)
    assert len(module.state_dict()) == 830


def test_a_config_says_whether_the_frame_rate_is_told():
    read, config = kind_of("transformer").read_config, {**COMMON, "ffn_dim": 80, "num_layers": 1}
    for said in (None, False):
        module = build_empty("transformer", read({**config, "inject_sample_info": said}))
        assert type(module) is WanTransformer
    with pytest.raises(CheckpointError, match="num_frame_per_block=3; only 1"):
        read({**config, "num_frame_per_block": 3})
