"""Step caches in whole requests: exact where nothing is reused, apart between requests and ranks, and resumed."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from animate_models import driving, write_animate
from fun_models import VARIANTS, write_fun
from pipelines import clip, picture, write_vace
from ranks import run_ranks

import fastvid
from fastvid import FastvidWarning, InvalidRequest
from fastvid.cli import commands
from fastvid.distributed.layout import parse_parallel
from fastvid.distributed.mesh import Mesh
from fastvid.engine import resume_files
from fastvid.engine.events import Finished, Frames, Step
from fastvid.errors import CheckpointError
from fastvid.models.loaded import LoadOptions
from fastvid.models.preset import Rollout
from fastvid.pipeline.load import load_model
from fastvid.pipeline.pipeline import Pipeline

PROMPT = "a red circle moving right on a white background"
SHORT: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 8, "seed": 3}
CACHES = {
    "first_block": "first_block:threshold=0.3,warmup=2",
    "taylorseer": "taylorseer:every=3,warmup=2",
    "easycache": "easycache:threshold=0.3,warmup=2",
    "target": 1.5,
}
CACHE = CACHES["taylorseer"]
ZERO = ("first_block:threshold=0,warmup=0", "easycache:threshold=0,warmup=0", "taylorseer:every=1")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return fastvid.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def exact(pipe: Pipeline) -> fastvid.Video:
    return pipe.generate(PROMPT, **SHORT)


def off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def frames_of(stream: Any) -> np.ndarray:
    return np.concatenate([event.frames for event in stream if isinstance(event, Frames)])


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("cache", ZERO)
def test_nothing_reused_is_exact(pipe: Pipeline, exact: fastvid.Video, cache: str) -> None:
    with pytest.warns(FastvidWarning, match="saves nothing") if "every=1" in cache else contextlib.nullcontext():
        assert np.array_equal(pipe.generate(PROMPT, **SHORT, cache=cache).frames, exact.frames)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_a_cache_reuses_and_its_recipe_makes_the_same(
    pipe: Pipeline, exact: fastvid.Video, cache: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastvid"):
        made = pipe.generate(PROMPT, **SHORT, cache=cache)
    count = next(r.args for r in caplog.records if r.msg.startswith("cache: %d of"))
    assert count[2] > 0 and count[0] + count[2] == count[1] == 16
    assert 12 < _psnr(made.frames, exact.frames) < 99
    again = fastvid.Request.from_recipe(json.loads(json.dumps(made.recipe)))
    assert np.array_equal(pipe.generate(**again.arguments()).frames, made.frames)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def test_requests_in_turns_keep_their_own(pipe: Pipeline) -> None:
    asked = [{**SHORT, "cache": cache} for cache in (CACHES["first_block"], CACHES["easycache"], None)]
    alone = [pipe.generate(PROMPT, **options).frames for options in asked]
    streams, frames = [pipe.stream(PROMPT, **options) for options in asked], [[] for _ in asked]
    while streams_left := [(i, event) for i, one in enumerate(streams) if (event := next(one, None)) is not None]:
        for i, event in streams_left:
            frames[i] += [event.frames] if isinstance(event, Frames) else []
    assert all(np.array_equal(np.concatenate(a), b) for a, b in zip(frames, alone, strict=True))


def _calls(pipe: Pipeline, source: fastvid.Video) -> dict[str, Callable[..., Any]]:
    blue = PROMPT.replace("red", "blue")
    return {
        "image": lambda **o: pipe.image(PROMPT, **o),
        "extend": lambda **o: pipe.extend(source, PROMPT, num_frames=8, direction="before", **o),
        "loop": lambda **o: pipe.loop(source, PROMPT, num_frames=8, **o),
        "blend": lambda **o: pipe.blend(source, source, PROMPT, num_frames=8, **o),
        "edit": lambda **o: pipe.edit(source, blue, strength=1.0, **o),
        "flow_edit": lambda **o: pipe.edit(source, blue, source_prompt=PROMPT, **o),
        "storyboard": lambda **o: pipe.storyboard([(PROMPT, 0.5), (blue, 0.5)], **o),
        "finalize": lambda **o: pipe.finalize(source, PROMPT, width=96, height=96, strength=1.0, **o),
        "progressive": lambda **o: pipe.generate(PROMPT, width=96, height=96, num_frames=5, progressive=0.5, **o),
        "keyframes": lambda **o: pipe.generate(PROMPT, num_frames=9, last_image=source.frames[0], **o),
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["image", "extend", "loop", "blend", "edit", "flow_edit", "storyboard", "finalize"])
def test_every_verb(pipe: Pipeline, exact: fastvid.Video, verb: str) -> None:
    make = _calls(pipe, exact)[verb]
    options = {"seed": 4, "num_inference_steps": 8}
    plain, made = make(**options), make(**options, cache=CACHE)
    assert made.frames.shape == plain.frames.shape and 12 < _psnr(made.frames, plain.frames) < 99
    assert np.array_equal(make(**options, cache=ZERO[0]).frames, plain.frames)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["progressive", "keyframes"])
def test_sizes_and_known_frames(pipe: Pipeline, exact: fastvid.Video, kind: str) -> None:
    make = _calls(pipe, exact)[kind]
    plain = make(seed=4, num_inference_steps=8)
    assert np.array_equal(make(seed=4, num_inference_steps=8, cache=ZERO[1]).frames, plain.frames)
    assert _psnr(make(seed=4, num_inference_steps=8, cache=CACHE).frames, plain.frames) < 99


# ---------------------------------------------------------------- checkpoints


def interrupted(pipe: Pipeline, folder: Path, steps: int, **options: Any) -> Path:
    stream = pipe.stream(PROMPT, **options, checkpoint=str(folder), checkpoint_every=0)
    for event in stream:
        if isinstance(event, Step) and event.step == steps:
            break
    stream.close()
    return folder


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_resumed_requests_are_bit_identical(pipe: Pipeline, tmp_path: Path, cache: Any) -> None:
    whole = pipe.generate(PROMPT, **SHORT, cache=cache).frames
    job = interrupted(pipe, tmp_path / "job", 5, **SHORT, cache=cache)
    assert len(list(job.glob("steps-*"))) == 1
    assert np.array_equal(frames_of(pipe.resume(str(job))), whole)
    assert not job.exists()


@pytest.mark.slow
def test_resumed_in_a_later_window(pipe: Pipeline, tmp_path: Path) -> None:
    options = {**SHORT, "num_frames": 49, "cache": CACHES["easycache"]}
    whole = pipe.generate(PROMPT, **options).frames
    job = interrupted(pipe, tmp_path / "job", 12, **options)
    assert np.array_equal(frames_of(pipe.resume(str(job))), whole)


def spoiled(job: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint whose step cache is changed, with digests as if it had been written so."""
    shutil.copytree(job, into)
    file = next(into.glob("steps-*"))
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    head = resume_files.get_json(into, "head.json")
    head["steps"] = resume_files.put_tensors(into, file.name.rpartition("-")[0], tensors)
    resume_files.put_json(into, "head.json", head)
    return into


