"""Pipelines on several processes: what they can be asked for, what happens when a rank dies, hangs or is left alone.
Real processes, real signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastvid
from fastvid import wire
from fastvid.events import Finished, Frames, Started, Step
from fastvid.workers import Workers

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 9, "num_inference_steps": 3, "seed": 5}
LONG = {"num_frames": 33, "num_inference_steps": 40, "seed": 5}
SEEN = 2.0  # seconds in which a death is seen


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[int]:
    """Workers of this process."""
    own = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found = {int(pid) for path in own for pid in path.read_text().split()}
    return {pid for pid in found if alive(pid) and b"fastvid.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.fixture(scope="module")
def alone():
    return fastvid.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def pipe():
    with fastvid.load("embedded", device="cpu", parallel=2) as made:
        yield made
        pids = children()
    assert pids and not children() and not any(map(alive, pids))


# ---------------------------------------------------------------- messages

PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN | st.fractions().map(lambda f: Fraction(f)) | st.text(min_size=1).filter(lambda t: "\0" not in t).map(Path),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_sent_arrives(value: object) -> None:
    stream = __import__("io").BytesIO()
    wire.send(stream, wire.pack({"value": value, "other": 1}))
    stream.seek(0)
    assert wire.unpack(wire.receive(stream)) == {"value": value, "other": 1}
    with pytest.raises(wire.Closed):
        wire.receive(stream)


@given(st.integers(0, 2**31))
def test_arrays_and_tensors_arrive(seed: int) -> None:
    draw = np.random.default_rng(seed)
    array = draw.integers(0, 255, (3, 4, 5), dtype=np.uint8)[::-1, :, ::2]
    tensor = torch.randn(2, 3).to(torch.bfloat16).t()
    picture = Image.fromarray(np.ascontiguousarray(array[0]))
    sent = {"a": [array, {"t": tensor}], "flag": array > 9, "picture": picture, "n": np.int64(3), "empty": array[:0]}
    made = wire.unpack(wire.pack(sent))
    assert np.array_equal(made["a"][0], array) and torch.equal(made["a"][1]["t"], tensor) and made["n"] == 3
    assert made["flag"].dtype == bool and np.array_equal(made["picture"], array[0]) and made["empty"].shape == (0, 4, 3)


def test_a_message_that_breaks_off_is_none() -> None:
    io = __import__("io")
    whole = io.BytesIO()
    wire.send(whole, wire.pack({"value": torch.zeros(9)}))
    for length in random.sample(range(len(whole.getvalue())), 20):
        with pytest.raises(wire.Closed):
            wire.receive(io.BytesIO(whole.getvalue()[:length]))
    with pytest.raises(wire.Closed, match="no message"):
        wire.receive(io.BytesIO(b"\xff" * 64))


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, np.array(["a"], dtype=object), [open]])
def test_what_cannot_be_sent_is_named(value: object) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="image"):
        wire.pack({"image": value})


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
        ("finalize", (true, PROMPT), {**few, "height": 128, "width": 128, "num_frames": None} | {}),
    ]
    for verb, words, options in asked:
        options = {name: value for name, value in options.items() if value is not None}
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 1}, "height=1: allowed is .* the nearest is 64"),
        ({"num_frames": -3}, "num_frames"),
        ({"image": object()}, "image is a object, which cannot be handed to other processes"),
        ({"nonsense": 3}, "nonsense"),
    ],
)
def test_bad_requests_are_refused_as_ever(pipe, options: dict, match: str) -> None:
    with pytest.raises((fastvid.InvalidRequest, TypeError), match=match):
        pipe.generate(PROMPT, **options)
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
    assert pipe._left == []


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
    answer, calls = Workers._answer, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answer(self, *given)

    monkeypatch.setattr(Workers, "_answer", interrupted)
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


# ---------------------------------------------------------------- faults


def fault(pipe, victim: int, number: signal.Signals, after: float) -> tuple[fastvid.WorkerFailed, float]:
    """Signals a rank some time after a request has begun; the error, and how long it took to come."""
    pids = {worker.rank: worker.pid for worker in pipe._workers._team.workers}
    sent: list[float] = []

    def strike() -> None:
        sent.append(time.monotonic())
        os.kill(pids[victim], number)

    timer = threading.Timer(after, strike)
    timer.start()
    with pytest.raises(fastvid.WorkerFailed) as caught:
        while True:  # until it strikes
            pipe.generate(PROMPT, **LONG)
    took = time.monotonic() - sent[0]
    assert caught.value.rank == victim and caught.value.pid == pids[victim] and str(victim) in str(caught.value)
    assert not any(map(alive, pids.values()))
    return caught.value, took


def test_a_rank_that_dies_is_seen_and_replaced(pipe) -> None:
    wanted = pipe.generate(PROMPT, **SHORT).frames
    for victim in (0, 1):
        stream = pipe.stream(PROMPT, **LONG)
        next(stream)
        error, took = fault(pipe, victim, signal.SIGKILL, random.uniform(0, 0.5))
        assert took < SEEN and "killed by SIGKILL" in error.cause
        assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)
        with pytest.raises(fastvid.WorkerFailed, match=f"rank {victim}"):  # it was of those that died
            next(stream)


def test_a_rank_that_hangs_is_seen(pipe) -> None:
    pipe._workers._hung = 2.0
    pipe._workers._team.end()
    pipe.generate(PROMPT, **SHORT)  # in new ones
    error, took = fault(pipe, 1, signal.SIGSTOP, 0.2)
    assert took < 2.0 + 1.0 and "no sign for 2 seconds" in error.cause
    pipe._workers._hung = 10.0
    pipe.generate(PROMPT, **SHORT)
    with pytest.raises(fastvid.WorkerFailed, match="did not answer in the time"):
        pipe._workers.command("wait", 0.5, seconds=30)
    assert len(pipe.generate(PROMPT, **SHORT).frames) == 9


def test_one_that_fails_alone_ends_all(pipe) -> None:
    number = pipe._workers._tell(pipe._workers._team, [{"do": "wait", "seconds": 0}, {"do": "wait", "seconds": "x"}])
    with pytest.raises(fastvid.WorkerFailed, match=r"rank 1 .* it raised TypeError"):
        pipe._workers._collect(pipe._workers._team, number, 10)
    assert len(pipe.generate(PROMPT, **SHORT).frames) == 9


PROGRAM = """
import fastvid, sys
pipe = fastvid.load("embedded", device="cpu", parallel=2)
print(*(worker.pid for worker in pipe._workers._team.workers), flush=True)
while True:
    pipe.generate("a red circle moving right on a white background", num_frames=33, num_inference_steps=40)
"""


def test_workers_end_with_their_program() -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    try:
        pids = list(map(int, program.stdout.readline().split()))
        time.sleep(random.uniform(0, 1))
        assert len(pids) == 2 and all(map(alive, pids))
    finally:
        program.kill()
        program.wait()
    until = time.monotonic() + SEEN
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def listening(pids: set[int]) -> list[str]:
    """Addresses, as /proc has them, on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes]


def test_sockets_are_on_loopback(pipe) -> None:
    pipe.generate(PROMPT, **SHORT)
    found = listening({worker.pid for worker in pipe._workers._team.workers})
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
    assert done.returncode != 0 and "3 processes were started together; the nearest is parallel=3" in done.stderr
