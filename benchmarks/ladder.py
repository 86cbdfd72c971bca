"""Runs the steps of the ladder (`gpu.sh`) one after the other, each with a limit of its own.

    build      compiles csrc/ for this GPU
    doctor     what fastvid finds here
    smoke      a small call of each kernel, compared with float64 (smoke.py)
    video      one video by the embedded model, as a user would make it
    tune       verifies and times every kernel at the shapes of published models (fastvid tune --export)
    tests      the tests marked gpu (gpu_tests.py)
    sanitize   small calls of every kernel under compute-sanitizer (sanitize.py)
    measure    benchmarks of operations and whole models; only by name

A step that hangs is stopped, one that fails is told of, and the others run. How each ended is recorded at once, in
ladder-<device>.json, and its output in ladder-<device>.txt. A later call starts from the results in benchmarks/results
and skips what was done with the same sources.

Exit status: 0, everything is done; 1, something failed; 3, nothing failed, but time ran out: call this again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from host import RESULTS, ROOT, earlier, gpu, slug
from limited import FINE, Ended, run, tail

SITE = ROOT / "build" / "site"
STEPS = ("build", "doctor", "smoke", "video", "tune", "tests", "sanitize", "measure")
MODELS = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")  # whose shapes are tuned
TOOLS = ("memcheck", "racecheck", "initcheck")
PROMPT = "a red circle moving right on a white background"
KERNELS, EVERYTHING = ("fastvid/ops", "kernels", "csrc"), ("fastvid", "kernels", "csrc")
# Seconds that an item of a step may take; tuning beyond its budget, for kernels that hang. Tests take what is left.
LIMITS = {"build": 180, "doctor": 40, "smoke": 40, "video": 90, "tune": 100, "sanitize": 150, "measure": 240}
LOGGED = 200_000  # characters of an item's output that are kept
UNSUPPORTED = "Device not supported"  # says compute-sanitizer where it cannot look at the device
LEAST = 10  # seconds: with less left nothing is begun
OUT_OF_TIME = 3  # status of a step that will go on, and of this script


@dataclass(frozen=True)
class Item:
    """A command of a step. limit: seconds; of: folders on which its result depends, none if the command itself knows
    what is done; grace: seconds to write what it has, after an interrupt."""

    step: str
    name: str
    command: Sequence[str]
    limit: float
    of: tuple[str, ...] = ()
    grace: float = 0


@dataclass
class Ladder:
    """The state of a call. known: item -> how it ended, with what sources, in this call or before."""

    device: str
    name: str
    out: Path
    until: float
    again: bool
    known: dict[str, dict[str, Any]]

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def done(self, name: str, of: Sequence[str]) -> bool:
        """Whether an item that depends on these folders was done before, with the same sources."""
        before = self.known.get(name, {})
        return bool(of) and before.get("ended") == FINE and before["key"] == sources(of) and not self.again

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".txt")

    @property
    def file(self) -> Path:
        return self.out / f"ladder-{slug(self.name)}.json"


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    args = parsed()
    ladder = started(args)
    outcomes = {}
    for item in items(args, ladder):
        outcomes[item.name] = climb(item, ladder)
        print(f"{item.name}: {outcomes[item.name]}", flush=True)
    print(f"results: {ladder.out}", flush=True)
    sys.exit(status(outcomes))


def status(outcomes: Mapping[str, str]) -> int:
    """The exit status, from how each item ended."""
    if set(outcomes.values()) - {FINE, "done before", "no time", "cannot run"}:
        return 1
    return OUT_OF_TIME if "no time" in outcomes.values() else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="those alone, after build; measure takes names too")
    parser.add_argument("--seconds", type=float, default=500, help="in all (default: 500)")
    parser.add_argument("--budget", type=float, default=120, help="of tuning a model, in seconds (default: 120)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="whose shapes are tuned")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--again", action="store_true", help="what was done before too")
    args = parser.parse_args()
    names = args.steps[args.steps.index("measure") + 1 :] if "measure" in args.steps else []
    args.measured, args.steps = names, args.steps[: len(args.steps) - len(names)] or list(STEPS[:-1])
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if unknown := set(names) - set(benchmarks()):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(benchmarks())}")
    return args


def started(args: argparse.Namespace) -> Ladder:
    """Finds the device and the earlier results, and makes the package importable, for commands too."""
    link()
    sys.path.insert(0, str(SITE))
    name = gpu("name") if args.device == "cuda" else cpu_name()
    if not name:
        sys.exit("no GPU is found (nvidia-smi names none)")
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT / "benchmarks"), str(SITE), os.environ.get("PYTHONPATH", "")]
    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"  # where compute-sanitizer is, if it is nowhere else
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "OUT": str(out)}
    ladder = Ladder(args.device, name, out, time.monotonic() + args.seconds, args.again, {})
    if (before := earlier(ladder.file)).exists():
        ladder.known = json.loads(before.read_text())["items"]
    ladder.log.unlink(missing_ok=True)
    return ladder


def cpu_name() -> str:
    """As in the names of a CPU's results."""
    from fastvid.tuning.machine import device_name

    return device_name(importlib.import_module("torch").device("cpu"))


