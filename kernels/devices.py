"""Which of the architectures that kernels are compiled for a device is, and what their tables of configurations say.

A table may lack an architecture: then it takes the entry of the one that it follows, whose instructions it has too. So
what is written for sm_80 is what runs everywhere, with 99 KiB of shared memory and mma.sync, and on AMD's devices with
64 KiB and MFMA. `benchmarks/resources.py` compiles every entry for all that take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

Arch = int | str  # 90 for sm_90; AMD's by name
T = TypeVar("T")

AMD = "gfx942"  # stands for all of AMD's
ARCHITECTURES: tuple[Arch, ...] = (80, 86, 89, 90, 100, 120, AMD)
FOLLOWS: dict[Arch, Arch] = {86: 80, 89: 86, 90: 80, 100: 80, 120: 89, AMD: 80}
# Bytes of shared memory that a block may take. The cards that people have at home (86, 89, 120) have the least.
SHARED: dict[Arch, int] = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, AMD: 65_536}


def architecture(device: torch.device) -> Arch:
    """The architecture whose code and entries fit a device: of its own instructions and, by what it says of itself, no
    more shared memory than it has. 80 for Triton's interpreter."""
    if device.type != "cuda":
        return 80
    if torch.version.hip:
        return AMD
    device_has = torch.cuda.get_device_properties(device)
    number = 10 * device_has.major + device_has.minor
    arch = {9: 90, 10: 100, 11: 100}.get(device_has.major) or max(one for one in (80, 86, 89, 120) if one <= number)
    limit = getattr(device_has, "shared_memory_per_block_optin", SHARED[arch])
    return arch if SHARED[arch] <= limit else 86


def entry(table: Mapping[Any, T], arch: Arch, *more: object) -> T:
    """What a table says for (arch, *more), or for the first of those that arch follows."""
    return table[(_listed(table, arch, *more), *more)]


def takers(table: Mapping[Any, object], arch: Arch, *more: object) -> tuple[Arch, ...]:
    """The architectures that take the entry (arch, *more)."""
    return tuple(one for one in ARCHITECTURES if _listed(table, one, *more) == arch)


def _listed(table: Mapping[Any, object], arch: Arch, *more: object) -> Arch:
    while (arch, *more) not in table:
        arch = FOLLOWS[arch]
    return arch


def options(arch: Arch, wanted: Mapping[str, int]) -> dict[str, int]:
    """Options of a launch; AMD's compiler knows no limit of registers."""
    return {name: value for name, value in wanted.items() if arch != AMD or name != "maxnreg"}
