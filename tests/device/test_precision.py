"""fp32 is IEEE fp32 inside our calls, whatever the caller's settings, and those come back after."""

from __future__ import annotations

import subprocess
import sys

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
