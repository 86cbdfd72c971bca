"""fp32 is IEEE fp32 inside our calls, whatever the caller's settings, and those come back after."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch
from fastvid.device.precision import ieee_fp32
torch.set_float32_matmul_precision("medium")
a, b = torch.randn(256, 512), torch.randn(512, 384)
exact = a.double() @ b.double()
error = lambda: float(((a @ b).double() - exact).norm() / exact.norm())
with ieee_fp32():
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert error() < 1e-6, error()
try:
    with ieee_fp32():
        raise KeyError
except KeyError:
    pass
assert torch.get_float32_matmul_precision() == "medium", torch.get_float32_matmul_precision()
first, second = ieee_fp32(), ieee_fp32()  # of two threads, which end in the order in which they began
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)
assert torch.backends.mkldnn.matmul.fp32_precision == "ieee" and error() < 1e-6
second.__exit__(None, None, None)
print(torch.backends.mkldnn.matmul.fp32_precision)
"""


def test_inside_it_is_ieee_and_the_callers_choice_comes_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bf16"
