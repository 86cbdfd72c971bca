"""The Wan 2.2 VAE against diffusers' on random weights; chunks against whole clips; shortcuts; the way through a model
folder, from the choice of the network to frames."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import vae_cases
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, DupUp3D, WanUpsample
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify as their_patchify
from hypothesis import given
from hypothesis import strategies as st
from pipelines import diffusers_frames
from torch import Tensor, nn
from vae_cases import (
    NETWORKS,
    OTHER_22,
    SMALL_22,
    diffusers_vae,
    draw_latents,
    error,
    ours,
    their_decoding,
    their_encoding,
)

import fastvid
from fastvid.errors import CheckpointError
from fastvid.models.registry import KINDS
from fastvid.models.wan import vae22
from fastvid.models.wan.config import LATENT_STATISTICS, WAN22_VAE, WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae22 import WanVAE22, add_spread, average_down, patchify, unpatchify
from fastvid.models.wan.variants import published_configs
from fastvid.ops import reference
from fastvid.planning.memory import ModelFacts, Needs, cache_bytes
from fastvid.requests.timeline import Segment

PUBLISHED: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 160,
    "clip_output": False,
    "decoder_base_dim": 256,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "in_channels": 12,
    "is_residual": True,
    "latents_mean": list(LATENT_STATISTICS[48][0]),
    "latents_std": list(LATENT_STATISTICS[48][1]),
    "num_res_blocks": 2,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
    "z_dim": 48,
}
draw_frames = partial(vae_cases.draw_frames, scale=16)


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKLWan:
    return NETWORKS["2.2"].theirs


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return NETWORKS["2.2"].vae


def test_other_stages_equal_diffusers() -> None:
    theirs = diffusers_vae(OTHER_22)
    vae = ours(theirs)
    assert (vae.config.spatial_scale, vae.config.temporal_scale) == (8, 2)
    latents, frames = draw_latents(5, 3, 2), draw_frames(3, 3, 1)
    assert error(vae.decode(latents)[0], their_decoding(theirs, latents)) < 1e-5
    assert error(vae.encode(frames)[0], their_encoding(theirs, frames)) < 1e-5


def test_in_fp64_only_the_order_of_sums_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers rounds to fp32 where it upsamples.
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)
    theirs = diffusers_vae(SMALL_22).double()
    vae = ours(theirs).double()
    latents, frames = draw_latents(3, 2, 3).double(), draw_frames(3, 2, 3).double()
    assert error(vae.decode(latents)[0], their_decoding(theirs, latents)) < 1e-13
    assert error(vae.encode(frames)[0], their_encoding(theirs, frames)) < 1e-13


def shuffled(shuffle: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """PyTorch's own order of the pixels of a patch: rows before columns."""
    return lambda x, size: shuffle(x.transpose(1, 2), size).transpose(1, 2)


def average_with_zeros_behind(x: Tensor, channels: int, factor_t: int, factor_s: int) -> Tensor:
    return average_down(F.pad(x, (0, 0, 0, 0, 0, -x.shape[2] % factor_t)), channels, factor_t, factor_s)


def spread_every_first_channel(out: Tensor, x: Tensor, factor_t: int, first: bool) -> Tensor:
    groups = x.shape[1] // out.shape[1]
    return add_spread(out, x[:, ::groups].repeat_interleave(groups, 1), factor_t, first)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("patchify", shuffled(F.pixel_unshuffle)),
        ("unpatchify", shuffled(F.pixel_shuffle)),
        ("average_down", average_with_zeros_behind),
        ("add_spread", spread_every_first_channel),
    ],
)
def test_a_mistake_beside_the_weights_would_be_seen(
    theirs: AutoencoderKLWan, vae: WanVAE22, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae22, name, wrong)
    if name in ("patchify", "average_down"):
        frames = draw_frames(2, 2, 3)
        assert error(vae.encode(frames)[0], their_encoding(theirs, frames)) > 1e-2
    else:
        latents = draw_latents(2, 2, 3)
        assert error(vae.decode(latents)[0], their_decoding(theirs, latents)) > 1e-2


def test_a_small_mistake_in_a_weight_would_be_seen(theirs: AutoencoderKLWan) -> None:
    latents, frames = draw_latents(3, 2, 3), draw_frames(2, 2, 3)
    wrong = ours(theirs)
    wrong.decoder.up_blocks[0].upsampler.time_conv.bias[0] += 0.05
    assert error(wrong.decode(latents)[0], their_decoding(theirs, latents)) > 1e-5
    wrong.encoder.down_blocks[1].downsampler.time_conv.bias[0] += 0.05
    assert error(wrong.encode(frames)[0], their_encoding(theirs, frames)) > 1e-5


class TestShortcuts:
    """The functions without weights against diffusers', bit by bit but for the order of a mean's sum."""

    @given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3))
    def test_average_down(self, factor_t: int, factor_s: int, frames: int, channels: int, side: int) -> None:
        x = torch.randn(2, 8, frames, factor_s * side, factor_s * (side + 1), dtype=torch.float64)
        want = AvgDown3D(8, channels, factor_t, factor_s)(x)
        assert error(average_down(x, channels, factor_t, factor_s), want) < 1e-15

    @given(st.integers(1, 2), st.integers(1, 4), st.sampled_from([2, 4, 8]), st.integers(1, 3), st.booleans())
    def test_add_spread(self, factor_t: int, frames: int, channels: int, side: int, first: bool) -> None:
        x = torch.randn(2, 8, frames, side, side + 1)
        want = DupUp3D(8, channels, factor_t, 2)(x, first_chunk=first)
        before = torch.randn(want.shape)
        out = before.clone()
        assert add_spread(out, x, factor_t, first) is out
        assert torch.equal(out, before + want)

    @given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
    def test_patches(self, size: int, height: int, width: int) -> None:
        x = torch.randn(2, 3, 2, size * height, size * width)
        patches = patchify(x, size)
        assert torch.equal(patches, their_patchify(x, size))
        assert torch.equal(unpatchify(patches, size), x)


