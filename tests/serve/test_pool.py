"""A pool on a local Ray: jobs handed out, the line before them, and groups that really die."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ray = pytest.importorskip("ray")

import fastvid  # noqa: E402
from fastvid.serve import pool as pools  # noqa: E402

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a white background"
SHORT = {"prompt": PROMPT, "num_frames": 9, "num_inference_steps": 3}
LONG = {"prompt": PROMPT, "num_frames": 33, "num_inference_steps": 60, "seed": 4}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    with fastvid.Pool(groups=2, waiting=3, cpus=1, device="cpu", folder=tmp_path_factory.mktemp("jobs")) as made:
        yield made
    ray.shutdown()


def begun(job: pools.Job, steps: int = 1) -> None:
    until = time.monotonic() + 60
    while job.steps()[0] < steps:
        assert time.monotonic() < until and not job.done()
        time.sleep(0.02)


def test_jobs_are_handed_out(pool) -> None:
    jobs = [pool.submit(**SHORT, seed=seed) for seed in range(5)]
    videos = [job.result(120) for job in jobs]
    assert all(job.done() and job.attempts == 1 for job in jobs)
    again = pool.submit(**SHORT, seed=3).result(120)
    assert np.array_equal(again.frames, videos[3].frames) and again.seed == 3
    assert not np.array_equal(videos[0].frames, videos[1].frames)
    longer = pool.submit("extend", video=videos[0], prompt=PROMPT, seconds=0.5, num_inference_steps=2).result(120)
    assert len(longer.frames) == 17 and np.array_equal(longer.frames[:9], videos[0].frames)
    assert not any(pool._folder.iterdir())


def test_a_job_has_loras_of_its_own(pool, tmp_path, monkeypatch) -> None:
    """By a path of the program's own folder."""
    monkeypatch.chdir(tmp_path)
    stem = "transformer.blocks.0.ffn.net.2"
    shape = fastvid.load("embedded", device="cpu")._model.transformer.state_dict()["blocks.0.ffn.net.2.weight"].shape
    inner, outer = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    save_file({f"{stem}.lora_A.weight": inner, f"{stem}.lora_B.weight": outer}, "a.safetensors")
    with_it, without = (pool.submit(**SHORT, seed=3, loras=loras).result(120) for loras in (["a.safetensors"], None))
    assert not np.array_equal(with_it.frames, without.frames)
    assert with_it.recipe["loras"] == [str(tmp_path / "a.safetensors")] and "loras" not in without.recipe


def test_the_line_has_an_end(pool) -> None:
    jobs = [pool.submit(**LONG, timeout=60) for _ in range(2)]
    for job in jobs:
        begun(job)
    jobs += [pool.submit(**SHORT) for _ in range(3)]
    with pytest.raises(fastvid.PoolFull, match="3 jobs wait already"):
        pool.submit(**SHORT, wait=False)
    with pytest.raises(fastvid.PoolFull):
        pool.submit(**SHORT, timeout=0.1)
    jobs[-1].cancel()
    with pytest.raises(fastvid.Cancelled):
        jobs[-1].result(5)
    jobs[0].cancel()  # it runs
    with pytest.raises(fastvid.Cancelled):
        jobs[0].result(60)
    with pytest.raises(TimeoutError):
        jobs[1].result(0.01)
    for job in jobs[1:-1]:
        job.result(120)


def test_what_is_wrong_is_said(pool) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="the nearest is 64"):
        pool.submit(prompt="a", height=1)
    with pytest.raises(fastvid.MediaError):
        pool.submit(prompt="a", image="no-such-picture.png").result(60)
    with pytest.raises(fastvid.CheckpointError):
        fastvid.Pool("no/such/model", groups=1, cpus=0)


def test_a_group_that_dies_loses_nothing(pool) -> None:
    wanted = pool.submit(**LONG).result(120)
    job = pool.submit(**LONG)
    begun(job, random.randrange(5, 30))
    os.kill(ray.get(job.group.ready.remote())[0], signal.SIGKILL)
    made = job.result(120)
    assert job.attempts == 2 and np.array_equal(made.frames, wanted.frames)
    assert pool.submit(**SHORT).result(120).num_frames == 9 and not any(pool._folder.iterdir())


def test_one_that_always_dies_is_given_up(pool) -> None:
    pool.retries, before = 1, pool.retries
    job = pool.submit(**LONG)
    for attempt in (1, 2):
        begun(job)
        assert job.attempts == attempt
        os.kill(ray.get(job.group.ready.remote())[0], signal.SIGKILL)
        while job.group is not None and job.attempts == attempt:
            time.sleep(0.02)
    pool.retries = before
    with pytest.raises(fastvid.WorkerFailed, match="it was begun 2 times"):
        job.result(60)


def test_a_group_that_cannot_come_back_says_why(pool, tmp_path: Path) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(Path(fastvid.__file__).parent / "embedded", model)
    with fastvid.Pool(str(model), cpus=0, retries=1, device="cpu") as small:
        job = small.submit(**LONG | {"seed": None})
        assert 0 <= job.options["seed"] < 2**32  # chosen once, whatever happens to the group
        begun(job)
        model.rename(away)
        os.kill(ray.get(job.group.ready.remote())[0], signal.SIGKILL)
        with pytest.raises(fastvid.WorkerFailed, match="could not load the model.*begun 2 times"):
            job.result(60)
        away.rename(model)
        small.retries = 3  # the group that stands ready may still be one that found no model
        assert small.submit(**SHORT).result(60).num_frames == 9


def test_the_example(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "pool.py"
    words = [sys.executable, str(script), "--groups", "1", PROMPT]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0.mp4").stat().st_size > 1000
