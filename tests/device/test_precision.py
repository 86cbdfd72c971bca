"""fp32 is IEEE fp32 inside our calls, whatever the caller's settings, and those come back after."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import threading
import torch
from fastvid.device.precision import computing
torch.set_float32_matmul_precision("medium")
a, b = torch.randn(256, 512), torch.randn(512, 384)
exact = a.double() @ b.double()
error = lambda: float(((a @ b).double() - exact).norm() / exact.norm())
with computing():
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert error() < 1e-6, error()
try:
    with computing():
        raise KeyError
except KeyError:
    pass
assert torch.get_float32_matmul_precision() == "medium", torch.get_float32_matmul_precision()
begun, may_end = threading.Event(), threading.Event()

def other():
    with computing():
        begun.set()
        may_end.wait(20)

with computing():
    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(20)
assert torch.backends.mkldnn.matmul.fp32_precision == "ieee" and error() < 1e-6  # the other thread is still inside
may_end.set()
thread.join()
print(torch.backends.mkldnn.matmul.fp32_precision)
"""


def test_inside_it_is_ieee_and_the_callers_choice_comes_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bf16"


TF32 = """
import os
import warnings
import torch
import fastvid
from fastvid.device.precision import computing

b = torch.backends
OLD = (torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32)
NEW = (b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv)

def told(read):
    try:
        return read()
    except RuntimeError:  # torch refuses where its interfaces differ
        return "refused"

def state():
    return [told(read) for read in OLD] + [one.fp32_precision for one in NEW]

def use():
    with warnings.catch_warnings(), computing():
        warnings.simplefilter("error")
        assert state()[:2] == ["highest", False], state()  # can be read, and agree with the new ones
        assert [b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision] == ["ieee", "ieee"]
        assert [b.mkldnn.matmul.fp32_precision, b.mkldnn.conv.fp32_precision] == ["ieee", "ieee"]

def request():
    pipe = fastvid.load("embedded", device="cpu")
    pipe.generate("a red circle", num_frames=5, num_inference_steps=1)

def states(caller, what, later):
    "Before and after `what` in a process of its own, and after what the caller sets later."
    read, write = os.pipe()
    if not os.fork():
        exec(caller)
        before = state()
        what()
        after = state()
        exec(later)
        os.write(write, repr((before, after, state())).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    return eval(os.read(read, 10**5))
"""
EACH = """
for caller in CALLERS:
    for later in LATER:
        before, after, end = states(caller, use, later)
        assert before == after, (caller, before, after)
        # What had no value of its own has none: what the caller sets later for all, or for a library, counts.
        assert states(caller, lambda: None, later)[2] == end, (caller, later)
assert "refused" in states(CALLERS[2], use, "")[0]
"""
REQUESTS = """
for caller in CALLERS[:3]:
    before, after, _ = states(caller, request, "")
    assert before == after, (caller, before, after)
"""
CALLERS = [
    "",
    'torch.set_float32_matmul_precision("high")',
    'b.cuda.matmul.fp32_precision = "tf32"',
    'torch.set_float32_matmul_precision("medium")',
    "b.cuda.matmul.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    'b.cudnn.conv.fp32_precision = "ieee"',
    'b.fp32_precision = "tf32"',
    'b.mkldnn.fp32_precision = "bf16"',
    'torch.set_float32_matmul_precision("high"); b.cuda.matmul.fp32_precision = "ieee"',
    'b.cuda.matmul.fp32_precision = "ieee"; b.cuda.matmul.allow_tf32 = True',
    'b.cudnn.conv.fp32_precision = "tf32"; b.cudnn.allow_tf32 = False',
    'b.cudnn.allow_tf32 = False; b.cudnn.rnn.fp32_precision = "tf32"',
]
LATER = [
    'b.fp32_precision = "ieee"',
    'b.cudnn.fp32_precision = "tf32"',
    'torch.set_float32_matmul_precision("highest")',
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("script", [EACH, pytest.param(REQUESTS, marks=pytest.mark.slow)], ids=["each", "requests"])
def test_both_interfaces_to_tf32_say_what_they_said(script: str) -> None:
    """The old one (allow_tf32) and the new one (fp32_precision), whichever the caller used, or both."""
    code = f"{TF32}\nCALLERS = {CALLERS}\nLATER = {LATER}\n{script}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
