"""No step waits for the host: whole requests on a stub of a GPU, which notes every place where the host would wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from stub_gpu import CUDA, READS, OnGpu, StubGpu, move, stub_gpu

import fastvid
from fastvid.device.offload import Resident
from fastvid.engine import session as sessions
from fastvid.engine.decode import Decoder
from fastvid.engine.events import Frames
from fastvid.engine.queue import Scheduler, Ticket
from fastvid.engine.session import SegmentRun, Session
from fastvid.errors import Error
from fastvid.layers import kv_cache
from fastvid.models.common.experts import Experts
from fastvid.models.loaded import Model
from fastvid.models.preset import Rollout
from fastvid.models.wan import presets
from fastvid.ops import compiled, rgb, upload, vae_library
from fastvid.pipeline.prepare import prepare
from fastvid.requests.request import Request
from fastvid.sampling import solvers

PROMPT = "a red circle moving right on a white background"
SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 4}
FUSED = "euler, fused", "unipc, fused", "dpm++, fused"


@pytest.fixture(scope="module")
def plain() -> Model:
    return fastvid.load("embedded", device="cpu", attention="sdpa")._model


@pytest.fixture(scope="module")
def stubbed() -> Model:
    """The embedded model with its weights on the stub, and the VAE's operations that are the default there."""
    model = fastvid.load("embedded", device="cpu", attention="sdpa")._model
    encoder = model.modules.encoders.modules[0]
    for module in (model.transformer, model.vae, encoder):
        move(module)
    eager = {op: partial(function, pointwise=vae_library.EAGER) for op, function in vae_library.OPERATIONS.items()}
    for part in model.vae.modules():
        part.ops = SimpleNamespace(**eager, to_rgb=rgb.reference)
    modules = replace(model.modules, experts=Experts([model.transformer], None), encoders=Resident([encoder]))
    return replace(model, modules=modules, placement=replace(model.placement, device=CUDA))


