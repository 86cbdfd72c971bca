"""Warnings reach the caller once, and point at its line: from ranks, from async requests, from the jobs of a pool."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import fastvid
from fastvid import notices
from fastvid.media.video import Video
from fastvid.serve.pool import Job
from fastvid.workers.messages import pack, unpack
from fastvid.workers.worker import WorkerServer

UNKNOWN = {"prompt": "a zyzzyva on a white background", "num_frames": 5, "num_inference_steps": 1, "seed": 1}


def own(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    return [one for one in caught if issubclass(one.category, fastvid.FastvidWarning)]


def test_warnings_of_a_block_are_collected_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        with notices.collected() as texts:
            for text in ("a", "b", "a"):
                notices.warn(text)
        notices.warn_all(texts)
    assert texts == ["a", "b"] and [str(one.message) for one in own(caught)] == texts
    assert {one.filename for one in caught} == {__file__}


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_says_it(rank: int) -> None:
    server = WorkerServer()
    server.rank = rank

    def do_warn() -> str:
        notices.warn("this and that")
        return "done"

    server.do_warn = do_warn  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = unpack(server.answer(pack({"do": "warn", "number": 3})))
    assert answer["number"] == 3 and answer["warnings"] == (["this and that"] if rank == 0 else [])


def test_an_async_request_warns_where_it_is_awaited() -> None:
    pipe = fastvid.load("embedded", device="cpu")

    async def stream() -> None:
        async for _ in pipe.astream(**UNKNOWN):
            pass

    for call in (lambda: pipe.agenerate(**UNKNOWN), stream):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            asyncio.run(call())
        assert any("zyzzyva" in str(one.message) for one in own(caught))
        assert not any("concurrent" in one.filename for one in own(caught))
    with warnings.catch_warnings(), pytest.raises(fastvid.FastvidWarning):
        warnings.simplefilter("error", fastvid.FastvidWarning)
        asyncio.run(pipe.agenerate(**UNKNOWN))


@pytest.mark.slow
def test_ranks_warn_the_program() -> None:
    with fastvid.load("embedded", device="cpu", parallel=2) as pipe, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.generate(**UNKNOWN)
    said = [one for one in own(caught) if "zyzzyva" in str(one.message)]
    assert said and {one.filename for one in said} == {__file__}


def test_a_job_gives_its_warnings_with_its_video() -> None:
    job = Job(SimpleNamespace(), "generate", {"prompt": "a"})
    job.warnings = ["cut"]
    job._finish(Video(np.zeros((1, 64, 64, 3), np.uint8), 16.0, 1))
    with pytest.warns(fastvid.FastvidWarning, match="^cut$") as caught:
        job.result()
    assert caught[0].filename == __file__
