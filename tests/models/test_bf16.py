"""bf16 against float64: the error of every network, and of a whole pipeline, is at most twice that of diffusers' or
transformers' own in bf16, with the same weights kept in fp32. The truth is their network in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import image_models
import numpy as np
import pytest
import test_umt5
import tiny
import torch
import vae_cases
import wan_cases
from diffusers import WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel
from wan_cases import error

import fastvid
from fastvid.loaders.checkpoint import load_part, open_checkpoint
from fastvid.models.common.umt5 import UMT5Config, UMT5Encoder
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vace import WanVACETransformer

KEPT = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}


def halved(theirs: nn.Module, kept: set[str]) -> nn.Module:
    """A copy in bf16, but for parameters with one of these parts in their name."""
    half = copy.deepcopy(theirs).bfloat16()
    for name, parameter in half.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = theirs.get_parameter(name).data
    return half


def in_double(half: nn.Module) -> nn.Module:
    """The network with the very weights that the bf16 one has, in float64."""
    return copy.deepcopy(half).double()


def doubled(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.bfloat16().double() if x.ndim > 2 else x for x in given)


def rounded(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Latents, text, pictures, controls in bf16; timesteps as they are."""
    return tuple(x.bfloat16() if x.ndim > 2 else x for x in given)


def dit_cases() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], Any, Any]]:
    """Their network, what it is called with, how theirs and ours are called."""
    cases: dict[str, Any] = {}
    for kind in wan_cases.CONFIGS:
        model = wan_cases.diffusers_model(kind)
        cases[kind] = (model, wan_cases.inputs(kind), wan_cases.run_theirs, wan_cases.run_ours)
    token = wan_cases.inputs("t2v", timesteps="token")
    cases["ti2v, a timestep a token"] = (cases["t2v"][0], token, wan_cases.run_theirs, wan_cases.run_ours)
    a14b, given = wan_cases.diffusers_model("i2v", **wan_cases.NO_CLIP), wan_cases.inputs("i2v")[:3]
    cases["i2v without clip"] = (a14b, given, wan_cases.run_theirs, wan_cases.run_ours)
    return cases


def our_dit(half: nn.Module) -> nn.Module:
    config = dict(half.config)
    if isinstance(half, WanVACETransformer3DModel):
        model: nn.Module = WanVACETransformer(WanVACEConfig.from_dict(config))
    else:
        model = WanTransformer(WanTransformerConfig.from_dict(config))
    model.load_state_dict(half.state_dict(), assign=True)
    return model.eval()


@torch.no_grad()
def test_every_dit() -> None:
    measured = {}
    for name, (theirs, given, run_theirs, run_ours) in dit_cases().items():
        half = halved(theirs, KEPT)
        truth = run_theirs(in_double(half), *doubled(given))
        allowed = error(run_theirs(half, *rounded(given)), truth)
        measured[name] = error(run_ours(our_dit(half), *rounded(given)), truth) / allowed
        assert truth.dtype == torch.float64 and allowed > 1e-3
    assert all(0 < ratio <= 2 for ratio in measured.values()), measured


