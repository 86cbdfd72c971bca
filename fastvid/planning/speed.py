"""How fast this machine is: seconds of a linear layer, an attention and a convolution at a few sizes, measured once and
kept in the user's cache folder, so that a plan can say how long a request takes.

Rates are of the very functions that models call, bound as the model's are. Between two sizes the speed is interpolated
over the logarithm of the work; above the largest it stays; a call smaller than the smallest takes as long as that one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastvid.device.devices import cpu_name
from fastvid.device.precision import ieee_fp32
from fastvid.layers.attention import self_attention
from fastvid.layers.linear import Linear
from fastvid.ops.dispatch import Ops

BUDGET = 0.6  # seconds for each of the three
SHARES = 4  # parts of it: a size has one, at least
RUNS = 3  # at least
LONG = 5e-3  # seconds of a run that all threads work on
Points = tuple[tuple[float, float], ...]  # (operations of a call, its seconds), ascending

# (rows, width); (tokens, heads, width of a head); (channels, frames, height, width).
LINEAR = ((80, 256), (256, 1024), (1560, 1536), (4096, 3072), (8192, 5120), (32768, 5120))
ATTENTION = ((80, 4, 64), (320, 8, 64), (1560, 12, 128), (8192, 24, 128), (32768, 40, 128))
CONVOLUTION = ((32, 4, 16, 16), (96, 2, 16, 16), (96, 4, 64, 64), (192, 4, 96, 96), (96, 4, 480, 832))


@dataclass(frozen=True)
class Rates:
    """What was measured: (floating point operations of a call, its seconds), ascending, of each kind of work."""

    linear: Points
    attention: Points
    convolution: Points

    def seconds(self, kind: str, flops: float, calls: float = 1) -> float:
        """Of `calls` calls with `flops` operations each; kind: the name of a field."""
        return calls * time_of(getattr(self, kind), flops)


def time_of(points: Points, flops: float) -> float:
    """Seconds of a call with so many operations."""
    if flops <= points[0][0]:
        return points[0][1] if flops > 0 else 0.0
    for (less, fast), (more, slow) in pairwise(points):
        if flops <= more:
            share = math.log(flops / less) / math.log(more / less)
            return fast * (slow / fast) ** share
    return points[-1][1] * flops / points[-1][0]


# ---------------------------------------------------------------- kept


def find(ops: Ops, device: torch.device, dtype: torch.dtype, again: bool = False) -> Rates:
    """The rates of this machine, from the user's cache folder, or measured, which takes about 2 s, and put there.
    again: measured in any case."""
    key = _key(ops, device, dtype)
    path = _folder() / f"rates-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not again and (kept := _read(path, key)) is not None:
        return kept
    made = measure(ops, device, dtype)
    with contextlib.suppress(OSError):  # a folder that can't be written to costs 2 s the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{secrets.token_hex(4)}.partial")
        part.write_text(json.dumps({"key": key, "rates": asdict(made)}, indent=1), encoding="utf-8")
        part.replace(path)
    return made


def _folder() -> Path:
    """Where users' programs keep what can be made again."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "fastvid"


def _key(ops: Ops, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "version": 1,
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": ops.bound["attention"],
    }


def _read(path: Path, key: dict[str, Any]) -> Rates | None:
    """What a file holds, if that is whole and of this very machine."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        made = Rates(
            **{kind: tuple((float(w), float(s)) for w, s in points) for kind, points in found["rates"].items()}
        )
        points = [made.linear, made.attention, made.convolution]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    whole = all(one and one == tuple(sorted(one)) and all(0 < n < math.inf for p in one for n in p) for one in points)
    return made if whole and found.get("key") == key else None


# ---------------------------------------------------------------- measured


@torch.no_grad()
def measure(ops: Ops, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure now: from small to large as far as the time allows."""
    with ieee_fp32():
        return Rates(
            _points(_linear(device, dtype), device),
            _points(_attention(ops, device, dtype), device),
            _points(_convolution(ops, device), device),
        )


Case = tuple[float, Callable[[], Any]]  # operations, and what does them


def _points(cases: Iterator[Case], device: torch.device) -> Points:
    end, found = time.perf_counter() + BUDGET, []
    for flops, run in cases:
        found.append((flops, _time(run, device)))
        # The next one is some ten times as much work.
        if time.perf_counter() + 10 * found[-1][1] * RUNS > end:
            break
    return tuple(found)


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run: the fastest, since what else runs on the machine only adds; of as many at a time as take 1 ms,
    since clocks and launches have their grain."""
    run()
    count = max(1, min(1000, int(1e-3 / _clock(run, device, 1))))
    end, taken = time.perf_counter() + BUDGET / SHARES, []
    while len(taken) < RUNS or time.perf_counter() < end:
        taken.append(_clock(run, device, count))
    return min(taken)


def _clock(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """Seconds of a run. Of a long one on the CPU no more than the process had of its threads: what others took of the
    machine meanwhile is not counted. (A short one may be too small to be divided among threads.)"""
    _wait(device)
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        run()
    _wait(device)
    passed, used = time.perf_counter() - start, time.process_time() - used
    if device.type == "cpu" and passed > LONG * count:
        passed = min(passed, used / torch.get_num_threads())
    return passed / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _linear(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in LINEAR:
        layer = Linear(width, width, device=device, dtype=dtype)
        x = torch.randn(1, rows, width, device=device, dtype=dtype)
        yield 2.0 * rows * width**2, lambda layer=layer, x=x: layer(x)


def _attention(ops: Ops, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for tokens, heads, width in ATTENTION:
        q, k, v = torch.randn(3, 1, tokens, heads, width, device=device, dtype=dtype)
        yield 4.0 * tokens**2 * heads * width, lambda q=q, k=k, v=v: self_attention(ops, q, k, v)


def _convolution(ops: Ops, device: torch.device) -> Iterator[Case]:
    """Of the VAE's residual blocks, in fp32 as the VAE is."""
    for channels, frames, height, width in CONVOLUTION:
        x, past = (torch.randn(1, channels, t, height, width, device=device) for t in (frames, 2))
        weight, bias = (
            torch.randn(channels, channels, 3, 3, 3, device=device) / 50,
            torch.zeros(channels, device=device),
        )
        gamma = torch.ones(channels, 1, 1, 1, device=device)
        given = (x, past, gamma, weight, bias)
        work = 2.0 * weight.numel() * frames * height * width
        yield work, lambda given=given: ops.vae_norm_silu_conv3d(*given)
