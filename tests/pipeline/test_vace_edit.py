"""VACE: a region of a clip made anew, or what is around it, by the control branch; what stays is byte-identical."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import HEIGHT, SIGMAS, WIDTH, clip, noise, prepared, region, run_theirs, share_of_equal, write_vace
from streams import run, same, snapshots

import fastvid
from fastvid.cli.commands import main
from fastvid.engine import controls
from fastvid.engine.pixels import KnownFrames
from fastvid.engine.source_clip import SourceClip
from fastvid.media.metadata import read_recipe
from fastvid.planning.speed import frames_encoded

FAST = {"num_inference_steps": 2, "strength": 1.0, "seed": 3, "solver": "euler"}
LEVELS = [1.0, 0.8, 0.5]  # from pure noise on, as `generate`
GREY = 1 / 127.5  # 127 is as near to grey as 8 bits come


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vace")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write_vace(folder)


@pytest.fixture(scope="module")
def pipe(theirs: Any, folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def short(pipe: fastvid.Pipeline) -> fastvid.Pipeline:
    """The same in segments of three columns, each shown the last one of the segment before."""
    return type(pipe)(replace(pipe._model, preset=replace(pipe._model.preset, window=3, context=1)))


def drawn(seed: int, frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def seen(
    pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch, verb: str, **options: Any
) -> tuple[fastvid.Video, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What a verb makes, and the frames and masks that its control branch was shown, by segment."""
    shown, control_video = [], controls.control_video
    with monkeypatch.context() as patch:
        patch.setattr(controls, "control_video", lambda *given: shown.append(control_video(*given)) or shown[-1])
        return getattr(pipe, verb)(**{"prompt": "a red circle", **options}), shown


