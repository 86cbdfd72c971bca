"""Messages between a program and its workers: what is sent arrives as it was, or is refused by name."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastvid
from fastvid.engine.events import Finished
from fastvid.media.clip import open_picture
from fastvid.media.sound import Sound, SoundFile, Span, Track
from fastvid.requests.inputs import read_mask
from fastvid.workers import messages
from fastvid.workers.channel import Message

PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN | st.fractions().map(lambda f: Fraction(f)) | st.text(min_size=1).filter(lambda t: "\0" not in t).map(Path),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_sent_arrives(value: object) -> None:
    header, payload = messages.pack({"value": value, "other": 1})
    sent = Message(json.loads(json.dumps(header)), payload)
    assert messages.unpack(sent) == {"value": value, "other": 1}


@given(st.integers(0, 2**31))
def test_arrays_and_tensors_arrive(seed: int) -> None:
    draw = np.random.default_rng(seed)
    array = draw.integers(0, 255, (3, 4, 5), dtype=np.uint8)[::-1, :, ::2]
    tensor = torch.randn(2, 3).to(torch.bfloat16).t()
    sent = {"a": [array, {"t": tensor}], "flag": array > 9, "n": np.int64(3), "empty": array[:0]}
    arrived = messages.unpack(messages.pack(sent))
    assert np.array_equal(arrived["a"][0], array) and torch.equal(arrived["a"][1]["t"], tensor) and arrived["n"] == 3
    assert arrived["flag"].dtype == bool and arrived["empty"].shape == (0, 4, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P"])
def test_a_picture_arrives_as_it_looks(mode: str) -> None:
    draw = np.random.default_rng()
    picture = Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).convert(mode)
    if mode.endswith("A"):
        picture.putalpha(Image.fromarray(draw.integers(0, 255, (20, 24), dtype=np.uint8)))
    if mode == "P":
        picture.info["transparency"] = 3
    arrived = messages.unpack(messages.pack({"image": [picture]}))["image"][0]
    assert np.array_equal(open_picture(arrived, "image"), open_picture(picture, "image"))
    assert np.array_equal(read_mask("image", arrived), read_mask("image", picture))


def test_events_and_videos_arrive() -> None:
    latents = torch.randn(1, 4, 2, 3, 3)
    event = Finished(7, 5, 16.0, latents, {"prompt": "a", "shots": [("b", 1.5)]}, {"denoise": 0.1})
    video = fastvid.Video(np.zeros((5, 8, 8, 3), np.uint8), 16.0, 7, latents, {"seed": 7})
    arrived = messages.unpack(messages.pack({"event": event, "video": video}))
    assert type(arrived["event"]) is Finished and torch.equal(arrived["event"].latents, latents)
    assert arrived["event"].recipe == event.recipe and arrived["event"].seconds == event.seconds
    assert np.array_equal(arrived["video"].frames, video.frames) and arrived["video"].recipe == {"seed": 7}


def test_sound_arrives() -> None:
    sound = Sound(np.linspace(-1, 1, 16000, dtype=np.float32).reshape(-1, 2), 8000)
    track = Track((Span(sound, 0.0, 0.25, 0.5), Span(SoundFile("/a.mp4", "mov", 0.5, 44100, 1), 1.0, 0.0, 2.0)), 3.0)
    video = fastvid.Video(np.zeros((16, 64, 64, 3), np.uint8), 16.0, 0, audio=sound)
    arrived = messages.unpack(messages.pack({"track": track, "video": video, "clip": fastvid.open_clip(video)}))
    first, second = arrived["track"].spans
    assert second == track.spans[1] and (first.begin, first.seconds, arrived["track"].seconds) == (0.25, 0.5, 3.0)
    for one in (first.source, arrived["video"].audio, arrived["clip"].audio):
        assert one.rate == 8000 and np.array_equal(one.samples, sound.samples)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, np.array(["a"]), np.arange(3.0).astype(">f8"), [open]])
def test_what_cannot_be_sent_is_named(value: object) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="image"):
        messages.pack({"image": value})


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("OutOfMemory", fastvid.OutOfMemory),
        ("CheckpointError", fastvid.CheckpointError),
        ("OutOfMemoryError", torch.OutOfMemoryError),
        ("KeyError", KeyError),
        ("WorkerFailed", fastvid.Error),
        ("SystemExit", fastvid.Error),
        ("Tensor", fastvid.Error),
        ("SomethingElse", fastvid.Error),
    ],
)
def test_errors_come_back_as_what_they_were(kind: str, wanted: type) -> None:
    error = messages.unpack_error({"kind": kind, "text": "what was said"})
    assert type(error) is wanted and "what was said" in str(error)
