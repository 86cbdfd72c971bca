"""Every public function with values of every type: it takes them, or refuses them with one of fastvid's errors, at
once, in a short message, and keeps nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import fuzz, refuses, status, untouched
from odd_values import ODD, Drawn, values

import fastvid
from fastvid import api
from fastvid.pipeline import prepare
from fastvid.pipeline.load_arguments import TAKEN
from fastvid.requests.arguments import VERBS
from fastvid.requests.options import GivenAgain
from fastvid.serve import pool as pools

AT_ONCE = 0.01  # seconds that a check may take
FILES = 1.0  # the same, where a file or a model's description is opened
MESSAGE = 300  # characters
CLIP = np.zeros((9, 64, 64, 3), np.uint8)
BASE: dict[str, dict[str, Any]] = {
    **{verb: {"prompt": "a"} for verb in ("generate", "image")},
    **{
        verb: {"video": CLIP, "prompt": "a"}
        for verb in ("extend", "loop", "edit", "finalize", "interpolate", "upscale")
    },
    "blend": {"video": CLIP, "video_2": CLIP, "prompt": "a"},
    "storyboard": {"shots": [("a", 1)]},
}
BESIDE: dict[str, dict[str, Any]] = {
    **{name: {"expand_prompt": True} for name in ("prompt_endpoint", "prompt_model", "prompt_key")},
    **{name: {"checkpoint": "job.ckpt"} for name in ("checkpoint_every", "keep_checkpoint")},
}
"""What an argument is given with, so that nothing else is wrong."""
Call = Callable[[Any], Any]


def clip() -> Any:
    return fastvid.open_clip(CLIP)


def asked(verb: str, name: str, value: Any) -> dict[str, Any]:
    made = {**BASE[verb], **BESIDE.get(name, {}), name: value}
    if name.endswith("prompt_embeds"):
        made.pop(name.removesuffix("_embeds"), None)
    return made


MAKE: dict[str, Call] = {
    f"{verb} {name}": lambda value, verb=verb, name=name: fastvid.Request.make(verb, **asked(verb, name, value))
    for verb, names in VERBS.items()
    for name in names
}
CLIPS: dict[str, Call] = {
    "Clip.read start": lambda value: clip().read(value),
    "Clip.read stop": lambda value: clip().read(0, value),
    "Clip.head count": lambda value: clip().head(value),
    "Clip.tail count": lambda value: clip().tail(value),
    "Clip.chunks count": lambda value: next(clip().chunks(value)),
    "Clip.resampled fps": lambda value: clip().resampled(value),
    "Clip.resized height": lambda value: clip().resized(value, 64),
    "Clip.resized width": lambda value: clip().resized(64, value),
    "Clip.resized fit": lambda value: clip().resized(64, 64, value),
    "open_clip name": lambda value: fastvid.open_clip(CLIP, name=value),
    "Video frames": lambda value: fastvid.Video(value, 16, 1),
    "Video fps": lambda value: fastvid.Video(CLIP, value, 1),
    "Video seed": lambda value: fastvid.Video(CLIP, 16, value),
    "Request.make verb": lambda value: fastvid.Request.make(value, prompt="a"),
    "Request.from_recipe recipe": fastvid.Request.from_recipe,
}
LOAD: dict[str, Call] = {
    f"load {name}": lambda value, name=name: fastvid.load(**{"device": "cpu", name: value}) for name in TAKEN["load"]
}
BLUEPRINT: dict[str, Call] = {
    f"blueprint {name}": lambda value, name=name: fastvid.blueprint(**{"device": "cpu", name: value})
    for name in TAKEN["blueprint"]
}


class NoPool(fastvid.Pool):
    """A pool without processes, whose queue is full."""

    def __init__(self) -> None:
        self._change, self._closed, self._queue, self.waiting = threading.Condition(), False, [], 0


def job() -> Any:
    made = pools.Job(NoPool(), "generate", {"prompt": "a"})
    made._finish(fastvid.Cancelled("it was cancelled"))
    return made


POOL: dict[str, Call] = {
    **{
        f"Pool {name}": lambda value, name=name: fastvid.Pool(**{name: value})
        for name in (*TAKEN["load"], "groups", "waiting", "retries", "folder", "cpus", "gpus")
    },
    "submit verb": lambda value: NoPool().submit(value, prompt="a", wait=False),
    "submit prompt": lambda value: NoPool().submit(prompt=value, wait=False),
    "submit seed": lambda value: NoPool().submit(prompt="a", seed=value, wait=False),
    "submit wait": lambda value: NoPool().submit(prompt="a", wait=value, timeout=0),
    "submit timeout": lambda value: NoPool().submit(prompt="a", wait=False, timeout=value),
    "result timeout": lambda value: job().result(value),
}


def of_pipeline(pipe: Any, blueprint: Any) -> dict[str, Call]:
    """The calls of a pipeline, none of which computes a step."""

    def stream(**options: Any) -> None:
        with contextlib.closing(pipe.stream("a", **options)) as made:
            repr(made)

    async def first(**options: Any) -> None:
        events = pipe.astream("a", **options)
        try:
            await anext(events)
        finally:
            await events.aclose()

    def changed(value: Any) -> None:
        with contextlib.closing(pipe.stream("a")) as made:
            made.change_prompt(value)

    def planned(verb: str, name: str, value: Any) -> Any:
        options = asked(verb, name, value)
        return pipe.plan(options.pop("prompt", None), verb=verb, **options)

    expansion = ("expand_prompt", "prompt_endpoint", "prompt_model", "prompt_key")
    plans: dict[str, Call] = {
        f"plan {verb} {name}": functools.partial(planned, verb, name)
        for verb, names in VERBS.items()
        for name in names
        if name not in expansion
    }
    return plans | {
        "plan verb": lambda value: pipe.plan("a", verb=value),
        "plan estimate": lambda value: pipe.plan("a", estimate=value),
        "stream verb": lambda value: stream(verb=value),
        "stream keep_latents": lambda value: stream(keep_latents=value),
        "stream seed": lambda value: stream(seed=value),
        "astream verb": lambda value: asyncio.run(first(verb=value)),
        "astream seed": lambda value: asyncio.run(first(seed=value)),
        "change_prompt": changed,
        "set_loras": pipe.set_loras,
        "embed": pipe.embed,
        "encode": pipe.encode,
        "decode": pipe.decode,
        "resume path": pipe.resume,
        "resume keep_latents": lambda value: pipe.resume("nothing.ckpt", keep_latents=value),
        "resume checkpoint_every": lambda value: pipe.resume("nothing.ckpt", checkpoint_every=value),
        "resume keep_checkpoint": lambda value: pipe.resume("nothing.ckpt", keep_checkpoint=value),
        **{
            f"resume {name}": lambda value, name=name: pipe.resume("nothing.ckpt", **{name: value})
            for name in GivenAgain.__annotations__
        },
        "Blueprint.plan prompt": blueprint.plan,
        "Blueprint.plan verb": lambda value: blueprint.plan("a", verb=value),
        "Blueprint.plan keep_frames": lambda value: blueprint.plan("a", keep_frames=value),
        "Blueprint.plan estimate": lambda value: blueprint.plan("a", estimate=value),
        "open_clip": lambda value: fastvid.open_clip(value).read(0, 1),
        "inspect model": api.inspect,
        "inspect loras": lambda value: api.inspect("embedded", loras=value),
        "inspect parts": lambda value: api.inspect("embedded", parts=value),
        "inspect variant": lambda value: api.inspect("embedded", variant=value),
        "inspect quantize": lambda value: api.inspect("embedded", quantize=value),
        "save": lambda value: fastvid.Video(CLIP[:1], 16, 1).save(value),
    }


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    pipe = fastvid.load("embedded", device="cpu")
    return MAKE | CLIPS | LOAD | BLUEPRINT | POOL | of_pipeline(pipe, fastvid.blueprint(device="cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own, without ranks, Ray and measured speeds, and models without weights."""

    def no_processes(*_: Any, **__: Any) -> Any:
        raise fastvid.BackendUnavailable("no process is started here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load_model", lambda source, options: api.outline(source, options))
    monkeypatch.setattr(api.remote, "load", no_processes)
    monkeypatch.setattr(pools, "_connected_ray", no_processes)
    monkeypatch.setattr(prepare, "find_rates", lambda *_, **__: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attempt(call: Call, value: Any, seconds: float = FILES) -> bool:
    """Whether the call refused the value, as it should."""
    said: list[str] = []

    def act() -> None:
        try:
            call(value)
        except fastvid.BackendUnavailable:
            raise  # lists every operation
        except fastvid.Error as error:
            said.append(str(error))
            raise

    refused = refuses(act, fastvid.Error, seconds=FILES)
    assert all(len(text) <= MESSAGE for text in said), said
    if refused and seconds < FILES and _took(act) > seconds:
        assert min(_took(act) for _ in range(5)) < seconds
    return refused


@contextlib.contextmanager
def no_spike(mib: float, what: str) -> Iterator[None]:
    """Fail if memory is at its highest inside, and by more than this above what was held. hypothesis itself keeps more
    and more, so that `peak` is no measure of many calls."""
    if not sys.platform.startswith("linux"):
        yield
        return
    held, highest = status("VmRSS"), status("VmHWM")
    yield
    reached = status("VmHWM")
    assert reached == highest or reached - held <= mib * 1024, f"{what}: {(reached - held) >> 10} MiB"


def _took(act: Callable[[], None]) -> float:
    start = time.process_time()
    with pytest.raises(fastvid.Error):
        act()
    return time.process_time() - start


# ---------------------------------------------------------------- each function, each value


@pytest.mark.parametrize("name", sorted(ODD))
def test_every_argument_of_every_verb_takes_or_refuses(name: str) -> None:
    make = ODD[name]
    refused = [attempt(call, make(), AT_ONCE) for call in MAKE.values()]
    assert any(refused), "no argument is of this type"


@pytest.mark.parametrize("call", [*CLIPS, *LOAD, *POOL])
def test_every_argument_of_clips_load_and_pools_takes_or_refuses(call: str) -> None:
    by_name = {**CLIPS, **LOAD, **POOL}
    assert any([attempt(by_name[call], make()) for make in ODD.values()])


def test_arguments_of_another_function_are_refused() -> None:
    for act, names in (
        (lambda: fastvid.load(device="cpu", card="RTX 4090"), "card: load"),
        (lambda: fastvid.blueprint(max_running=2), "max_running: blueprint"),
        (lambda: api.inspect("embedded", format="q4_k"), "format: inspect"),
    ):
        with pytest.raises(fastvid.InvalidRequest, match=names + r" does not take it \(.* does\); leave it out"):
            act()


@pytest.mark.slow
def test_every_call_of_a_pipeline_with_every_value(calls: dict[str, Call]) -> None:
    names = [name for name in calls if name not in MAKE | CLIPS | LOAD | POOL]
    read = [name for name in names if not name.startswith("plan ") or name.split()[-1] in GivenAgain.__annotations__]
    for name in read:
        for odd, make in ODD.items():
            with no_spike(64, f"{name}: {odd}"):
                attempt(calls[name], make())


@fuzz(10_000)
def test_calls_with_values_of_any_type(calls: dict[str, Call], tmp_path: Path, count: int) -> None:
    seen: set[bool] = set()
    folder = tmp_path

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    @given(call=st.sampled_from(sorted(calls)), value=values())
    def run(call: str, value: Drawn) -> None:
        with no_spike(64, f"{call}: {value}"):
            seen.add(attempt(calls[call], value.make()))

    with untouched(folder.parent, folder):
        run()
    assert seen == {True, False}


# ---------------------------------------------------------------- what is said, and what is kept


def test_a_refused_value_is_not_kept() -> None:
    class Foreign:
        pass

    seen = []
    for call in (*MAKE.values(), *CLIPS.values(), *LOAD.values()):
        value = Foreign()
        seen.append(weakref.ref(value))
        with pytest.raises(fastvid.Error):
            call(value)
        del value
    gc.collect()
    assert not any(ref() for ref in seen)


def test_a_verb_that_does_not_exist_is_refused_by_name() -> None:
    pool = NoPool()
    for act in (lambda: fastvid.Request.make("gen"), lambda: pool.submit("a red circle")):
        with pytest.raises(fastvid.InvalidRequest, match="^verb='.*': allowed is one of generate") as told:
            act()
        assert all(verb in str(told.value) for verb in VERBS)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_taken(kind: Any) -> None:
    pipe = fastvid.blueprint(device="cpu")
    options = {"num_inference_steps": kind(5), "num_frames": kind(9), "height": kind(64), "seed": kind(3)}
    plan = pipe.plan("a", **cast(Any, options))
    assert (plan.steps, plan.num_frames, plan.height) == (5, 9, 64)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp32", "float32"),
        ("half", "float16"),
        ("float", "float32"),
        ("torch.bfloat16", "bfloat16"),
        (torch.float16, "float16"),
        (np.str_("float32"), "float32"),
    ],
)
def test_a_dtype_has_the_names_that_people_use(dtype: Any, name: str) -> None:
    assert fastvid.load(device="cpu", dtype=dtype, vae_dtype=dtype).describe()["dtype"] == name


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "fp8", np.float32, 16])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="^dtype=.*float32, bfloat16, float16"):
        fastvid.load(device="cpu", dtype=dtype)


def test_what_prints_is_short() -> None:
    pipe, request = fastvid.load("embedded", device="cpu"), fastvid.Request.make(prompt="a" * 5000, prompt_key=None)
    plan = fastvid.blueprint(device="cpu").plan("a", width=96, num_frames=33)
    assert repr(pipe) == "<Pipeline embedded on cpu>"
    assert repr(plan).startswith("<Plan: 33 frames of 96x64 at 16 fps, 20 steps, ") and len(repr(plan)) < 120
    assert len(repr(request)) < 120 and "(5000 characters)" in repr(request)
    secret = fastvid.Request.make(prompt="a", expand_prompt=True, prompt_key="secret")
    assert "secret" not in repr(secret)
