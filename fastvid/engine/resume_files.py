"""The files of a checkpoint: each is written under another name, brought to the disk and then given its own, so that
at any moment what has a name is whole. Names of tensor files hold a digest of their bytes, JSON files one of the rest
of them: what was damaged is found out. Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvid.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = 16  # hex digits in a name
PARTIAL = ".partial"
FORMAT = 1  # of the whole folder


def folder_of(path: Any) -> Path:
    """The folder that a path names, links followed. Raises InvalidRequest for what is no path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise InvalidRequest(f"checkpoint={path!r:.60}: give the name of a folder, such as job.ckpt")
    return Path(os.path.realpath(path))


def free_place(path: Any) -> Path:
    """Where a new checkpoint can be: a new or an empty folder. Raises InvalidRequest."""
    folder = folder_of(path)
    if (folder / "request.json").exists():
        raise InvalidRequest(f"checkpoint: {path} holds one already; resume it (fastvid resume {path}), or remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidRequest(f"checkpoint: {path} is there already and is no empty folder; give a new name")
    if not folder.parent.is_dir():
        raise InvalidRequest(f"checkpoint: there is no folder {folder.parent}; make it first")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise InvalidRequest(f"checkpoint: {folder.parent} is read-only; give a place that can be written to")
    return folder


def get_about(path: Any) -> dict[str, Any]:
    """What a checkpoint is of: its request.json. Raises CheckpointError."""
    folder = folder_of(path)
    try:
        about = get_json(folder, "request.json")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} holds no checkpoint: there is no request.json in it") from None
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {about.get('format')!r:.20}; this version of fastvid reads {FORMAT}"
        )
    return about


def put_json(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    """An object, with the digest of all else in it. Everything that was put before is on the disk before it is, and it
    is when this returns."""
    with _errors(folder):
        sync(folder)
        _put(folder / name, json.dumps({**value, "sha256": _digest_of(value)}, separators=(",", ":")).encode())
        sync(folder)


def get_json(folder: Path, name: str) -> dict[str, Any]:
    """An object that `put_json` wrote. Raises CheckpointError if it is damaged, FileNotFoundError if it isn't there."""
    path = folder / name
    try:
        value = json.loads(path.read_bytes())
        if value.pop("sha256") == _digest_of(value):
            return value
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise damaged(path)


def put_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file of these; returns its name, stem-digest.safetensors. A tensor may be anywhere."""
    import safetensors.torch
    import torch

    how = {"copy": True, "memory_format": torch.contiguous_format}  # of tensors that share memory none is written
    copies = {key: one.detach().to("cpu", **how) for key, one in tensors.items()}
    data = safetensors.torch.save(copies)
    name = f"{stem}-{hashlib.sha256(data).hexdigest()[:DIGEST]}.safetensors"
    with _errors(folder):
        _put(folder / name, data)
    return name


def get_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Raises CheckpointError if it is missing or damaged."""
    import safetensors.torch  # torch is not loaded to say that there is no checkpoint

    path = folder / name
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:DIGEST] == path.stem[-DIGEST:]:
            return safetensors.torch.load(data)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing from this checkpoint; start the request anew") from None
    except (OSError, safetensors.SafetensorError):
        pass
    raise damaged(path)


def damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: it does not hold what was written there; remove {path.parent} and start the request anew"
    )


def remove(folder: Path) -> None:
    """All of a checkpoint; it has no name any more before its first file goes."""
    gone = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    with _errors(folder):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


class Lock:
    """Held by one request at a time; the system lets go of it when its process ends, however it does."""

    def __init__(self, folder: Path) -> None:
        with _errors(folder):
            self._file = (folder / "lock").open("ab")
        try:
            _lock(self._file.fileno())
        except OSError:
            self._file.close()
            raise CheckpointError(f"{folder} is the checkpoint of a request that is running; wait, or end it") from None

    def release(self) -> None:
        self._file.close()


def _lock(number: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has other locks, and lets nobody remove a folder with an open file
        return
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _put(path: Path, data: bytes) -> None:
    stage = path.with_name(path.name + PARTIAL)
    with stage.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(stage, path)


def sync(folder: Path) -> None:
    """A name is on the disk when its folder is. Where folders can't be opened (Windows) they need not be."""
    with contextlib.suppress(PermissionError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _digest_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written: {error.strerror or error}; what was saved before is whole"
        ) from error
