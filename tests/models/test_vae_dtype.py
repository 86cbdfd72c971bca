"""The VAE in 16 bits: against fp64, beside diffusers in the same type; what a model that is loaded so says of it."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from vae_cases import SMALL, diffusers_vae, error, ours, their_decoding, their_encoding

import fastvid
from fastvid.errors import InvalidRequest
from fastvid.models.wan.vae_layers import RMSNorm
from fastvid.ops import reference

HALVES = ["bfloat16", "float16"]
PSNR = {"bfloat16": 45.0, "float16": 50.0}  # dB against fp32, of the embedded model


@pytest.fixture(scope="module")
def pipes() -> dict[str, fastvid.Pipeline]:
    plain = fastvid.load("embedded", device="cpu")
    return {"float32": plain} | {name: fastvid.load("embedded", device="cpu", vae_dtype=name) for name in HALVES}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("seed", range(3))
def test_error_beside_diffusers(name: str, seed: int) -> None:
    dtype = getattr(torch, name)
    theirs = diffusers_vae(SMALL)
    mine, true, halved = ours(theirs), deepcopy(theirs).double(), deepcopy(theirs).to(dtype)
    mine = mine.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 3, 3 + seed, 5, generator=generator)
    frames = torch.rand(1, 3, 9, 24, 16 + 8 * seed, generator=generator) * 2 - 1

    wanted = their_decoding(true, latents.double())
    made = torch.cat([frames for frames in _decoded(mine, latents)], dim=2)
    assert made.dtype == dtype
    assert 0 < error(made, wanted) <= 2 * error(their_decoding(halved, latents.to(dtype)), wanted)

    wanted = their_encoding(true, frames.double())
    made = mine.encode(frames)[0]
    assert made.dtype == torch.float32, "latents go on in fp32"
    assert 0 < error(made, wanted) <= 2 * error(their_encoding(halved, frames.to(dtype)), wanted)


def _decoded(vae: object, latents: torch.Tensor) -> list[torch.Tensor]:
    """In two chunks, so that the feature cache is in 16 bits too."""
    first, cache = vae.decode(latents[:, :, :1])
    return [first, vae.decode(latents[:, :, 1:], cache)[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_in_fp32(dtype: torch.dtype) -> None:
    """Squares of what fp16 holds go beyond it, and bf16 loses a sum's small parts."""
    x = torch.full((1, 512, 1, 2, 2), 300.0) + torch.randn(1, 512, 1, 2, 2)
    norm = RMSNorm(512, 3, reference)
    made = norm.to(dtype)(x.to(dtype))
    wanted = x.double() / x.double().square().mean(dim=1, keepdim=True).sqrt()
    assert error(made, wanted) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", HALVES)
def test_the_embedded_models_frames(name: str, pipes: dict[str, fastvid.Pipeline]) -> None:
    # Without instructions for it, a CPU takes half a minute for a few frames in fp16.
    options = {"seed": 11, "num_frames": 9 if name == "bfloat16" else 1, "num_inference_steps": 4}
    prompt = "a green triangle moving down on a black background"
    wanted, made = (pipes[kind].generate(prompt, **options) for kind in ("float32", name))
    assert torch.equal(made.latents, wanted.latents), "the transformer is as it was"
    assert PSNR[name] < _psnr(made.frames, wanted.frames) < np.inf
    found, true = (pipes[kind].encode(wanted.frames) for kind in (name, "float32"))
    assert found.dtype == torch.float32 and 0 < error(found, true) < 8 * torch.finfo(getattr(torch, name)).eps
    again = pipes[name].decode(wanted.latents)  # in chunks of other lengths, whose sums round elsewhere
    assert PSNR[name] < _psnr(again, wanted.frames) < np.inf
    assert made.recipe["settings"]["vae_dtype"] == name and "vae_dtype" not in wanted.recipe["settings"]


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def test_what_a_model_says_of_it(pipes: dict[str, fastvid.Pipeline]) -> None:
    assert {name: pipe.describe()["vae_dtype"] for name, pipe in pipes.items()} == {name: name for name in pipes}
    plans = {name: pipe.plan("x") for name, pipe in pipes.items()}
    for name, plan in plans.items():
        planned = fastvid.blueprint("embedded", device="cpu", vae_dtype=name).plan("x")
        assert (planned.bytes_weights, planned.bytes_decoder) == (plan.bytes_weights, plan.bytes_decoder)
    whole, half = plans["float32"], plans["bfloat16"]
    held = sum(weight.nbytes for weight in pipes["float32"]._model.vae.parameters())
    assert whole.bytes_weights - half.bytes_weights == held // 2
    assert whole.bytes_decoder == 2 * half.bytes_decoder and plans["float16"].bytes_decoder == half.bytes_decoder


def test_a_type_that_there_is_not() -> None:
    for call in (fastvid.load, fastvid.blueprint):
        with pytest.raises(InvalidRequest, match="vae_dtype='bfloat15': .* the nearest is bfloat16"):
            call("embedded", device="cpu", vae_dtype="bfloat15")
        with pytest.raises(InvalidRequest, match="vae_dtype="):
            call("embedded", device="cpu", vae_dtype=torch.int8)
