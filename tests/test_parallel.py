"""Whole requests on several ranks: the frames of one rank, with every layout; what is asked for with `parallel=`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import run_ranks

from fastvid.distributed import Layout, Mesh
from fastvid.errors import InvalidRequest
from fastvid.loading import load_parts
from fastvid.parallel import Asked, every, layout_for, parse
from fastvid.pipeline import Pipeline

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 9, "num_inference_steps": 3, "seed": 5}


def off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def requests(mesh: Mesh) -> None:
    """The embedded model; every verb that lays out known and free frames in its own way."""
    alone = Pipeline(load_parts("embedded"))
    true = alone.generate(PROMPT, **SHORT)
    for layout in [None, *every(mesh.size, 4, True)]:
        pipe = Pipeline(load_parts("embedded", mesh=mesh, layout=layout))
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


@pytest.mark.parametrize("size", [2, 3, 4])
def test_requests(size: int) -> None:
    run_ranks(size, requests)


def test_what_parallel_says() -> None:
    assert parse("auto") == parse(None) == Asked() and parse(4) == parse("4") == Asked(4)
    wanted = Asked(8, Layout(2, 1, 4))
    for said in ("guidance=2,ulysses=4", "ulysses=4, guidance=2", {"ulysses": 4, "guidance": 2}, Layout(2, 1, 4)):
        assert parse(said) == wanted


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (0, "allowed is 1 to 1024, the nearest is 1"),
        (2000, "the nearest is 1024"),
        (2.5, "a number of ranks"),
        (True, "a number of ranks"),
        ("many", "'auto', a number of ranks"),
        ("ulyses=2", "'ulyses' is not known; allowed is .*ulysses"),
        ("ulysses=two", "ulysses is 'two'"),
        ("guidance=3", "two velocities, so the nearest is 2"),
        ({"ring": -1}, "ring is -1; allowed is 1 to 1024"),
    ],
)
def test_what_it_cannot_say(said: object, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        parse(said)


def test_layouts_fit_heads_tokens_and_guidance() -> None:
    assert layout_for(None, 8, 12, 1560, False) == Layout(1, 2, 4)
    assert layout_for(None, 8, 12, 1560, True) == Layout(2, 1, 4)
    assert layout_for(Layout(1, 8, 1), 8, 12, 1560, True) == Layout(1, 8, 1)
    # Three ranks of two tokens a frame: only guidance could share out more, and three is odd.
    with pytest.raises(InvalidRequest, match="a latent frame has 2 tokens here.*the nearest is parallel=2"):
        layout_for(None, 3, 12, 2, False)
    assert layout_for(None, 4, 12, 2, True) == Layout(2, 1, 2)


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


def on_one_gpu(mesh: Mesh) -> None:
    """Ranks that share a GPU, their messages through host memory: the device's code is that of many GPUs."""
    mesh = Mesh.of_group(device="cuda")
    assert mesh.staged
    alone = Pipeline(load_parts("embedded", device="cuda", dtype="float32")).generate(PROMPT, **SHORT)
    for layout in every(mesh.size, 4, True):
        made = Pipeline(load_parts("embedded", device="cuda", dtype="float32", mesh=mesh, layout=layout))
        assert off(made.generate(PROMPT, **SHORT).frames, alone.frames) <= 1, layout


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_requests_on_one_gpu(size: int) -> None:
    run_ranks(size, on_one_gpu)
