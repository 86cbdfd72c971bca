"""Two ranks of the embedded model: a video, a kill, a restart. `test_workers` and `test_faults`, which are slow, have
the rest."""

from __future__ import annotations

import logging
import os
import signal
import time

import numpy as np
import pytest
from processes import alive, listening, off, workers_here

import fastvid

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 5, "num_inference_steps": 2, "seed": 5}
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_video_a_kill_and_a_restart(caplog) -> None:
    caplog.set_level(logging.INFO, "fastvid.workers")
    wanted = fastvid.load("embedded", device="cpu").generate(PROMPT, **SHORT).frames
    before = descriptors()
    with fastvid.load("embedded", device="cpu", parallel=2) as pipe:
        running = descriptors()
        video = pipe.generate(PROMPT, **SHORT)
        assert off(video.frames, wanted) <= 1 and video.recipe["settings"]["parallel"] == "2"
        half = SHORT | {"width": 96, "height": 96, "progressive": 0.5}
        alone = fastvid.load("embedded", device="cpu").generate(PROMPT, **half).frames
        assert off(pipe.generate(PROMPT, **half).frames, alone) <= 1
        found = listening(workers_here())
        assert found and set(found) <= LOOPBACK
        stream = pipe.stream(PROMPT, **SHORT)
        next(stream)
        pids = [worker.pid for worker in pipe._team.group.workers]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(fastvid.WorkerFailed, match="rank 1 .* killed by SIGKILL") as caught:
            for _ in stream:
                pass
        assert caught.value.pid == pids[1] and not any(map(alive, pids))
        del caught, stream
        assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, video.frames)
        assert descriptors() <= running
    assert not workers_here()
    until = time.monotonic() + 5  # threads close their ends
    while descriptors() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert descriptors() <= before
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [text.split(" ")[0] for _, text in told] == ["starting", "2", "rank", "restarting", "2", "2"]
    assert [level for level, _ in told] == ["INFO", "INFO", "WARNING", "INFO", "INFO", "INFO"]
