"""What joins the ranks of a job and what they compute on, for `fastvid.distributed.cost_model` to predict with: found
out where that can be, or as the program says, or assumed, and which of these it was.

Ranks agree on it when a model is loaded: the slowest link that one of them finds counts for all, and rank 0's card.
"""

from __future__ import annotations

import ctypes
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from fastvid.distributed.cost_model import CORE, H200, INFINIBAND, LINKS, LOOPBACK, NVLINK, PCIE, Device, Link
from fastvid.distributed.layout import agree, first
from fastvid.distributed.mesh import Mesh
from fastvid.errors import InvalidRequest

AUTO = "auto"
FOUND, SAID, ASSUMED = "found", "as was said", "assumed"
ALLOWED = f"{', '.join((AUTO, *LINKS))}, or two of them: within a host and between hosts, such as 'nvlink,infiniband'"
PER_HOST = 8  # GPUs, of hosts that are not here

# Dense bf16 operations and bytes a second, as NVIDIA's data sheets state them. The share that is reached is assumed to
# be that of an H200 (`scaling.H200`). The first whose name is part of a card's counts.
CARDS = {
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "RTX 5090": (209e12, 1.79e12),
    "RTX 4090": (165e12, 1.01e12),
}
NVML, NVML_NVLINK = "libnvidia-ml.so.1", 2  # the driver's; NVML_P2P_CAPS_INDEX_NVLINK of nvml.h


@dataclass(frozen=True)
class Links:
    """near: between ranks of a host, and how that is known; far: between hosts of per_host ranks (None: all ranks are
    on one). device: what ranks compute on."""

    near: Link = LOOPBACK
    near_how: str = FOUND
    far: Link = LOOPBACK
    far_how: str = ASSUMED
    per_host: int | None = None
    device: Device = CORE

    def __str__(self) -> str:
        near = f"{self.near.name} ({self.near_how})"
        between = f" on hosts of {self.per_host}, {self.far.name} ({self.far_how}) between them"
        return near + (between if self.per_host else "")


def parse(said: Any) -> tuple[Link | None, Link | None]:
    """`link=` as `fastvid.load` takes it: the links within a host and between hosts, None where nothing is said. Raises
    InvalidRequest."""
    names = [name.strip().lower() for name in said.split(",")] if isinstance(said, str) else []
    if wrong := [name for name in names if name not in (AUTO, *LINKS)]:
        near = difflib.get_close_matches(wrong[0], (AUTO, *LINKS), 1, 0)[0]
        raise InvalidRequest(f"link: {wrong[0]!r:.40} is not known; allowed is {ALLOWED}; the nearest is {near}")
    if not 1 <= len(names) <= 2:
        raise InvalidRequest(f"link={said!r:.40}: allowed is {ALLOWED}; the nearest is {AUTO}")
    found = [LINKS.get(name) for name in names]
    return found[0], found[1] if len(found) == 2 else None


def find(said: Any, mesh: Mesh, device: torch.device, planned: bool = False) -> Links:
    """The links of a mesh, the same on all of its ranks. said: see `parse`. planned: for ranks that are not running;
    those of a GPU that is not here are assumed to be on hosts of 8 with NVLink."""
    near, far = parse(said)
    if mesh.size == 1:
        return Links()
    per_host = mesh.per_host or (PER_HOST if planned and device.type == "cuda" else mesh.size)
    how = SAID
    if near is None:
        found, how = (LOOPBACK, FOUND) if device.type == "cpu" or mesh.staged else _between(mesh, per_host, planned)
        order, hows = list(LINKS.values()), (FOUND, ASSUMED)
        code = agree(mesh, order.index(found) * len(hows) + hows.index(how), max)
        near, how = order[code // len(hows)], hows[code % len(hows)]
    slower = min(near, INFINIBAND, key=lambda link: link.bandwidth)
    far_how = SAID if far else ASSUMED
    hosts = per_host if per_host < mesh.size else None
    return Links(near, how, far or slower, far_how, hosts, _device(mesh, device))


def _between(mesh: Mesh, per_host: int, planned: bool) -> tuple[Link, str]:
    """What this rank sees between the GPUs of its host."""
    count = min(per_host, mesh.size)
    if torch.cuda.device_count() < count:  # they are not here, or are hidden from this process
        return (NVLINK if planned else PCIE), ASSUMED
    joined = nvlinked([str(torch.cuda.get_device_properties(i).uuid) for i in range(count)])
    if joined is not None:
        return (NVLINK if joined else PCIE), FOUND
    # NVLink always lets one GPU into the other's memory; that PCI Express may do so too leaves it open otherwise.
    open_ = all(torch.cuda.can_device_access_peer(a, b) for a, b in combinations(range(count), 2))
    return PCIE, ASSUMED if open_ else FOUND


def nvlinked(uuids: Sequence[str]) -> bool | None:
    """Whether all of these GPUs reach each other by NVLink, by the driver's NVML; None if that cannot be asked."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        handles = [ctypes.c_void_p() for _ in uuids]
        for uuid, handle in zip(uuids, handles, strict=True):
            if nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(handle)):
                return None
        for a, b in combinations(handles, 2):
            status = ctypes.c_int(-1)
            if nvml.nvmlDeviceGetP2PStatus(a, b, NVML_NVLINK, ctypes.byref(status)):
                return None
            if status.value:  # 0: NVML_P2P_STATUS_OK
                return False
        return True
    finally:
        nvml.nvmlShutdown()


def _device(mesh: Mesh, device: torch.device) -> Device:
    """What ranks compute on: rank 0's card, an H200 where it is not here or not known."""
    if device.type != "cuda":
        return CORE
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    known = next((i for i, card in enumerate(CARDS) if card in name), -1)
    return card_of(agree(mesh, known, first))


def card_of(index: int) -> Device:
    """The device that CARDS has at an index; -1: an H200, assumed."""
    if index < 0:
        return Device(f"an {H200.name} ({ASSUMED})", H200.linear, H200.attention, H200.memory, H200.launch)
    name, (operations, memory) = list(CARDS.items())[index]
    share, moved = operations / CARDS["H200"][0], memory / CARDS["H200"][1]
    return Device(name, H200.linear * share, H200.attention * share, H200.memory * moved, H200.launch)
