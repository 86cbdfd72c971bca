"""What decoding loses of known frames is given back beside them: any chunks, frames in order, known ones exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvid
from fastvid.engine import decode
from fastvid.engine.decode import FADE, KnownFrameBlend, frames_to_blend
from fastvid.models.preset import EVERYTHING
from fastvid.requests.timeline import Segment


def segment(num_frames, skip=0, made=None):
    made = made or skip + num_frames
    return Segment(num_frames, 4, 4, made, 16, 16, skip=skip)


def decoded(count, level=100):
    return np.full((count, 4, 4, 3), level, np.uint8)


def put(part, known, frames, sizes):
    """What comes out when frames are given in chunks of these sizes, its numbers, and the most frames that waited."""
    blend, made, numbers, start, waited = KnownFrameBlend(part, known), [], [], 0, 0
    for size in sizes:
        for out, first in blend.put(frames[start : start + size], start):
            made.append(out)
            numbers.extend(range(first, first + len(out)))
        start += size
        waited = max(waited, min(start, part.skip + part.num_frames) - (numbers[-1] + 1 if numbers else part.skip))
    return (np.concatenate(made) if made else frames[:0]), numbers, waited


def test_nothing_known_nothing_changed():
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
    made, numbers, waited = put(segment(5, skip=3, made=9), {}, frames, [1, 4, 4])
    assert np.array_equal(made, frames[3:8]) and numbers == [3, 4, 5, 6, 7] and waited == 0


def test_what_is_lost_fades_away_from_a_known_frame():
    part = segment(8, skip=1, made=9)
    known = frames_to_blend(part, decoded(1, 110)[0], None, {})
    made, _, waited = put(part, known, decoded(9), [1, 4, 4])
    assert made[:, 0, 0, 0].tolist() == [108, 106, 104, 102, 100, 100, 100, 100] and waited == 0


def test_frames_wait_for_what_follows_them_and_no_more():
    part = segment(8, skip=0, made=12)
    known = frames_to_blend(part, None, decoded(1, 90)[0], {})
    assert KnownFrameBlend(part, known).last == 8  # one more has to be decoded
    made, numbers, waited = put(part, known, decoded(12), [1, 4, 4, 3])
    assert made[:, 0, 0, 0].tolist() == [100, 100, 100, 100, 98, 96, 94, 92]
    assert numbers == list(range(8)) and 0 < waited <= FADE


def test_a_picture_comes_out_as_it_is_and_the_first_one_as_it_is_decoded():
    part = segment(9)
    known = frames_to_blend(part, None, None, {0: decoded(1, 0)[0], 4: decoded(1, 120)[0]})
    made, _, _ = put(part, known, decoded(9), [9])
    assert made[:, 0, 0, 0].tolist() == [104, 108, 112, 116, 120, 116, 112, 108, 104]


def test_where_two_fade_they_share():
    part = segment(2, skip=1, made=6)
    beside = frames_to_blend(part, decoded(1, 120)[0], decoded(1, 120)[0], {})
    made, _, _ = put(part, beside, decoded(6), [1, 4, 1])
    assert made[:, 0, 0, 0].tolist() == [120, 120]  # 0.8 + 0.6 of what both lose is all of it, not 1.4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_do_not_matter(data):
    skip, count, behind = (data.draw(st.integers(low, 9)) for low in (0, 1, 1))
    total = skip + count + behind
    part = segment(count, skip, total)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    frames = rng.integers(0, 256, (total, 4, 4, 3), np.uint8)
    pictures = {n: rng.integers(0, 256, (4, 4, 3), np.uint8) for n in data.draw(st.sets(st.integers(0, count - 1)))}
    left = frames[0][::-1] if skip and data.draw(st.booleans()) else None
    after = frames[0][::-1] if data.draw(st.booleans()) else None
    known = frames_to_blend(part, left, after, pictures)
    whole, numbers, _ = put(part, known, frames, [total])
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1))) if total > 1 else [])
    sizes = np.diff([0, *cuts, total]).tolist()
    made, again, waited = put(part, known, frames, sizes)
    assert np.array_equal(whole, made) and numbers == again == list(range(skip, skip + count))
    assert waited <= FADE
    for frame, picture in pictures.items():
        if skip + frame > 0:
            assert np.array_equal(made[frame], picture)


# ---------------------------------------------------------------- through the pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder)
    loaded = fastvid.load(str(folder), device="cpu")
    recipe = dataclasses.replace(
        loaded._model.preset, per_token_timesteps=True, patterns=EVERYTHING, window=6, context=2, carries=True
    )
    return type(loaded)(dataclasses.replace(loaded._model, preset=recipe))


STEPS = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 1}


def clip(frames, level, size=(64, 80)):
    """A smooth picture that goes on."""
    y, x = np.mgrid[: size[0], : size[1]]
    base = np.stack((x * 2, y * 2, x + y), -1) % 200
    return np.stack([np.clip(base + level + f, 0, 255) for f in range(frames)]).astype(np.uint8)


def without(pipe, monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(decode, "frames_to_blend", lambda *_: {})
        return run()


@pytest.mark.parametrize("bridge", [3, 8, 13])
def test_a_bridge_begins_and_ends_nearer_to_its_clips(pipe, monkeypatch, bridge):
    a, b = clip(9, 10), clip(12, 40)

    def run():
        return pipe.blend(a, b, "a", num_frames=bridge, **STEPS)

    made, plain = run(), without(pipe, monkeypatch, run)
    assert len(made.frames) == len(plain.frames) == 9 + bridge + 12
    assert np.array_equal(made.frames[:9], a) and np.array_equal(made.frames[9 + bridge :], b)
    assert torch.equal(made.latents, plain.latents)
    jump = [np.abs(np.diff(v.frames.astype(int), axis=0)).mean((1, 2, 3)) for v in (made, plain)]
    for seam in (8, 8 + bridge):
        assert jump[0][seam] < 0.85 * jump[1][seam]
    far = slice(9 + FADE, 9 + bridge - FADE)
    assert np.array_equal(made.frames[far], plain.frames[far])


def test_pictures_behind_the_first_come_out_as_they_are(pipe):
    pictures = clip(3, 30)
    made = pipe.generate("a", image=pictures[0], keyframes={6: pictures[1]}, last_image=pictures[2], num_frames=17,
                         size="80x64", **STEPS)  # fmt: skip
    assert np.array_equal(made.frames[6], pictures[1]) and np.array_equal(made.frames[16], pictures[2])
    head = pipe.decode(pipe.encode(pictures[:1]))
    assert np.abs(made.frames[0].astype(int) - head[0]).max() <= 1
