"""`fastvid.tune`: checks and times the back ends of every operation, for the shapes of a model, and keeps what won.

Each family of operations has a child process (child.py). It says what it is at; what hangs, faults or crashes there is
taken to be wrong, and another child goes on without it. The time is shared out by the work that each family does in a
request.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvid import checks
from fastvid.device.devices import choose_dtype, find_device
from fastvid.errors import Error, InvalidRequest
from fastvid.models.loaded import LoadOptions
from fastvid.ops import dispatch, tuned
from fastvid.ops.sources import file_of, source_hash
from fastvid.tuning.calls import FAMILIES, Call, candidates, family_of, to_json, total
from fastvid.tuning.machine import machine
from fastvid.tuning.process import Child, Fault
from fastvid.tuning.work import Subject, record

PUBLISHED = (Subject("wan2.1-t2v-1.3b"), Subject("wan2.1-t2v-14b"), Subject("embedded"), Subject("embedded", (160, 96)))
BUDGETS = {"cuda": 120.0, "cpu": 60.0}  # seconds a model
LIMITS = {"cuda": 60.0, "cpu": 30.0}  # seconds of one piece of work, beside what its calls are expected to take
GRACE, GRACE_SHARE = 3.0, 0.1  # seconds, and share of the budget, after which work that has begun is broken off
FLOOR = 0.02  # a family's share of the time at least
START_LIMIT = 60.0  # seconds until a child has started; where it imports torch for the first time, that takes long
Progress = Callable[[Mapping[str, Any]], None]
ClassName = tuple[str, str, str]
Known = dict[str, list[list[str]]]
"""What children have found: back ends of classes that are rejected or right, and classes that are done. later: classes
that the table has already; others come first."""


@dataclass
class Tuned:
    """What `tune` has found. path: of the table. rows: of the winners, as `fastvid.ops.tuned` has them. rejected: what
    was not right, and why. unmeasured: classes that the budget did not reach. seconds: it took."""

    path: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    unmeasured: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def record(self, device: torch.device) -> dict[str, Any]:
        """The table as a result that can be committed under benchmarks/results/."""
        table = tuned.load(device)
        rows = [{name: value for name, value in row.items() if name != "result"} for row in table["rows"]]
        facts = {"benchmark": "tune", "machine": machine(device), "key": table["key"]}
        return {**facts, "rows": rows, "rejected": table["rejected"], "unmeasured": self.unmeasured}


@dataclass(frozen=True)
class Plan:
    """How `tune` goes about it. limit: seconds of one piece of work. plugin: a Python file that children run first, for
    tests."""

    device: torch.device
    options: LoadOptions
    budget: float
    families: tuple[str, ...]
    limit: float
    progress: Progress
    plugin: Path | None = None


def tune(
    model: str | None = None,
    size: str | tuple[int, int] | None = None,
    *,
    num_frames: int | None = None,
    budget: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    only: str | Iterable[str] | None = None,
    export: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Find the fastest right back end of every operation on this machine. `auto` follows from the next `load` on.

    Args:
        model: as `load` takes it, or the name of a published model, which needs no files. None: the published 1.3B at
            480p and 14B at 720p and the embedded model; on a CPU the embedded model alone.
        size: (width, height) or "832x480"; default: the model's own.
        num_frames: of the video; default: the model's own.
        budget: seconds of checks and measurements for each model; default: 120 on a GPU, 60 on a CPU. The start of up
            to eight processes comes on top.
        device, dtype: as `load` takes them.
        only: families of operations: attention, linears, norms, ends, solver, rgb, vae-convolutions, vae-norms; names,
            or one text with commas.
        export: a file to which the result is written as JSON as well.
        progress: called with what is done now: {"model", "op", "shape_class", "backend", "stage", "done", "total"}.

    An interruption (Ctrl-C) keeps what is done. Raises InvalidRequest for an argument that is not allowed,
    CheckpointError for a model that cannot be read, BackendUnavailable for a device that is not there, and Error where
    the table cannot be written or is not trusted.
    """
    where = find_device(device)
    dispatch.bind("reference", "reference", where)  # raises if it is not there
    choose_dtype(dtype, where)
    plan = Plan(
        where,
        LoadOptions(device=where, dtype=dtype),
        BUDGETS[where.type] if budget is None else checks.number(1.0, 86_400.0)("budget", budget),
        families_of(only),
        LIMITS[where.type],
        progress or (lambda event: None),
    )
    return run(plan, subjects(model, size, num_frames, where), None if export is None else check_export(export))


