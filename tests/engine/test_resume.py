"""Checkpoints: a request that goes on from one makes the very frames that it would have made, whenever its process
ended; one that does not belong to the request, or is damaged, is refused; cancelling leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from streams import run, same, snapshots

import fastvid
from fastvid.engine import resume, resume_files
from fastvid.engine.events import Finished, Step
from fastvid.models.preset import EVERYTHING, Rollout
from fastvid.pipeline.pipeline import Pipeline
from fastvid.sampling.loop import Position
from fastvid.sampling.solvers import SolverState

PROMPT = "a red circle moving right on a white background"
SIZE = {"height": 64, "width": 64}
ROLLOUT = Rollout(frames_per_block=1, window=3, sink=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder, vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16})
    return folder


@pytest.fixture(scope="module")
def pipes(folder):
    """Two, loaded one after the other: what one has made the other cannot know."""
    return [fastvid.load(str(folder), device="cpu") for _ in range(2)]


def changed(pipe, **recipe):
    """A pipeline whose model is said to be of another kind."""
    known = dataclasses.replace(pipe._model.preset, patterns=EVERYTHING, **recipe)
    return Pipeline(dataclasses.replace(pipe._model, preset=known))


def clip(frames=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 64, 64, 3), np.uint8)


ONE = {"num_frames": 9, "num_inference_steps": 4, "seed": 3, **SIZE}
LONG = {"num_frames": 13, "num_inference_steps": 3, "seed": 3, **SIZE}
MORE = {"num_inference_steps": 2, "seed": 5}
WINDOWS = {"carries": True, "window": 3, "overlap": 1}
CHAINED = {"carries": False, "window": 2, "context": 1}
SHOTS = [("a red circle", 0.3), ("a blue square", 0.25)]
CASES = {
    "whole clip": ({}, "generate", {**ONE, "solver": "unipc"}),
    "new noise": ({}, "generate", {**ONE, "solver": "redraw"}),
    "windows": (WINDOWS, "generate", {**LONG, "solver": "unipc"}),
    "timesteps": ({**WINDOWS, "per_token_timesteps": True}, "generate", {**LONG, "solver": "dpm++", "image": "given"}),
    "segments": (CHAINED, "generate", {**LONG, **MORE, "solver": "unipc"}),
    "rollout": ({"rollout": ROLLOUT}, "generate", {**LONG, **MORE, "solver": "redraw"}),
    "rollout of a clip": ({"rollout": ROLLOUT}, "extend", {**MORE, "num_frames": 12, "solver": "euler"}),
    "before and after": (CHAINED, "extend", {**MORE, "num_frames": 5, "direction": "both"}),
    "edit": (WINDOWS, "edit", {**MORE, "strength": 1.0, "mask": "given"}),
    "other prompt": (WINDOWS, "edit", {**MORE, "strength": 1.0, "source_prompt": "a blue square"}),
    "shots": (CHAINED, "storyboard", {**MORE, "shots": SHOTS, "prompt": None, **SIZE}),
}
VIDEO = ("extend", "edit")
DATA = {"video": clip(13), "mask": clip(1)[..., 0] > 90, "image": clip(1)[0]}


FAST = ("whole clip", "windows", "rollout")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_after_a_kill_at_any_row_the_frames_are_the_same(pipes, tmp_path, case):
    recipe, verb, options = CASES[case]
    given = {name: made for name, made in DATA.items() if options.get(name) or (name == "video" and verb in VIDEO)}
    options = {"prompt": PROMPT, **options, **given}
    pipe, other = (changed(each, **recipe) for each in pipes)
    whole, path = run(pipe.stream(verb=verb, **options)), tmp_path / "job.ckpt"
    assert whole.frames.std() > 5
    copies = snapshots(pipe.stream(verb=verb, **options, checkpoint=path, checkpoint_every=0), path, tmp_path)
    assert len(copies) == whole.total + 1 and not path.exists()
    begun = []
    for copy in copies:
        again = run(other.resume(copy, **given))
        assert same(again, whole) and again.recipe == whole.recipe and not copy.exists()
        assert again.steps == list(range(whole.total - len(again.steps) + 1, whole.total + 1))
        begun.append(whole.total - len(again.steps))
    if "rollout" not in case:  # it goes on from the very row
        assert begun == list(range(whole.total + 1))
    else:  # or from where the last chunk ended
        lost = [row - at for row, at in enumerate(begun)]
        assert min(lost) == 0 and max(lost) == options["num_inference_steps"] and begun[-1] == whole.total


def test_a_request_may_be_killed_again_and_again(pipes, tmp_path):
    pipe = changed(pipes[0], **CHAINED)
    whole, path = run(pipe.stream(PROMPT, **LONG)), tmp_path / "job.ckpt"
    stream, seen = pipe.stream(PROMPT, **LONG, checkpoint=path, checkpoint_every=0, keep_checkpoint=True), []
    while path.exists() or not seen:
        for event in stream:
            if isinstance(event, Step):
                seen.append(event.step)
                if len(seen) % 2 == 0:
                    break
        stream.close()
        if seen[-1] == whole.total:
            break
        stream = pipe.resume(path, checkpoint_every=0, keep_checkpoint=True)
    assert seen == list(range(1, whole.total + 1))
    assert same(run(pipe.resume(path)), whole)


def test_what_a_kill_leaves_half_written_is_not_looked_at(pipes, tmp_path):
    pipe = changed(pipes[0], **WINDOWS)
    whole, path = run(pipe.stream(PROMPT, **LONG)), tmp_path / "job.ckpt"
    copies = snapshots(pipe.stream(PROMPT, **LONG, checkpoint=path, checkpoint_every=0), path, tmp_path)
    assert len(copies) == 7
    # All but the head of the row after: the files of a kill just before it was replaced.
    early, late = copies[2], copies[4]
    for file in late.iterdir():
        if not (early / file.name).exists():
            shutil.copy(file, early)
    shutil.copy(late / resume_files.LIST, early)
    (early / "head.json.partial").write_bytes(b"{")
    half = next(late.glob("state-*")).name
    (early / f"{half}.partial").write_bytes(b"half")
    stream = pipe.resume(early, keep_checkpoint=True)
    again = run(stream)
    assert same(again, whole) and len(again.steps) == whole.total - 2
    assert not list(early.glob("*.partial"))


def test_every_so_many_seconds(pipes, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: now[0]))
    path, saved = tmp_path / "job.ckpt", []
    for event in pipes[0].stream(PROMPT, **{**ONE, "num_inference_steps": 8}, checkpoint=path, checkpoint_every=2.5):
        if isinstance(event, Step):
            saved.append(resume.read(path).head.rows)
            now[0] += 1.0
    assert saved == [0, 0, 0, 4, 4, 4, 7, 7]


def test_a_checkpoint_does_not_grow_with_the_video(pipes, tmp_path):
    """But for the clean latents: each file is written once, and the rest is as large at the end as at the start."""
    pipe, path, rest, clean = changed(pipes[0], rollout=ROLLOUT), tmp_path / "job.ckpt", [], {}
    options = {**LONG, "num_frames": 61, "num_inference_steps": 1, "solver": "euler"}
    for event in pipe.stream(PROMPT, **options, checkpoint=path, checkpoint_every=0):
        if isinstance(event, Step) and event.step % 2 == 0:
            files = {file.name: file.stat() for file in path.iterdir()}
            lists = ("clean", resume_files.LIST)  # the list has a line for each file
            rest.append(sum(stat.st_size for name, stat in files.items() if not name.startswith(lists)))
            now = {name: stat.st_mtime_ns for name, stat in files.items() if name.startswith("clean")}
            assert clean.items() <= now.items()
            clean = now
    assert len(clean) == 16 and max(rest[4:]) < 1.02 * min(rest[4:])


def test_every_part_of_a_position_is_saved():
    """A field that is added to it has to be one that `position_to_tensors` takes and `position_from_tensors` brings
    back."""
    columns, shape = 3, (1, 2, 3, 2, 2)
    state = SolverState(
        torch.arange(columns), (torch.rand(columns, dtype=torch.float64),) * 2, (torch.randn(shape),) * 2,
        torch.randn(shape).transpose(3, 4), fresh=lambda draws: draws,
    )  # fmt: skip
    known = {"row": 4, "start": 2, "latents": torch.randn(shape), "state": state, "done": 3}
    extra = {f.name: torch.randn(shape) for f in dataclasses.fields(Position) if f.name not in known}
    position = Position(**known, **extra)
    back = resume.position_from_tensors(resume.position_to_tensors(position), torch.device("cpu"))
    assert resume.position_to_tensors(back).keys() == resume.position_to_tensors(position).keys()
    for name, tensor in resume.position_to_tensors(position).items():
        assert torch.equal(resume.position_to_tensors(back)[name], tensor), name
    assert back.state.fresh is None and {f.name for f in dataclasses.fields(back.state)} == {
        "order", "sigmas", "x0s", "x", "fresh",
    }  # fmt: skip


# ---------------------------------------------------------------- when it is removed


def test_it_stays_until_the_stream_ends(pipes, tmp_path):
    path = tmp_path / "job.ckpt"
    stream = pipes[0].stream(PROMPT, **ONE, checkpoint=path, checkpoint_every=0)
    for event in stream:
        assert path.exists()
        if isinstance(event, Finished):  # what the caller does with it may fail
            break
    stream.close()
    assert path.exists()
    run(pipes[0].resume(path))
    assert not path.exists() and not list(tmp_path.iterdir())


def test_generate_removes_it_or_keeps_it(pipes, tmp_path):
    path = tmp_path / "job.ckpt"
    video = pipes[0].generate(PROMPT, **ONE, checkpoint=path, keep_checkpoint=True, checkpoint_every=0)
    again = run(pipes[1].resume(path, keep_checkpoint=True))
    assert np.array_equal(again.frames, video.frames) and again.steps == [] and path.exists()
    with pytest.raises(fastvid.InvalidRequest, match="holds one already; resume it"):
        pipes[0].generate(PROMPT, **ONE, checkpoint=path)
    pipes[0].generate(PROMPT, **ONE, checkpoint=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_failure_keeps_it_and_a_request_that_was_not_begun_makes_none(pipes, tmp_path):
    path = tmp_path / "job.ckpt"
    stream = pipes[0].stream(PROMPT, **ONE, checkpoint=path, checkpoint_every=0)
    assert not path.exists()
    next(stream), next(stream)
    with pytest.raises(fastvid.CheckpointError, match="of a request that is running"):
        run(pipes[1].resume(path))
    stream.cancel()
    with pytest.raises(fastvid.Cancelled):
        list(stream)
    assert same(run(pipes[1].resume(path)), run(pipes[0].stream(PROMPT, **ONE)))


def test_two_requests_cannot_have_one_folder(pipes, tmp_path):
    path = tmp_path / "job.ckpt"
    how = {"checkpoint": path, "checkpoint_every": 0, "keep_checkpoint": True}
    first, second = (pipes[0].stream(PROMPT, **{**ONE, "seed": seed}, **how) for seed in (1, 2))
    next(first)
    with pytest.raises(fastvid.CheckpointError, match="of a request that is running"):
        next(second)
    next(first)
    first.close()
    again, third = pipes[1].resume(path), pipes[0].stream(PROMPT, **ONE, checkpoint=tmp_path / "other")
    run(pipes[1].resume(path, checkpoint_every=0, keep_checkpoint=True))
    with pytest.raises(fastvid.CheckpointError, match="another request has been here"):
        next(again)
    run(pipes[0].stream(PROMPT, **ONE, checkpoint=tmp_path / "other", keep_checkpoint=True))
    with pytest.raises(fastvid.CheckpointError, match="another request has been here"):
        next(third)


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def kept(pipes, tmp_path_factory):
    """A checkpoint in the middle of a rollout from a picture, with all kinds of files."""
    into = tmp_path_factory.mktemp("kept")
    pipe = changed(pipes[0], rollout=ROLLOUT)
    stream = pipe.stream(PROMPT, **{**LONG, "num_inference_steps": 2}, solver="euler", image=clip(1)[0],
                         checkpoint=into / "job", checkpoint_every=0)  # fmt: skip
    copies = snapshots(stream, into / "job", into)
    assert {name.split("-")[0] for name in (p.name for p in copies[8].iterdir())} == {
        "request.json", "head.json", "lock", "fastvid", "clean", "state", "cache",
    }  # fmt: skip
    return copies[8]


def test_another_model_or_request_is_refused_by_name(pipes, folder, kept, tmp_path, monkeypatch):
    pipe, image = changed(pipes[0], rollout=ROLLOUT), clip(1)[0]

    def refused(match, pipe=pipe, **given):
        with pytest.raises(fastvid.InvalidRequest, match=match):
            pipe.resume(kept, **{"image": image, **given})

    refused("image is missing.*give image= again", image=None)
    refused(r"another request: image \(sha256 \w+ then, sha256 \w+ now\)", image=clip(1, seed=1)[0])
    refused(r"another request: seed \(3 then, 4 now\)", seed=4)
    refused("another request: prompt", prompt="a blue square")
    refused("last_image was not given", last_image=image)
    refused(r"other recipe of the model", pipe=pipes[0])
    half = fastvid.load(str(folder), device="cpu", dtype="bfloat16")
    refused(r"other dtype \(float32 then, bfloat16 now\)", pipe=changed(half, rollout=ROLLOUT))
    shutil.copytree(folder, tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    refused(r"other weights \(transformer\)", pipe=changed(fastvid.load(str(tmp_path / "model")), rollout=ROLLOUT))
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        refused(rf"other device \(.*, {threads} threads then, .*, {threads + 1} threads now\)")
    monkeypatch.setattr("fastvid.engine.resume_identity.__version__", "0.0.9")
    refused(r"other fastvid \(\S+ then, 0.0.9 now\)")


def test_a_moved_model_is_the_same(pipes, folder, kept, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    pipe = changed(fastvid.load(str(moved), device="cpu"), rollout=ROLLOUT)
    copy = shutil.copytree(kept, tmp_path / "job")
    whole = changed(pipes[0], rollout=ROLLOUT).generate(
        PROMPT, **{**LONG, "num_inference_steps": 2}, solver="euler", image=clip(1)[0]
    )
    again = run(pipe.resume(copy, image=clip(1)[0]))
    assert np.array_equal(again.frames, whole.frames) and again.recipe == whole.recipe


def test_any_damage_is_found(pipes, kept, tmp_path):
    pipe, image = changed(pipes[0], rollout=ROLLOUT), clip(1)[0]
    random.seed(0)
    saved = resume.read(kept)
    files = ["request.json", "head.json", *saved.clean, saved.head.state, *(name for name, _ in saved.head.caches)]
    for number in range(60):
        copy = shutil.copytree(kept, tmp_path / str(number))
        victim = copy / files[number % len(files)]
        data = bytearray(victim.read_bytes())
        if number % 5 == 0:
            data = data[: random.randrange(len(data))]
        else:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        victim.write_bytes(data)
        with pytest.raises(fastvid.CheckpointError, match=f"{victim.name} is damaged"):
            pipe.resume(copy, image=image)
    pipe.resume(kept, image=image)


def test_missing_files_and_other_folders_are_refused(pipes, kept, tmp_path):
    for number, stem in enumerate(("clean-000001", "state", "cache")):
        copy = shutil.copytree(kept, tmp_path / str(number))
        next(copy.glob(f"{stem}*")).unlink()
        with pytest.raises(fastvid.CheckpointError, match=f"{stem}.* is missing from this checkpoint"):
            pipes[0].resume(copy)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file", "none"):
        with pytest.raises(fastvid.CheckpointError, match="holds no checkpoint"):
            pipes[0].resume(tmp_path / name)
    later = shutil.copytree(kept, tmp_path / "later")
    about = json.loads((later / "request.json").read_text()) | {"format": 2}
    resume_files.put_json(later, "request.json", {k: v for k, v in about.items() if k != "sha256"})
    with pytest.raises(fastvid.CheckpointError, match="of format 2; this version of fastvid reads 1"):
        pipes[0].resume(later)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"checkpoint": 3}, "checkpoint=3: allowed is the name of a file or folder"),
        ({"checkpoint": "nowhere/job.ckpt"}, "there is no folder"),
        ({"checkpoint": "there"}, "no empty folder"),
        ({"checkpoint": "file"}, "no empty folder"),
        ({"checkpoint": "job", "checkpoint_every": -1}, "checkpoint_every"),
        ({"checkpoint": "job", "keep_checkpoint": 1}, "keep_checkpoint=1"),
        ({"checkpoint_every": 1}, "give checkpoint= too"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_done(pipes, tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    (tmp_path / "file").touch()
    with pytest.raises(fastvid.InvalidRequest, match=match):
        pipes[0].stream(PROMPT, **ONE, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_files_are_found_where_they_were(pipes, tmp_path, monkeypatch):
    video = fastvid.Video(clip(), 16.0, 0, None, {"fastvid": "0", "prompt": "a red circle"})
    video.save(tmp_path / "in.npy")
    monkeypatch.chdir(tmp_path)
    pipe = changed(pipes[0], **CHAINED)
    options = {"num_inference_steps": 2, "num_frames": 8, "seed": 1}
    copies = snapshots(pipe.stream(verb="extend", video="in.npy", **options, checkpoint="job", checkpoint_every=0),
                       tmp_path / "job", tmp_path)  # fmt: skip
    monkeypatch.chdir("/")
    whole = run(pipe.stream(verb="extend", video=tmp_path / "in.npy", **options))
    assert same(run(pipe.resume(copies[1])), whole) and whole.recipe["prompt"] == "a red circle"
    (tmp_path / "in.npy").rename(tmp_path / "moved.npy")
    assert same(run(pipe.resume(copies[2], video=tmp_path / "moved.npy")), whole)


# ---------------------------------------------------------------- cancelling


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_cancelling_at_any_moment_leaves_no_trace(pipes, count):
    options = {**ONE, "num_inference_steps": 5, "num_frames": 5}
    pipe, wanted = pipes[0], run(pipes[1].stream(PROMPT, **options))
    begin = time.perf_counter()
    run(pipe.stream(PROMPT, **options))
    whole = time.perf_counter() - begin
    for point in random.Random(0).choices(range(1000), k=count):
        stream, at, after = pipe.stream(PROMPT, **options), [], []
        timer = threading.Timer(
            whole * point / 1000, lambda s=stream, at=at: (at.append(time.perf_counter()), s.cancel())
        )
        timer.start()
        try:
            for event in stream:
                if at:
                    after.append(type(event))
        except fastvid.Cancelled:
            # What was under way when it was cancelled came out, and nothing else was begun.
            assert len(after) <= 1
        else:
            assert not at or len(after) <= 2  # it was done before it saw it
        timer.cancel()
        timer.join()
    assert same(run(pipe.stream(PROMPT, **options)), wanted)


def test_ranks_go_on_in_the_layout_that_is_told() -> None:
    from fastvid.distributed.mesh import Layout

    def layout(about: dict, size: int = 2, asked: Layout | None = None) -> Layout | None:
        saved = SimpleNamespace(folder="job.ckpt", about=about)
        return resume.layout_of(saved, SimpleNamespace(mesh=SimpleNamespace(size=size), layout=asked))

    assert layout({"layout": str(Layout(ring=2))}) == Layout(ring=2)
    assert layout({}, size=1) is None and layout({}, asked=Layout(ulysses=2)) is None
    with pytest.raises(fastvid.CheckpointError, match="does not say how ranks shared"):
        layout({})
    with pytest.raises(fastvid.CheckpointError, match="is damaged: parallel"):
        layout({"layout": "rings=2"})
