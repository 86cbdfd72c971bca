"""Guidance at some noise levels alone, with a difference that is computed in every N-th step, and both halves in one
call: against plain loops in float64, and on all ways that a request may take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks
from streams import frames_of, run, same, snapshots

import fastvid
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.models.loaded import LoadOptions
from fastvid.models.preset import EVERYTHING, Rollout
from fastvid.pipeline.load import load_model
from fastvid.pipeline.pipeline import Pipeline
from fastvid.requests.request import Request
from fastvid.sampling.noise import latent_noise

PROMPT, NEGATIVE = "a red circle moving right", "blue square"
SIGMAS = [1.0, 0.93, 0.84, 0.72, 0.6, 0.45, 0.3, 0.15]
BOUNDARY = 0.7
ASKED: dict[str, Any] = {"sigmas": SIGMAS, "solver": "euler", "height": 64, "width": 96, "num_frames": 9, "seed": 3}
ASKED |= {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}
EVERY, INTERVAL = {"guidance_every": 2}, {"guidance_interval": (0.2, 0.84)}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> list[fastvid.Pipeline]:
    """With one expert and with two."""
    found = []
    for name, boundary in (("one", None), ("two", BOUNDARY)):
        folder = tmp_path_factory.mktemp(name)
        tiny.write_checkpoint(
            folder, boundary_ratio=boundary, vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16}
        )
        pipe = fastvid.load(str(folder), device="cpu")
        for expert in pipe._model.experts.modules:  # random weights hardly look at the text
            for block in expert.blocks:
                block.attn2.norm_q.weight.data *= 4
                block.attn2.to_out[0].weight.data *= 40
        found.append(pipe)
    return found


def with_preset(pipe: fastvid.Pipeline, **changes: Any) -> fastvid.Pipeline:
    known = replace(pipe._model.preset, patterns=EVERYTHING, **changes)
    return Pipeline(replace(pipe._model, preset=known))


def plain(pipe: fastvid.Pipeline, kinds: str, scales: tuple[float, ...] = (4.0,)) -> tuple[torch.Tensor, int]:
    """Euler's steps in float64, and the number of calls. kinds: of each step, c: computed, r: the last difference again
    (smaller as the noise is), -: the prompt's velocity alone."""
    model, calls, difference, then = pipe._model, 0, None, 1.0
    texts = [model.embed(PROMPT), model.embed(NEGATIVE)]
    x = latent_noise(ASKED["seed"], (16, 3, 8, 12)).double()
    for kind, sigma, after in zip(kinds, SIGMAS, [*SIGMAS[1:], 0.0], strict=True):
        number = int(len(scales) == 2 and sigma < BOUNDARY)
        expert, time = model.experts.modules[number], torch.full((1, 3), 1000 * sigma, dtype=torch.float64)
        with torch.no_grad():
            v, *other = (expert(x.float(), time, text).double() for text in texts[: 1 + (kind == "c")])
        calls += 1 + len(other)
        difference, then = (v - other[0], sigma) if other else (difference, then)
        share = ((1 - then) / (1 - sigma)) ** 0.5 if kind == "r" else 1.0
        v = v if kind == "-" else v + (scales[number] - 1) * share * difference
        x = x + (after - sigma) * v
    return x, calls


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def calls_of(pipe: fastvid.Pipeline, run: Any) -> tuple[Any, list[int]]:
    """What run() returns, and how many prompts each call of the model had."""
    sizes: list[int] = []
    hooks = [one.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))) for one in modules(pipe)]
    made = run()
    for hook in hooks:
        hook.remove()
    return made, sizes


def modules(pipe: fastvid.Pipeline) -> Any:
    return pipe._model.experts.modules


# ---------------------------------------------------------------- against plain loops


@pytest.mark.filterwarnings("ignore:guidance_interval is not used")
@pytest.mark.parametrize(
    ("levers", "kinds"),
    [
        ({}, "cccccccc"),
        ({"guidance_interval": (0.3, 0.93)}, "-ccccc--"),
        ({"guidance_every": 2}, "ccrcrcrc"),
        ({"guidance_every": 3}, "ccrrcrrc"),
        ({"guidance_every": 3, "guidance_interval": (0.15, 0.84)}, "--ccrrc-"),
        ({"guidance_interval": (0.16, 0.2)}, "--------"),
    ],
)
def test_one_expert(pipes: list[fastvid.Pipeline], levers: dict[str, Any], kinds: str) -> None:
    wanted, count = plain(pipes[0], kinds)
    video, sizes = calls_of(pipes[0], lambda: pipes[0].generate(PROMPT, **ASKED, **levers))
    assert error(video.latents, wanted) < 1e-5
    assert sum(sizes) == count == pipes[0].plan(PROMPT, **ASKED, **levers).model_calls
    assert kinds == "c" * 8 or error(video.latents, plain(pipes[0], "c" * 8)[0]) > 1e-3


