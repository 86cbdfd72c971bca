"""Wan-Animate: whole pipelines against diffusers' WanAnimatePipeline on random weights, in every layout of its files;
what users get wrong; resuming and streaming by segments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from animate_models import LEVELS, SIDE, driving, original_names, run_animate, write_animate
from PIL import Image
from pipelines import HEIGHT, WIDTH, clip, picture, prepared, region, share_of_equal
from safetensors.torch import load_file, save_file
from streams import run, snapshots

import fastvid
from fastvid.cli.commands import main
from fastvid.engine.driving import back_and_forth, letterboxed
from fastvid.engine.events import Frames, Step
from fastvid.loaders.convert import convert
from fastvid.media.metadata import read_recipe

PROMPT, SIZE = "a red circle moving left", f"{WIDTH}x{HEIGHT}"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT: dict[str, Any] = {"segment_frame_length": 5, "num_inference_steps": 1, "seed": 3, "size": SIZE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("animate")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write_animate(folder)


@pytest.fixture(scope="module")
def pipe(theirs: Any, folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


def made(pipe: fastvid.Pipeline, count: int = 7, mode: str = "animate", **options: Any) -> np.ndarray:
    """Frames of two segments."""
    return pipe.generate(PROMPT, **{**driving(count, mode), **SHORT, **options}).frames


class TestEqualsDiffusers:
    """Two segments; the second is shorter than a segment, so that the inputs run back."""

    @pytest.mark.parametrize(
        ("mode", "seen", "guidance"),
        [
            ("animate", 1, 1.0),
            ("replace", 1, 3.0),
            *(pytest.param(mode, 5, 3.0, marks=pytest.mark.slow) for mode in ("animate", "replace")),
        ],
    )
    def test_frames(self, theirs: Any, pipe: fastvid.Pipeline, mode: str, seen: int, guidance: float) -> None:
        length, count = (9, 15) if seen == 1 else (13, 18)
        given = driving(count, mode, segment_frame_length=length, prev_segment_conditioning_frames=seen)
        asked = {"solver": "euler", "sigmas": LEVELS, "guidance_scale": guidance, "seed": 11, "size": SIZE}
        found = pipe.generate(PROMPT, negative_prompt="blue square", **asked, **given)
        assert found.frames.std() > 5 and len(found.frames) == count
        assert found.latents.shape[2] == 2 * (length - 1) // 4 + (1 if seen == 1 else 0)
        assert share_of_equal(found.frames, run_animate(theirs, pipe, 11, guidance, given)) >= 0.999

    def test_every_input_counts(self, pipe: fastvid.Pipeline) -> None:
        first = made(pipe, mode="replace")
        changes = {"image": picture(6), "pose_video": clip(8)[1:], "face_video": clip(8, 40, 40)[1:]}
        changes |= {"background_video": clip(8)[:7], "mask_video": region(9)[2:], "mode": "animate"}
        for name, value in changes.items():
            other = (
                {"background_video": None, "mask_video": None} if name == "mode" else {"mode": "replace", name: value}
            )
            assert share_of_equal(made(pipe, **other), first) < 0.99, name


class TestFiles:
    def test_the_original_folder_and_single_files(self, pipe: fastvid.Pipeline, folder: Path, tmp_path: Path) -> None:
        convert(folder, tmp_path / "original", "original")
        found = fastvid.load(str(tmp_path / "original"), device="cpu")
        assert found.inspect()["pipeline"] == "WanAnimatePipeline"
        assert np.array_equal(made(found), made(pipe))
        named = original_names(load_file(folder / "transformer" / WEIGHTS))
        file = tmp_path / "wan2.2_animate_14B_bf16.safetensors"
        save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in named.items()}, file)
        shutil.copy(folder / "transformer" / "config.json", tmp_path / "config.json")  # widths are not published ones
        file = file.rename(tmp_path / WEIGHTS)
        single = fastvid.load(str(file), device="cpu", parts={"base": str(folder)})
        assert np.array_equal(made(single), made(pipe))

    def test_inspect_shows_it(self, pipe: fastvid.Pipeline) -> None:
        found = pipe.inspect()
        assert found["parts"]["transformer"]["class"] == "WanAnimateTransformer3DModel"
        assert found["parts"]["transformer"]["config"]["motion_encoder_size"] == SIDE
        recipe = found["recipe"]
        assert (recipe["mode"], recipe["segment_frame_length"], recipe["prompt"]) == (
            "animate",
            77,
            "视频中的人在做动作",
        )


class TestRequests:
    def test_size_length_rate_and_prompt_follow(self, pipe: fastvid.Pipeline, tmp_path: Path) -> None:
        fastvid.Video(clip(6, 96, 64), 12.0, 0, None, {}).save(tmp_path / "pose.mp4")
        given = driving(6) | {"pose_video": tmp_path / "pose.mp4"}
        plan = pipe.plan(**given)
        assert (plan.width, plan.height, plan.num_frames, plan.fps, plan.segments) == (784, 1168, 6, 12.0, 1)
        assert plan.model_frames == 77
        job = prepared(pipe, **given, size=SIZE).job
        assert job.request.prompt == "视频中的人在做动作" and job.request.guidance_scale == 1
        embeds = torch.zeros(1, 512, 32)
        assert prepared(pipe, **given, size=SIZE, prompt_embeds=embeds).job.request.prompt is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image": None}, "image is missing"),
            ({"pose_video": None}, "pose_video is missing"),
            ({"face_video": None}, "face_video is missing"),
            ({"mode": "replace"}, "background_video is missing"),
            ({"mode": "replace", "background_video": clip(7)}, "mask_video is missing"),
            ({"mask_video": region(7)}, "mask_video is for mode='replace'"),
            ({"mode": "move"}, "mode='move': allowed is one of animate, replace"),
            ({"num_frames": 8}, "pose_video has 7 frames; the nearest is 7"),
            ({"segment_frame_length": 12}, "it is 4k [+] 1; the nearest is 13"),
            ({"segment_frame_length": 5, "prev_segment_conditioning_frames": 5}, "a segment has 5 frames"),
            ({"prev_segment_conditioning_frames": 3}, "allowed is 1 or 5; the nearest is 5"),
            ({"last_image": picture(1)}, "leave last_image out"),
            ({"keyframes": {1: picture(1)}}, "leave keyframes out"),
            ({"video": clip(7)}, "no control branch; leave video out"),
            ({"schedule": "staggered"}, "staggered"),
        ],
    )
    def test_what_is_wrong_is_refused(self, pipe: fastvid.Pipeline, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(fastvid.InvalidRequest, match=message):
            prepared(pipe, prompt="", **{**driving(7), **SHORT, **changes})

    def test_a_missing_pose_is_named_where_the_prompt_is_missing_too(self, pipe: fastvid.Pipeline) -> None:
        given = {name: value for name, value in driving(7).items() if name != "pose_video"}
        with pytest.raises(fastvid.InvalidRequest, match="pose_video is missing"):
            prepared(pipe, **given, **SHORT)

    def test_other_verbs_and_other_models_are_refused(self, pipe: fastvid.Pipeline) -> None:
        with pytest.raises(fastvid.InvalidRequest, match="extend needs another model"):
            prepared(pipe, "extend", video=clip(9), prompt="a")
        with pytest.raises(fastvid.InvalidRequest, match="embedded has no face blocks; leave pose_video out"):
            prepared(fastvid.load("embedded", device="cpu"), prompt="a", pose_video=clip(7))

    def test_clips_of_other_shapes_are_told(self, pipe: fastvid.Pipeline) -> None:
        with pytest.warns(fastvid.FastvidWarning) as told:
            prepared(pipe, prompt="", **driving(7, face_video=clip(5, 32, 64)), **SHORT)
        words = " ".join(str(one.message) for one in told)
        assert "face_video is 64x32 and the face encoder's pictures are 32x32" in words
        assert "face_video has 5 frames and the video 7: from its end on it runs back and forth" in words
        with pytest.warns(fastvid.FastvidWarning, match="mask_video is black everywhere: black keeps background_video"):
            prepared(pipe, prompt="", **driving(7, "replace", mask_video=0 * region(7)), **SHORT)
        with pytest.warns(fastvid.FastvidWarning, match="mask_video has 9 frames, of which the first 7 are used"):
            prepared(pipe, prompt="", **driving(7, "replace", mask_video=region(9)), **SHORT)

    def test_one_picture_stands_for_all_frames(self, pipe: fastvid.Pipeline) -> None:
        one, all_of_them = clip(1)[0], np.repeat(clip(1), 7, axis=0)
        mask = {"mask_video": region(1)[0]}, {"mask_video": np.repeat(region(1), 7, axis=0)}
        short = made(pipe, mode="replace", background_video=one, **mask[0])
        assert np.array_equal(short, made(pipe, mode="replace", background_video=all_of_them, **mask[1]))

    def test_a_plan_needs_no_clips(self) -> None:
        blueprint = fastvid.blueprint("wan2.2-animate-14b", device_memory=80 << 30)
        plan = blueprint.plan(size="832x480", num_frames=100)
        assert (plan.segments, plan.model_frames, plan.tokens) == (2, 77 + 76, 21 * 30 * 52)


def test_from_the_command_line_and_by_its_recipe(pipe: fastvid.Pipeline, folder: Path, tmp_path: Path) -> None:
    given = driving(7, "replace")
    for name, value in given.items():
        if name.endswith("video"):
            np.save(tmp_path / f"{name}.npy", value)
    Image.fromarray(given["image"]).save(tmp_path / "image.png")
    clips = [name for name in given if name.endswith("video")]
    files = [part for name in clips for part in (f"--{name.replace('_', '-')}", str(tmp_path / f"{name}.npy"))]
    files += ["--image", str(tmp_path / "image.png"), "--model", str(folder), "--quiet", "--device", "cpu"]
    asked = ["--mode", "replace", "--segment-frame-length", "5", "--steps", "1", "--seed", "3", "--size", SIZE]
    assert main(["generate", PROMPT, *files, *asked, "-o", str(tmp_path / "one.mp4")]) == 0
    recipe = read_recipe(tmp_path / "one.mp4")
    assert (recipe["mode"], recipe["segment_frame_length"], recipe["prev_segment_conditioning_frames"]) == (
        *("replace", 5, 1),
    )
    assert recipe["mask_video"]["shape"] == [7, HEIGHT, WIDTH]
    again = ["generate", "--recipe", str(tmp_path / "one.mp4"), *files, "-o", str(tmp_path / "two.npy")]
    assert main(again) == 0
    assert np.array_equal(np.load(tmp_path / "two.npy"), made(pipe, mode="replace"))


def test_faces_are_encoded_once_a_segment_and_branch(pipe: fastvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every step: 5 faces in batches of 4, and one that is blank for the negative prompt, in two segments."""
    seen, encoder = [], pipe._model.transformer.motion_encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pictures: seen.append(len(pictures)) or forward(pictures))
    made(pipe, num_inference_steps=3, guidance_scale=2.0)
    assert sorted(seen) == [1, 1, 1, 1, 4, 4]