class Counted:
    """Where the host waits in each step, from one row of the noise table to the next and in what ends it, and in each
    decoded chunk."""

    def __init__(self, gpu: StubGpu) -> None:
        self.gpu, self.steps, self.ends, self.chunks = gpu, list[list[str]](), list[list[str]](), list[list[str]]()

    def rows(self, walk: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def counted(*args: Any, **options: Any) -> Iterator[Any]:
            rows = walk(*args, **options)
            while True:
                with self.gpu.counting() as waits:
                    row = next(rows, None)
                if row is None:
                    return
                self.steps.append(waits)
                yield row

        return counted

    def calls(self, function: Callable[..., Any], into: list[list[str]]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            with self.gpu.counting() as waits:
                made = function(*args)
            into.append(waits)
            return made

        return counted


def run(model: Model, job: Any) -> tuple[Counted, np.ndarray]:
    """The waits and the frames of a request on the stub."""
    with torch.no_grad(), stub_gpu() as gpu:
        counted = Counted(gpu)
        session = Session(model, job, Ticket(Scheduler()))
        with (
            mock.patch.object(sessions, "walk", counted.rows(sessions.walk)),
            mock.patch.object(SegmentRun, "_finish_steps", counted.calls(SegmentRun._finish_steps, counted.ends)),
            mock.patch.object(Decoder, "_decode", counted.calls(Decoder._decode, counted.chunks)),
        ):
            frames = [event.frames for event in session.run() if isinstance(event, Frames)]
    return counted, np.concatenate(frames)


def requested(model: Model, verb: str = "generate", **options: Any) -> Any:
    return prepare(model, Request.make(verb, **{"prompt": PROMPT, **SIZE, **options})).job


def with_fused_steps(model: Model) -> Model:
    """With the solver's step as one operation, as torch.compile makes it; but nothing is compiled for the stub."""
    ops = replace(model.ops, bound={**model.ops.bound, "solver_step": "compiled"})
    vars(ops)["solver_step"] = compiled.solver_step
    return replace(model, ops=ops)


def clip(count: int) -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    return np.stack(
        [np.roll(np.stack((x * 4, y * 4, 255 - 2 * x - y), -1).astype(np.uint8), 3 * i, 1) for i in range(count)]
    )


def check(counted: Counted, new_windows: int = 1) -> None:
    """No step waits, but for the pictures and clips that a window needs; a step's end waits for the step before, while
    the GPU is at this one, or for latents that leave; a chunk is waited for once it is made: its sums, its frames."""
    assert sum(map(bool, counted.steps[1:])) < new_windows, counted.steps
    assert len(counted.ends) == len(counted.steps) + 1
    for waits in counted.ends:
        ahead = [int(re.findall(r"(\d+) operations ahead", wait)[0]) for wait in waits]
        assert len(ahead) <= 2 and (len(ahead) < 2 or ahead[0] > 100 >= ahead[1]), waits
    assert counted.chunks and all(len(waits) == 2 for waits in counted.chunks), counted.chunks


SLOW = pytest.mark.slow


@pytest.mark.parametrize("solver", ["euler", "unipc", *(pytest.param(one, marks=SLOW) for one in ("dpm++", *FUSED))])
def test_steps_with_guidance(solver: str, plain: Model, stubbed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "run", lambda *given: given[-1]())
    job = requested(plain, num_frames=5, solver=solver.split(",")[0], guidance_scale=4.0)
    counted, frames = run(with_fused_steps(stubbed) if "fused" in solver else stubbed, job)
    assert len(counted.steps) == 3 and not any(counted.steps)
    check(counted)
    assert [len(waits) for waits in counted.ends] == [0, 1, 2, 0], "the first is waited for after the second is queued"
    if solver == "unipc":
        options = {"num_frames": 5, "solver": solver, "guidance_scale": 4.0, **SIZE}
        wanted = fastvid.Pipeline(plain).generate(PROMPT, **options).frames
        assert np.abs(wanted.astype(int) - frames).max() <= 1, "the stub computes"


@pytest.mark.parametrize(
    "kind",
    [
        "picture",
        *(pytest.param(one, marks=SLOW) for one in ("mask", "source", "windows", "staggered", "redraw")),
    ],
)
def test_steps_with_known_columns(kind: str, plain: Model, stubbed: Model) -> None:
    mask = np.zeros((9, 64, 64), np.uint8)
    mask[:, :32] = 255
    options: dict[str, Any] = {
        "picture": {"image": clip(1)[0], "num_frames": 5},
        "mask": {"verb": "edit", "video": clip(9), "mask": mask},
        "source": {"verb": "edit", "video": clip(5), "source_prompt": "colours", "solver": "euler"},
        "windows": {"num_frames": 41},
        "staggered": {"num_frames": 9, "schedule": "staggered"},
        "redraw": {"num_frames": 5, "solver": "redraw"},
    }[kind]
    counted, _ = run(stubbed, requested(plain, **options))
    check(counted, new_windows=2 if kind == "windows" else 1)


@pytest.mark.parametrize("picture", [pytest.param(False, marks=SLOW), True])
def test_steps_of_a_causal_model(picture: bool, plain: Model, stubbed: Model) -> None:
    """With a KV cache, whose slots come round, new noise in every step, and clean blocks written into it."""
    rollout = Rollout(frames_per_block=1, window=3, sink=1)
    changes = {"spatial_multiple": 16, "temporal": 4, "rollout": rollout}
    models = [replace(m, preset=replace(presets.SELF_FORCING, **changes)) for m in (plain, stubbed)]
    job = requested(models[0], num_frames=17, num_inference_steps=2, **({"image": clip(1)[0]} if picture else {}))
    counted, _ = run(models[1], job)
    assert len(counted.steps) > 8
    check(counted)


def test_encoding_and_decoding(stubbed: Model) -> None:
    with torch.no_grad(), stub_gpu() as gpu:
        frames = torch.rand(1, 3, 9, 64, 64, device=CUDA)
        latents, cache = stubbed.vae.encode(frames[:, :, :5])
        stubbed.vae.encode(frames[:, :, 5:], cache)
        _, cache = stubbed.vae.decode(latents)
        stubbed.vae.decode(latents, cache, stripes=2, reuse=True)
        assert gpu.waits == [] and gpu.operations > 500 and isinstance(latents, OnGpu)
        stubbed.vae.decode_rgb(latents)
        assert len(gpu.waits) == 1 and gpu.waits[0].startswith("tolist")


def test_nan_is_found_one_step_later(plain: Model, stubbed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And told of the step that made it."""
    job, steps = requested(plain, num_frames=5, num_inference_steps=4), []
    keep = solvers._blend

    def broken(x: Any, *rest: Any) -> Any:
        steps.append(x)
        return keep(x, *rest) * (float("nan") if len(steps) == 2 else 1)

    monkeypatch.setattr(solvers, "_blend", broken)
    with pytest.raises(Error, match=r"step 2 of 4 \(noise level 0\.\d+\): the latents are not finite"):
        run(stubbed, replace(job, request=replace(job.request, solver="euler")))
    assert len(steps) == 3


# ---------------------------------------------------------------- the test itself


@pytest.mark.parametrize(
    ("where", "name", "bad"),
    [
        pytest.param(solvers, "upload", lambda values, device, dtype=None: values.to(device, dtype), marks=SLOW),
        (solvers, "upload", lambda values, device, dtype=None: values.to(device, dtype, non_blocking=True)),
        (solvers, "_blend", lambda x, target, *_: x if bool((x > 9).any()) else target),
        pytest.param(solvers, "_blend", lambda x, *_: x * float(x.mean()), marks=SLOW),
        pytest.param(solvers, "_blend", lambda x, *_: x * torch.tensor([0.5], device=x.device), marks=SLOW),
        pytest.param(solvers, "_blend", lambda x, *_: x.cpu().to(x.device), marks=SLOW),
    ],
)
def test_a_wait_is_seen(
    where: Any, name: str, bad: Any, plain: Model, stubbed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, bad)
    counted, _ = run(stubbed, requested(plain, num_frames=5, solver="euler"))
    assert all(counted.steps)
    with pytest.raises(AssertionError):
        check(counted)


def test_what_the_stub_sees() -> None:
    reads: dict[str, Callable[[torch.Tensor], Any]] = {
        "item": lambda x: x.sum().item(),
        "float": lambda x: float(x[0]),
        "bool": lambda x: bool(x.any()),
        "nonzero": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 0],
        "unique": torch.unique,
        "equal": lambda x: torch.equal(x, x),
        "list": lambda x: x.tolist(),
        "to the host": lambda x: x.to("cpu"),
        "into the host": lambda x: torch.empty(3).copy_(x),
        "from a list": lambda x: x.new_tensor([1.0]),
        "rows": lambda x: x[[0, 2]],
        "stream": lambda x: torch.cuda.current_stream(x.device).synchronize(),
    }
    for name, read in reads.items():
        with torch.no_grad(), stub_gpu() as gpu:
            x = torch.randn(3, device=CUDA)
            assert gpu.waits == []
            read(x)
            assert len(gpu.waits) == 1, (name, gpu.waits)
    assert "equal" in READS
    with torch.no_grad(), stub_gpu() as gpu:
        x = torch.randn(3, device=CUDA)
        (x * 2 + x.new_zeros(3)).clamp(max=1).view(1, 3).float()
        made = upload.upload(torch.ones(3, dtype=torch.float64), CUDA, torch.float32)
        assert made.dtype == torch.float32 and isinstance(made, OnGpu) and gpu.waits == []
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


def test_runs_of_slots() -> None:
    assert kv_cache.runs([4]) == [(4, 0, 1)] and kv_cache.runs([]) == []
    assert kv_cache.runs([5, 6, 2, 3, 4, 9]) == [(5, 0, 2), (2, 2, 3), (9, 5, 1)]
