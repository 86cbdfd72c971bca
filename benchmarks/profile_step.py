"""Profiles one denoising step of a request: counts of operations, the slowest kernels, copies and casts.

Copies and casts are listed with their bytes and source lines.

    python benchmarks/profile_step.py [--model embedded] [--device cpu] [--dtype float32] [--backend auto]

Operations are recorded in the second step of a request with guidance, times in the third with torch.profiler. Bytes are
those of the result. Copies inside a library's operation are not visible.
"""

from __future__ import annotations

import argparse
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from harness import save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastvid
from fastvid.benchmarks.host import ROOT
from fastvid.engine import session
from fastvid.engine.events import Step

COPIES = ("_to_copy", "clone", "contiguous", "copy_", "cat", "stack", "constant_pad_nd")
SLOWEST = 15
PROMPT = "a red circle moving right on a white background"


class Watch(TorchDispatchMode):
    """Counts operations and records copies."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies: dict[tuple[str, str], list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.counts[f"{function.namespace}::{name}"] += 1
        if name in COPIES and isinstance(made, Tensor):
            self.copies.setdefault((name, _place()), []).append(made.nbytes)
        return made

    def report(self) -> dict[str, Any]:
        """The recorded copies, the largest first."""
        copies = [
            {"op": op, "at": at, "count": len(sizes), "bytes": sum(sizes)} for (op, at), sizes in self.copies.items()
        ]
        copies.sort(key=lambda copy: (-copy["bytes"], copy["op"], copy["at"]))
        return {
            "operations": sum(self.counts.values()),
            "copy_count": sum(copy["count"] for copy in copies),
            "copy_bytes": sum(copy["bytes"] for copy in copies),
            "copies": copies,
            "counts": dict(self.counts.most_common()),
        }


def _place() -> str:
    """The calling line of fastvid: "fastvid/ops/reference.py patch_embed: the code"."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve():
            return f"{path.relative_to(ROOT)} {frame.name}: {frame.line}"
    return "elsewhere"


@contextmanager
def second_row_watched(watch: Watch) -> Iterator[None]:
    """Has the denoising loop of requests in this block watched in its second row. A pipeline leaves its caller's modes,
    so the mode is entered within it."""
    walk = session.walk

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        for number, rows in enumerate(repeat(walk(*args, **options))):
            with watch if number == 1 else nullcontext():
                row = next(rows, None)
            if row is None:
                return
            yield row

    session.walk = watched
    try:
        yield
    finally:
        session.walk = walk


def steps(events: Iterator[Any]) -> Callable[[], None]:
    """A function that runs a request up to its next step."""

    def run() -> None:
        while not isinstance(next(events), Step):
            pass

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="the default is the device's")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    pipe = fastvid.load(args.model, device=args.device, dtype=args.dtype, backend=args.backend)
    watch, activities = Watch(), [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device != "cpu" else [])]
    with second_row_watched(watch):
        stream = pipe.stream(PROMPT, seed=1, num_inference_steps=4, guidance_scale=4.0)
        step = steps(stream)
        step()  # the first makes what all share
        step()
        with profile(activities=activities) as profiled:
            step()
        stream.close()
    time = "self_device_time_total" if args.device != "cpu" else "self_cpu_time_total"
    averages = sorted(profiled.key_averages(), key=lambda row: -getattr(row, time))[:SLOWEST]
    slowest = [{"name": row.key, "count": row.count, "us": round(getattr(row, time), 1)} for row in averages]
    report = watch.report()
    for copy in report["copies"]:
        print(f"{copy['bytes']:>12,} bytes in {copy['count']:>3} x {copy['op']:<16} {copy['at']}")
    print(f"{report['operations']} operations, {report['copy_count']} copies of {report['copy_bytes']:,} bytes")
    described = pipe.describe()
    what = {"model": args.model, "dtype": described["dtype"], "backends": described["backends"]}
    print(save("profile-step", {}, args.device, what=what, slowest=slowest, **report))


if __name__ == "__main__":
    main()
