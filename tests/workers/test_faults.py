"""What happens when a rank of a pipeline dies, hangs, fails alone or is left alone: real processes, real signals."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import alive, workers_here
from safetensors.torch import save_file

import fastvid
from fastvid.engine.events import Frames, Step
from fastvid.workers.group import POLL_INTERVAL, ChildWorker, WorkerGroup
from fastvid.workers.remote import FIRST_STEP_SECONDS, STEP_SECONDS, RemotePipeline, step_deadline
from fastvid.workers.team import SILENCE_LIMIT, Team

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 9, "num_inference_steps": 3, "seed": 5}
LONG = {"num_frames": 33, "num_inference_steps": 40, "seed": 5}
SEEN = 2.0  # seconds
SLOW = np.zeros((65, 512, 512, 3), np.uint8)  # encoding this takes many seconds


ENCODE = {"name": "encode", "args": [SLOW], "options": {}, "folder": "/"}


@pytest.fixture(scope="module")
def pipe():
    with fastvid.load("embedded", device="cpu", parallel=2) as made:
        yield made
    assert not workers_here()


@pytest.fixture(scope="module")
def wanted(pipe) -> np.ndarray:
    return pipe.generate(PROMPT, **SHORT).frames


def strike(pipe, victim: int, number: signal.Signals, after: float) -> tuple[fastvid.WorkerFailed, float]:
    """Signals a rank some time after a request has begun; the error, and how long it took to come."""
    pids = {worker.rank: worker.pid for worker in pipe._team.group.workers}
    sent: list[float] = []

    def hit() -> None:
        sent.append(time.monotonic())
        os.kill(pids[victim], number)

    threading.Timer(after, hit).start()
    with pytest.raises(fastvid.WorkerFailed) as caught:
        while True:  # until it strikes
            pipe.generate(PROMPT, **LONG)
    took = time.monotonic() - sent[0]
    assert caught.value.rank == victim and caught.value.pid == pids[victim] and str(victim) in str(caught.value)
    assert not any(map(alive, pids.values()))
    return caught.value, took


# ---------------------------------------------------------------- deaths


def test_a_rank_that_dies_is_seen_and_replaced(pipe, wanted) -> None:
    streams = []
    for victim in (0, 1):
        streams.append(pipe.stream(PROMPT, **LONG))
        next(streams[-1])
        error, took = strike(pipe, victim, signal.SIGKILL, random.uniform(0, 0.5))
        assert took < SEEN and "killed by SIGKILL" in error.cause
        assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)
    for victim, stream in enumerate(streams):
        with pytest.raises(fastvid.WorkerFailed, match=f"rank {victim}"):  # of those that were its own
            next(stream)


def at_start(monkeypatch, tmp_path: Path, code: str) -> None:
    """Has every worker that starts from now on do something first."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, subprocess, sys\nif 'fastvid.workers.worker' in sys.orig_argv:\n{code}"
    )
    monkeypatch.syspath_prepend(tmp_path)  # workers import from where their program does


def test_one_that_cannot_start_says_why(monkeypatch, tmp_path) -> None:
    before = workers_here()
    at_start(monkeypatch, tmp_path, "    print('out of luck', file=sys.stderr, flush=True)\n    os._exit(3)\n")
    with pytest.raises(fastvid.WorkerFailed, match=r"rank \d .* ended with status 3; it last said: out of luck"):
        fastvid.load("embedded", device="cpu", parallel=2)
    assert workers_here() == before


def test_what_they_started_ends_with_them(pipe, monkeypatch, tmp_path) -> None:
    pids = tmp_path / "pids"
    code = f"    child = subprocess.Popen(['sleep', '1000'])\n    print(child.pid, file=open({str(pids)!r}, 'a'))\n"
    at_start(monkeypatch, tmp_path, code)
    pipe._team.group.end()
    pipe.generate(PROMPT, **SHORT)
    own = [int(pid) for pid in pids.read_text().split()]
    assert len(own) == 2 and all(map(alive, own))
    strike(pipe, random.randrange(2), signal.SIGKILL, 0.1)
    time.sleep(0.2)
    assert not any(map(alive, own))


def test_one_that_dies_while_nobody_waits_and_a_checkpoint_that_outlives_it(pipe, wanted, tmp_path) -> None:
    stream = pipe.stream(PROMPT, **SHORT, checkpoint=tmp_path / "job", checkpoint_every=0)
    for event in stream:
        if isinstance(event, Step) and event.step == 2:
            break
    os.kill(random.choice(list(workers_here())), signal.SIGTERM)
    until = time.monotonic() + SEEN
    while workers_here() and time.monotonic() < until:
        time.sleep(0.02)
    assert not workers_here()
    with pytest.raises(fastvid.WorkerFailed, match="killed by SIGTERM"):
        next(stream)
    made = [event.frames for event in pipe.resume(tmp_path / "job") if isinstance(event, Frames)]
    assert np.array_equal(np.concatenate(made), wanted)


