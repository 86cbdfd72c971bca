"""Prompts that are changed while a request runs: as a storyboard that has them from the start, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import fastvid
from fastvid.engine.events import Finished, Frames, Started, Step
from fastvid.models.preset import Rollout
from fastvid.models.wan.presets import LONGLIVE

SIZE = {"height": 64, "width": 64, "fps": 16, "seed": 4}
FIRST, THEN = "a red circle moving right", "a blue square growing"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder, num_layers=2)
    made = fastvid.load(str(folder), device="cpu")
    for block in made._model.transformer.blocks:
        block.attn2.to_out[0].weight.data *= 20  # random weights hardly look at their text
    return made


def changed_after(pipe: fastvid.Pipeline, step: int, frames: int, **options):
    """The frames and the last event of a stream that is told another prompt once it has made so many steps."""
    shown, last, total = [], None, 0
    stream = pipe.stream(FIRST, num_frames=frames, **SIZE, **options)
    for last in stream:
        if isinstance(last, Step):
            assert last.step <= last.total
            total = last.total
        if isinstance(last, Step) and last.step == step:
            stream.change_prompt(THEN)
        if isinstance(last, Frames):
            shown.append(last.frames)
    return np.concatenate(shown), last, total


@pytest.mark.parametrize("recache", [True, False])
def test_a_causal_model_goes_on_with_the_new_prompt(pipe, recache):
    recipe = replace(
        LONGLIVE, rollout=Rollout(2, window=6, sink=2, recache=recache), spatial_multiple=16, temporal=4, context=2
    )
    causal = fastvid.Pipeline(replace(pipe._model, preset=recipe))
    # Blocks of two latents: 5, 8, 8 frames; a block makes 4 steps and one for the cache. The third has the new prompt.
    frames, last, total = changed_after(causal, 7, 21)
    shots = [(FIRST, 13 / 16), (THEN, 8 / 16)]
    story = list(causal.stream(verb="storyboard", shots=shots, **SIZE))
    assert isinstance(last, Finished) and torch.equal(last.latents, story[-1].latents)
    assert np.array_equal(frames, np.concatenate([e.frames for e in story if isinstance(e, Frames)]))
    assert last.recipe["changed_prompts"] == [[13, THEN]]
    assert isinstance(story[0], Started) and total == story[0].total_steps
    same = causal.generate(FIRST, num_frames=21, **SIZE)
    assert np.array_equal(frames[:13], same.frames[:13]) and not np.array_equal(frames[13:], same.frames[13:])


def test_windows_and_segments_begin_with_the_new_prompt(pipe):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    for carries in (True, False):
        recipe = replace(pipe._model.preset, window=3, overlap=1, context=1, carries=carries)
        windowed = fastvid.Pipeline(replace(pipe._model, preset=recipe))
        frames, last, _ = changed_after(windowed, 1, 17, **options)
        plain = windowed.generate(FIRST, num_frames=17, **SIZE, **options).frames
        ((at, prompt),) = last.recipe["changed_prompts"]
        assert prompt == THEN and at == 9, carries
        assert np.array_equal(frames[:at], plain[:at]) and not np.array_equal(frames[at:], plain[at:])


def test_what_is_made_in_one_window_stays_as_it_is(pipe):
    frames, last, _ = changed_after(pipe, 1, 5, num_inference_steps=3)
    assert np.array_equal(frames, pipe.generate(FIRST, num_frames=5, num_inference_steps=3, **SIZE).frames)
    assert "changed_prompts" not in last.recipe


def test_refusals(pipe, tmp_path):
    stream = pipe.stream(FIRST, num_frames=5, num_inference_steps=1, **SIZE)
    for prompt in (None, 5, "a\0b"):
        with pytest.raises(fastvid.InvalidRequest, match="prompt"):
            stream.change_prompt(prompt)
    kept = pipe.stream(FIRST, num_frames=5, num_inference_steps=1, checkpoint=str(tmp_path / "job.ckpt"), **SIZE)
    with pytest.raises(fastvid.InvalidRequest, match="checkpoint"):
        kept.change_prompt(THEN)
    with pytest.raises(fastvid.InvalidRequest, match="storyboard"):
        from fastvid.requests.request import Request

        Request.from_recipe({"fastvid": "0", "prompt": "a", "changed_prompts": [[3, "b"]]})
