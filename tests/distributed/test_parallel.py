"""Whole requests on several ranks: the frames of one rank, with every layout; what is asked for with `parallel=`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from image_models import write_image_model
from ranks import run_ranks
from sharing import relative

import fastvid
from fastvid.cli import render
from fastvid.distributed.layout import Parallelism, every, layouts_for, parse_parallel
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.engine.events import Frames, Step
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import LoadOptions
from fastvid.models.preset import Rollout
from fastvid.models.wan.presets import LONGLIVE
from fastvid.pipeline.load import load_model
from fastvid.pipeline.pipeline import Pipeline

PROMPT = "a red circle moving right on a white background"
SIZE = {"height": 64, "width": 96}
SHOTS = [("a red circle", 1.0), ("a blue square moving left", 10 / 16), ("white on red", 19 / 16)]
ROLLOUT = Rollout(frames_per_block=2, window=5, sink=1, recache=True)
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
SHORT = {"num_frames": 9, "num_inference_steps": 3, "seed": 5}


def off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def requests(mesh: Mesh) -> None:
    """The embedded model; every verb that lays out known and free frames in its own way."""
    alone = Pipeline(load_model("embedded"))
    true = alone.generate(PROMPT, **SHORT)
    for layout in [None, *every(mesh.size, 4, True)]:
        pipe = Pipeline(load_model("embedded", LoadOptions(layout=layout), mesh))
        plan = pipe.plan(PROMPT, **SHORT)
        assert plan.parallel == str(layout or plan.parallel) and plan.parallel
        made = pipe.generate(PROMPT, **SHORT)
        assert off(made.frames, true.frames) <= 1, (layout, off(made.frames, true.frames))
        assert torch.equal(made.latents, pipe.generate(PROMPT, **SHORT).latents)
        if layout is not None:
            continue
        drawn = pipe.generate(PROMPT, num_frames=5, num_inference_steps=1)  # a seed that all have drawn alike
        assert len(set(mesh.gather(torch.tensor([drawn.seed]), (1,) * mesh.size, 0).tolist())) == 1
        for verb, given in (
            ("extend", {"video": true, "prompt": PROMPT, "seconds": 0.5, "direction": "before"}),
            ("edit", {"video": true, "prompt": PROMPT.replace("red", "blue"), "source_prompt": PROMPT}),
        ):
            given |= {"seed": 3, "num_inference_steps": 2}
            assert off(getattr(pipe, verb)(**given).frames, getattr(alone, verb)(**given).frames) <= 1, verb
        # Without guidance nobody makes a second velocity.
        given = {**SHORT, "guidance_scale": 1.0}
        assert off(pipe.generate(PROMPT, **given).frames, alone.generate(PROMPT, **given).frames) <= 1


def one_request(mesh: Mesh) -> None:
    options = {**SHORT, "num_frames": 5, "num_inference_steps": 2}
    true = Pipeline(load_model("embedded")).generate(PROMPT, **options)
    assert off(Pipeline(load_model("embedded", mesh=mesh)).generate(PROMPT, **options).frames, true.frames) <= 1


def test_a_request_on_two_ranks() -> None:
    run_ranks(2, one_request)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_requests(size: int) -> None:
    run_ranks(size, requests)


def test_what_parallel_says() -> None:
    assert parse_parallel("auto") == parse_parallel(None) == Parallelism() and parse_parallel(4) == parse_parallel(
        "4"
    ) == Parallelism(4)
    wanted = Parallelism(8, Layout(2, 1, 4))
    for said in ("guidance=2,ulysses=4", "ulysses=4, guidance=2", {"ulysses": 4, "guidance": 2}, Layout(2, 1, 4)):
        assert parse_parallel(said) == wanted


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (0, "a whole number from 1 to 1024.*; the nearest is 1"),
        (2000, "the nearest is 1024"),
        (2.5, "parallel=2.5: .*'auto', or degrees"),
        (True, "parallel=True: .*'auto', or degrees"),
        (10**50, "the nearest is 1024"),
        ("ulysses=2,ulysses=4", "each once"),
        ({"ring": 1024, "ulysses": 2}, "2048 ranks; allowed is 1 to 1024"),
        ("many", "'auto', a number of ranks"),
        ("ulyses=2", "'ulyses': allowed is .*ulysses"),
        ("ulysses=two", "ulysses='two'"),
        ("guidance=3", "two velocities, so the nearest is 2"),
        ({"ring": -1}, "ring=-1: allowed is a whole number from 1 to 1024"),
    ],
)
def test_what_it_cannot_say(said: object, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        parse_parallel(said)


def test_a_plan_says_who_shares_what() -> None:
    given = {"device_memory": 80 * 2**30, "dtype": "bfloat16"}
    size = {"height": 480, "width": 832, "num_frames": 81}
    alone = fastvid.blueprint("wan2.1-t2v-1.3b", **given).plan(**size)
    eight = fastvid.blueprint("wan2.1-t2v-1.3b", **given, parallel=8).plan(**size)
    assert alone.parallel == "" and eight.parallel == "guidance=2,ring=1,ulysses=4"
    assert 0.24 < eight.bytes_activations / alone.bytes_activations < 0.27
    unguided = fastvid.blueprint("wan2.1-t2v-1.3b", **given, parallel=8).plan(**size, guidance_scale=1.0)
    assert unguided.parallel == "guidance=1,ring=2,ulysses=4"
    with pytest.raises(InvalidRequest, match="ulysses=8 does not divide the 12 heads"):
        fastvid.blueprint("wan2.1-t2v-1.3b", **given, parallel="ulysses=8").plan(**size)


def test_an_estimate_for_ranks() -> None:
    size = {"height": 256, "width": 256, "num_frames": 33, "estimate": True}
    alone = fastvid.blueprint("embedded", device="cpu").plan(**size)
    two = fastvid.blueprint("embedded", device="cpu", parallel=2).plan(**size)
    ring = fastvid.blueprint("embedded", device="cpu", parallel="ring=2").plan(**size)
    assert alone.efficiency is None and 0.9 < two.efficiency <= 1 and 0.3 < ring.efficiency < two.efficiency
    assert two.seconds_parts["denoise"] == pytest.approx(alone.seconds_parts["denoise"] / 2 / two.efficiency)
    lines = "\n".join(render.lines(two, "embedded"))
    assert f"guidance=2,ring=1,ulysses=1; predicted efficiency of a step {two.efficiency:.0%}" in lines


def layout_for(*given, **options) -> Layout:
    """What is taken where nothing is known of how long each takes."""
    return layouts_for(*given, **options)[0]


def test_layouts_fit_heads_tokens_and_guidance() -> None:
    assert layout_for(None, 8, 12, 1560, False) == Layout(1, 2, 4)
    assert layout_for(None, 8, 12, 1560, True) == Layout(2, 1, 4)
    assert layout_for(Layout(1, 8, 1), 8, 12, 1560, True) == Layout(1, 8, 1)
    # Heads are exchanged within a host, and no further.
    assert layout_for(None, 16, 40, 3600, False, per_host=8) == Layout(1, 2, 8)
    assert layout_for(None, 16, 40, 3600, True, per_host=4) == Layout(2, 2, 4)
    # Three ranks of two tokens a frame: only guidance could share out more, and three is odd.
    with pytest.raises(InvalidRequest, match="a latent frame has 2 tokens here.*the nearest is parallel=2"):
        layout_for(None, 3, 12, 2, False)
    assert layout_for(None, 4, 12, 2, True) == Layout(2, 1, 2)
    # All that can be, each once; what was asked for, alone.
    assert {*layouts_for(None, 8, 12, 1560, True)} == {*every(8, 12, True)}
    assert len(layouts_for(None, 8, 12, 1560, True)) == 6
    assert layouts_for(Layout(1, 8), 8, 12, 9, True) == [Layout(1, 8)]


@pytest.mark.parametrize(
    ("layout", "guided", "match"),
    [
        (Layout(1, 1, 8), True, "ulysses=8 does not divide the 12 heads; the nearest is guidance=1,ring=2,ulysses=4"),
        (
            Layout(2, 1, 4),
            False,
            "guidance=2 needs a request with guidance; the nearest is guidance=1,ring=2,ulysses=4",
        ),
        (Layout(1, 2, 2), True, "is a layout of 4 ranks, and there are 8"),
    ],
)
def test_impossible_layouts_are_refused(layout: Layout, guided: bool, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        layout_for(layout, 8, 12, 1560, guided)


def other_models(mesh: Mesh, folder: str) -> None:
    """A causal model with a KV cache that is shared, prompts that change in it and guidance; and one that takes known
    frames as channels, by text and picture."""
    causal = Pipeline(load_model(f"{folder}/causal"))
    preset = replace(LONGLIVE, spatial_multiple=16, temporal=4, rollout=ROLLOUT)
    causal = Pipeline(replace(causal._model, preset=preset))
    image = Pipeline(load_model(f"{folder}/i2v"))
    for scale in (1.0, 2.0):
        given = {"guidance_scale": scale, "negative_prompt": "blue square", "seed": 2}
        true = causal.storyboard(SHOTS, **given, **SIZE)
        shown = image.generate("a red circle", image=PICTURE, num_frames=9, num_inference_steps=3, **given, **SIZE)
        for layout in every(mesh.size, 2, scale != 1):
            parts = replace(causal._model, mesh=mesh, options=LoadOptions(layout=layout))
            made = Pipeline(parts).storyboard(SHOTS, **given, **SIZE)
            assert relative(made.latents, true.latents) < 1e-4 and off(made.frames, true.frames) <= 1, layout
            goes_on(mesh, Pipeline(parts), f"{folder}/{scale}-{layout}", made, SHOTS, {**given, **SIZE})
            pipe = Pipeline(replace(image._model, mesh=mesh, options=LoadOptions(layout=layout)))
            made = pipe.generate("a red circle", image=PICTURE, num_frames=9, num_inference_steps=3, **given, **SIZE)
            assert relative(made.latents, shown.latents) < 1e-4 and off(made.frames, shown.frames) <= 1, layout


def goes_on(mesh: Mesh, pipe: Pipeline, folder: str, true: fastvid.Video, shots: list, given: dict) -> None:
    """A storyboard that is broken off in the middle of its blocks."""
    for rows in (3, 20):
        stream = pipe.stream(verb="storyboard", shots=shots, checkpoint=folder, checkpoint_every=0, **given)
        for event in stream:
            if isinstance(event, Step) and event.step == rows:
                break
        stream.close()
        mesh.gather(torch.zeros(1), (1,) * mesh.size, 0)  # until all have let go of it
        made = list(pipe.resume(folder))
        mesh.gather(torch.zeros(1), (1,) * mesh.size, 0)
        frames = np.concatenate([event.frames for event in made if isinstance(event, Frames)])
        assert torch.equal(made[-1].latents, true.latents) and np.array_equal(frames, true.frames), rows


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_other_models(size: int, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "causal", num_layers=3)
    write_image_model(tmp_path / "i2v", "i2v")
    run_ranks(size, other_models, str(tmp_path))


def interrupted(mesh: Mesh, folder: str) -> None:
    """A request that goes on from its checkpoint on as many ranks; one of them writes it."""
    pipe = Pipeline(load_model("embedded", mesh=mesh))
    true = pipe.generate(PROMPT, **SHORT)
    stream = pipe.stream(PROMPT, **SHORT, checkpoint=folder, checkpoint_every=0)
    for event in stream:
        if isinstance(event, Step) and event.step == 2:
            break
    stream.close()
    mesh.gather(torch.zeros(1), (1,) * mesh.size, 0)  # until all have let go of it
    made = [event for event in pipe.resume(folder)]
    frames = np.concatenate([event.frames for event in made if isinstance(event, Frames)])
    assert np.array_equal(frames, true.frames) and torch.equal(made[-1].latents, true.latents)
    assert [event.step for event in made if isinstance(event, Step)] == [3]


@pytest.mark.slow
def test_a_checkpoint_of_ranks(tmp_path: Path) -> None:
    run_ranks(3, interrupted, str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()


def on_one_gpu(mesh: Mesh) -> None:
    """Ranks that share a GPU, their messages through host memory: the device's code is that of many GPUs."""
    mesh = Mesh.of_group(device="cuda")
    assert mesh.staged
    alone = Pipeline(load_model("embedded", LoadOptions("cuda", "float32"))).generate(PROMPT, **SHORT)
    for layout in every(mesh.size, 4, True):
        made = Pipeline(load_model("embedded", LoadOptions("cuda", "float32", layout=layout), mesh))
        assert off(made.generate(PROMPT, **SHORT).frames, alone.frames) <= 1, layout


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_requests_on_one_gpu(size: int) -> None:
    run_ranks(size, on_one_gpu)


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(InvalidRequest, match="device='cpuu': allowed is 'cpu'"):
        fastvid.load("embedded", device="cpuu", parallel=2)
