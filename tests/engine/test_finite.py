"""NaN and infinity stop a request, with the step and the likely cause; nothing makes black frames of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastvid
from fastvid.engine import finite

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 5, "num_inference_steps": 4, "seed": 5, "width": 64, "height": 64}
CLIP = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


def broken_from(call: int, module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """One value of what a module makes is not finite, from this call on."""
    forward, calls = module.forward, iter(range(1, 1000))

    def changed(*args, **options):
        out = forward(*args, **options).clone()
        if next(calls) >= call:
            out[(-1,) * out.ndim] = value
        return out

    monkeypatch.setattr(module, "forward", changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
def test_a_step_that_is_not_finite_stops_the_request(pipe, monkeypatch, value, solver) -> None:
    broken_from(3, pipe._model.transformer, monkeypatch, value)
    steps = []
    with pytest.raises(fastvid.Error, match=r"^step 3 of 4 \(noise level 0\.\d+\): the latents are not finite"):
        for event in pipe.stream(PROMPT, **SHORT, guidance_scale=1.0, solver=solver):
            steps += [event.step] if isinstance(event, fastvid.Step) else []
    assert steps == [1, 2]


def test_nothing_that_is_not_finite_is_saved(pipe, monkeypatch, tmp_path) -> None:
    wanted = pipe.generate(PROMPT, **SHORT, guidance_scale=1.0).frames
    with monkeypatch.context() as patch:
        broken_from(3, pipe._model.transformer, patch, float("nan"))
        with pytest.raises(fastvid.Error, match="not finite"):
            pipe.generate(PROMPT, **SHORT, guidance_scale=1.0, checkpoint=tmp_path / "c", checkpoint_every=0)
    resumed = [event.frames for event in pipe.resume(tmp_path / "c") if isinstance(event, fastvid.Frames)]
    assert np.array_equal(np.concatenate(resumed), wanted)


def test_frames_that_are_not_finite_stop_the_request(pipe, monkeypatch) -> None:
    latents = pipe.generate(PROMPT, **SHORT).latents
    broken_from(1, pipe._model.vae.decoder.up_blocks[-1], monkeypatch, float("nan"))
    for call in (lambda: pipe.generate(PROMPT, **SHORT), lambda: pipe.decode(latents)):
        with pytest.raises(fastvid.Error, match="the decoded frames are not finite"):
            call()


def test_given_frames_and_prompts_that_are_not_finite_stop_it(pipe, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        broken_from(1, pipe._model.vae.encoder.mid_block, patch, float("inf"))
        calls = [
            lambda: pipe.extend(CLIP, PROMPT, num_frames=4, num_inference_steps=1),
            lambda: pipe.edit(CLIP, PROMPT, num_inference_steps=1),
            lambda: pipe.encode(CLIP),
        ]
        for call in calls:
            with pytest.raises(fastvid.Error, match="the latents of the given frames are not finite"):
                call()
    broken_from(1, pipe._model.text_encoder, monkeypatch, float("nan"))
    for call in (lambda: pipe.generate("a blue star", **SHORT), lambda: pipe.embed("a green star")):
        with pytest.raises(fastvid.Error, match="the prompt's embeddings are not finite"):
            call()


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_of_the_caller_are_refused_beforehand(pipe, name, value) -> None:
    given = {"prompt_embeds": pipe.embed(PROMPT), "latents": pipe.generate(PROMPT, **SHORT).latents}
    given[name].view(-1)[7] = value
    with pytest.raises(fastvid.InvalidRequest, match=f"^{name} holds NaN or infinity"):
        pipe.generate(**given, **SHORT)


@pytest.mark.parametrize("what", ["step 1", finite.DECODED])
def test_half_precision_names_itself(what) -> None:
    model = SimpleNamespace(dtype=torch.float16, vae_dtype=torch.float16, loras=())
    option = "vae_dtype" if what == finite.DECODED else " dtype"
    assert f"{option}='bfloat16' or 'float32'" in str(finite.not_finite(model, what))
    assert "65504" in str(finite.not_finite(model, what))


def test_a_lora_is_named() -> None:
    model = SimpleNamespace(dtype=torch.float32, vae_dtype=torch.float32, loras=(("a", 1.0),))
    assert "LoRA" in str(finite.not_finite(model, "x")) and "LoRA" not in str(finite.not_finite(model, finite.DECODED))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_and_strided_tensors_are_finite(dtype) -> None:
    x = torch.full((1, 8, 3, 64, 64), 60000.0, dtype=dtype).permute(0, 2, 3, 4, 1)
    assert finite.is_finite(x) and finite.is_finite(x[..., ::2])
    for value in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[0, 2, 63, 63, 7] = value
        assert not finite.is_finite(y)