def link() -> None:
    """What an editable install would do: the package, with kernels/ and benchmarks/ in it, in a folder of its own."""
    package = SITE / "fastvid"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (*(ROOT / "fastvid").iterdir(), ROOT / "kernels", ROOT / "benchmarks"):
        (package / path.name).symlink_to(path)


# ---------------------------------------------------------------- the steps


def items(args: argparse.Namespace, ladder: Ladder) -> Iterator[Item]:
    """The items of the steps that are asked for, in order. Drawn one by one: limits are shares of the time left."""
    python, device = sys.executable, ("--device", args.device)
    again = ("--again",) if args.again else ()
    build = (python, "setup.py", "-q", "build_ext", "--inplace")
    yield Item("build", "build", build, LIMITS["build"])  # quick if nothing has changed
    if "doctor" in args.steps:
        yield Item("doctor", "doctor", (python, "-m", "fastvid", "doctor"), LIMITS["doctor"], EVERYTHING)
    seconds = ("--seconds", str(LIMITS["smoke"] - 20))
    smoke = Item("smoke", "smoke", (python, script("smoke"), *device, *seconds, *again), LIMITS["smoke"])
    if "smoke" in args.steps:
        yield smoke
    if "video" in args.steps:
        made = ("--seed", "1", "--quiet", *device, "-o", str(Path(tempfile.gettempdir(), "fastvid-video.npy")))
        yield Item("video", "video", (python, "-m", "fastvid", "generate", PROMPT, *made), LIMITS["video"], EVERYTHING)
    if "tune" in args.steps:
        yield from tuned(args, ladder)
    if "smoke" in args.steps and ladder.known.get("smoke", {}).get("ended") == "no time":
        yield smoke  # by now what it loads is in memory
    if "tests" in args.steps:
        limits = ("--in-all", f"{ladder.left - 20:.0f}", "--record")  # it starts and ends in the rest
        yield Item("tests", "tests", (python, script("gpu_tests"), *limits, *again), ladder.left)
    if "sanitize" in args.steps:
        yield from sanitized()
    if "measure" in args.steps:
        for name in args.measured or benchmarks():
            file = name if name == "profile_step" else f"bench_{name}"
            yield Item("measure", f"measure {name}", (python, script(file), *device), LIMITS["measure"], EVERYTHING)


def tuned(args: argparse.Namespace, ladder: Ladder) -> Iterator[Item]:
    """The shapes of a model at a time, into a file of its own. What the budget of an earlier call did not reach is left
    to this one, into another file."""
    of = (*KERNELS, "fastvid/tuning")
    for model in args.models:
        name, file = f"tune {model}", ladder.out / f"tune-{slug(model)}-{slug(ladder.name)}.json"
        how = ("--model", model, "--budget", f"{args.budget:.0f}", "--device", args.device)
        command = (sys.executable, "-m", "fastvid", "tune", *how)
        done_before = ladder.done(name, of)
        yield Item("tune", name, (*command, "--export", str(file)), args.budget + LIMITS["tune"], of, grace=10)
        if done_before and (left := unmeasured(earlier(file))):
            rest = file.with_name(file.name.replace("tune-", "tune-rest-", 1))
            only = ("--only", ",".join(left), "--export", str(rest))
            yield Item("tune", f"{name}, the rest", (*command, *only), args.budget + LIMITS["tune"], of, grace=10)