def test_a_damaged_step_cache_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    job = interrupted(pipe, tmp_path / "job", 5, **SHORT, cache=CACHES["first_block"])
    changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "a tensor too much": lambda t: t.update({"0.0.other": t["0.0.head"].clone()}),
        "another size": lambda t: t.update({"0.0.head": t["0.0.head"][:, :, :8].clone()}),
        "another dtype": lambda t: t.update({"0.0.head": t["0.0.head"].half(), "0.0.residual": t["0.0.head"].half()}),
        "too many tokens": lambda t: t.update({k: v.repeat(1, 2, 1) for k, v in t.items() if v.ndim == 3}),
        "NaN": lambda t: t["0.0.residual"].fill_(float("nan")),
        "a later step": lambda t: t.update({"step": t["step"] + 1}),
        "another window": lambda t: t.update({"window": t["window"] + 1}),
        "a step that has not been": lambda t: t.update({"0.0.last": torch.tensor(6)}),
        "another expert": lambda t: t.update({"7.0.last": torch.tensor(1)}),
        "no numbers": lambda t: t.pop("0.0.last"),
    }
    for name, change in changes.items():
        with pytest.raises(CheckpointError, match="step cache|holds a tensor"):
            frames_of(pipe.resume(str(spoiled(job, tmp_path / name, change))))
    shutil.copytree(job, tmp_path / "cut")
    file = next((tmp_path / "cut").glob("steps-*"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        frames_of(pipe.resume(str(tmp_path / "cut")))
    assert np.array_equal(
        frames_of(pipe.resume(str(job))), pipe.generate(PROMPT, **SHORT, cache=CACHES["first_block"]).frames
    )


# ---------------------------------------------------------------- ranks


def on_ranks(mesh: Mesh, folder: str, caches: str, layouts: str) -> None:
    alone = Pipeline(load_model("embedded"))
    for cache in json.loads(caches):
        true = alone.generate(PROMPT, **SHORT, cache=cache).frames
        for number, layout in enumerate(parse_parallel(one).layout for one in json.loads(layouts)):
            pipe = Pipeline(load_model("embedded", LoadOptions(layout=layout), mesh))
            made = pipe.generate(PROMPT, **SHORT, cache=cache).frames
            assert off(made, true) <= 1, (cache, layout, off(made, true))
            if number == 0:
                job = interrupted(pipe, Path(folder) / str(cache).partition(":")[0], 5, **SHORT, cache=cache)
                assert np.array_equal(frames_of(pipe.resume(str(job))), made), layout


@pytest.mark.slow
def test_two_ranks_decide_alike_and_resume(tmp_path: Path) -> None:
    run_ranks(2, on_ranks, str(tmp_path), json.dumps([CACHES["first_block"]]), json.dumps(["ulysses=2"]))


@pytest.mark.slow
def test_ranks_decide_alike(tmp_path: Path) -> None:
    layouts = json.dumps(["guidance=2", "ring=2"])
    run_ranks(2, on_ranks, str(tmp_path), json.dumps([CACHES["easycache"], CACHE]), layouts)


# ---------------------------------------------------------------- other models


@pytest.mark.slow
def test_experts_have_branches_of_their_own(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "two", boundary_ratio=0.7, num_layers=3)
    pipe = fastvid.load(str(tmp_path / "two"), device="cpu")
    options = {**SHORT, "width": 64, "height": 64, "cache": CACHE}
    seen = []
    for steps in (2, 7):
        job = interrupted(pipe, tmp_path / f"job{steps}", steps, **options)
        names = safetensors.torch.load_file(next(job.glob("steps-*")))
        seen.append({name.split(".")[0] for name in names if "." in name})
    assert seen == [{"0"}, {"1"}]
    assert np.array_equal(frames_of(pipe.resume(str(job))), pipe.generate(PROMPT, **options).frames)


def _models(folder: Path, kind: str) -> tuple[Pipeline, dict[str, Any]]:
    if kind == "vace":
        write_vace(folder)
        return fastvid.load(str(folder), device="cpu"), {"video": clip(5), "height": 64, "width": 96}
    if kind == "animate":
        write_animate(folder)
        return fastvid.load(str(folder), device="cpu"), {**driving(5), "width": 64, "height": 96}
    fun = write_fun(folder / "fun", "control-a14b")
    pipe = fastvid.load(str(fun.folder), device="cpu", variant=VARIANTS["control-a14b"])
    return pipe, {"reference_images": [picture(3)], "height": 64, "width": 96}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
@pytest.mark.parametrize("kind", ["vace", "animate", "fun"])
def test_models_with_a_control(tmp_path: Path, kind: str) -> None:
    pipe, given = _models(tmp_path, kind)
    options = {"num_inference_steps": 8, "seed": 1, **given} | ({} if kind == "animate" else {"num_frames": 5})
    exact = pipe.generate("a red circle", **options).frames
    for cache in ZERO:
        assert np.array_equal(pipe.generate("a red circle", **options, cache=cache).frames, exact), cache
    for cache in ("first_block:threshold=9,warmup=2", CACHE, "easycache:threshold=9,warmup=2"):
        assert not np.array_equal(pipe.generate("a red circle", **options, cache=cache).frames, exact), cache


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
def test_rollouts_fill_their_kv_cache(tmp_path: Path) -> None:
    """Blocks that are left out leave a KV cache as the last whole step did; the clean pass then writes it."""
    tiny.write_checkpoint(tmp_path / "tiny", num_layers=3)
    model = fastvid.load(str(tmp_path / "tiny"), device="cpu")._model
    rollout = Rollout(frames_per_block=1, window=3, sink=1)
    pipe = Pipeline(replace(model, preset=replace(model.preset, rollout=rollout)))
    options = {"num_frames": 13, "num_inference_steps": 5, "seed": 3, "height": 64, "width": 64, "solver": "euler"}
    exact = pipe.generate(PROMPT, **options).frames
    assert np.array_equal(pipe.generate(PROMPT, **options, cache=ZERO[0]).frames, exact)
    options["cache"] = "taylorseer:order=0,every=2,warmup=1"
    made = pipe.generate(PROMPT, **options).frames
    assert not np.array_equal(made, exact)
    job = interrupted(pipe, tmp_path / "job", 14, **options)
    assert np.array_equal(frames_of(pipe.resume(str(job))), made)


# ---------------------------------------------------------------- plans and refusals


def test_plans_say_what_is_left_out(pipe: Pipeline) -> None:
    plain, target = pipe.plan(PROMPT), pipe.plan(PROMPT, cache=1.5)
    assert (
        "13 of 20 steps run the blocks, 1.54 x" in target.levers["cache"]
        and "taylorseer of order 1" in target.levers["cache"]
    )
    assert target.flops_denoise == pytest.approx(plain.flops_denoise * 13 / 20)
    kept = 2 * 2 + 2  # two differences of two prompts, and what a call holds
    assert target.bytes_context - plain.bytes_context == kept * plain.tokens * 256 * 4
    assert "8 to 20 of 20 steps" in pipe.plan(PROMPT, cache="first_block:warmup=4,longest=4").levers["cache"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cache": 2.0, "num_inference_steps": 4}, r"cache=2: in 4 steps at least 3 have .* the nearest is cache=1.33"),
        ({"cache": 1.5, "num_inference_steps": 2}, r"in 2 steps at least 2 have to run the blocks; leave cache out"),
        ({"cache": 9.0}, r"cache=9: in 20 steps at least 5 have to run the blocks; the nearest is cache=4.00"),
        ({"cache": 1.5, "schedule": "staggered", "num_frames": 49}, "staggered schedule"),
        ({"cache": "magcache"}, "not been calibrated .* run: fastvid calibrate --cache"),
        ({"cache": "magcache:file=/nowhere"}, "there is no /nowhere"),
        ({"cache": {"name": "magcache", "file": "a,b.json"}}, "without commas"),
    ],
)
def test_what_cannot_be_done_is_refused(
    pipe: Pipeline, options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InvalidRequest, match=match):
        pipe.plan(PROMPT, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cache": "first_block", "num_inference_steps": 4}, "all of 4 steps run all blocks"),
        ({"cache": "taylorseer:every=2,warmup=1", "num_inference_steps": 6}, "in 6 steps each changes much"),
        ({"cache": 1.5, "solver": "redraw"}, "becomes another one"),
    ],
)
def test_what_shows_is_warned_of(pipe: Pipeline, options: dict[str, Any], match: str) -> None:
    with pytest.warns(FastvidWarning, match=match):
        pipe.plan(PROMPT, **options)


