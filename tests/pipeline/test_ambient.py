"""Modes of torch and numpy that the caller has set change no byte of a video, whether around load, a request, or single
events of a stream; they are as before afterwards."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvid
from fastvid.planning import speed

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 5, "num_inference_steps": 2, "seed": 5, "width": 64, "height": 64}


class Doubling(TorchDispatchMode):
    """A dispatch mode that changes every result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, torch.Tensor) and out.is_floating_point() else out


class Widening(TorchFunctionMode):
    """A function mode that changes every result."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.double() if isinstance(out, torch.Tensor) and out.is_floating_point() else out


@contextlib.contextmanager
def setting(set_to: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "half as default": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "inference": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "matmul precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "flush denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "attention kernels": lambda: sdpa_kernel(SDPBackend.MATH),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "dispatch": Doubling,
    "function": Widening,
    "fake": FakeTensorMode,
    "anomalies": torch.autograd.set_detect_anomaly,
    "numpy errors": lambda: np.errstate(all="raise"),
    "warnings": warnings_as_errors,
    "recursion": lambda: setting(sys.setrecursionlimit, 400, sys.getrecursionlimit()),
}
ARGUMENTS = {"anomalies": (True,)}
QUICK = ("autocast", "default device", "default dtype", "inference", "function", "dispatch", "numpy errors", "warnings")
OTHERS = [name for name in MODES if name != "default dtype"]
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODES]


def entered(name: str) -> Any:
    return MODES[name](*ARGUMENTS.get(name, ()))


def state() -> tuple[Any, ...]:
    """What a caller can see of the modes."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch._C._get_mkldnn_enabled(),
        sys.float_info.min / 2 == 0.0,
        torch.initial_seed(),
        np.geterr(),
        sys.getrecursionlimit(),
    )


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def wanted(pipe: fastvid.Pipeline) -> np.ndarray:
    return pipe.generate(PROMPT, **SHORT).frames


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning", "ignore:TF32 acceleration")
@pytest.mark.parametrize("mode", EACH)
def test_no_mode_changes_a_frame(pipe: fastvid.Pipeline, wanted: np.ndarray, mode: str) -> None:
    with entered(mode):
        before = state()
        own = fastvid.load("embedded", device="cpu")
        inside = pipe.generate(PROMPT, **SHORT).frames
        assert state() == before
    assert np.array_equal(inside, wanted)
    assert np.array_equal(in_and_out(own, mode), wanted)


