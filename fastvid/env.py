"""All environment variables that fastvid reads at run time (setup.py also reads FASTVID_BUILD_CUDA and
FASTVID_CUDA_ARCHS when it builds). They are defaults; arguments and flags win.

The library never sets a variable. The command line and the processes of ranks, which are fastvid's own, set what OpenMP
reads (`thread_variables`), unless the caller has.

    FASTVID_MODEL      the default model: "embedded", a folder or a hub id
    FASTVID_DEVICE     "cpu", "cuda", "cuda:1"
    FASTVID_DTYPE      "float32", "bfloat16", "float16"
    FASTVID_BACKEND    as in fastvid.ops.dispatch.bind: "auto", "reference", "triton", "cuda", or "to_rgb=cuda"
    FASTVID_ATTENTION  the same for attention, also "sdpa", "cudnn", "flash", "cuda_int8" and others, or "sparse"
    FASTVID_PROMPT_ENDPOINT  endpoint for prompt expansion (fastvid.requests.prompts): "http://localhost:8000/v1"
    FASTVID_PROMPT_MODEL     the language model's name at the endpoint
    FASTVID_PROMPT_KEY       the endpoint's key; never in an error, a report or a recipe
    FASTVID_LOG        the command line's log level, on standard error: "debug", "info", "warning", "error"
    FASTVID_DEBUG      any value: the command line shows tracebacks
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

PREFIX = "FASTVID_"
BUILD_TIME = ("FASTVID_BUILD_CUDA", "FASTVID_CUDA_ARCHS")


@dataclass(frozen=True)
class Settings:
    """The values of the environment variables; None or a default where unset."""

    model: str = "embedded"
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    attention: str = "auto"
    prompt_endpoint: str | None = None
    prompt_model: str | None = None
    prompt_key: str | None = field(default=None, repr=False)
    log: str | None = None
    debug: str | None = None


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings; an empty variable counts as unset."""
    values = {field.name: environ.get(PREFIX + field.name.upper()) for field in fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if value})


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables with fastvid's prefix that nothing reads, most likely misspelled."""
    known = {PREFIX + field.name.upper() for field in fields(Settings)} | set(BUILD_TIME)
    return [name for name in all_set(environ) if name not in known]


def all_set(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All variables with fastvid's prefix, known or not; the values of keys are hidden."""
    variables = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIX)}
    return {name: "(hidden)" if name.endswith("_KEY") and value else value for name, value in variables.items()}


# ---------------------------------------------------------------- threads

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Any of these is the caller's own word on how idle threads wait."""


def thread_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process of fastvid's own sets before torch is imported.

    Idle threads sleep instead of spinning on cores that other processes need. Where the control group allows less time
    than there are cores, there are only as many threads; else torch decides, by physical cores and affinity.
    """
    chosen = {} if any(environ.get(name) for name in WAITING) else {"OMP_WAIT_POLICY": "PASSIVE"}
    cores = available_cores()
    if cores < _cores_of_affinity() and not environ.get("OMP_NUM_THREADS"):
        chosen["OMP_NUM_THREADS"] = str(cores)
    return chosen


def available_cores() -> int:
    """The cores that this process may use, by affinity and the control group's quota."""
    quota = _cores_of_quota()
    return _cores_of_affinity() if quota is None else max(1, min(_cores_of_affinity(), math.ceil(quota)))


def _cores_of_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_of_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The control group's (container's) limit of CPU time, in cores; None without one."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        else:
            names = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
            quota, period = ((root / name).read_text(encoding="ascii").strip() for name in names)
        return int(quota) / int(period) if quota.isdecimal() and int(period) else None
    except (OSError, ValueError):
        return None