@pytest.mark.parametrize(
    ("levers", "kinds"),
    [({"guidance_every": 3}, "ccrrccrr"), ({"guidance_every": 2, "guidance_interval": (0.3, 0.93)}, "-ccrcc--")],
)
@pytest.mark.parametrize("second", [2.0, 1.0])
def test_an_expert_switch_begins_anew(
    pipes: list[fastvid.Pipeline], levers: dict[str, Any], kinds: str, second: float
) -> None:
    kinds = kinds if second != 1 else kinds[:4] + "----"
    wanted, count = plain(pipes[1], kinds, (4.0, second))
    asked = {**ASKED, "guidance_scale_2": second, **levers}
    video, sizes = calls_of(pipes[1], lambda: pipes[1].generate(PROMPT, **asked))
    assert error(video.latents, wanted) < 1e-5 and sum(sizes) == count == pipes[1].plan(PROMPT, **asked).model_calls


# ---------------------------------------------------------------- every way of a request

CLIP = np.random.default_rng(1).integers(0, 256, (13, 64, 64, 3), np.uint8)
SHORT: dict[str, Any] = {"num_inference_steps": 4, "seed": 5, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
SIZE = {"height": 64, "width": 64}
WINDOWS: dict[str, Any] = {"carries": True, "window": 3, "overlap": 1, "known_guidance_scale": 2.0}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "windows": (WINDOWS, "generate", {**SIZE, "num_frames": 17}),
    "new noise": (WINDOWS, "generate", {**SIZE, "num_frames": 9, "solver": "redraw"}),
    "rollout": ({"rollout": Rollout(1, window=3, sink=1)}, "generate", {**SIZE, "num_frames": 9, "solver": "euler"}),
    "edit": (WINDOWS, "edit", {"video": CLIP, "strength": 1.0}),
    "other prompt": (WINDOWS, "edit", {"video": CLIP, "strength": 1.0, "source_prompt": "a blue square"}),
    "extend": (WINDOWS, "extend", {"video": CLIP, "num_frames": 8}),
    "two sizes": (
        WINDOWS,
        "generate",
        {"height": 128, "width": 128, "num_frames": 9, "progressive": 0.5, "num_inference_steps": 6},
    ),
    "staggered": ({"window": 5, "overlap": 1}, "generate", {**SIZE, "num_frames": 17, "schedule": "staggered"}),
}
LEVERS = [EVERY, INTERVAL, {**EVERY, "guidance_interval": (0.1, 0.95)}]