def families_of(only: str | Iterable[str] | None) -> tuple[str, ...]:
    """The families that `only` names; all of them by default."""
    if only is None:
        return tuple(FAMILIES)
    names = only.split(",") if isinstance(only, str) else list(only) if isinstance(only, Iterable) else [only]
    chosen = {checks.one_of(FAMILIES)("only", name.strip() if isinstance(name, str) else name) for name in names}
    if not chosen:
        raise InvalidRequest(f"only names no family; give some of {', '.join(FAMILIES)}, or leave it out")
    return tuple(family for family in FAMILIES if family in chosen)


def subjects(model: str | None, size: Any, num_frames: int | None, device: torch.device) -> list[Subject]:
    """What is tuned for."""
    size = "{}x{}".format(*size) if isinstance(size, tuple) and len(size) == 2 else size
    pair = None if size is None else checks.size("size", size)
    count = None if num_frames is None else checks.whole(1, checks.MAX_FRAMES)("num_frames", num_frames)
    if model is not None:
        return [Subject(checks.text("model", model), pair, count)]
    if pair is not None or count is not None:
        raise InvalidRequest("size and num_frames are those of a model; give model too, such as model='wan2.1-t2v-14b'")
    return [one for one in PUBLISHED if device.type != "cpu" or one.model == "embedded"]


def run(plan: Plan, todo: Sequence[Subject], export: Path | None = None) -> Tuned:
    """Tunes for each subject. Writes the table, and the export, whatever happens."""
    began = time.monotonic()
    result = Tuned(str(tuned.write(plan.device, [], [])))  # before anything is measured, it is sure that it can be
    try:
        for calls, name, budget in _recorded(plan, todo):
            _tune_calls(plan, calls, name, budget, result)
    finally:
        result.seconds = time.monotonic() - began
        if export is not None:
            write_export(result, plan.device, export)
    return result


def _recorded(plan: Plan, todo: Sequence[Subject]) -> Iterable[tuple[list[Call], str, float]]:
    """The calls of each model, without those of models before it; sizes of one model share its budget."""
    seen: set[ClassName] = set()
    models = dict.fromkeys(one.model for one in todo)
    for model in models:
        calls = []
        for subject in (one for one in todo if one.model == model):
            plan.progress({"model": subject.title, "stage": "recording"})
            for call in record(subject, plan.options):
                if call.name not in seen and family_of(call.op) in plan.families:
                    seen.add(call.name)
                    calls.append(call)
        yield calls, model, plan.budget


def check_export(export: str | os.PathLike[str]) -> Path:
    """The file of an export, if it can be written. Raises InvalidRequest otherwise."""
    path = Path(checks.path("export", export))
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidRequest(
            f"export: {path} cannot be written; give a file in a folder that is there, such as tune.json"
        )
    if path.resolve().parent == tuned.folder().resolve():
        raise InvalidRequest(f"export: {path} is where the tables are; give a file elsewhere, such as tune.json")
    return path


