"""Processes that are really killed (SIGKILL): what `fastvid generate` leaves plays, and `fastvid resume` makes the file
that would have been, and removes what was left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvid.media.metadata import read_video

# One process imports everything; each command runs in a child of it, so that a kill costs no start.
PARENT = """
import json, os, sys
from fastvid.cli import commands as cli
import fastvid.pipeline.pipeline
from fastvid.media.writer import FrameSink

def logged(sink, frames):
    write(sink, frames)
    os.pwrite(log, b"%12d" % sink.num_frames, 0)

write, FrameSink.write = FrameSink.write, logged
for line in sys.stdin:
    name, words = json.loads(line)
    if (child := os.fork()) == 0:
        log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os._exit(cli.main(words))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Runner:
    """Runs commands in children of one process."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, log: Path, *words: str) -> int:
        self.process.stdin.write(json.dumps([str(log), words]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The status of the command, as the system tells it."""
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def runner():
    made = Runner()
    yield made
    made.close()


def handed(log: Path) -> int:
    """Frames that were handed to the sink."""
    return int(log.read_text() or 0) if log.exists() else 0


def played(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


FRAMES, FPS = 81, 16
COMMAND = ["generate", "a red circle moving right on a white background", "--seed", "4", "--quiet", "--steps", "2"]
COMMAND += ["--num-frames", str(FRAMES)]
POINTS = int(os.environ.get("KILLS", 4))


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    runner.start(folder / "log", *COMMAND, "-o", str(folder / "out.mp4"))
    assert runner.wait() == 0 and played(folder / "out.mp4") == FRAMES
    return folder / "out.mp4"


@pytest.mark.parametrize("point", [0, *(pytest.param(point, marks=pytest.mark.slow) for point in range(1, POINTS))])
def test_a_killed_file_plays_and_its_request_goes_on(runner, whole, tmp_path, point):
    chance = random.Random(point)
    log, out, job = tmp_path / "log", tmp_path / "out.mp4", tmp_path / "job.ckpt"
    child = runner.start(log, *COMMAND, "-o", str(out), "--checkpoint", str(job), "--checkpoint-every", "0")
    goal, since = chance.randrange(FRAMES * 3 // 5), time.monotonic()  # a window's steps are still to come then
    while handed(log) <= goal and time.monotonic() - since < 60:
        time.sleep(0.0005)
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    assert runner.wait() == signal.SIGKILL
    assert not out.exists() and job.is_dir()
    left = [path for path in tmp_path.iterdir() if path.suffix == ".partial"]
    assert len(left) == 1
    made = handed(log)
    shown = played(left[0]) if made > FPS else 0
    assert goal < made < FRAMES and made - shown <= FPS
    runner.start(log, "resume", str(job), "-o", str(out), "--quiet")
    assert runner.wait() == 0 and not job.exists() and not left[0].exists()
    assert out.read_bytes() == whole.read_bytes()
    assert (read_video(out)[0] == read_video(whole)[0]).all()
