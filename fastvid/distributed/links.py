"""The links and devices of a job's ranks, for `fastvid.distributed.cost_model`.

A link is stated by the caller, or detected, or assumed; `Links` records which. When a model is loaded, the ranks agree
on the slowest link that any of them detects, and on rank 0's GPU model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from fastvid.checks import guarded, nearest_name, refuse
from fastvid.distributed.cards import CARDS, Card, card_named, check_card
from fastvid.distributed.cost_model import CORE, H200, INFINIBAND, LINKS, LOOPBACK, NVLINK, PCIE, Device, Link
from fastvid.distributed.layout import agree, first
from fastvid.distributed.mesh import Mesh

AUTO = "auto"
FOUND, SAID, ASSUMED = "found", "as was said", "assumed"
ALLOWED = f"{', '.join((AUTO, *LINKS))}, or two of them: within a host and between hosts, such as 'nvlink,infiniband'"
PER_HOST = 8  # GPUs of an assumed host
log = logging.getLogger("fastvid.plan")


@dataclass(frozen=True)
class Links:
    """near: the link within a host, near_how: how it is known. far: the link between hosts of per_host ranks (None: a
    single host). device: what ranks compute on."""

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


def parse_link(link: Any) -> tuple[Link | None, Link | None]:
    """Parse `link=` of `fastvid.load`: the links within a host and between hosts, None for "auto".

    Raises InvalidRequest.
    """
    if not isinstance(link, str):
        refuse("link", link, ALLOWED, AUTO)
    names = [name.strip().lower() for name in link.split(",")]
    if unknown := [name for name in names if name not in (AUTO, *LINKS)]:
        refuse("link", unknown[0], ALLOWED, nearest_name(unknown[0], (AUTO, *LINKS)))
    if len(names) > 2:
        refuse("link", link, ALLOWED, AUTO)
    links = [LINKS.get(name) for name in names]
    return links[0], links[1] if len(links) == 2 else None


@guarded(ALLOWED)
def check_link(name: str, link: Any) -> str:
    """`link=` if `parse_link` knows it."""
    parse_link(link)
    return str.__str__(link)


def find_links(link: Any, mesh: Mesh, device: torch.device, planned: bool = False) -> Links:
    """The links of a mesh, the same on all its ranks. link: see `parse_link`.

    planned: the ranks do not run. For GPUs this assumes hosts of 8 with NVLink.
    """
    near, far = parse_link(link)
    if mesh.size == 1:
        return Links()
    per_host = mesh.per_host or (PER_HOST if planned and device.type == "cuda" else mesh.size)
    how = SAID
    if near is None:
        detected, how = (LOOPBACK, FOUND) if device.type == "cpu" or mesh.staged else _between(mesh, per_host, planned)
        order, hows = list(LINKS.values()), (FOUND, ASSUMED)
        code = agree(mesh, order.index(detected) * len(hows) + hows.index(how), max)
        near, how = order[code // len(hows)], hows[code % len(hows)]
    slower = min(near, INFINIBAND, key=lambda link: link.bandwidth)
    far_how = SAID if far else ASSUMED
    hosts = per_host if per_host < mesh.size else None
    return Links(near, how, far or slower, far_how, hosts, _device(mesh, device))


def _between(mesh: Mesh, per_host: int, planned: bool) -> tuple[Link, str]:
    """The link that this rank detects between the GPUs of its host, and whether it is found or assumed."""
    count = min(per_host, mesh.size)
    if torch.cuda.device_count() < count:  # on other machines, or hidden from this process
        return (NVLINK if planned else PCIE), ASSUMED
    joined = nvlinked([str(torch.cuda.get_device_properties(i).uuid) for i in range(count)])
    if joined is not None:
        return (NVLINK if joined else PCIE), FOUND
    # Peer access always works over NVLink, but may also work over PCI Express. Only its absence proves anything.
    accessible = all(torch.cuda.can_device_access_peer(a, b) for a, b in combinations(range(count), 2))
    return PCIE, ASSUMED if accessible else FOUND


def nvlinked(uuids: Sequence[str]) -> bool | None:
    """Whether NVLink connects all of these GPUs, according to NVML; None if NVML can't be queried."""
    try:
        import pynvml
    except ImportError:
        log.info("links between GPUs are assumed: detecting them requires the package nvidia-ml-py (fastvid[nvml])")
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("links between GPUs are assumed: NVML does not start (%s)", error)
        return None
    try:
        gpus = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}") for uuid in uuids]
        kind, joined = pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK
        return all(pynvml.nvmlDeviceGetP2PStatus(a, b, kind) == joined for a, b in combinations(gpus, 2))
    except pynvml.NVMLError as error:
        log.info("links between GPUs are assumed: NVML failed (%s)", error)
        return None
    finally:
        pynvml.nvmlShutdown()


def _device(mesh: Mesh, device: torch.device) -> Device:
    """The device of all ranks: rank 0's card, or an H200 if that is unknown."""
    if device.type != "cuda":
        return CORE
    card = card_named(torch.cuda.get_device_name(device)) if torch.cuda.is_available() else None
    return card_of(agree(mesh, CARDS.index(card) if card else -1, first))


def card_of(index: int) -> Device:
    """The device of CARDS at an index; -1: an assumed H200."""
    if index < 0:
        return Device(f"an {H200.name} ({ASSUMED})", H200.linear, H200.attention, H200.memory, H200.launch)
    return device_of(CARDS[index])


def device_of(card: Card) -> Device:
    """What a card is assumed to reach: the same share of what is published as an H200."""
    whole = check_card("card", H200.name)
    share, moved = card.bf16 / whole.bf16, card.bandwidth / whole.bandwidth
    return Device(card.name, H200.linear * share, H200.attention * share, H200.memory * moved, H200.launch)
