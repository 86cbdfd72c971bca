"""Back ends that are made wrong on purpose. `install` adds some of them to this process; a child process of a test runs
a plugin that does the same there."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import dispatch, reference

OP = "rms_norm"
CALLS = {"number": 0}
KEPT: dict[object, tuple[Tensor, Tensor]] = {}


def right(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, eps)


def off(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An epsilon that is 25 times too large: an error of 1.2e-5, as seen in the field."""
    return reference.rms_norm(x, weight, eps * 25 + 2.5e-5)


def tail(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but for the last value, which is not written."""
    out = reference.rms_norm(x, weight, eps)
    out.view(-1)[-1] = torch.nan
    return out


def middle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but for a row that no sample of rows looks at."""
    out = reference.rms_norm(x, weight, eps)
    if out.shape[-2] > 300:
        out[..., 301, :] *= 1.05
    return out


def fickle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, with other bits every tenth time."""
    CALLS["number"] += 1
    out = reference.rms_norm(x, weight, eps)
    return out.mul_(1 + 2.0**-23) if CALLS["number"] % 10 == 0 else out


def scribbling(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but it writes into its input."""
    out = reference.rms_norm(x, weight, eps)
    x.mul_(2)
    return out


def overflowing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but for large values."""
    return reference.rms_norm(x, weight, eps) * torch.where(x.abs().amax() > 500, torch.inf, 1.0)


def refusing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise ValueError("rows of 64 are not supported")


def hanging(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    time.sleep(600)
    return x


def slow_to_hang(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Hangs only after its checks, while it is timed."""
    CALLS["number"] += 1
    if CALLS["number"] > 110 and x.shape[-2] > 300:
        time.sleep(600)
    return reference.rms_norm(x, weight, eps)


def aborting(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    os.abort()


def faulting(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    ctypes.string_at(0)
    return x


def sleeping(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, and slow."""
    time.sleep(0.05)
    return reference.rms_norm(x, weight, eps)


def keeping(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but a weight that was written to counts as it was at first."""
    kept, _ = KEPT.setdefault(("weight", weight.data_ptr()), (weight.clone(), weight))
    return reference.rms_norm(x, kept, eps)


def sharing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but all results of a shape are in the same memory."""
    out = reference.rms_norm(x, weight, eps)
    shared, _ = KEPT.setdefault(tuple(out.shape), (out, out))
    return shared.copy_(out)


def faint(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but for a row that no sample looks at, and that hardly shows in the error of all."""
    out = reference.rms_norm(x, weight, eps)
    if out.shape[-2] > 300:
        out[..., 301, :] *= 1.0005
    return out


def setting(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right, but it leaves torch with another default."""
    torch.set_default_dtype(torch.float64)
    return reference.rms_norm(x, weight, eps)


def signalling(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Ends by a signal without a name."""
    os.kill(os.getpid(), signal.SIGRTMIN + 3)
    return x


def clinging(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Hangs with Python's lock, and says who it is."""
    Path(os.environ["FAKES_PID"]).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(600)
    return x


FAKES = {one.__name__: one for one in (right, off, tail, middle, fickle, scribbling, overflowing, refusing)}
FAKES |= {one.__name__: one for one in (hanging, slow_to_hang, aborting, faulting, sleeping)}
FAKES |= {one.__name__: one for one in (keeping, sharing, faint, setting, signalling, clinging)}


def install(names: Sequence[str], patch: Callable[[object, str, Any], None] = setattr) -> None:
    """Makes the reference and these fakes all there is."""
    made = {OP: {"reference": reference.rms_norm, **{name: FAKES[name] for name in names}}}
    patch(dispatch, "implementations", lambda: made)


def plugin(folder: Path, names: Sequence[str]) -> Path:
    """A file that installs them in a child process."""
    path = folder / "plugin.py"
    here = str(Path(__file__).parent)
    path.write_text(f"import sys\nsys.path.insert(0, {here!r})\nimport fakes\nfakes.install({list(names)!r})\n")
    return path
