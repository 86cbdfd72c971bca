"""`fastvid doctor`: reports this machine's hardware and software, and the back end of every operation on it.

`doctor()` returns the report as JSON types, `render()` as text. No errors are raised: a section that fails holds the
reason under "error".
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvid import env
from fastvid.device.devices import AUTO, architecture, choose_dtype, cpu_name, driver, driver_too_old, on_rocm
from fastvid.version import __version__

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "ftfy", "huggingface_hub", "av", "tqdm")
ENCODERS = {"mp4": "libx264", "webm": "libvpx-vp9", "gif": "gif", "png": "png"}
GIB = 2**30


def doctor(device: str | None = None) -> dict[str, Any]:
    """The report. device: the device to bind the operations for; default: the first GPU, else the CPU."""
    sections: dict[str, Callable[[], Any]] = {
        "fastvid": lambda: {"version": __version__, "folder": str(Path(__file__).parents[1])},
        "python": lambda: {"version": platform.python_version(), "executable": sys.executable},
        "host": _host,
        "threads": _threads,
        "disk": _disk,
        "packages": lambda: {name: _version(name) for name in PACKAGES},
        "cuda": _cuda,
        "extension": _extension,
        "encoders": _encoders,
        "ops": lambda: _ops(device),
        "environment": lambda: {"set": env.all_set(), "unknown": env.unknown()},
    }
    return {name: _guarded(look) for name, look in sections.items()}


def render(report: dict[str, Any]) -> str:
    """The report as text: one line per fact."""
    lines = []
    for section, facts in report.items():
        lines.append(section)
        width = max(22, *map(len, facts))
        lines += [f"  {name:<{width}} {_text(value)}" for name, value in facts.items()]
    return "\n".join(lines)


def _guarded(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Exception as error:  # reporting broken parts of the machine is the purpose
        return {"error": f"{type(error).__name__}: {error}"}


def _host() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(min(pages, _memory_limit() or pages) / GIB, 1),
    }


def _threads() -> dict[str, Any]:
    import torch

    said = ", ".join(f"{name}={os.environ[name]}" for name in env.WAITING if os.environ.get(name))
    return {
        "available_cores": env.available_cores(),
        "torch": torch.get_num_threads(),
        "idle_threads": said or "spin on their cores",
        "in_your_program": "set OMP_WAIT_POLICY=PASSIVE before torch is imported, if others need its cores",
    }


def _memory_limit() -> int | None:
    """The control group's (container's) memory limit in bytes; None without a limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return int(text) if text.isdigit() else None


def _disk() -> dict[str, Any]:
    folders = {"here": os.getcwd(), "temporary": tempfile.gettempdir(), "home": os.path.expanduser("~")}
    return {f"{name}_free_gib": round(shutil.disk_usage(folder).free / GIB, 1) for name, folder in folders.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count()
    gpus = [(torch.cuda.get_device_properties(i), architecture(torch.device("cuda", i))) for i in range(count)]
    return {
        "driver": driver(),
        "torch_built_for": f"ROCm {torch.version.hip}" if on_rocm() else torch.version.cuda,
        **_too_old(torch.version.cuda, "torch"),
        "gpus": [f"{gpu.name}, {arch}, {gpu.total_memory / GIB:.0f} GiB" for gpu, arch in gpus],
        "nvcc": _nvcc(),
    }


def _too_old(cuda: str | None, user: str) -> dict[str, str]:
    """A line if the driver cannot run it, else none."""
    why = driver_too_old(cuda, user)
    return {"driver_too_old": why} if why else {}


def _nvcc() -> str | None:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        return None
    out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    match = re.search(r"release ([\d.]+)", out)
    return f"{match.group(1) if match else 'unknown version'}, {path}"


def _extension() -> dict[str, Any]:
    from fastvid.ops import dispatch

    module = dispatch.extension()
    if isinstance(module, str):
        return {"built": False, "why": f"{module}; without it fastvid is pure Python and Triton"}
    facts = {"built": True, "archs": module.ARCHS, "cuda": module.CUDA_VERSION, "file": module.__file__}
    return {**facts, **_too_old(module.CUDA_VERSION, "fastvid._C")}


def _encoders() -> dict[str, Any]:
    import av

    have = {suffix: codec if codec in av.codecs_available else None for suffix, codec in ENCODERS.items()}
    return {**have, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}


def _ops(device: str | None) -> dict[str, Any]:
    import torch

    from fastvid.models.loaded import LoadOptions
    from fastvid.ops.dispatch import bind

    settings = env.read()
    where = device or settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = bind(settings.backend, LoadOptions(attention=settings.attention).attention_backend, where)
    dtype, why = choose_dtype(AUTO, torch.device(where))
    said = {"device": where, "dtype_auto": f"{str(dtype).removeprefix('torch.')} ({why.removeprefix('auto: ')})"}
    return {**said, **{op: _op(ops, op) for op in ops.bound}}


def _op(ops: Any, op: str) -> dict[str, Any]:
    """What runs for an operation and why; for each measured shape class also how fast, and what is next best."""
    said: dict[str, Any] = {"backend": ops.bound[op], "reason": ops.reasons[op]}
    if op in ops.choices:
        said["choices"] = [choice.to_dict() for choice in ops.choices[op]]
    return said


def _text(value: Any) -> str:
    if isinstance(value, dict):
        if {"backend", "reason"} <= set(value):
            lines = [f"{value['backend']:<10} {value['reason']}", *map(_choice, value.get("choices", ()))]
            return "\n      ".join(lines)
        return ", ".join(f"{name}={item}" for name, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _choice(choice: dict[str, Any]) -> str:
    """ "bfloat16 dense self 2^14x2^14 heads 2^3 d128: cuda 810 us, next is cudnn with 905 us (1.12 x)"."""
    said = f"{choice['dtype']} {choice['shape_class']}: {choice['backend']} {_time(choice['median_us'])}"
    if not choice["next_us"]:
        return said
    gain = choice["next_us"] / choice["median_us"]
    return f"{said}, next is {choice['next_best']} with {_time(choice['next_us'])} ({gain:.2f} x)"


def _time(us: float) -> str:
    return f"{us:,.0f} us" if us >= 1000 else f"{us:.3g} us"