def test_the_names_and_shapes_are_those_of_the_published_file() -> None:
    config = WanVAEConfig.from_dict(PUBLISHED)
    assert config == WAN22_VAE
    assert (config.spatial_scale, config.temporal_scale, config.z_dim) == (16, 4, 48)
    with torch.device("meta"):
        theirs, own = AutoencoderKLWan.from_config(PUBLISHED), WanVAE22(config)
    shapes = {name: value.shape for name, value in own.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert (len(shapes), sum(shape.numel() for shape in shapes.values())) == (196, 704_688_668)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 3, 5, 24, 32), "24x32"),
        ((1, 3, 5, 32, 40), "multiples of 16"),
        ((1, 3, 4, 16, 16), "4k\\+1"),
        ((1, 3, 0, 16, 16), "0 frames"),
    ],
)
def test_what_cannot_be_encoded_is_refused(vae: WanVAE22, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vae.encode(torch.zeros(shape))


def test_a_later_chunk_needs_whole_groups(vae: WanVAE22) -> None:
    _, cache = vae.encode(draw_frames(1, 1, 1))
    with pytest.raises(ValueError, match="4k after the start"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16), cache)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"latents_mean": [0.0] * 3}, "z_dim=4"),
        ({"latents_std": [1.0] * 48}, "z_dim=4"),
        ({"latents_std": 1.0}, "latents_std is 1.0"),
        ({"latents_mean": [0.0, 0.0, 0.0, float("nan")]}, "latents_mean is .*nan"),
        ({"patch_size": 4}, "in_channels=12; RGB in patches of patch_size=4 needs 48"),
        ({"patch_size": None}, "in_channels=12.* needs 3"),
        ({"out_channels": 3}, "out_channels=3.* needs 12"),
        ({"patch_size": "2"}, "patch_size is '2'"),
        ({"base_dim": 0}, "base_dim is 0"),
        ({"dim_mult": []}, r"dim_mult is \[\]"),
        ({"temperal_downsample": [False, True]}, "2 values; one less than dim_mult, 3, are needed"),
    ],
)
def test_configurations_that_it_cannot_do_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        WanVAEConfig.from_dict({**SMALL_22, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim_mult": [3, 4, 4, 4]}, "32 values of a block in the encoder give no 24 means"),
        ({"dim_mult": [1, 2, 4, 2]}, "32 channels in the decoder cannot be spread to 64"),
    ],
)
def test_widths_without_a_shortcut_are_refused(changes: dict[str, Any], says: str) -> None:
    config = WanVAEConfig.from_dict({**SMALL_22, **changes})
    with torch.device("meta"), pytest.raises(CheckpointError, match=says):
        WanVAE22(config)


def test_the_file_says_which_network_it_is() -> None:
    kind = KINDS["vae"]
    for config, builds in ((SMALL_22, WanVAE22), ({"base_dim": 8}, WanVAE)):
        assert type(kind.build(kind.read_config(config), reference)) is builds


def test_the_plan_counts_its_width() -> None:
    """5.4 times the last upsampler's output, 512 channels at half the height and width of a frame, beside the cache."""
    configs = {**published_configs("wan2.2-ti2v-5b")[1], "vae": WAN22_VAE}
    segment = Segment(9, 704, 1280, 9, 704, 1280, spatial=16, temporal=4)
    cost = Needs(ModelFacts.of_configs(configs, torch.bfloat16), segment).cost()
    cache = cache_bytes(configs["vae"], 704, 1280)
    assert cost.decoder - cache == pytest.approx(5.4 * 4 * (512 * 4 * 352 * 640))
    assert cost.latents == 6 * 4 * (48 * 3 * 44 * 80)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny22")
    return folder, tiny.write_checkpoint(folder, vae_config=SMALL_22)


def test_frames_of_a_model_folder_equal_diffusers(checkpoint: tuple[Path, Any]) -> None:
    latents = torch.randn(1, 4, 2, 6, 4, generator=torch.Generator().manual_seed(5))
    sigmas = [1.0, 0.8, 0.4]
    pipe = fastvid.load(str(checkpoint[0]), device="cpu")
    options: dict[str, Any] = {"height": 96, "width": 64, "num_frames": 5, "guidance_scale": 4.0}
    prompts = "a red circle moving left", "blue square"
    ours = pipe.generate(
        prompts[0], negative_prompt=prompts[1], solver="euler", sigmas=sigmas, latents=latents, **options
    ).frames
    theirs = diffusers_frames(checkpoint[1], latents, sigmas, 4.0, 96, 64, 5)
    assert ours.shape == theirs.shape == (5, 96, 64, 3) and ours.std() > 5
    assert (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean() >= 0.999


def test_sizes_go_up_to_multiples_of_the_vae_and_the_patch(checkpoint: tuple[Path, Any]) -> None:
    pipe = fastvid.load(str(checkpoint[0]), device="cpu")
    made = pipe.plan("a red circle", height=80, width=100, num_frames=3)
    assert (made.model_height, made.model_width, made.model_frames) == (96, 128, 5)
    assert made.latent_shape == (4, 2, 6, 8)
    video = pipe.generate("a red circle", height=80, width=100, num_frames=3, num_inference_steps=1)
    assert video.frames.shape == (3, 80, 100, 3)
