"""Maps weights from their files instead of copying them: a parameter is then a view of the page cache.

A mapping is private: what is written to such a parameter never gets into the file. It shows the file as it is, not as
it was. A file that is replaced (renamed over, as downloads and git do) stays as it was for who has it mapped; one that
is written into changes under the model, and one that is cut short ends the process with SIGBUS when the missing part is
used. So `check_unchanged` looks at the files before every request, and files on network drives, where others write and
connections break, are read (`why_not`).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import sys
import weakref
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastvid.errors import CheckpointError

# File systems whose files only this machine writes, by their names in /proc/self/mountinfo.
LOCAL = frozenset(
    "ext2 ext3 ext4 xfs btrfs f2fs zfs bcachefs tmpfs ramfs overlay squashfs erofs".split()  # noqa: SIM905
)
SMALLEST = 2**26  # bytes; a smaller file is read as fast as it is mapped, and may then change
AHEAD = 2**25  # bytes that are asked for before they are looked at
MOUNTS = Path("/proc/self/mountinfo")


class MappedFile(mmap.mmap):
    """A file's bytes, in private memory. It lives as long as a tensor of it. taken: bytes of its tensors."""

    path: Path
    taken: int
    _descriptor: int
    _state: tuple[int, ...]

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor | None:
        """A tensor in the file, without a copy; None if it does not lie at a multiple of its type's size. Raises
        CheckpointError if the file is too short."""
        count = math.prod(shape)
        if count == 0 or offset % dtype.itemsize:
            return None
        if offset + count * dtype.itemsize > len(self):
            raise CheckpointError(f"{self.path} ended while it was read; download it again")
        self.taken += count * dtype.itemsize
        return torch.frombuffer(self, dtype=dtype, count=count, offset=offset).view(*shape)

    def fetch(self, begin: int, size: int) -> None:
        """Has the bytes that come some time after these be read from the disk, while these are looked at."""
        place = begin + AHEAD
        if not hasattr(os, "RWF_NOWAIT") or place >= len(self):
            return
        try:  # costs a hundredth of advice on pages that are in memory already
            os.preadv(self._descriptor, [bytearray(1)], place + size - 1, os.RWF_NOWAIT)
        except OSError:  # not in memory, or a file system that cannot say so
            os.posix_fadvise(self._descriptor, place, size, os.POSIX_FADV_WILLNEED)

    def is_changed(self) -> bool:
        return self._state != _state(self._descriptor)


_OPEN: weakref.WeakSet[MappedFile] = weakref.WeakSet()


def map_file(file: BinaryIO, path: Path) -> MappedFile:
    """Maps an open file. Raises OSError."""
    mapped = MappedFile(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.path, mapped.taken, mapped._descriptor = path, 0, os.dup(file.fileno())
    weakref.finalize(mapped, os.close, mapped._descriptor)
    mapped._state = _state(mapped._descriptor)
    _OPEN.add(mapped)
    return mapped


def files_to_map(files: Iterable[Path], asked: str | bool, device: torch.device) -> frozenset[Path]:
    """Those of a model's files whose weights are used where they lie. asked: `mmap=` of `fastvid.load`."""
    if asked is False or device.type != "cpu":
        return frozenset()
    return frozenset(path for path in files if asked is True or not why_not(path))


def why_not(path: Path) -> str | None:
    """Why a file is read and not mapped where nobody has said what to do; None if it is mapped."""
    if sys.platform != "linux":
        return f"on {sys.platform} it is not known whether other machines write to a file"
    try:
        if path.stat().st_size < SMALLEST:
            return f"it has less than {SMALLEST >> 20} MiB"
    except OSError:
        return "it cannot be looked at"  # what opens it says why
    kind = _kind_of_mount(path)
    return None if kind in LOCAL else f"other machines may write to a file system of kind {kind}"


def bytes_mapped(files: Collection[Path]) -> int:
    """Bytes of weights that lie in these files, mapped, which the system counts as memory that it can free."""
    taken: dict[Path, int] = {}
    for one in _opened(files):
        taken[one.path] = max(one.taken, taken.get(one.path, 0))
    return sum(taken.values())


def check_unchanged(files: Collection[Path]) -> None:
    """Raises CheckpointError if one of these files was written into since weights were mapped from it."""
    for one in _opened(files):
        if one.is_changed():
            raise CheckpointError(
                f"{one.path} was written into while a pipeline used weights in it; load the model again. Replace a "
                "file in use by renaming another one to its name, or load with mmap=False"
            )


def _opened(files: Collection[Path]) -> list[MappedFile]:
    return [one for one in tuple(_OPEN) if one.path in files]


def _state(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _kind_of_mount(path: Path) -> str:
    """The kind of file system that a file is on, such as "ext4" or "nfs4"."""
    real, best, kind = os.path.realpath(path), "", "unknown"
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return kind
    for line in lines:
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), left.split()[4])
        if len(point) >= len(best) and os.path.commonpath((point, real)) == point:
            best, kind = point, right.split()[0]
    return kind
