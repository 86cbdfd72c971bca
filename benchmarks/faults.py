"""Fault injection: SIGKILL or SIGSTOP of random ranks at random times, and SIGKILL of the main program.

Measures how long detection takes and checks the guarantees below each time.

    python benchmarks/faults.py [--kills 50] [--stops 10] [--orphans 20] [--ranks 3] [--out DIR]

Guarantees: the caller gets WorkerFailed with the right rank and cause within 2 s (killed) or 10 s (stopped). No process
of the pipeline and nothing in /dev/shm is left. The next request on the same pipeline gives the same bytes as before.
A result is written only if all guarantees held every time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvid
from fastvid.device.devices import cpu_name
from fastvid.tuning.machine import machine

PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 9, "num_inference_steps": 2, "seed": 5}
LONG = {"num_frames": 33, "num_inference_steps": 20, "seed": 5}
KILLED, STOPPED = 2.0, 10.0  # maximum seconds until detection
PROGRAM = """
import fastvid, sys
pipe = fastvid.load("embedded", device="cpu", parallel=int(sys.argv[1]))
print(*(worker.pid for worker in pipe._team.group.workers), flush=True)
while True:
    pipe.generate(sys.argv[2], num_frames=33, num_inference_steps=20)
"""


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shared_memory() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def strike(pipe: Any, number: signal.Signals, latest: float) -> float:
    """Signal a random rank at a random time while requests run. Returns the seconds until the error."""
    pids = {worker.rank: worker.pid for worker in pipe._team.group.workers}
    victim, sent = random.choice(list(pids)), []

    def fire() -> None:
        sent.append(time.monotonic())
        os.kill(pids[victim], number)

    threading.Timer(random.uniform(0, latest), fire).start()
    try:
        while True:
            pipe.generate(PROMPT, **LONG)
    except fastvid.WorkerFailed as error:
        took = time.monotonic() - sent[0]
        assert (error.rank, error.pid) == (victim, pids[victim]), error
        assert ("SIGKILL" if number == signal.SIGKILL else "no sign") in error.cause, error
    assert not any(map(alive, pids.values())), "a worker is left"
    return took


def orphan(ranks: int, latest: float) -> float:
    """Kill a program at a random time. Returns the seconds until its workers are gone."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(ranks), PROMPT], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, program.stdout.readline().split()))
    time.sleep(random.uniform(0, latest))
    assert all(map(alive, pids))
    program.kill()
    program.wait()
    mark = time.monotonic()
    while any(map(alive, pids)) and time.monotonic() < mark + 10:
        time.sleep(0.01)
    assert not any(map(alive, pids)), "a worker outlived its program"
    return time.monotonic() - mark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 50), ("stops", 10), ("orphans", 20), ("ranks", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    before, times = shared_memory(), {"kills": [], "stops": [], "orphans": []}
    restart = []
    with fastvid.load("embedded", device="cpu", parallel=given.ranks) as pipe:
        wanted = pipe.generate(PROMPT, **SHORT).frames
        for kind, number, most in (("kills", signal.SIGKILL, KILLED), ("stops", signal.SIGSTOP, STOPPED)):
            for i in range(getattr(given, kind)):
                times[kind].append(strike(pipe, number, 1.5))
                assert times[kind][-1] < most, f"it took {times[kind][-1]:.2f} s to be seen"
                mark = time.monotonic()
                assert np.array_equal(pipe.generate(PROMPT, **SHORT).frames, wanted), "other bytes after a restart"
                restart.append(time.monotonic() - mark)
                print(
                    f"{kind} {i + 1}: seen after {times[kind][-1]:.2f} s, made again after {restart[-1]:.1f} s",
                    flush=True,
                )
    for i in range(given.orphans):
        times["orphans"].append(orphan(given.ranks, 1.5))
        print(f"orphans {i + 1}: workers gone after {times['orphans'][-1]:.2f} s", flush=True)
    assert shared_memory() <= before, "shared memory is left"
    result = {
        "what": "seconds until a fault is seen; every promise was kept each time",
        "machine": machine(torch.device("cpu")),
        "ranks": given.ranks,
        "faults": {kind: _summary(seconds) for kind, seconds in times.items() if seconds},
        "restart": _summary(restart),
    }
    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = given.out / f"faults-cpu-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "count": len(seconds),
        "median": round(statistics.median(seconds), 3),
        "largest": round(max(seconds), 3),
        "all": [round(one, 3) for one in seconds],
    }


if __name__ == "__main__":
    main()