def test_quality_leaves_out_what_cannot_be(pipe: Pipeline) -> None:
    preset = replace(pipe._model.preset, qualities={"exact": {}, "balanced": {"cache": 1.5}, "fast": {"cache": 2.0}})
    other = Pipeline(replace(pipe._model, preset=preset))
    with pytest.warns(FastvidWarning, match="quality=fast: its step cache is left out"):
        plan = other.plan(PROMPT, quality="fast", num_inference_steps=4)
    assert "cache" not in plan.levers and "cache" in other.plan(PROMPT, quality="fast").levers
    with pytest.raises(InvalidRequest, match="cache=2: in 4 steps"):
        other.plan(PROMPT, quality="fast", cache=2.0, num_inference_steps=4)


# ---------------------------------------------------------------- MagCache's calibration


def test_magcache_is_calibrated_once(
    pipe: Pipeline, exact: fastvid.Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = pipe.calibrate(prompts=[PROMPT], num_frames=5, num_inference_steps=12)
    assert Path(facts["file"]).is_relative_to(tmp_path) and facts["steps"] == len(facts["ratios"]["prompt"]) == 12
    assert all(0.5 < one < 1.5 for name in ("prompt", "negative") for one in facts["ratios"][name])
    made = pipe.generate(PROMPT, **SHORT, cache="magcache:threshold=0.5,warmup=2")  # of another number of steps
    assert 12 < _psnr(made.frames, exact.frames) < 99 and "digest=sha256-" in made.recipe["cache"]
    again = fastvid.Request.from_recipe(made.recipe)
    assert np.array_equal(pipe.generate(**again.arguments()).frames, made.frames)
    with pytest.raises(InvalidRequest, match="calibrated with solver='unipc', and this request has solver='euler'"):
        pipe.plan(PROMPT, cache=f"magcache:file={facts['file']}", solver="euler")
    pipe.calibrate(prompts=[PROMPT], num_frames=5, num_inference_steps=6)
    with pytest.raises(InvalidRequest, match="is not the calibration that this recipe was made with"):
        pipe.plan(**again.arguments())
    Path(facts["file"]).write_text("{}")
    with pytest.raises(InvalidRequest, match="is no calibration"):
        pipe.plan(PROMPT, cache="magcache")
    with pytest.raises(InvalidRequest, match="cache leaves out work"):
        pipe.calibrate(cache=1.5)


def test_the_command_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "made.json"
    words = ["--cache", "--num-frames", "5", "--steps", "6", "-o", str(file), "--quiet", "--json"]
    assert commands.main(["calibrate", PROMPT, *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"] == str(file) and facts["prompts"] == 1 and json.loads(file.read_text())["flow_shift"] == 3.0
    assert commands.main(["calibrate"]) == 2 and "say what to measure: --cache" in capsys.readouterr().err


def test_events_end_as_without(pipe: Pipeline) -> None:
    events = list(pipe.stream(PROMPT, **SHORT, cache=CACHE))
    assert sum(isinstance(event, Step) for event in events) == 8 and isinstance(events[-1], Finished)