@pytest.mark.parametrize("levers", LEVERS, ids=["every", "interval", "both"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:guidance_every.*not used")
def test_plans_count_the_calls_and_recipes_repeat_them(pipes: Any, case: str, levers: dict[str, Any]) -> None:
    changes, verb, options = CASES[case]
    pipe = with_preset(pipes[0], **changes)
    asked = {"prompt": PROMPT, **SHORT, **options, **levers}
    made, sizes = calls_of(pipe, lambda: run(pipe.stream(verb=verb, **asked)))
    plain, exact = calls_of(pipe, lambda: run(pipe.stream(verb=verb, **{"prompt": PROMPT, **SHORT, **options})))
    assert pipe.plan(verb=verb, **asked).model_calls == sum(sizes)
    if levers == EVERY and case == "staggered":
        assert same(made, plain) and len(sizes) == len(exact)
        return
    assert len(sizes) < len(exact) and not torch.equal(made.latents, plain.latents)
    given = {name: value for name, value in options.items() if name == "video"}
    again = Request.from_recipe(made.recipe, **given)
    assert same(run(pipe.stream(verb=verb, **again.arguments())), made)


@pytest.mark.parametrize(
    "case", ["windows", *(pytest.param(case, marks=pytest.mark.slow) for case in ("rollout", "two sizes"))]
)
def test_a_resumed_request_is_bit_identical(pipes: Any, tmp_path: Any, case: str) -> None:
    changes, verb, options = CASES[case]
    pipe, asked = with_preset(pipes[0], **changes), {"prompt": PROMPT, **SHORT, **options, **EVERY}
    asked["num_inference_steps"] = max(5, asked["num_inference_steps"])
    whole, path = run(pipe.stream(verb=verb, **asked)), tmp_path / "job.ckpt"
    stream = pipe.stream(verb=verb, **asked, checkpoint=path, checkpoint_every=0)
    given = {name: value for name, value in options.items() if name == "video"}
    for copy in snapshots(stream, path, tmp_path)[: 9 if case != "rollout" else None]:
        assert same(run(pipe.resume(copy, **given)), whole)


def test_requests_in_turns_keep_apart(pipes: Any) -> None:
    asked = [{**ASKED, "seed": seed, "guidance_every": every} for seed, every in ((1, 2), (2, 3))]
    alone = [pipes[0].generate(PROMPT, **each).frames for each in asked]
    streams = [pipes[0].stream(PROMPT, **each) for each in asked]
    events: list[list[Any]] = [[], []]
    left = [0, 1]
    while left:
        for i in list(left):
            event = next(streams[i], None)
            if event is None:
                left.remove(i)
            else:
                events[i].append(event)
    assert all(np.array_equal(frames_of(made), one) for made, one in zip(events, alone, strict=True))


# ---------------------------------------------------------------- both halves in one call


def test_both_halves_in_one_call(pipes: list[fastvid.Pipeline]) -> None:
    for pipe in pipes:
        apart = pipe.generate(PROMPT, **ASKED).latents
        video, sizes = calls_of(pipe, lambda pipe=pipe: pipe.generate(PROMPT, **ASKED, guidance_batch=True))
        assert sizes == [2] * len(SIGMAS) and error(video.latents, apart) < 1e-5
        assert video.recipe["guidance_batch"] is True
        plan = pipe.plan(PROMPT, **ASKED, guidance_batch=True)
        assert plan.model_calls == sum(sizes) and plan.levers["guidance_batch"] == "both prompts in one call"
        assert plan.bytes_activations == 2 * pipe.plan(PROMPT, **ASKED).bytes_activations
    both = {**ASKED, "guidance_batch": True, "guidance_every": 2}
    video, sizes = calls_of(pipes[0], lambda: pipes[0].generate(PROMPT, **both))
    assert sizes == [2, 2, 1, 2, 1, 2, 1, 2]
    assert error(video.latents, pipes[0].generate(PROMPT, **ASKED, guidance_every=2).latents) < 1e-5


@pytest.mark.parametrize("case", ["windows", "edit", "other prompt", "extend", "staggered"])
def test_windows_and_clips_in_one_call(pipes: Any, case: str) -> None:
    changes, verb, options = CASES[case]
    pipe, asked = with_preset(pipes[0], **changes), {"prompt": PROMPT, **SHORT, **options}
    made, sizes = calls_of(pipe, lambda: run(pipe.stream(verb=verb, **asked, guidance_batch=True)))
    assert 2 in sizes and error(made.latents, run(pipe.stream(verb=verb, **asked)).latents) < 1e-5


@pytest.mark.parametrize(
    ("changes", "asked", "why"),
    [
        ({"rollout": Rollout(1)}, {}, "KV cache"),
        ({}, {"prompt_embeds": torch.zeros(1, 5, 32)}, "5 and 16 rows"),
        ({}, {"height": 320, "width": 320}, "1,200 tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*trained at", "ignore:guidance_batch is not used")
def test_what_cannot_be_one_call_is_made_one_after_the_other(
    pipes: Any, changes: dict[str, Any], asked: dict[str, Any], why: str
) -> None:
    pipe = with_preset(pipes[0], **changes)
    given = {"prompt": PROMPT, **ASKED, "sigmas": [1.0], **asked, "guidance_batch": True}
    given |= {"prompt": None} if "prompt_embeds" in asked else {}
    with pytest.warns(fastvid.FastvidWarning, match=f"guidance_batch.*{why}"):
        video, sizes = calls_of(pipe, lambda: pipe.generate(**given))
    assert set(sizes) == {1} and why in pipe.plan(**given).levers["guidance_batch"]


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("name", ["guidance_interval", "guidance_every", "guidance_batch"])
def test_levers_without_guidance_are_named(pipes: Any, name: str) -> None:
    value = {"guidance_interval": (0.2, 0.8), "guidance_every": 2, "guidance_batch": True}[name]
    asked = {**ASKED, "guidance_scale": 1.0, "negative_prompt": None, "sigmas": [1.0]}
    with pytest.warns(fastvid.FastvidWarning, match=f"{name} is not used: there is no guidance"):
        made = pipes[0].generate(PROMPT, **asked, **{name: value})
    assert np.array_equal(made.frames, pipes[0].generate(PROMPT, **asked).frames)


def test_an_interval_without_levels_is_named(pipes: Any) -> None:
    with pytest.warns(fastvid.FastvidWarning, match="guidance_interval is not used: it holds none of .* 1 to 0.15"):
        pipes[0].generate(PROMPT, **ASKED, guidance_interval=(0.16, 0.2))


# ---------------------------------------------------------------- ranks


ALL = (EVERY, INTERVAL, {"guidance_batch": True})
LAYOUTS = (None, Layout(guidance=2), Layout(ulysses=2), Layout(ring=2))


def shared(mesh: Mesh, few: str = "") -> None:
    """Levers in layouts of two ranks, against one rank."""
    asked: dict[str, Any] = {"prompt": PROMPT, "num_frames": 9, "num_inference_steps": 4, "seed": 5}
    alone = Pipeline(load_model("embedded"))
    for levers in ALL[:1] if few else ALL:
        true = alone.generate(**asked, **levers)
        for layout in LAYOUTS[:2] if few else LAYOUTS:
            pipe = Pipeline(load_model("embedded", LoadOptions(layout=layout), mesh))
            made = pipe.generate(**asked, **levers)
            assert np.abs(made.frames.astype(int) - true.frames).max() <= 1, (levers, layout)
            assert layout is not None or "guidance=1" in pipe.plan(**asked, **levers).parallel


def test_two_ranks() -> None:
    run_ranks(2, shared, "few")


@pytest.mark.slow
def test_two_ranks_in_all_layouts() -> None:
    run_ranks(2, shared)