@torch.no_grad()
def test_the_text_encoder() -> None:
    torch.manual_seed(0)
    config = test_umt5.TheirConfig(**test_umt5.SMALL, feed_forward_proj="gated-gelu")
    theirs = UMT5EncoderModel(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    half = copy.deepcopy(theirs).bfloat16()
    ids, mask = test_umt5.tokens([137, 20], 137)
    truth = in_double(half)(ids, mask).last_hidden_state[mask == 1]
    model = UMT5Encoder(UMT5Config.from_dict(config.to_dict())).bfloat16().eval()
    model.load_state_dict({n: t for n, t in half.state_dict().items() if n not in UMT5Encoder.ALIASES})
    allowed = error(half(ids, mask).last_hidden_state[mask == 1], truth)
    assert 0 < error(model(ids, mask)[mask == 1], truth) <= 2 * allowed


@pytest.mark.parametrize("name", vae_cases.NETWORKS)
@torch.no_grad()
def test_vae(name: str) -> None:
    """Loaded in fp32; whoever makes it bf16 loses no more than with diffusers."""
    theirs = vae_cases.NETWORKS[name].theirs
    half = copy.deepcopy(theirs).bfloat16()
    model, exact = vae_cases.ours(theirs).bfloat16(), in_double(half)
    latents = torch.randn(1, theirs.config.z_dim, 3, 4, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = vae_cases.their_decoding(exact, latents.double())
    allowed = error(vae_cases.their_decoding(half, latents), truth)
    assert 0 < error(model.decode(latents)[0], truth) <= 2 * allowed
    frames = truth.clamp(-1, 1).bfloat16()
    truth = vae_cases.their_encoding(exact, frames.double())
    allowed = error(vae_cases.their_encoding(half, frames), truth)
    assert 0 < error(model.encode(frames)[0], truth) <= 2 * allowed


# ---------------------------------------------------------------- loaded checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(path)
    return path


def test_fp32_parts_are_those_of_diffusers(folder: Path) -> None:
    """Every parameter has the dtype in which diffusers loads it, the VAE stays in fp32."""
    for theirs, ours in ((WanTransformer3DModel, WanTransformer), (WanVACETransformer3DModel, WanVACETransformer)):
        # Their rope is a table; ours is made anew, in fp32.
        assert set(theirs._keep_in_fp32_modules) - {"rope"} == set(ours.FP32_PARTS) == KEPT
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    parts = fastvid.load(str(folder), device="cpu", dtype="bfloat16")._model
    dtypes = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: tensor.dtype for name, tensor in parts.transformer.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    their_text = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    assert {p.dtype for p in parts.text_encoder.parameters()} == {p.dtype for p in their_text.parameters()}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}


def test_clip_is_loaded_in_fp32(tmp_path: Path) -> None:
    image_models.write_image_model(tmp_path, "i2v")
    parts = fastvid.load(str(tmp_path), device="cpu", dtype="bfloat16")._model
    assert {p.dtype for p in parts.image_encoder.parameters()} == {torch.float32}
    kept = {name for name, p in parts.transformer.named_parameters() if p.dtype == torch.float32}
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    assert kept == {name for name, p in theirs.named_parameters() if p.dtype == torch.float32}


@torch.no_grad()
def test_a_whole_pipeline(folder: Path) -> None:
    """Frames of a text-to-video pipeline in bf16, VAE in fp32, against diffusers' in float64."""
    latents = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    sigmas = [1.0, 0.9, 0.7, 0.4]
    asked = {"prompt": "a red circle moving left", "negative_prompt": "blue square", "guidance_scale": 4.0}
    asked |= {"height": 64, "width": 64, "num_frames": 5}

    def their_latents(dtype: torch.dtype) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        class Given(FlowMatchEulerDiscreteScheduler):
            def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> None:
                super().set_timesteps(sigmas=sigmas, device=device)

        pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        if dtype == torch.float64:
            pipe.transformer.double()
            pipe.text_encoder.double()
        pipe.scheduler = Given(num_train_timesteps=1000, shift=1.0)
        pipe.set_progress_bar_config(disable=True)
        steps = {"num_inference_steps": len(sigmas), "max_sequence_length": 16, "output_type": "latent"}
        return pipe(**asked, **steps, latents=latents.to(dtype)).frames

    truth = their_latents(torch.float64)
    allowed = error(their_latents(torch.bfloat16), truth)
    pipe = fastvid.load(str(folder), device="cpu", dtype="bfloat16")
    ours = pipe.generate(**asked, solver="euler", sigmas=sigmas, latents=latents)
    assert 0 < error(ours.latents, truth) <= 2 * allowed
    exact = load_part(open_checkpoint(folder), "vae", dtype=torch.float64).decode(truth)[0]
    frames = torch.from_numpy(np.asarray(ours.frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    theirs = load_part(open_checkpoint(folder), "vae").decode(their_latents(torch.bfloat16).float())[0]
    assert error(frames, exact) <= 2 * error(theirs, exact) + 1 / 255
