"""A process that checks and times one family of operations: `python -m fastvid.tuning.child`.

It reads a job, one line of JSON, and writes messages, one a line: what it is at (before each piece of work, with the
seconds that the piece may take), and what came of it. So whoever reads knows which kernel has hung or crashed, and
starts another process without it. It ends when its standard input does.

    {"seconds", "device", "threads", "calls", "rejected", "right", "done", "later", "limit", "mark", "plugin"}: the job
    {"at": {"op", "dtype", "shape_class", "backend", "stage", "of"}, "limit": seconds}
    {"right": name of the class and back end}   {"rejected": row}   {"row": row}   {"unmeasured": row}   {"end": true}
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from fastvid.device.precision import computing, settings
from fastvid.errors import BackendUnavailable
from fastvid.ops import libraries, tuned
from fastvid.ops.sources import file_of, source_hash
from fastvid.tuning import calls as recorded
from fastvid.tuning import check
from fastvid.tuning.calls import Call, candidates, total, work
from fastvid.tuning.timing import Case, measure_within, timer_of

LEAST = 0.05  # seconds of timing a class
LONGEST = 0.34  # share of the time that is left, which checks and timing of a class may be expected to take
GAIN = 1.02  # by which another back end has to be faster than the default
CALLS = 10  # of each back end, that a class needs at least
STICKY = 3  # exit status after an error that the device does not recover from, or changed settings
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
Function = Callable[..., Any]


class Job:
    """What is to be done, and the time for it."""

    def __init__(self, data: Mapping[str, Any], out: TextIO) -> None:
        self.device = torch.device(data["device"])
        later = {tuple(one) for one in data["later"]}
        calls = map(recorded.from_json, data["calls"])
        self.calls = sorted(calls, key=lambda call: (call.name in later, -work(call, self.device)))
        self.rejected, self.right, self.done = ({tuple(one) for one in data[n]} for n in ("rejected", "right", "done"))
        self.limit, self._out = float(data["limit"]), out
        self._end = time.monotonic() + data["seconds"]
        file = os.open(data["mark"], os.O_RDWR)
        self._mark = mmap.mmap(file, 1)
        os.close(file)

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def say(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def at(self, call: Call, backend: str, stage: str, more: float = 0.0, of: Sequence[str] = ()) -> None:
        """Says what comes next. more: seconds that it may take beside the limit. of: the back ends that take turns in
        it, of which `mark` tells."""
        names = dict(zip(("op", "dtype", "shape_class"), call.name, strict=True))
        self.say(at={**names, "backend": backend, "stage": stage, "of": of}, limit=self.limit + more)

    def mark(self, number: int) -> None:
        """Notes which back end runs, where a message would take longer than the run."""
        self._mark[0] = number


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what kernels and libraries print must not look like messages
    _killed_with_parent()
    data = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="fastvid-tune", daemon=True).start()
    if data["plugin"]:
        _load(Path(data["plugin"]))
    torch.set_num_threads(data["threads"])  # as in the process whose table it is for
    job = Job(data, out)
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)  # Triton launches on the current one
    with computing():
        run(job)
    job.say(end=True)


def _killed_with_parent() -> None:
    """Linux itself ends this process with its parent, also where a hung kernel holds Python's lock, so that no thread
    of ours could. (Elsewhere, and where the parent is gone already, `_end_with_parent` does.)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _load(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def run(job: Job) -> None:
    """All classes, new ones first, and of those the one with most work; each gets its share of the time left."""
    todo = [call for call in job.calls if call.name not in job.done]
    for number, call in enumerate(todo):
        share = job.left * work(call, job.device) / total(todo[number:], job.device)
        if job.left <= 0:
            _unmeasured(job, call, "the budget was spent before it")
        else:
            tune_class(job, call, max(share, LEAST))


def _unmeasured(job: Job, call: Call, why: str) -> None:
    job.say(unmeasured={"op": call.op, "dtype": call.dtype, "shape_class": call.shape_class, "why": why})


def tune_class(job: Job, call: Call, seconds: float) -> None:
    """Checks every back end of a class, and times those that are right."""
    began = time.monotonic()
    job.at(call, "", "preparing")
    cases = check.small_cases(call, job.device)
    expected = expected_seconds(call, cases[0], job.device)
    functions = candidates(call.op, job.device)
    if expected * CALLS * len(functions) > LONGEST * max(job.left, 1.0):
        _unmeasured(job, call, f"one call takes about {expected:.2g} s, too long for what is left of the budget")
        return
    job.at(call, "", "preparing", more=CALLS * expected)
    cases.append(check.whole_case(call, job.device))
    if (far := check.far_case(call.op, cases[0].given, job.device)) is not None:
        cases.append(far)
    right = {}
    for name, function in functions.items():
        if (*call.name, name) in job.rejected:
            continue
        if (*call.name, name) not in job.right and not _passes(job, call, name, function, cases, expected):
            continue
        right[name] = function
    if right:
        left = max(LEAST, seconds - (time.monotonic() - began))
        job.say(row=time_class(job, call, right, cases[len(check.SMALL)], min(left, job.left + LEAST), expected))


def expected_seconds(call: Call, few: check.Case, device: torch.device) -> float:
    """About how long a call takes, from one on few rows."""
    small = {name: recorded.like(value) for name, value in few.given.items()}
    flops, moved = recorded.cost(call.op, small, few.expected)
    reference, timer = candidates(call.op, device)["reference"], timer_of(device)
    taken = min(timer(lambda: check.run(call.op, reference, check.fresh(call.op, few.given))) for _ in range(3))
    return taken / 1e6 * max(call.flops / max(flops, 1.0), call.bytes / max(moved, 1.0), 1.0)


def _passes(job: Job, call: Call, name: str, function: Function, cases: list[check.Case], expected: float) -> bool:
    job.at(call, name, "checking", more=CALLS * expected)
    why, spoiled, before = None, False, settings()
    try:
        for case in cases:
            with _named(case.name):
                check.check(call.op, function, case)
        if call.op == "attention":
            check.check_empty_lists(function, cases[0].given)
        check.check_other_values(call.op, function, cases[0])
        _wait(job.device)
    except check.Wrong as error:
        why, spoiled = str(error), isinstance(error, check.Spoiled)
    except (BackendUnavailable, ValueError, TypeError, NotImplementedError) as error:
        why = f"it does not take the call: {error!s:.200}"
    except Exception as error:
        why = f"{type(error).__name__}: {error!s:.200}"
        if _is_broken(job.device):
            job.say(rejected=_rejection(call, name, why))
            sys.exit(STICKY)
    if changed := [setting for setting, value in settings().items() if value != before[setting]]:
        job.say(rejected=_rejection(call, name, f"it changes torch's {', '.join(changed)}"))
        sys.exit(STICKY)  # the others are checked with the settings as they were
    if why is None:
        job.say(right=[*call.name, name])
        return True
    job.say(rejected=_rejection(call, name, why))
    if spoiled:
        job.at(call, "", "preparing", more=CALLS * expected)
        far = cases[len(check.SMALL) + 1 :]
        cases[:] = [*check.small_cases(call, job.device), check.whole_case(call, job.device), *far]
    return False


class _named:  # noqa: N801 - used like a function
    """Puts a case's name in front of what is wrong in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, check.Wrong):
            error.args = (f"{self._name}: {error}",)


def _rejection(call: Call, backend: str, why: str) -> dict[str, str]:
    named = dict(zip(("op", "dtype", "shape_class"), call.name, strict=True))
    plain = "".join(c if c.isprintable() else " " for c in why)[: tuned.MAX_TEXT]
    return {**named, "backend": backend, "source": _source(call, backend), "why": plain}


def _source(call: Call, backend: str) -> str:
    return source_hash(backend, file_of(call.op, backend, call.shape_class)) or "unknown"


def _is_broken(device: torch.device) -> bool:
    """Whether the device does not recover from an error."""
    try:
        _wait(device)
    except Exception:
        return True
    return False


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_class(
    job: Job, call: Call, right: Mapping[str, Function], case: check.Case, seconds: float, expected: float
) -> dict[str, Any]:
    """The row of a class, from the back ends that are right."""
    job.at(call, "", "timing", seconds + CALLS * len(right) * expected, list(right))
    given = check.fresh(call.op, case.given)
    args, kwargs = recorded.split(call.op, given)

    def running(number: int, function: Function) -> Callable[[], Any]:
        def run() -> Any:
            job.mark(number)
            return function(*args, **kwargs)

        return run

    cases = [Case(name, running(number, function)) for number, (name, function) in enumerate(right.items())]
    times = {row.name: row.median for row in measure_within(cases, job.device, seconds)}
    best = _winner(times, libraries.default(call.op, job.device)[0])
    following = min((name for name in times if name != best), key=lambda name: times[name], default=None)
    return {
        **{"op": call.op, "dtype": call.dtype, "shape_class": call.shape_class, "backend": best},
        "machine": tuned.machine(job.device),
        "file": file_of(call.op, best, call.shape_class),
        "source": _source(call, best),
        "median_us": times[best],
        "next": following,
        "next_us": times[following] if following else None,
        "times_us": times,
    }


def _winner(times: Mapping[str, float], default: str) -> str:
    """The fastest; `auto`'s default where nothing gains more than a measurement jitters."""
    best = min(times, key=lambda name: times[name])
    return default if default in times and times[default] < GAIN * times[best] else best


if __name__ == "__main__":
    main()
