"""Opens files that somebody else may have made: regular files only, and no more bytes than expected."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path, links: bool = True) -> BinaryIO:
    """A regular file, open for reading. A named pipe, a device or a folder is refused, without waiting for a writer.

    links: whether a symbolic link is followed. Raises OSError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags if links else flags | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int, links: bool = True) -> bytes:
    """What a regular file holds. One of more than `limit` bytes is refused before it is read. Raises OSError."""
    with open_regular(path, links) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            data = file.read(limit + 1)
            size = len(data)
    if size > limit:
        raise OSError(f"{path} has {size:,} bytes; at most {limit:,} are read")
    return data