def write_export(result: Tuned, device: torch.device, path: Path) -> None:
    try:
        path.write_text(json.dumps(result.record(device), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Error(f"export: {path} cannot be written ({error.strerror})") from error


# ---------------------------------------------------------------- families


def _tune_calls(plan: Plan, calls: Sequence[Call], model: str, budget: float, result: Tuned) -> None:
    """All families of a model's calls, within its budget. Operations with one back end need no choice."""
    several = [call for call in calls if len(candidates(call.op, plan.device)) > 1]
    families = {family: [c for c in several if family_of(c.op) == family] for family in plan.families}
    families = {family: found for family, found in families.items() if found}
    work = {
        family: max(total(found, plan.device), FLOOR * total(several, plan.device))
        for family, found in families.items()
    }
    table = [_name(row) for row in tuned.load(plan.device)["rows"]]
    watch = Watch(plan, model, len(several), time.monotonic() + budget, table)
    for number, (family, found) in enumerate(families.items()):
        rest = list(families)[number:]
        share = work[family] / sum(work[one] for one in rest)
        seconds = max(0.0, watch.left) * share
        try:
            _tune_family(watch, found, seconds, result)
        finally:
            _keep(plan.device, result, found)


def _keep(device: torch.device, result: Tuned, calls: Sequence[Call]) -> None:
    """Writes what was found of these calls into the table."""
    names = {call.name for call in calls}

    def of_these(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if (row["op"], row["dtype"], row["shape_class"]) in names]

    tuned.write(device, of_these(result.rows), of_these(result.rejected))


@dataclass
class Watch:
    """A model's time. done, total: classes. later: those that the table has already."""

    plan: Plan
    model: str
    total: int
    end: float
    later: list[list[str]]
    done: int = 0

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def show(self, at: Mapping[str, Any]) -> None:
        self.plan.progress({"model": self.model, **at, "done": self.done, "total": self.total})


def _tune_family(watch: Watch, calls: Sequence[Call], seconds: float, result: Tuned) -> None:
    """One family, in as many children as it takes: one more for each kernel that hangs or crashes."""
    known: Known = {"rejected": [], "right": [], "done": [], "later": watch.later}
    plan = watch.plan
    while True:
        with tempfile.TemporaryDirectory(prefix="fastvid-tune-") as folder:
            job = {"seconds": max(0.0, seconds), "calls": [to_json(call) for call in calls], **known}
            job |= {"device": str(plan.device), "limit": plan.limit, "plugin": plan.plugin and str(plan.plugin)}
            began, before = time.monotonic(), watch.end
            fault = _follow(watch, Child(job, Path(folder)), known, result)
        if fault is None:
            return
        seconds -= fault.since - began - (watch.end - before)
        watch.end += time.monotonic() - fault.since  # it costs its own time, not the others'
        _blame(fault, known, result)


def _blame(fault: Fault, known: Known, result: Tuned) -> None:
    """Notes who has hung or crashed, so that the next child does not try it again."""
    if not fault.at:
        raise Error(f"a child process of fastvid tune does not start: {fault.why}")
    op, _, shape_class = name = _name(fault.at)
    row = {**_names(fault.at), "why": fault.why}
    if not fault.backend:  # the inputs, or the reference
        result.unmeasured.append(row)
        known["done"].append(name)
    elif [*name, fault.backend] not in known["rejected"]:  # of some errors the child has told before it ended
        source = source_hash(fault.backend, file_of(op, fault.backend, shape_class)) or "unknown"
        result.rejected.append({**row, "backend": fault.backend, "source": source})
        known["rejected"].append([*name, fault.backend])


def _follow(watch: Watch, child: Child, known: Known, result: Tuned) -> Fault | None:
    """Reads a child's messages until it is done; a Fault if it has hung or ended before."""
    at: dict[str, Any] = {}
    limit, began = START_LIMIT, time.monotonic()
    since = began
    with child:
        while True:
            over = watch.end + GRACE + GRACE_SHARE * watch.plan.budget if at else since + limit
            message = child.message(min(since + limit, over) - time.monotonic())
            if not message:
                if message is not None and over < since + limit:
                    result.unmeasured.append({**_names(at), "why": "the budget was spent in it"})
                    return None
                return child.fault(at, since, None if message is None else limit)
            if not at:
                watch.end += time.monotonic() - began  # what a child takes to start is beside the budget
            if "at" in message:
                at, limit, since = message["at"], float(message["limit"]), time.monotonic()
                watch.show(at)
            elif "end" in message:
                return None
            else:
                _note(watch, message, known, result)


def _note(watch: Watch, message: Mapping[str, Any], known: Known, result: Tuned) -> None:
    """Keeps what a child has found."""
    if "right" in message:
        known["right"].append(message["right"])
    elif "rejected" in message:
        row = message["rejected"]
        result.rejected.append(row)
        known["rejected"].append([*_name(row), row["backend"]])
    else:
        row = message.get("row") or message["unmeasured"]
        (result.rows if "row" in message else result.unmeasured).append(row)
        known["done"].append(_name(row))
        watch.done += 1


def _name(row: Mapping[str, Any]) -> list[str]:
    return [row["op"], row["dtype"], row["shape_class"]]


def _names(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: row.get(name, "") for name in ("op", "dtype", "shape_class")}