def in_and_out(pipe: fastvid.Pipeline, mode: str) -> np.ndarray:
    """A stream begun outside of a mode, and pulled inside and outside of it by turns."""
    events, frames = pipe.stream(PROMPT, **SHORT), []
    for turn in range(1000):
        with entered(mode) if turn % 2 else contextlib.nullcontext():
            event = next(events, None)
        if event is None:
            break
        frames += [event.frames] if isinstance(event, fastvid.Frames) else []
    return np.concatenate(frames)


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
@pytest.mark.parametrize("mode", ["default dtype", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_nor_where_clips_and_pictures_are_given(pipe: fastvid.Pipeline, mode: str) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    mask = np.zeros((5, 64, 64), np.uint8)
    mask[:, 20:50] = 255
    steps = {"num_inference_steps": 1, "seed": 2}
    calls = [
        lambda: pipe.extend(clip, PROMPT, num_frames=4, **steps),
        lambda: pipe.edit(clip, PROMPT, mask=mask, strength=0.5, **steps),
        lambda: pipe.generate(PROMPT, image=clip[0], keyframes={2: clip[1]}, **{**SHORT, **steps}),
    ]
    for call in calls:
        plain = call()
        with entered(mode):
            made = call()
        assert np.array_equal(plain.frames, made.frames) and torch.equal(plain.latents, made.latents)


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
def test_nor_in_other_threads_and_tasks(pipe: fastvid.Pipeline, wanted: np.ndarray) -> None:
    found: list[np.ndarray] = []

    def make() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            found.append(pipe.generate(PROMPT, **SHORT).frames)

    threads = [threading.Thread(target=make) for _ in range(2)]
    with torch.inference_mode(), np.errstate(all="raise"):
        for thread in threads:
            thread.start()
        found.append(asyncio.run(pipe.agenerate(PROMPT, **SHORT)).frames)
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(np.array_equal(frames, wanted) for frames in found)


@pytest.mark.parametrize("kind", ["inference", "grad"])
def test_tensors_from_other_modes_are_taken(pipe: fastvid.Pipeline, kind: str) -> None:
    embeds, latents = pipe.embed(PROMPT), pipe.generate(PROMPT, **SHORT).latents
    plain = pipe.generate(prompt_embeds=embeds, latents=latents, **SHORT)
    with torch.inference_mode(kind == "inference"):
        embeds, latents = embeds.clone(), latents.clone()
    if kind == "grad":
        embeds, latents = embeds.requires_grad_(), latents.requires_grad_()
    made = pipe.generate(prompt_embeds=embeds, latents=latents, **SHORT)
    assert np.array_equal(made.frames, plain.frames)
    assert not made.latents.requires_grad and not made.latents.is_inference()


def test_random_states_of_the_caller_are_neither_used_nor_changed(pipe: fastvid.Pipeline, wanted: np.ndarray) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert np.array_equal(fastvid.load("embedded", device="cpu").generate(PROMPT, **SHORT).frames, wanted)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)


@pytest.mark.slow
def test_measuring_this_machine_draws_no_random_number_of_the_callers(pipe: fastvid.Pipeline) -> None:
    before = torch.get_rng_state()
    speed.measure(pipe._model.ops, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_functorch_and_torch_compile_leave_it_alone(pipe: fastvid.Pipeline, wanted: np.ndarray) -> None:
    def weighted(x: torch.Tensor) -> torch.Tensor:
        return x * bool(np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted))

    assert torch.func.vmap(weighted)(torch.ones(2)).tolist() == [1, 1]
    assert torch.func.grad(weighted)(torch.ones(())).item() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_torch_compile_leaves_it_alone(pipe: fastvid.Pipeline, wanted: np.ndarray) -> None:
    def weighted(x: torch.Tensor) -> torch.Tensor:
        return x * bool(np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted))

    assert torch.compile(weighted, backend="eager")(torch.ones(2)).tolist() == [1, 1]


def test_what_a_mode_asks_for_and_does_not_get_is_said(pipe: fastvid.Pipeline) -> None:
    for mode, said in (("autocast", "load\\(dtype="), ("device", "default device meta"), ("dispatch", "Doubling")):
        with pytest.warns(fastvid.FastvidWarning, match=said), entered(mode):
            pipe.plan(PROMPT, **SHORT)
    with warnings_as_errors(), torch.device("cpu"), torch.no_grad():
        pipe.generate(PROMPT, **{**SHORT, "num_inference_steps": 1})


def test_every_float_tensor_is_made_with_its_dtype() -> None:
    """What a test of frames cannot reach on this machine: the default dtype would decide. Modules' parameters get their
    dtype when weights are loaded."""
    makers = {"zeros", "ones", "empty", "full", "linspace", "randn", "rand", "eye"}
    missing = []
    for path in (Path(fastvid.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in makers
            ):
                continue
            of_torch = ast.unparse(node.func.value) == "torch"
            named = {keyword.arg for keyword in node.keywords} & {"dtype", None}  # None: **options
            if of_torch and not named:
                missing.append(f"{path.name}: {ast.unparse(node)}")
    allowed = ("fused.py", "linear.py", "vae_layers.py", "umt5.py", "animate_motion.py")  # of parameters
    on_meta = [line for line in missing if "device='meta'" in line]
    steps = [line for line in missing if line.endswith("step)")]  # whole numbers
    assert [m for m in missing if not m.startswith(allowed) and m not in (*on_meta, *steps)] == []
