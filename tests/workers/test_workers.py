"""Pipelines on several processes: what they can be asked for, from a program, the command line and torchrun."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from processes import alive, listening, off, workers_here

import fastvid
from fastvid.distributed.layout import parse_parallel
from fastvid.engine.events import Finished, Frames, Started, Step
from fastvid.workers import remote
from fastvid.workers.team import Team

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 9, "num_inference_steps": 3, "seed": 5}
LONG = {"num_frames": 33, "num_inference_steps": 40, "seed": 5}


@pytest.fixture(scope="module")
def alone():
    return fastvid.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def pipe():
    with fastvid.load("embedded", device="cpu", parallel=2) as made:
        yield made
        pids = workers_here()
    assert pids and not workers_here() and not any(map(alive, pids))


# ---------------------------------------------------------------- requests


def test_every_verb(pipe, alone) -> None:
    video = pipe.generate(PROMPT, **SHORT)
    true = alone.generate(PROMPT, **SHORT)
    assert off(video.frames, true.frames) <= 1 and video.latents.shape == true.latents.shape
    assert video.recipe["settings"].pop("parallel") == "2" and video.recipe == true.recipe
    few, mask = {"num_inference_steps": 2, "seed": 1}, np.zeros((64, 64), bool)
    mask[:32] = True
    picture = Image.fromarray(true.frames[0])
    asked = [
        ("image", (PROMPT,), few),
        ("generate", (PROMPT,), {**few, "image": picture, "num_frames": 9}),
        ("extend", (true, PROMPT), {**few, "seconds": 0.5}),
        ("loop", (true.frames, PROMPT), {**few, "seconds": 0.5}),
        ("blend", (true, torch.from_numpy(true.frames), PROMPT), {**few, "seconds": 0.5}),
        ("edit", (true, PROMPT.replace("red", "blue")), {**few, "mask": mask}),
        ("storyboard", ([(PROMPT, 0.5), (PROMPT.replace("red", "green"), Fraction(1, 2))],), few),
        ("finalize", (true, PROMPT), {**few, "height": 128, "width": 128}),
    ]
    for verb, words, options in asked:
        made, wanted = (getattr(one, verb)(*words, **options) for one in (pipe, alone))
        assert off(made.frames, wanted.frames) <= 1 and made.fps == wanted.fps, verb


def test_the_other_methods(pipe, alone) -> None:
    torch.testing.assert_close(pipe.embed(PROMPT), alone.embed(PROMPT))
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    latents = pipe.encode(frames)
    torch.testing.assert_close(latents, alone.encode(frames))
    assert off(pipe.decode(latents), alone.decode(latents)) <= 1
    assert pipe.plan(PROMPT).parallel == "guidance=2,ring=1,ulysses=1" and alone.plan(PROMPT).parallel == ""
    assert pipe.describe()["parallel"] == "2" and alone.describe()["parallel"] == "1"
    assert pipe.inspect() == alone.inspect()
    video = asyncio.run(pipe.agenerate(PROMPT, **SHORT))
    assert np.array_equal(video.frames, pipe.generate(PROMPT, **SHORT).frames)


def test_batches_warm_ups_and_prompts_that_come_again(pipe) -> None:
    assert list(pipe.warmup((64, 64, 9))) == ["64x64, 9 frames"]
    with pytest.raises(fastvid.InvalidRequest, match=r"^sizes\[0\] of the warm-up: size="):
        pipe.warmup("64*64")
    hits = pipe.describe()["text_cache"]["hits"]
    one, other = pipe.generate(PROMPT, **SHORT | {"seed": [5, 6]})
    assert np.array_equal(one.frames, pipe.generate(PROMPT, **SHORT).frames) and other.seed == 6
    assert pipe.describe()["text_cache"]["hits"] > hits
    with pytest.raises(fastvid.InvalidRequest, match="batch_size=2: on several ranks"):
        pipe.generate(PROMPT, batch_size=2, **SHORT | {"seed": [5, 6]})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 1}, "height=1: allowed is .* the nearest is 64"),
        ({"num_frames": -3}, "num_frames"),
        ({"image": object()}, "image=<object>: allowed is a file"),
        ({"nonsense": 3}, "nonsense"),
    ],
)
def test_bad_requests_are_refused_as_ever(pipe, options: dict, match: str) -> None:
    with pytest.raises((fastvid.InvalidRequest, TypeError), match=match):
        pipe.generate(PROMPT, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "_send", lambda *_: pytest.fail("it went to the workers, who may be at a long step"))
        with pytest.raises((fastvid.InvalidRequest, TypeError), match=match):
            pipe.stream(PROMPT, **options)
    assert len(pipe.generate(PROMPT, **SHORT).frames) == 9


def test_streams_by_turns_and_some_that_are_left(pipe) -> None:
    wanted = [pipe.generate(PROMPT, **{**SHORT, "seed": seed}).frames for seed in (1, 2)]
    streams = [pipe.stream(PROMPT, **{**SHORT, "seed": seed}) for seed in (1, 2)]
    pipe.stream(PROMPT, **SHORT)  # nobody asks for anything of it
    begun = pipe.stream(PROMPT, **SHORT)
    next(begun), next(begun)
    del begun
    gc.collect()
    frames: list[list[np.ndarray]] = [[], []]
    while any(event := [next(stream, None) for stream in streams]):
        for i, one in enumerate(event):
            if isinstance(one, Frames):
                frames[i].append(one.frames)
    assert all(np.array_equal(np.concatenate(made), true) for made, true in zip(frames, wanted, strict=True))
    pipe.describe()
    assert not pipe._abandoned


def test_cancel_is_at_a_step(pipe) -> None:
    stream = pipe.stream(PROMPT, **LONG)
    seen = [next(stream) for _ in range(4)]
    assert isinstance(seen[0], Started) and all(isinstance(event, Step) for event in seen[1:])
    threading.Timer(0.05, stream.cancel).start()
    with pytest.raises(fastvid.Cancelled):
        for _ in stream:
            pass
    assert len(pipe.generate(PROMPT, **SHORT).frames) == 9


def test_an_interrupt_leaves_no_answer_behind(pipe, monkeypatch) -> None:
    wanted = pipe.generate(PROMPT, **SHORT).frames
    answer, calls = Team._next_answer, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answer(self, *given)

    monkeypatch.setattr(Team, "_next_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.generate(PROMPT, **SHORT)
    monkeypatch.undo()
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)


def test_a_checkpoint(pipe, tmp_path) -> None:
    wanted = pipe.generate(PROMPT, **SHORT)
    stream = pipe.stream(PROMPT, **SHORT, checkpoint=tmp_path / "job", checkpoint_every=0)
    for event in stream:
        if isinstance(event, Step) and event.step == 2:
            break
    stream.close()
    made = list(pipe.resume(tmp_path / "job"))
    assert np.array_equal(np.concatenate([e.frames for e in made if isinstance(e, Frames)]), wanted.frames)
    assert isinstance(made[-1], Finished) and not (tmp_path / "job").exists()


def test_a_prompt_that_changes(pipe) -> None:
    given = {"num_frames": 65, "num_inference_steps": 2, "seed": 1}
    stream = pipe.stream(PROMPT, **given)
    for event in stream:
        if isinstance(event, Step):
            stream.change_prompt(PROMPT.replace("red", "blue"))
            break
    finished = list(stream)[-1]
    assert [prompt for _, prompt in finished.recipe["changed_prompts"]] == [PROMPT.replace("red", "blue")]


def test_sockets_are_on_loopback(pipe) -> None:
    pipe.generate(PROMPT, **SHORT)
    found = listening(workers_here())
    assert found and set(found) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_the_program_stays_as_it_was() -> None:
    script = """