# ---------------------------------------------------------------- hangs, and failures of one alone


def test_one_that_hangs_is_seen(pipe, wanted) -> None:
    """Sooner than the ten seconds that are promised, which `benchmarks/faults.py` waits for."""
    assert SILENCE_LIMIT + POLL_INTERVAL < 10
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)
    assert pipe._team.group.silence_limit == SILENCE_LIMIT
    pipe._team.group.silence_limit = 1.5
    error, took = strike(pipe, random.randrange(2), signal.SIGSTOP, random.uniform(0, 0.5))
    assert took < 2.5 and "no sign for 1.5 seconds" in error.cause


def test_one_that_takes_too_long_is_seen(pipe, wanted) -> None:
    with pytest.raises(fastvid.WorkerFailed, match="did not answer in the time"):
        pipe._team.command("call", 0.5, **ENCODE)
    assert not workers_here()
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)


def test_one_that_fails_alone_ends_all(pipe, monkeypatch) -> None:
    """As when the memory of one device is full, and the others wait for it in an exchange."""
    monkeypatch.setattr("fastvid.workers.team.OTHERS_FAIL_WITHIN", 0.5)
    group, mark = pipe._team.start(), time.monotonic()
    commands = [{"do": "call", **ENCODE}, {"do": "call", **ENCODE, "options": {"nonsense": 1}}]
    with pytest.raises(fastvid.WorkerFailed, match="rank 1 .* it raised TypeError: .*, and others did not") as caught:
        pipe._team._run(group, 1e6, commands)
    assert isinstance(caught.value.__cause__, TypeError) and time.monotonic() - mark < 5
    assert not workers_here()


def test_a_step_past_its_plan_counts_as_hung_but_not_one_that_compiles(pipe) -> None:
    stream = pipe.stream(PROMPT, **SHORT)
    started = next(stream)
    stream.close()
    limits: dict[str, list[list[float]]] = {}
    for device in ("cpu", "cuda:0"):
        told = replace(started, plan=replace(started.plan, device=device))
        script = [told, *(Step(i, 3, 0.5, 0.1) for i in (1, 2, 3)), Frames(0, np.zeros((9, 64, 64, 3), np.uint8)), None]
        remote = RemotePipeline(Scripted(script))
        for _ in range(2):
            remote._team.limits = []
            assert len(list(remote.stream(PROMPT, **SHORT))) == 5
            limits.setdefault(device, []).append(remote._team.limits)
    work = step_deadline(started)
    rest = [work] * 4
    first = STEP_SECONDS + FIRST_STEP_SECONDS
    assert limits["cpu"] == [[first, work + FIRST_STEP_SECONDS, *rest]] * 2
    work = step_deadline(told)  # as of a GPU
    compiling = work + FIRST_STEP_SECONDS
    assert limits["cuda:0"][0] == [first] + [compiling] * 5, "kernels are compiled in a shape's first request"
    assert limits["cuda:0"][1] == [first, compiling] + [work] * 4


class Scripted:
    """A team that answers what it is told to."""

    description = {"variant": "embedded"}

    def __init__(self, script: list) -> None:
        self.script, self.limits, self.at, self.group = script, [], 0, WorkerGroup()

    def check_process(self) -> None:
        pass

    def start(self) -> WorkerGroup:
        self.at = 0
        return self.group

    def command(self, do: str, deadline: float = 0.0, *_: object, **__: object) -> object:
        if do != "next":
            return None
        self.limits.append(deadline)
        self.at += 1
        return self.script[self.at - 1]


# ---------------------------------------------------------------- interrupts, closing, forks


def test_a_start_that_breaks_off_leaves_nothing(monkeypatch) -> None:
    before, begun, real = workers_here(), [], subprocess.Popen

    def refused(*given, **options):
        if begun:
            raise OSError(11, "no more processes")
        begun.append(real(*given, **options))
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(OSError, match="no more processes"):
        fastvid.load("embedded", device="cpu", parallel=2)
    assert begun and workers_here() == before


def test_an_interrupt_amid_a_message_leaves_them_in_step(pipe, wanted, monkeypatch) -> None:
    sent, send = [], ChildWorker.send

    def interrupted(self, message):
        sent.append(self.rank)
        if len(sent) == 6:  # rank 0 has it, rank 1 has not
            raise KeyboardInterrupt
        send(self, message)

    monkeypatch.setattr(ChildWorker, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.generate(PROMPT, **SHORT)
    monkeypatch.undo()
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)


