"""How long the command line's embedded `generate` takes beside other busy processes, with idle threads that sleep (what
fastvid sets), and with those that spin (what OpenMP does by itself).

python benchmarks/beside.py [--rounds 3] [--busy 0 1 2] [--steps 20]

Each round runs every case once, so that work of others on the machine hits all alike; the least and the median count.
A busy process is a Python loop with normal priority.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import _path, machine

PROMPT = "a red circle moving right on a white background"
POLICIES = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
"""What OpenMP reads: libgomp's own default where nothing is set, and what the command line sets."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    seconds: dict[tuple[int, str], list[float]] = {(busy, name): [] for busy in args.busy for name in POLICIES}
    for _ in range(args.rounds):
        for (busy, name), times in seconds.items():
            times.append(timed(busy, POLICIES[name], args.steps))
            print(f"{busy} busy processes, {name:<9} {times[-1]:7.2f} s", flush=True)
    cases = [
        {"busy": busy, "idle_threads": name, "least": min(times), "median": statistics.median(times), "all": times}
        for (busy, name), times in seconds.items()
    ]
    for case in cases:
        print(
            f"{case['busy']} busy, {case['idle_threads']:<9} least {case['least']:.2f} s, median {case['median']:.2f} s"
        )
    device = torch.device("cpu")
    report = {
        "what": "seconds of the command line's embedded generate beside busy processes, by what idle threads do",
        "machine": machine(device),
        "steps": args.steps,
        "cases": cases,
    }
    _path("beside", device).write_text(json.dumps(report, indent=2) + "\n")


def timed(busy: int, policy: dict[str, str], steps: int) -> float:
    """Seconds of one command beside so many busy processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment |= policy
    with busy_processes(busy), tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "fastvid", "generate", PROMPT, "--steps", str(steps), "--quiet", "--seed", "1"]
        start = time.perf_counter()
        subprocess.run([*words, "-o", str(Path(folder) / "out.mp4")], env=environment, check=True)
        return round(time.perf_counter() - start, 2)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
