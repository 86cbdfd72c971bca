"""The pool's queue, on a Ray that is played: actors are objects in this process. `test_pool` has the real one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import fastvid
from fastvid.serve import pool as pools

PROMPT = "a red circle moving right on a white background"
SHORT = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 2}


class RayError(Exception):
    """What Ray raises for an actor that died."""


class PlayedRay:
    """`remote` makes actors; what is called on them runs in threads. killed: actors that are gone."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.killed: list = []
        self.threads = ThreadPoolExecutor(8)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict:
        return {}

    def remote(self, **_):
        return lambda kind: SimpleNamespace(remote=lambda *given: self._actor(kind(*given)))

    def _actor(self, held):
        names = ("ready", "run", "warmup", "steps", "cancel")
        return SimpleNamespace(held=held, **{name: self._method(held, name) for name in names})

    def _method(self, held, name: str):
        return SimpleNamespace(remote=lambda *given: self.threads.submit(self._call, held, name, given))

    def _call(self, held, name: str, given):
        result = getattr(held, name)(*given)
        if any(held is one for one in self.killed):
            raise RayError("the actor died")
        return result

    def get(self, references, timeout=None):
        if isinstance(references, list):
            return [self.get(one) for one in references]
        return references.result(timeout)

    def kill(self, actor) -> None:
        self.killed.append(actor.held)


@pytest.fixture
def ray(monkeypatch):
    played = PlayedRay()
    monkeypatch.setattr(pools, "_ray", lambda: played)
    return played


@pytest.fixture
def pool(ray, tmp_path):
    with fastvid.Pool(waiting=2, device="cpu", folder=tmp_path) as made:
        yield made


@pytest.fixture
def gate(monkeypatch):
    """Jobs begin when it is set."""
    event, run = threading.Event(), pools.Group.run
    monkeypatch.setattr(pools.Group, "run", lambda self, *given: event.wait(30) and run(self, *given))
    yield event
    event.set()


def running(job: pools.Job) -> pools.Job:
    until = time.monotonic() + 10
    while job.group is None and time.monotonic() < until:
        time.sleep(0.01)
    return job


def test_jobs_run_in_order(pool) -> None:
    jobs = [pool.submit(**SHORT, seed=seed) for seed in (1, 2)]
    videos = [job.result(60) for job in jobs]
    assert [video.seed for video in videos] == [1, 2] and all(job.done() and job.attempts == 1 for job in jobs)
    assert not np.array_equal(videos[0].frames, videos[1].frames) and not any(pool._folder.iterdir())


def test_all_groups_warm_up_and_those_that_replace_them(pool, ray, monkeypatch) -> None:
    asked, warm = [], fastvid.Pipeline.warmup
    monkeypatch.setattr(
        fastvid.Pipeline, "warmup", lambda pipe, *a, **o: (asked.append((a, o)), warm(pipe, *a, **o))[1]
    )
    seconds = pool.warmup((64, 64, 5), num_inference_steps=1)
    assert list(seconds) == ["64x64, 5 frames"] and len(asked) == pool.groups
    with pytest.raises(fastvid.InvalidRequest, match=r"^sizes\[0\] of the warm-up: size="):
        pool.warmup("64*64")
    pool._replace(0)
    ray.threads.shutdown(wait=True)
    assert asked[-1] == (((64, 64, 5),), {"num_inference_steps": 1}) and len(asked) == 3


def test_lists_are_no_job(pool) -> None:
    with pytest.raises(fastvid.InvalidRequest, match="allowed is one string; lists are for the verbs"):
        pool.submit(prompt=[PROMPT, PROMPT])


def test_the_queue_has_an_end(pool, gate) -> None:
    first = running(pool.submit(**SHORT))
    waiting = [pool.submit(**SHORT) for _ in range(2)]
    for options in ({"wait": False}, {"timeout": 0.05}):
        with pytest.raises(fastvid.PoolFull, match="2 jobs wait already"):
            pool.submit(**SHORT, **options)
    with pytest.raises(TimeoutError, match="not done in 0.01 seconds"):
        first.result(0.01)
    waiting[0].cancel()
    with pytest.raises(fastvid.Cancelled):
        waiting[0].result(1)
    first.cancel()
    time.sleep(0.1)
    gate.set()
    with pytest.raises(fastvid.Cancelled):
        first.result(30)
    assert waiting[1].result(30).num_frames == 5


def test_a_closed_pool_ends_its_jobs(ray, gate) -> None:
    pool = fastvid.Pool(device="cpu")
    jobs = [running(pool.submit(**SHORT)), pool.submit(**SHORT)]
    threading.Timer(0.2, gate.set).start()
    pool.close()
    for job in jobs:
        with pytest.raises(fastvid.Cancelled):
            job.result(5)
    assert not pool._folder.exists()
    with pytest.raises(fastvid.Error, match="closed"):
        pool.submit(**SHORT)


def test_a_job_whose_group_dies_is_begun_again(pool, ray, gate) -> None:
    job = running(pool.submit(**SHORT, seed=3))
    ray.kill(job.group)
    gate.set()
    assert job.result(60).seed == 3 and job.attempts == 2
    pool.retries = 0
    gate.clear()
    job = running(pool.submit(**SHORT))
    ray.kill(job.group)
    gate.set()
    with pytest.raises(fastvid.WorkerFailed, match="process ended: the actor died; it was begun 1 times"):
        job.result(60)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"verb": "genrate"}, "the nearest is generate"),
        ({"verb": "edit"}, "edit does not take it"),
        ({"height": 1}, "the nearest is 64"),
        ({"stepz": 3}, "steps"),
        ({"checkpoint": "job"}, "a pool keeps one for every job"),
        ({"image": object()}, "image"),
    ],
)
def test_bad_requests_are_refused_at_once(pool, options: dict, match: str) -> None:
    with pytest.raises(fastvid.InvalidRequest, match=match):
        pool.submit(**{**SHORT, **options})


@pytest.mark.parametrize("options", [{"groups": 0}, {"waiting": 0}, {"retries": -1}, {"parallel": 0}])
def test_bad_options_of_a_pool_are_refused(ray, options: dict) -> None:
    with pytest.raises(fastvid.InvalidRequest, match=next(iter(options))):
        fastvid.Pool(**options)


def test_errors_of_a_request_and_of_loading_come_through(pool) -> None:
    with pytest.raises(fastvid.MediaError):
        pool.submit(prompt="a", image="no-such-picture.png").result(30)
    with pytest.raises(fastvid.CheckpointError):
        fastvid.Pool("no/such/model")