def test_closed_amid_work() -> None:
    before = workers_here()
    pipe = fastvid.load("embedded", device="cpu", parallel=2)
    for pid in workers_here() - before:
        os.kill(pid, signal.SIGINT)  # which is for their program to see
    # What runs in a shell's background has this signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pipe._team.command("call", **ENCODE)
    finally:
        signal.signal(signal.SIGINT, handler)
    mark = time.monotonic()
    pipe.close()
    assert time.monotonic() - mark < 4 and workers_here() == before
    with pytest.raises(fastvid.Error, match="closed"):
        pipe.generate(PROMPT, **SHORT)


def test_garbage_sends_nothing(pipe, monkeypatch) -> None:
    stream, told = pipe.stream(PROMPT, **LONG), []
    next(stream), next(stream)
    command = Team.command
    monkeypatch.setattr(
        Team, "command", lambda self, do, *given, **v: told.append(do) or command(self, do, *given, **v)
    )
    stream.itself = stream  # so that it is found by a collection, whenever that comes
    del stream
    gc.collect()
    assert told == []
    pipe.describe()
    assert told == ["close", "call"] and not pipe._abandoned


FORK = """
import fastvid, gc, os
pipe = fastvid.load("embedded", device="cpu", parallel=2)
group = pipe._team.group
if not (child := os.fork()):
    try:
        pipe.generate("a", num_frames=5, num_inference_steps=1)
    except fastvid.Error as error:
        said = str(error)
    pipe.close()
    del pipe
    gc.collect()
    os._exit(0 if f"belongs to process {os.getppid()}" in said else 1)
assert os.waitpid(child, 0)[1] == 0
assert len(pipe.generate("a", num_frames=5, num_inference_steps=1).frames) == 5
assert pipe._team.group is group
"""


def test_a_fork_does_not_touch_them_nor_does_the_folder_s_own_code(tmp_path) -> None:
    program, folder = tmp_path / "program" / "main.py", tmp_path / "folder"
    program.parent.mkdir(), folder.mkdir()
    for name in ("queue", "torch", "fastvid"):
        (folder / f"{name}.py").write_text("raise SystemExit('taken from the wrong place')")
    program.write_text(FORK)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PROGRAM = """
import fastvid, os, time
pipe = fastvid.load("embedded", device="cpu", parallel=2)
if not (child := os.fork()):
    time.sleep(1000)  # it holds the workers' pipes
print(child, *(worker.pid for worker in pipe._team.group.workers), flush=True)
while True:
    pipe.generate("a red circle moving right on a white background", num_frames=33, num_inference_steps=40)
"""


def test_they_end_with_their_program() -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    pids: list[int] = []
    try:
        child, *pids = map(int, program.stdout.readline().split())
        time.sleep(random.uniform(0, 1))
        assert len(pids) == 2 and all(map(alive, pids))
    finally:
        program.kill()
        program.wait()
    until = time.monotonic() + SEEN
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    left = [pid for pid in pids if alive(pid)]
    os.kill(child, signal.SIGKILL)
    assert not left


# ---------------------------------------------------------------- what new ones have to find again


def lora(path: Path) -> Path:
    """One that is strong enough to be seen."""
    state = fastvid.load("embedded", device="cpu")._model.transformer.state_dict()
    name = next(key for key in state if key.endswith("ffn.net.2.weight"))
    rows, columns = state[name].shape
    stem = f"transformer.{name.removesuffix('.weight')}"
    save_file({f"{stem}.lora_A.weight": torch.randn(2, columns), f"{stem}.lora_B.weight": torch.randn(rows, 2)}, path)
    return path


def test_loras_and_folders_are_as_they_were(pipe, wanted, tmp_path, monkeypatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    lora(here / "a.safetensors")
    pipe.set_loras([("a.safetensors", 0.5)])
    changed = pipe.generate(PROMPT, **SHORT).frames
    assert not np.array_equal(changed, wanted)
    stream = pipe.stream(PROMPT, **SHORT, checkpoint="job", checkpoint_every=0, keep_checkpoint=True)
    next(stream)
    monkeypatch.chdir(there)
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, changed)
    made = [event.frames for event in stream if isinstance(event, Frames)]
    assert np.array_equal(np.concatenate(made), changed)
    assert (here / "job" / "head.json").exists() and not list(there.iterdir())
    os.kill(random.choice(list(workers_here())), signal.SIGKILL)
    time.sleep(0.5)
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, changed)
    pipe.set_loras([])
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted)
