"""Opens files that somebody else may have made: regular files only, and no more bytes than expected. Knows where
fastvid's own files are kept."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """fastvid's folder in the user's cache."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "fastvid"


def open_regular(path: str | os.PathLike[str], links: bool = True, buffering: int = -1) -> BinaryIO:
    """A regular file, open for reading. A pipe, a device, a socket or a folder is refused without being opened.

    links: whether a symbolic link is followed. buffering: as `open` takes it. Raises OSError.
    """
    # A pipe may take the file's place before it is opened: do not wait for who writes to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check_regular(os.stat(path, follow_symlinks=links), path)
        descriptor = os.open(path, flags if links else flags | getattr(os, "O_NOFOLLOW", 0))
    except ValueError as error:  # a NUL, or half a character
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", ascii(os.fspath(path))) from None
    try:
        _check_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = "a folder, link, pipe, socket or device"
        raise OSError(errno.EINVAL, f"not an ordinary file ({kinds}); give a file", os.fspath(path))


def read_bytes(path: str | os.PathLike[str], limit: int, links: bool = True) -> bytes:
    """What a regular file holds. One of more than `limit` bytes is refused before it is read. Raises OSError."""
    with open_regular(path, links) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            data = file.read(limit + 1)
            size = len(data)
    if size > limit:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {limit:,} are read", os.fspath(path))
    return data


def copy_files(source: Path, to: Path, limit: int) -> None:
    """Copy the files of a folder, with its folders. Raises OSError for a file that `read_bytes` refuses."""
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if not path.is_dir():
            target = to / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(path, limit))


def reason(error: Exception, named: bool = False) -> str:
    """Why a file could not be read or written, in a few words. named: with the file's name, if the error has it."""
    text = str(getattr(error, "strerror", None) or error or type(error).__name__)[:300]
    name = getattr(error, "filename", None) if named else None
    return f"{text} ({name})" if name else text


def links_out(folder: Path, files: Iterable[Path]) -> dict[Path, Path]:
    """The files that links lead out of their folder, with the real place of each.

    Their folder is `folder`, or for a file outside of it the one that the file is named in. A snapshot of the Hugging
    Face cache and the rest of its repository, where its links lead, count as one folder.
    """
    found = {}
    for file in files:
        home = _home(folder if file.is_relative_to(folder) and folder.is_dir() else file.parent)
        real = os.path.realpath(file)
        if os.path.commonpath((home, real)) != home:
            found[file] = Path(real)
    return found


def _home(folder: Path) -> str:
    real = Path(os.path.realpath(folder))
    snapshots = next((path for path in (real, *real.parents) if path.name == "snapshots"), None)
    return str(snapshots.parent if snapshots and (snapshots.parent / "blobs").is_dir() else real)
