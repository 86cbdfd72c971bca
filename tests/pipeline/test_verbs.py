"""The verbs on the embedded model and on small ones: what stays comes out byte for byte, what is counted is right, and
what a model cannot do is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipelines import prepared
from tiny import write_checkpoint

import fastvid
from fastvid.benchmarks.quality.clips import Scene, draw
from fastvid.benchmarks.quality.verb_cases import to_uint8
from fastvid.engine import conditioning
from fastvid.engine.pixels import KnownFrames
from fastvid.engine.windows import spans
from fastvid.pipeline.verbs import lay_out, rules_of
from fastvid.requests import timeline
from fastvid.requests.inputs import read
from fastvid.requests.request import Request
from fastvid.requests.timeline import Kept, Rules, Stretch, lay
from fastvid.sampling.noise import latent_noise

SCENE = Scene("red", "circle", "moving right", "white", across=0.4)
FAST = {"num_inference_steps": 1, "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    return fastvid.load("embedded", device="cpu")


def with_recipe(pipe, **changed):
    return type(pipe)(replace(pipe._model, preset=replace(pipe._model.preset, **changed)))


def clip(frames: int = 9, height: int = 64, width: int = 64, scene: Scene = SCENE) -> np.ndarray:
    return to_uint8(draw(scene, frames, height, width))


# ---------------------------------------------------------------- frames that stay, frames that are counted


@pytest.mark.slow
@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("frames, size, added", [(9, (64, 64), 5), (1, (66, 71), 3), (6, (64, 80), 24)])
def test_extend_keeps_the_clip_byte_for_byte(pipe, carries, frames, size, added):
    pipe, given_clip = with_recipe(pipe, carries=carries, window=5), clip(frames, *size)
    both = pipe.extend(given_clip, "a red circle", num_frames=added, direction="both", **FAST).frames
    assert both.shape == (2 * added + frames, *size, 3)
    assert np.array_equal(both[added : added + frames], given_clip)
    after = pipe.extend(given_clip, "a red circle", num_frames=added, **FAST).frames
    assert np.array_equal(after, both[added:])  # what comes after does not depend on what is made before
    before = pipe.extend(given_clip, "a red circle", num_frames=added, direction="before", **FAST).frames
    assert np.array_equal(before, both[: added + frames])


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("added", [1, 7, 22])
def test_loop_and_blend_keep_their_clips(pipe, carries, added):
    pipe, a, b = with_recipe(pipe, carries=carries, window=5, context=2, overlap=1), clip(9), clip(7, 80, 96)
    looped = pipe.loop(fastvid.Video(a, 8.0, 0), "a red circle", num_frames=added, **FAST)
    assert looped.frames.shape == (9 + added, 64, 64, 3) and np.array_equal(looped.frames[:9], a) and looped.fps == 8
    slow = fastvid.Video(b, 8.0, 0)
    joined = pipe.blend(fastvid.Video(a, 16.0, 0), slow, "a red circle", num_frames=added, **FAST)
    second = fastvid.open_clip(slow).resized(64, 64).resampled(16.0)
    assert joined.fps == 16 and joined.frames.shape == (9 + added + second.num_frames, 64, 64, 3)
    assert np.array_equal(joined.frames[:9], a)
    assert np.array_equal(joined.frames[9 + added :], second.read())


def test_the_strength_of_an_edit_that_says_none(pipe):
    frames, mask = clip(5), np.ones((64, 64), bool)
    own, other = pipe._model.preset, with_recipe(pipe, edit_strength=None)

    def strength(at, **options):
        return prepared(at, "edit", video=frames, prompt="a", **FAST, **options).job.request.strength

    assert strength(pipe) == strength(pipe, mask=mask) == own.edit_strength == 0.4
    assert strength(other) == strength(other, mask=mask) == strength(pipe, source_prompt="b") == 0.6
    assert strength(pipe, width=96, height=64) == strength(other, width=96, height=64) == 1.0
    assert strength(pipe, width=96, height=64, strength=0.5) == strength(pipe, strength=0.5) == 0.5


def test_a_mask_is_cut_as_its_clip_is(pipe):
    """A picture of the mask as the clip shows where it is: of another shape both are cut in the middle."""
    mask = np.zeros((80, 160), bool)
    mask[20:60, 50:110] = True
    frames = np.repeat(np.where(mask, 255, 0)[None, :, :, None], 5, 0).repeat(3, -1).astype(np.uint8)
    for width, height in ((64, 64), (160, 64), (80, 80), (128, 100)):
        job = prepared(pipe, "edit", video=frames, prompt="a", mask=mask, width=width, height=height, **FAST).job
        shown = job.request.video.read(0, 1)[0, :, :, 0] > 127
        assert job.request.mask.shape == (1, height, width) and 0.1 < shown.mean() < 0.9
        assert ((job.request.mask[0] > 127) != shown).mean() < 0.03, (width, height)


def test_a_mask_keeps_bytes_and_a_whole_one_keeps_none(pipe):
    given_clip, mask = clip(9, 70, 66), np.zeros((9, 70, 66), bool)
    for frame in range(9):
        mask[frame, 10:50, 5 * frame : 5 * frame + 20] = True
    made = pipe.edit(given_clip, "a blue square", mask=mask, **FAST).frames
    assert made.shape == given_clip.shape and np.array_equal(made[~mask], given_clip[~mask])
    assert not np.array_equal(made[mask], given_clip[mask])
    assert np.array_equal(pipe.edit(given_clip, "a blue square", mask=mask & False, **FAST).frames, given_clip)
    whole = pipe.edit(given_clip, "a blue square", mask=mask | True, **FAST).frames
    assert np.array_equal(whole, pipe.edit(given_clip, "a blue square", **FAST).frames)


def test_outpainting_keeps_the_clip_in_the_middle(pipe):
    given_clip = clip(5, 64, 66)
    made = pipe.edit(given_clip, "a red circle", width=100, height=80, strength=1.0, **FAST).frames
    assert made.shape == (5, 80, 100, 3) and np.array_equal(made[:, 8:72, 17:83], given_clip)


def test_flow_edit_to_the_same_prompt_gives_the_source_back(pipe):
    given_clip = clip(9)
    made = pipe.edit(given_clip, SCENE.caption, source_prompt=SCENE.caption, guidance_scale=1.0, seed=1).frames
    assert np.abs(made.astype(int) - pipe.decode(pipe.encode(given_clip))).max() <= 1


def test_flow_edit_runs_eulers_method_unless_told(pipe):
    def solver(**options):
        request = Request.make("edit", prompt="a", video=clip(5), **options)
        return request.resolve(pipe._model.preset).solver

    assert solver() == "unipc" and solver(source_prompt="b") == "euler"
    assert solver(source_prompt="b", solver="dpm++") == "dpm++"


# ---------------------------------------------------------------- what is known reaches the frames


def test_known_latents_come_out_as_the_vae_has_them(pipe):
    """A picture at the start, and the clip in front of what goes on, as the VAE alone gives them back."""
    truth = clip(9)
    made = pipe.generate("a red circle", image=truth[0], num_frames=9, width=64, height=64, **FAST)
    assert np.abs(made.frames[0].astype(int) - pipe.decode(pipe.encode(truth[:1]))[0]).max() <= 1
    assert torch.allclose(made.latents[:, :, :1], pipe.encode(truth[:1]), atol=1e-5)
    last = pipe.generate("a red circle", last_image=truth[8], num_frames=9, width=64, height=64, **FAST)
    held = pipe.encode(np.repeat(truth[8:], 5, axis=0))[:, :, 1:]
    assert torch.allclose(last.latents[:, :, 2:], held, atol=1e-4)


def test_noise_of_what_comes_before_has_indices_below_zero(pipe):
    rules = rules_of(pipe._model)
    request = Request.make("extend", video=clip(9), prompt="", num_frames=100, direction="both", seed=3)
    laid = lay_out(read(request).resolve(pipe._model.preset), rules)
    kept = next(i for i, part in enumerate(laid.parts) if isinstance(part, Kept))
    indices = [
        range(s.origin + s.left_columns, s.origin + s.columns - s.right_columns)
        for s in laid.parts[:kept] + laid.parts[kept + 1 :]
    ]
    flat = [index for each in indices for index in each]
    assert len(set(flat)) == len(flat)  # no noise is used twice
    assert all(index < 0 for each in indices[:kept] for index in each)
    assert all(index >= 0 for each in indices[kept:] for index in each)
    assert not torch.equal(latent_noise(3, (1, 1, 2, 2), start=flat[0]), latent_noise(3, (1, 1, 2, 2), start=flat[-1]))


# ---------------------------------------------------------------- long ones


def test_what_leads_up_to_a_clip_is_made_from_right_to_left(pipe):
    """Windows from left to right would not know of the clip until the last one: nothing would join."""
    pipe, given_clip = with_recipe(pipe, window=5, context=2), clip(9)
    stretch = Stretch(40, 64, 64, after=timeline.Edge(given_clip), after_frames=9)
    laid = timeline.Timeline(tuple(lay(stretch, rules_of(pipe._model))))
    assert len(laid.parts) > 2 and laid.order() == list(range(len(laid.parts)))[::-1]
    near = pipe.extend(given_clip, "a red circle", num_frames=12, direction="before", **FAST).frames
    assert near.shape == (21, 64, 64, 3) and np.array_equal(near[12:], given_clip)


def test_a_clip_that_comes_later_is_encoded_as_in_mid_stream(pipe):
    """Its latents are near those that it has in a stream where it is not the first."""
    whole = clip(29)
    known = KnownFrames(right=whole[17:])
    segment = replace(lay(Stretch(17, 64, 64), Rules())[0], model_frames=29, right=12)
    ((column, latents),) = conditioning.known_latents(pipe._model, segment, known)
    there = pipe.encode(whole)[:, :, 5:]
    assert column == 5 and latents.shape == there.shape
    away = (latents - there).flatten(3).norm(dim=(1, 3)) / there.flatten(3).norm(dim=(1, 3))
    assert float(away[0, 0]) < 0.2 and float(away[0, 2]) < 0.05


@pytest.mark.parametrize("carries", [True, False])
def test_a_long_video_is_its_windows(pipe, carries):
    pipe = with_recipe(pipe, carries=carries, window=5, overlap=2, context=2)
    made = pipe.generate("a red circle", num_frames=50, **FAST)
    assert made.frames.shape == (50, 64, 64, 3)
    plan = pipe.plan("a red circle", num_frames=50, num_inference_steps=1)
    assert plan.windows == 4 if carries else plan.segments == 4
    short = pipe.generate("a red circle", num_frames=17, **FAST).frames
    assert np.array_equal(made.frames[:17], short)  # the first window knows of nothing else


@given(
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(3, 10),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_every_stretch_is_laid_whole(frames, before, after, window, context, carries, has_before):
    rules = Rules(window=max(window, 2 * context + 1), context=context, overlap=1, carries=carries)
    stretch = Stretch(
        frames,
        64,
        64,
        before=timeline.Edge("a", before) if has_before else None,
        before_frames=before,
        after=timeline.Edge("b") if after else None,
        after_frames=after,
    )
    segments = lay(stretch, rules)
    assert sum(s.num_frames for s in segments) == frames
    for segment in segments:
        rest = segment.model_frames - segment.right - segment.skip - segment.num_frames
        assert 0 <= rest < 4 and (segment.model_frames - 1) % 4 == 0 and segment.skip >= segment.left
        assert len(segments) == 1 or segment.columns <= rules.window
    assert [s.source_start for s in segments] == list(np.cumsum([0, *(s.num_frames for s in segments)])[:-1])
    timeline.Timeline(tuple(segments)).order()
    if has_before and after and len(segments) > 1:  # what brings two clips together sees enough of both
        assert segments[-1].num_frames == 4 * (rules.window - 2 * context)
        assert all(s.left_columns == min(context, 1 + (before - 1) // 4) for s in segments[:1])


def test_the_window_that_joins_has_as_much_to_make_as_it_can(pipe):
    pipe = with_recipe(pipe, window=7, overlap=2, context=2)
    request = Request.make("loop", video=clip(9), prompt="", num_frames=33, seed=1)
    (segment,) = lay_out(read(request).resolve(pipe._model.preset), rules_of(pipe._model)).segments
    found = spans(pipe._model, segment)
    assert found[-1] == (segment.columns - 7, segment.columns) and found[-2][1] == segment.columns - 5
    short = replace(segment, num_frames=4, model_frames=segment.left + 4 + segment.right)
    assert spans(pipe._model, short) == [(0, short.columns)]  # what fits is one window


def test_a_shot_begins_with_the_nearest_column():
    stretch = Stretch(33, 64, 64, prompts=((0, 0), (16, 1)))
    (segment,) = lay(stretch, Rules(carries=True))
    assert [segment.turn_column(f) for f in (1, 2, 3, 4, 5, 16, 17, 32)] == [1, 1, 2, 2, 2, 5, 5, 8]
    assert replace(segment, num_frames=17).turn_column(16) == 4  # the last frame is someone's too


# ---------------------------------------------------------------- other models


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2v")
    write_checkpoint(folder)
    return fastvid.load(str(folder), device="cpu")


@pytest.mark.parametrize(
    "verb, options",
    [
        ("extend", {"direction": "both", "num_frames": 5}),
        ("loop", {"num_frames": 6}),
        ("blend", {"num_frames": 3}),
        ("edit", {}),
        ("edit", {"source_prompt": "a blue circle"}),
        ("edit", {"mask": np.eye(64, dtype=bool)}),
        ("finalize", {"width": 96, "height": 80}),
    ],
)
def test_a_text_model_runs_every_verb(text_only, verb, options):
    clips = (clip(5), clip(5)) if verb == "blend" else (clip(5),)
    made = getattr(text_only, verb)(*clips, "a red circle", **options, **FAST).frames
    count = {"extend": 15, "loop": 11, "blend": 13}.get(verb, 5)
    assert made.shape == (count, *((80, 96) if verb == "finalize" else (64, 64)), 3)


def test_a_model_of_pictures_refuses_what_it_cannot_see(tmp_path):
    """A mask of whole frames says nothing of a region; a causal model sees nothing of what comes later."""
    from fastvid.models import preset as patterns

    write_checkpoint(tmp_path)
    pipe = fastvid.load(str(tmp_path), device="cpu")
    pictured = with_recipe(pipe, patterns=patterns.PICTURE)
    with pytest.raises(fastvid.InvalidRequest, match=r"edit: .* cannot take a region to keep \(mask=\)"):
        pictured.edit(clip(5), "a red circle", mask=np.eye(64, dtype=bool), **FAST)
    causal = with_recipe(pipe, patterns=patterns.CAUSAL)
    with pytest.raises(fastvid.InvalidRequest, match="loop: .* cannot take what stands before and after; it can take"):
        causal.loop(clip(5), "a red circle", **FAST)
