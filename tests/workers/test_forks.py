"""A pipeline in a forked child works, or is refused at once with one of fastvid's errors; it never hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SCRIPT = """
import os, signal, sys, threading, time
import fastvid, torch
PROMPT = "a red circle moving right on a white background"
SHORT = {"num_frames": 5, "num_inference_steps": 2, "seed": 5}
when, threads, own_threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
pipe, stop = None, threading.Event()

def serve():
    while not stop.is_set():
        pipe.generate(PROMPT, **SHORT)

if when != "before work":
    pipe = fastvid.load("embedded", device="cpu")
    pipe.generate(PROMPT, **SHORT)
    idle = pipe.stream(PROMPT, **SHORT)
    next(idle)
if when == "amid a request":
    thread = threading.Thread(target=serve)
    thread.start()
    time.sleep(0.3)
pid = os.fork()
if pid == 0:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)
    try:
        torch.set_num_threads(own_threads)
        before = time.monotonic()
        if pipe is None:
            pipe = fastvid.load("embedded", device="cpu")
        pipe.generate(PROMPT, **SHORT)
    except fastvid.Error as error:
        assert "spawn" in str(error) and time.monotonic() - before < 1, error
        for refused in (lambda: next(idle), idle.close, lambda: fastvid.load("embedded"), lambda: pipe.embed("a")):
            try:
                refused()
            except fastvid.Error:
                continue
            os._exit(5)
        os._exit(3)
    except BaseException:
        os._exit(4)
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
stop.set()
print(code)
"""
CASES = {
    ("before work", 2, 2): 0,
    ("after work", 1, 1): 0,
    ("after work", 2, 2): 3,
    ("after work", 2, 1): 0,  # without the threads that are not there
    ("amid a request", 1, 1): 3,
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c[0] == "amid a request" else pytest.mark.slow) for c in CASES]
)
def test_a_child_works_or_is_refused(case) -> None:
    words = [sys.executable, "-c", SCRIPT, *map(str, case)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == [str(CASES[case])], done.stderr