def signed(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1


# ---------------------------------------------------------------- what the model is shown


def test_a_region_is_grey_and_white(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on odd sizes, whose edge goes on; a soft mask is shown as it is, and parts the pixels at its middle."""
    video, mask = drawn(1, 6, 70, 90), region(6, 70, 90)
    made, ((frames, masks),) = seen(pipe, monkeypatch, "edit", video=video, mask=mask, **FAST)
    assert frames.shape == (9, 3, 80, 96) and masks.shape == (9, 1, 80, 96)
    changes = mask > 127
    assert 0 < changes.mean() < 1 and (mask[changes] < 255).any()
    torch.testing.assert_close(masks[:6, 0, :70, :90], torch.from_numpy(mask / 255).float())
    wanted = signed(video).masked_fill(torch.from_numpy(changes)[:, None], 0)
    torch.testing.assert_close(frames[:6, :, :70, :90], wanted)
    for one in (frames, masks):
        assert torch.equal(one[6:], one[5:6].expand(3, -1, -1, -1))
        assert torch.equal(one[:, :, 70:], one[:, :, 69:70].expand(-1, -1, 10, -1))
        assert torch.equal(one[..., 90:], one[..., 89:90].expand(-1, -1, -1, 6))
    assert np.array_equal(made.frames[~changes], video[~changes])
    assert not np.array_equal(made.frames[changes], video[changes])


def test_what_is_around_a_clip_is_grey_and_white(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    video = drawn(2, 5, 64, 66)
    made, ((frames, masks),) = seen(pipe, monkeypatch, "edit", video=video, width=100, height=80, **FAST)
    inside = (..., slice(8, 72), slice(17, 83))
    torch.testing.assert_close(frames[inside], signed(video))
    assert not masks[inside].any()
    rest = masks.clone()
    rest[inside] = 1
    assert rest.all() and (frames != 0).sum() == (frames[inside] != 0).sum()
    assert made.frames.shape == (5, 80, 100, 3) and np.array_equal(made.frames[:, 8:72, 17:83], video)


def test_another_aspect_ratio(pipe: fastvid.Pipeline) -> None:
    video = drawn(3, 5, 64, 64)
    made = pipe.edit(video, "a", aspect="16:9", **FAST).frames
    assert made.shape == (5, 64, 114, 3) and np.array_equal(made[:, :, 25:89], video)


def test_an_edit_of_everything_is_shown_nothing(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"strength": 0.5}, {"source_prompt": "a blue square"}):
        made, ((frames, masks),) = seen(
            pipe, monkeypatch, "edit", video=drawn(4, 5), num_inference_steps=2, seed=1, **options
        )
        assert not frames.any() and masks.all() and made.frames.shape == (5, HEIGHT, WIDTH, 3)


# ---------------------------------------------------------------- what it makes of that


def test_frames_equal_diffusers(theirs: Any, pipe: fastvid.Pipeline) -> None:
    """Which is given the clip with exact grey in the region, as one that is not of 8 bits."""
    video, mask, latents = drawn(5, 9), region(9) > 127, noise(3)
    made = pipe.edit(
        video,
        "a red circle moving left",
        negative_prompt="blue square",
        mask=mask,
        solver="euler",
        sigmas=SIGMAS,
        strength=1.0,
        guidance_scale=4.0,
        latents=latents,
    ).frames
    frames, change = torch.from_numpy(video / 255).float().movedim(-1, 1)[None], torch.from_numpy(mask)[None, :, None]
    change = change.expand(-1, -1, 3, -1, -1)
    wanted = run_theirs(theirs, latents, video=frames.masked_fill(change, 0.5), mask=change.float())
    assert share_of_equal(made[mask], wanted[mask]) >= 0.999 and made[mask].std() > 5
    assert np.array_equal(made[~mask], video[~mask])
    blind = run_theirs(theirs, latents)
    assert share_of_equal(made[mask], blind[mask]) < 0.9, "what stays counts for what is made"


def test_it_is_generate_with_a_grey_region(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    video, mask = drawn(6, 7), region(7)
    changes = mask > 127
    greyed = np.where(changes[..., None], np.uint8(127), video)
    options = {"mask": mask, "sigmas": LEVELS, "solver": "euler", "seed": 5}
    edited, ((frames, masks),) = seen(pipe, monkeypatch, "edit", video=video, strength=1.0, **options)
    made, ((others, again),) = seen(pipe, monkeypatch, "generate", video=greyed, size=f"{WIDTH}x{HEIGHT}", **options)
    assert torch.equal(masks, again) and float((frames - others).abs().max()) < GREY
    assert torch.equal(frames[(masks <= 0.5).expand_as(frames)], others[(masks <= 0.5).expand_as(frames)])
    assert share_of_equal(edited.frames[changes], made.frames[changes]) >= 0.99
    assert np.array_equal(edited.frames[~changes], video[~changes])


@pytest.mark.parametrize("case", ["all", "none", "between"])
def test_where_nothing_is_grey_in_part_it_is_generate_to_the_bit(pipe: fastvid.Pipeline, case: str) -> None:
    """A mask that is white, black, or black in the first and last frame alone."""
    video = drawn(7, 9)
    mask = np.full((9, HEIGHT, WIDTH), case != "none")
    mask[[0, -1]] &= case == "all"
    given = {
        "all": {"num_frames": 9},
        "none": {"video": video, "mask": mask},
        "between": {"num_frames": 9, "image": video[0], "last_image": video[8]},
    }[case]
    options = {"sigmas": LEVELS, "solver": "euler", "seed": 6}
    edited = pipe.edit(video, "a red circle", mask=mask, strength=1.0, **options)
    made = pipe.generate("a red circle", size=f"{WIDTH}x{HEIGHT}", **given, **options)
    assert torch.equal(edited.latents, made.latents)
    assert np.array_equal(edited.frames, np.where(mask[..., None], made.frames, video))


def test_what_is_made_depends_on_what_stays_and_not_on_what_goes(pipe: fastvid.Pipeline) -> None:
    video, mask = clip(5), region(5) > 127
    options = {"mask": mask, "sigmas": LEVELS, "strength": 1.0, "seed": 2}
    first = pipe.edit(video, "a red circle", **options).frames
    inside, outside = (np.where(part[..., None], drawn(8, 5), video) for part in (mask, ~mask))
    assert np.array_equal(pipe.edit(inside, "a red circle", **options).frames, first)
    assert share_of_equal(pipe.edit(outside, "a red circle", **options).frames[mask], first[mask]) < 0.95
    weak = pipe.edit(inside, "a red circle", **{**options, "strength": 0.5}).frames
    assert (
        share_of_equal(weak[mask], pipe.edit(video, "a red circle", **{**options, "strength": 0.5}).frames[mask]) < 0.95
    )
    faint = pipe.edit(video, "a red circle", conditioning_scale=[0.0, 0.1], **options).frames
    assert share_of_equal(faint[mask], first[mask]) < 0.95 and np.array_equal(faint[~mask], video[~mask])


def test_the_difference_of_two_prompts_in_a_region(pipe: fastvid.Pipeline) -> None:
    video, mask = clip(5), region(5) > 127
    options = {"mask": mask, "guidance_scale": 1.0, "num_inference_steps": 3, "seed": 1}
    back = pipe.edit(video, "a red circle", source_prompt="a red circle", **options)
    assert np.abs(back.frames.astype(int) - pipe.decode(pipe.encode(video)))[mask].max() <= 1
    other = pipe.edit(video, "a red circle", source_prompt="a blue square", **options)
    assert np.array_equal(other.frames[~mask], video[~mask])
    assert not np.array_equal(other.frames[mask], back.frames[mask])


# ---------------------------------------------------------------- long clips, events, other processes


@pytest.mark.parametrize("kind, frames", [("region", 10), ("region", 21), ("around", 14)])
def test_segments_are_shown_their_part(
    short: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch, kind: str, frames: int
) -> None:
    video = drawn(9, frames)
    asked: dict[str, Any] = {"mask": region(frames)} if kind == "region" else {"size": f"{WIDTH + 20}x{HEIGHT + 9}"}
    made, shown = seen(short, monkeypatch, "edit", video=video, **asked, **FAST)
    job = prepared(short, "edit", prompt="a", video=video, **asked, **FAST).job
    segments = job.timeline.segments
    found = short.plan("a", verb="edit", video=video, **asked, **FAST)
    assert found.segments == len(segments) == len(shown) == (3 if frames == 21 else 2)
    one = replace(segments[0], num_frames=frames, model_frames=frames + 3)
    source = SourceClip(short._model, one, KnownFrames(), job.request.mask)
    whole, masks = controls.control_video(job.request, one, KnownFrames(), source)
    for segment, (frames_of, masks_of) in zip(segments, shown, strict=True):
        start, count = segment.source_start, segment.num_frames
        assert torch.equal(frames_of[segment.left :][:count], whole[start : start + count])
        assert torch.equal(masks_of[segment.left :][:count], masks[start : start + count])
        before = signed(made.frames[start - segment.left : start])
        torch.testing.assert_close(frames_of[: segment.left, :, : before.shape[2], : before.shape[3]], before)
        assert not masks_of[: segment.left].any()
    inside = slice(None) if kind == "region" else (slice(None), slice(4, 4 + HEIGHT), slice(10, 10 + WIDTH))
    stays = region(frames) <= 127 if kind == "region" else np.ones(video.shape[:3], bool)
    assert len(made.frames) == frames and np.array_equal(made.frames[inside][stays], video[stays])
    first = segments[0].num_frames
    again = {"mask": region(first)} if kind == "region" else asked
    assert np.array_equal(made.frames[:first], short.edit(video[:first], "a red circle", **again, **FAST).frames)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["region", "around"])
def test_streaming_and_going_on_after_any_step(
    short: fastvid.Pipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    given = {"video": drawn(10, 13)} | ({"mask": region(13)} if kind == "region" else {})
    options = {"prompt": "a", **FAST, **({} if kind == "region" else {"size": "112x80", "num_inference_steps": 1})}
    whole, path = run(short.stream(verb="edit", **given, **options)), tmp_path / "job.ckpt"
    direct = short.edit(**given, **options)
    assert np.array_equal(whole.frames, direct.frames) and whole.total in (4, 2) and whole.frames.std() > 5
    copies = snapshots(
        short.stream(verb="edit", **given, **options, checkpoint=path, checkpoint_every=0), path, tmp_path
    )
    other = type(short)(replace(fastvid.load(str(folder), device="cpu")._model, preset=short._model.preset))
    for copy in copies if kind == "region" else copies[1:2]:
        assert same(run(other.resume(copy, **given)), whole)


def test_from_the_command_line(
    pipe: fastvid.Pipeline, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, mask = drawn(11, 5), region(5)[:1]
    np.save(tmp_path / "video.npy", video)
    Image.fromarray(mask[0]).save(tmp_path / "mask.png")
    words = ["edit", "--model", str(folder), "--quiet", "--seed", "3", "--steps", "2", str(tmp_path / "video.npy"), "a"]
    for name, flags, options in (
        ("region", ["--mask", str(tmp_path / "mask.png"), "--strength", "0.5"], {"mask": mask, "strength": 0.5}),
        ("around", ["--size", "112x80"], {"size": "112x80"}),
    ):
        out = tmp_path / f"{name}.npy"
        assert main([*words, *flags, "-o", str(out)]) == 0
        made = pipe.edit(video, "a", seed=3, num_inference_steps=2, **options)
        assert np.array_equal(np.load(out), made.frames)
        assert read_recipe(out)["verb"] == "edit"
        again = ["edit", "--model", str(folder), "--quiet", "--recipe", str(out), str(tmp_path / "video.npy")]
        assert main([*again, *flags[:2], "-o", str(tmp_path / "again.npy")]) == 0
        assert np.array_equal(np.load(tmp_path / "again.npy"), made.frames)
    capsys.readouterr()
    assert main(["plan", *words, "--mask", str(tmp_path / "mask.png")]) == 0
    assert "96x64" in capsys.readouterr().out


def test_the_plan_counts_what_is_encoded(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays and what changes, and the clip itself."""
    encoded, encode = [], pipe._model.vae.encode
    monkeypatch.setattr(
        pipe._model.vae, "encode", lambda x, cache=None, **_: encoded.append(x.shape[2]) or encode(x, cache)
    )
    for verb, size in (("edit", None), ("generate", f"{WIDTH}x{HEIGHT}")):
        options = {"video": drawn(12, 9), "mask": region(9), "num_inference_steps": 1, "size": size}
        encoded.clear()
        getattr(pipe, verb)(prompt="a", **options)
        job = prepared(pipe, verb, prompt="a", **options).job
        assert frames_encoded(pipe._model, job.timeline.segments[0]) == sum(encoded) == (27 if verb == "edit" else 18)


def test_a_published_model_is_planned_without_its_files() -> None:
    blueprint = fastvid.blueprint("wan2.1-vace-1.3b", device="cpu", device_memory=80 << 30)
    video = drawn(13, 9, 96, 160)
    found = [
        blueprint.plan("a", verb="edit", video=video, **options)
        for options in ({}, {"mask": region(9, 96, 160)}, {"size": "320x192"})
    ]
    assert [plan.width for plan in found] == [160, 160, 320]
    # What a clip is noised to spares steps; a frame that is grown has no clip where it grew.
    assert [plan.model_calls for plan in found] == [60, 60, 100]


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "options, says",
    [
        ({"mask": region(3)}, "mask has 3 frames; allowed is 1, or 5 as video has"),
        ({"mask": region(5) / 100}, "mask is floating point"),
        ({"mask": (region(5) > 9).astype(np.uint8)}, "give it as bool, or times 255"),
        ({"mask": np.zeros((5, 4, 4, 2), np.uint8)}, "mask is uint8"),
        ({"mask": region(5), "strength": 1.5}, "strength=1.5"),
        ({"mask": region(5), "conditioning_scale": [1, 2, 3]}, "give one number, or 2"),
        ({"mask": region(5), "latents": noise(3)}, r"must be \[1, 16, 2, 8, 12\]"),
        ({"mask": region(5), "reference_images": drawn(0, 1)[0]}, "reference_images"),
        ({"mask": region(5), "video": drawn(0, 5) / 100}, "video is floating point"),
        ({"width": 4096, "height": 64}, "4096"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: fastvid.Pipeline, options: dict[str, Any], says: str) -> None:
    for ask in (pipe.plan, pipe.stream):
        with pytest.raises(fastvid.InvalidRequest, match=says):
            ask("a", verb="edit", **{"video": drawn(0, 5), **options})
