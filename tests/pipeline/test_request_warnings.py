"""Requests that are made, but with a warning: unknown words, empty and cut prompts, unused negative prompts, sizes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import fastvid
from fastvid import FastvidWarning, notices
from fastvid.cli.commands import main

KNOWN = "a green star spinning on a navy background"
SMALL = {"num_inference_steps": 1, "num_frames": 5, "seed": 2}


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


def said(pipe: fastvid.Pipeline, prompt: str, verb: str = "generate", **options: Any) -> list[str]:
    """The warnings of a stream that is started and dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.stream(prompt, verb=verb, **{**SMALL, **options}).close()
    assert all(issubclass(one.category, FastvidWarning) and one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("prompt", [KNOWN, "A RED circle", "a blue square, moving left."])
def test_known_words_are_not_warned_of(pipe: fastvid.Pipeline, prompt: str) -> None:
    unknown = [word for word in said(pipe, prompt) if "does not know" in word and "," not in prompt]
    assert unknown == []


def test_unknown_words_are_named_once_with_those_that_are_known(pipe: fastvid.Pipeline) -> None:
    (text,) = said(pipe, "a red zebra beside a red zebra, über a café")
    assert all(f"'{word}'" in text for word in ("zebra", "beside", "über", "café")) and text.count("zebra") == 1
    assert "'red'" not in text and "circle, square" in text


@pytest.mark.parametrize("prompt", ["", " \n\t "])
def test_an_empty_prompt(pipe: fastvid.Pipeline, prompt: str) -> None:
    (text,) = said(pipe, prompt)
    assert text.startswith("prompt is empty")


def test_a_cut_prompt_says_how_much_is_read_and_what_is_dropped(pipe: fastvid.Pipeline) -> None:
    # 15 words and the end token are 16 tokens: all are read.
    assert said(pipe, "red " * 15) == []
    (text,) = said(pipe, "red " * 15 + "blue star on white")
    assert "reads 16 tokens" in text and "'blue star on white'" in text


def test_every_prompt_of_the_caller_is_looked_at(pipe: fastvid.Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.stream(None, verb="storyboard", shots=[(KNOWN, 0.3), ("a cat", 0.3)], seed=1).close()
    assert any("shots[1]" in str(one.message) and "cat" in str(one.message) for one in caught)
    clip = np.zeros((5, 64, 64, 3), np.uint8)
    assert "source_prompt" in said(pipe, KNOWN, "edit", video=clip, source_prompt="a hat", num_frames=None)[0]
    assert "negative_prompt" in said(pipe, KNOWN, negative_prompt="fog")[0]


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_negative_prompt_without_guidance(pipe: fastvid.Pipeline, scale: float) -> None:
    (text,) = said(pipe, KNOWN, negative_prompt="blue", guidance_scale=scale, known_guidance_scale=scale)
    assert "negative_prompt is not used" in text and f"guidance_scale={scale:g}" in text
    assert said(pipe, KNOWN, guidance_scale=scale) == []
    assert said(pipe, KNOWN, negative_prompt="blue", guidance_scale=1.01) == []


@pytest.mark.parametrize(("size", "word"), [("640x480", "larger"), ("96x1080", "larger")])
def test_a_size_beyond_training(pipe: fastvid.Pipeline, size: str, word: str) -> None:
    (text,) = said(pipe, KNOWN, size=size)
    assert size in text and word in text
    assert "160x96" in text or "96x160" in text


def test_sizes_of_a_published_model() -> None:
    plans = fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=80 << 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.plan("a", size="832x480")
        plans.plan("a", size="480x832", draft=True)
        plans.plan("a", size="832x464")
    with pytest.warns(FastvidWarning, match=r"larger .* is 832x480"):
        plans.plan("a", size="1920x1080", num_frames=5)
    with pytest.warns(FastvidWarning, match=r"smaller .* is 480x832"):
        plans.plan("a", size="64x128")


def test_an_expanded_prompt_is_shown(pipe: fastvid.Pipeline) -> None:
    (text,) = said(pipe, "golden coin falling, night", expand_prompt=True)
    assert "'a yellow circle moving down on a black background'" in text


def test_the_command_line_writes_warnings_to_stderr(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "a red bicycle", "-o", str(tmp_path / "a.npy"), "--steps", "1", "--num-frames", "1", "--quiet"]
    assert main([*words, "--size", "64x64"]) == 0
    assert "fastvid: warning: prompt: the model does not know 'bicycle'" in capsys.readouterr().err


def test_a_changed_prompt_and_an_embedded_one_are_looked_at(pipe: fastvid.Pipeline) -> None:
    stream = pipe.stream(KNOWN, **SMALL)
    with pytest.warns(FastvidWarning, match="does not know 'kite'") as said:
        stream.change_prompt("a red kite")
    assert said[0].filename == __file__
    stream.close()
    with pytest.warns(FastvidWarning, match="does not know 'kite'"):
        pipe.embed("a red kite")


def test_a_warning_can_be_printed_and_sent() -> None:
    """It may quote a stranger's file."""
    with pytest.warns(FastvidWarning) as said:
        notices.warn("key \ud800 of " + "x" * 10_000)
    text = str(said[0].message)
    assert text.encode() and "\\ud800" in text and len(text) < 5000


def test_finalizing_a_draft_names_the_inputs_that_it_does_not_take(pipe: fastvid.Pipeline) -> None:
    picture = np.full((96, 96, 3), 120, np.uint8)
    draft = pipe.generate(
        "a red circle", image=picture, draft=True, size="128x128", num_frames=5, num_inference_steps=1
    )
    with pytest.warns(fastvid.FastvidWarning, match="the draft was made with image=; the final video"):
        pipe.finalize(draft, num_inference_steps=2)
