"""Which device and precision a model runs on, and how much memory is free there."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from fastvid.checks import guarded, one_of, refuse

OLDEST_DRIVERS = {12: 525, 13: 580}  # major version of CUDA -> first release of the driver; as in csrc/archs.h


def available_bytes(device: torch.device, mapped: int = 0) -> int:
    """Bytes that can still be allocated on a device. mapped: of weights in files, which Linux counts as free."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return min(max(0, int(line.split()[1]) * 1024 - mapped), _cgroup_free())
    return 1 << 62  # no way to know on this system: refuse nothing


def _cgroup_free() -> int:
    """Bytes left below the container's memory limit, if there is one."""
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return max(0, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else 1 << 62


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = tuple(DTYPES.values())
AUTO = "auto"
SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Other names of dtypes that are in common use."""
DEVICES = "'cpu', 'cuda' or 'cuda:<number>'"


def find_device(device: Any) -> torch.device:
    """Parse `device=`; None: a GPU if there is one. `ops.dispatch.bind` checks that it can be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _parse_device("device", device)


def check_device(name: str, device: Any) -> str:
    """The device's name."""
    return str(_parse_device(name, device))


@guarded(DEVICES)
def _parse_device(name: str, device: Any) -> torch.device:
    if not isinstance(device, str | int | torch.device) or isinstance(device, bool):
        refuse(name, device, DEVICES)
    parsed = torch.device(device)  # raises for what is none
    if parsed.type not in ("cpu", "cuda"):
        refuse(name, str(parsed), DEVICES)
    return parsed


def choose_dtype(dtype: Any, device: torch.device) -> tuple[torch.dtype, str]:
    """(the dtype of transformer and text encoder, why). "auto" on a CPU: bf16 if it multiplies that itself."""
    if dtype is None:
        return (torch.bfloat16 if device.type == "cuda" else torch.float32), f"the default on a {device.type} device"
    if dtype != AUTO:
        return check_dtype("dtype", dtype), "asked for"
    has = _bf16_products(device)
    if has is None:
        return torch.float32, "auto: no products of bfloat16 are built in, so it would be slower"
    return torch.bfloat16, f"auto: products of bfloat16 are built in ({has}); a value keeps 8 of float32's 24 bits"


def _bf16_products(device: torch.device) -> str | None:
    """The unit that multiplies bfloat16 on a device; None if there is none, or if nobody knows."""
    if device.type == "cuda":
        return architecture(device) if not on_rocm() and torch.cuda.get_device_capability(device) >= (8, 0) else None
    words = set(re.findall(r"\b(amx_bf16|avx512_bf16)\b", _read("/proc/cpuinfo")))
    return " and ".join(sorted(words)) or None


def resolve_vae_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """The VAE's dtype; by default bf16 on a GPU, whose matrix units take 16 bits, and fp32, as published, on a CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return check_dtype("vae_dtype", dtype)


@guarded(", ".join(DTYPES))
def check_dtype(name: str, dtype: Any) -> torch.dtype:
    """A dtype by name ("bfloat16", "bf16", "torch.bfloat16") or as torch.dtype."""
    known = str(dtype) if isinstance(dtype, torch.dtype) else dtype
    if isinstance(known, str):
        plain = str.__str__(known).removeprefix("torch.")
        known = SHORT.get(plain, plain)
    return DTYPES[one_of(DTYPES)(name, known)]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def on_rocm() -> bool:
    """Whether torch was built for AMD's GPUs, which it calls "cuda" too, with capabilities of their own: a gfx942 says
    (9, 4)."""
    return torch.version.hip is not None


def architecture(device: torch.device) -> str:
    """ "sm_90" etc. for NVIDIA's GPUs, "gfx942" etc. for AMD's, else the device's type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    if on_rocm():
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def driver() -> str | None:
    """The version of NVIDIA's kernel driver; None without one, or where the system hides it (WSL)."""
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _read("/proc/driver/nvidia/version"))
    return match.group(1) if match else None


def driver_too_old(cuda: str | None, user: str) -> str | None:
    """Why the installed driver cannot run what is built with CUDA `cuda` ("13.0"); None if it can, or if one of the two
    is not known. user: what is built with it, for the message."""
    installed, oldest = driver(), OLDEST_DRIVERS.get(int(cuda.split(".")[0]) if cuda else 0, 0)
    release = int(installed.split(".")[0]) if installed else oldest
    if release >= oldest:
        return None
    older = max((major for major, first in OLDEST_DRIVERS.items() if first <= release), default=None)
    remedy = f", or install {user} for CUDA {older}" if older else ""
    return f"driver {installed} is too old: CUDA {cuda} of {user} needs r{oldest} or later; update the driver{remedy}"