def test_frames_leave_as_segments_are_done(pipe: fastvid.Pipeline) -> None:
    events = list(pipe.stream(PROMPT, **driving(7), **{**SHORT, "num_inference_steps": 2}))
    kinds = [type(event) for event in events if isinstance(event, Step | Frames)]
    assert kinds.index(Frames) == 2 and kinds[-1] is Frames and kinds.count(Step) == 4
    assert sum(len(event.frames) for event in events if isinstance(event, Frames)) == 7


def test_a_request_resumes_within_a_segment(pipe: fastvid.Pipeline, folder: Path, tmp_path: Path) -> None:
    asked = {**driving(7, "replace"), **SHORT, "num_inference_steps": 2, "prompt": PROMPT}
    whole, path = pipe.generate(**asked).frames, tmp_path / "job"
    copies = snapshots(pipe.stream(**asked, checkpoint=path, checkpoint_every=0), path, tmp_path)
    clips = {name: value for name, value in driving(7, "replace").items() if name != "mode"}
    for copy in copies[1::2]:
        resumed = run(fastvid.load(str(folder), device="cpu").resume(copy, **clips))
        assert np.array_equal(resumed.frames, whole)


def test_pictures_go_back_and_forth_and_keep_their_shape() -> None:
    assert back_and_forth(0, 10, 5).tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert back_and_forth(4, 4, 5).tolist() == [4, 3, 2, 1] and back_and_forth(3, 2, 1).tolist() == [0, 0]
    white = np.full((90, 60, 3), 255, np.uint8)
    boxed = letterboxed(white, 64, 96)
    assert (
        boxed.shape == (64, 96, 3) and boxed[:, 27:69].min() == 255 and boxed[:, :27].max() == boxed[:, 69:].max() == 0
    )
    assert letterboxed(white.transpose(1, 0, 2), 96, 64)[27:69].min() == 255
