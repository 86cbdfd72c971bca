"""Write down what fastvid does, so that a later version can be compared with it: golden.json and frames.npz.

    python make.py OUT [--models FOLDER] [--only AREA] [--small]
    python compare.py OLD NEW [--exact | --tolerance 1]

Only public names are used (`import fastvid`, `python -m fastvid`), so the same script runs on every version. The one
exception is `golden_pipes.causal`.

golden.json is {area: {case: record}}. frames.npz has the frames of every case as uint8 [F, H, W, 3].

Left out, because it differs from run to run or from machine to machine:
- events: seconds of Step and of Finished (the names of the stages are kept).
- plans: seconds, seconds_parts and efficiency (measured rates); bytes_free of plans for this machine.
- paths (MODELS, WORK and FASTVID stand for folders), the version in recipes, addresses of objects.
- command line: progress on standard error of commands that succeed; seconds and bytes_free in --json.
- checkpoints: the files in their folders.
"""

from __future__ import annotations

import os

# Before torch is imported. One thread, so that sums have one order.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", COLUMNS="100", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", PYTHONDONTWRITEBYTECODE="1")
for _name in [name for name in os.environ if name.startswith("FASTVID_")]:
    del os.environ[_name]

import argparse  # noqa: E402
import contextlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from golden_record import Lab, run_case  # noqa: E402

import fastvid  # noqa: E402

AREAS = ("frames", "plans", "cli", "refusals", "resume", "files")


def main() -> int:
    asked = arguments()
    torch.set_num_threads(1)
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"fastvid {fastvid.__version__} of {Path(fastvid.__file__).parent}", file=sys.stderr)
    with working_folder() as work:
        lab = Lab(asked.models.resolve(), work)
        areas = ("small",) if asked.small else tuple(asked.only or AREAS)
        found = {area: run_area(lab, area) for area in areas}
        write(out, found, lab.frames, "small" if asked.small else "golden")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder")
    models = Path(tempfile.gettempdir()) / "fastvid-golden-models"
    parser.add_argument("--models", type=Path, default=models, help="where the tiny checkpoints are kept")
    parser.add_argument("--only", action="append", choices=AREAS, help="this area alone; may be repeated")
    parser.add_argument("--small", action="store_true", help="the small set that the tests compare with")
    return parser.parse_args()


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A new current folder, and a cache of its own for what fastvid measures."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        (work / "cases").mkdir()
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        os.chdir(work / "cases")
        try:
            yield work / "cases"
        finally:
            os.chdir(before)


def run_area(lab: Lab, area: str) -> dict[str, Any]:
    started = time.perf_counter()
    cases = importlib.import_module(f"golden_{area}").cases()
    found = {name: run_case(lab, f"{area}/{name}", case) for name, case in cases.items()}
    errors = sum("error" in record for record in found.values() if isinstance(record, dict))
    seconds = time.perf_counter() - started
    print(f"{area:<9} {len(found):>4} cases, {errors} of them errors, {seconds:.1f} s", file=sys.stderr)
    return found


def write(out: Path, found: dict[str, Any], frames: dict[str, np.ndarray], name: str) -> None:
    (out / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(out / ("small.npz" if name == "small" else "frames.npz"), **frames)


if __name__ == "__main__":
    sys.exit(main())