def unmeasured(file: Path) -> list[str]:
    """The families with classes that the budget did not reach."""
    if not file.exists() or not (rows := json.loads(file.read_text()).get("unmeasured")):
        return []
    from fastvid.tuning.calls import family_of

    return sorted({family_of(row["op"]) for row in rows})


def sanitized() -> Iterator[Item]:
    """Kernels of csrc/ apart from those of Triton: after a fault nothing more runs in a process."""
    for kind, backends in (("cuda", ("cuda", "cuda_int8", "cuda_fp8")), ("triton", ("triton",))):
        for tool in TOOLS:
            checker = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "0")
            asked = [part for backend in backends for part in ("--backend", backend)]
            command = (*checker, sys.executable, script("sanitize"), *asked)
            yield Item("sanitize", f"{tool} {kind}", command, LIMITS["sanitize"], KERNELS)


def benchmarks() -> list[str]:
    """What `measure` runs: benchmarks of operations, then of whole models, and what a step runs and copies."""
    found = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    operations = [path.stem.removeprefix("bench_") for path in found if "\nOPERATIONS = True" in path.read_text()]
    return [*operations, "vae_frames", "e2e", "profile_step"]


def script(name: str) -> str:
    return str(ROOT / "benchmarks" / f"{name}.py")


# ---------------------------------------------------------------- one item


def climb(item: Item, ladder: Ladder) -> str:
    """Run an item and record how it ended: "done", "done before", "no time" (it was not begun, or goes on in the next
    call), "cannot run" (a sanitizer, on a virtual machine that hides the device), or how it failed."""
    if ladder.done(item.name, item.of):
        return "done before"
    limit = min(item.limit, ladder.left)
    if limit < LEAST:
        return "no time"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.txt")
        ended = run(item.command, limit, log, env=environment(item), cwd=ROOT, grace=item.grace)
        said = tail(log, LOGGED)
    if item.step == "build":
        link()
    outcome = "no time" if ran_out(ended, item, limit) else ended.how
    if item.step == "sanitize" and UNSUPPORTED in said:
        outcome = "cannot run"
    with ladder.log.open("a") as file:
        file.write(f"===== {item.name}: {outcome}\n{said}\n")
    ladder.known[item.name] = {"ended": outcome, "seconds": round(ended.seconds, 1), "key": sources(item.of)}
    write(ladder)
    print(said[-600 if outcome == FINE else -3000 :], flush=True)
    return outcome


def ran_out(ended: Ended, item: Item, limit: float) -> bool:
    """Whether an item ended for want of time in this call, and not by its own limit."""
    return ended.code == OUT_OF_TIME or (ended.code is None and (limit < item.limit or item.step == "tests"))


def environment(item: Item) -> dict[str, str]:
    if item.step == "build":
        arch = gpu("compute_cap").replace(".", "")
        arch += "a" if int(arch or 0) >= 90 else ""  # those have instructions of their own (the a of sm_90a)
        return {**os.environ, "FASTVID_BUILD_CUDA": "1", "FASTVID_CUDA_ARCHS": arch}
    if item.step == "sanitize":  # without torch's memory cache every tensor has bounds that a sanitizer sees
        return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return dict(os.environ)


def sources(folders: Sequence[str]) -> str:
    """Hash of the sources in these folders, of torch, Triton and the driver; "" for no folder."""
    if not folders:
        return ""
    digest = hashlib.sha256(f"{version('torch')} {version('triton')} {gpu('driver_version')}".encode())
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in sorted(path for path in paths if path.suffix in (".py", ".cu", ".h", ".cpp")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(ladder: Ladder) -> None:
    machine = {
        "device": ladder.name,
        "arch": re.sub(r"^(\d+)\.(\d+)$", r"sm_\1\2", gpu("compute_cap")) if ladder.device == "cuda" else "cpu",
        "driver": gpu("driver_version"),
        "torch": version("torch"),
        "triton": version("triton"),
    }
    record = {"benchmark": "ladder", "machine": machine, "items": ladder.known}
    ladder.file.write_text(json.dumps(record, indent=2) + "\n")


def stop(*_: int | FrameType | None) -> None:
    """Ends this script when it is told to, so that what it runs is ended too."""
    sys.exit(1)


if __name__ == "__main__":
    main()