import multiprocessing, os, sys
before = dict(os.environ), os.getcwd()
import fastvid
pipe = fastvid.load("embedded", device="cpu", parallel=2)  # no main guard
pipe.generate("a red circle", num_frames=5, num_inference_steps=1)
assert (dict(os.environ), os.getcwd()) == before
assert multiprocessing.get_start_method(allow_none=True) is None
import torch.distributed as dist
assert not dist.is_initialized()
del pipe  # that ends them, as does the end of the program
import gc; gc.collect()
assert not open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- the command line and torchrun


def test_the_command_line(tmp_path, alone) -> None:
    words = ["generate", PROMPT, "-o", str(tmp_path / "a.npy"), "--gpus", "2", "--device", "cpu", "--quiet", "--json"]
    words += ["--seed", "5", "--steps", "3", "--num-frames", "9"]
    done = subprocess.run([sys.executable, "-m", "fastvid", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["settings"]["parallel"] == "2"
    assert off(np.load(tmp_path / "a.npy"), alone.generate(PROMPT, **SHORT).frames) <= 1
    words[words.index("--gpus") + 1] = "ulysses=3"
    done = subprocess.run([sys.executable, "-m", "fastvid", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "ulysses=3 does not divide the 4 heads" in done.stderr


TORCHRUN = """
import os, sys
import fastvid
pipe = fastvid.load("embedded", device="cpu", parallel=sys.argv[2])
print("rank", os.environ["RANK"], flush=True)
video = pipe.generate("a red circle moving right on a white background", num_frames=9, num_inference_steps=3, seed=5)
video.save(sys.argv[1])
try:
    pipe.generate("a", height=1)
except fastvid.InvalidRequest as error:
    print(error)
stream = pipe.stream("a", num_frames=33)
next(stream), next(stream)
stream.close()
assert len(pipe.generate("a", num_frames=5, num_inference_steps=1, seed=1).frames) == 5
"""


def test_torchrun_needs_no_change(tmp_path, alone) -> None:
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", str(program)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "a.npy"), "auto"], capture_output=True, text=True, timeout=180, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "rank 0" and "the nearest is 64" in lines[1] and len(lines) == 2
    assert off(np.load(tmp_path / "a.npy"), alone.generate(PROMPT, **SHORT).frames) <= 1
    done = subprocess.run([*command, "b.npy", "2"], capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode != 0 and "WORLD_SIZE=3" in done.stderr
    assert "3 processes were started together" in done.stderr and "the nearest is parallel=3" in done.stderr


KILLED = """
import os, signal, threading, time
import fastvid
pipe = fastvid.load("embedded", device="cpu", parallel="auto")
victim = pipe._team.group.workers[1]
pipe.generate("a", num_frames=5, num_inference_steps=1)
sent = []
threading.Timer(0.5, lambda: (sent.append(time.monotonic()), os.kill(victim.pid, signal.SIGKILL))).start()
try:
    while True:
        pipe.generate("a", num_frames=33, num_inference_steps=40)
except fastvid.WorkerFailed as error:
    print(time.monotonic() - sent[0], error.rank, error.pid == victim.pid, error.cause)
try:
    pipe.generate("a", num_frames=5)
except fastvid.WorkerFailed as error:
    print("again", error.rank)
"""


def test_a_rank_of_a_job_that_dies_is_seen(tmp_path) -> None:
    """Without torchrun's agent, which would end the others as well."""
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    job = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, program], env={**job, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=120)
        seconds, said = out.decode().split(" ", 1) if out else (None, err.decode())
        assert said.splitlines()[0] == "1 True its connection is closed" and float(seconds) < 2, err.decode()
        assert said.splitlines()[1:] == ["again 1"]
        assert ranks[1].wait(10) == -signal.SIGKILL and ranks[0].returncode == 0
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("world", "asked", "ranks"), [("1", 2, 2), ("1", "auto", 1), ("4", 4, 4), ("4", "auto", 4)])
def test_what_a_job_starter_says(monkeypatch, world: str, asked, ranks: int) -> None:
    """One process alone is no group of ranks, so it may start its own."""
    for name, value in {"RANK": "0", "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert remote.ranks_for(parse_parallel(asked), "cpu").ranks == ranks


@pytest.mark.parametrize("world", ["4", "many", "-1", "9" * 5000])
def test_a_world_size_that_does_not_fit_is_named(monkeypatch, world: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(fastvid.InvalidRequest, match="WORLD_SIZE") as caught:
        remote.ranks_for(parse_parallel(2), "cpu")
    assert len(str(caught.value)) < 200
