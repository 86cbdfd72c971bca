"""Async streams that their caller leaves: nothing is said, no thread and no turn is left."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time

import fastvid

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 5, "num_inference_steps": 3, "seed": 5}

SCRIPT = """
import asyncio, fastvid
pipe = fastvid.load("embedded", device="cpu")

async def left():
    async for event in pipe.astream("a red circle", num_frames=5, num_inference_steps=3):
        if isinstance(event, fastvid.Step):
            return event.step

async def held():
    kept.append(pipe.astream("a red circle", num_frames=5))
    await kept[-1].__anext__()

kept = []
print(asyncio.run(left()), asyncio.run(left()), asyncio.run(held()))
"""


def test_one_that_is_left_early_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-X", "dev", "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1 1 None\n"
    assert "Error" not in done.stderr and "never" not in done.stderr, done.stderr


def test_and_leaves_no_thread_and_no_turn() -> None:
    pipe = fastvid.load("embedded", device="cpu")

    async def leave(how: str) -> None:
        stream = pipe.astream(PROMPT, **SHORT)
        await stream.__anext__()
        if how == "close":
            await stream.aclose()
        elif how == "cancel":
            task = asyncio.create_task(stream.__anext__())
            await asyncio.sleep(0.01)
            task.cancel()

    for how in ("close", "cancel", "drop"):
        asyncio.run(leave(how))
    gc.collect()
    until = time.monotonic() + 20
    while any(thread.name.startswith("fastvid-request") for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert pipe._scheduler.running == pipe._scheduler.waiting == 0
