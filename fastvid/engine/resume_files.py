"""The files of a checkpoint. Each is written under another name, synced to the disk and then renamed, so a file with its
own name is always complete. The names of tensor files hold a digest of their bytes, JSON files hold one of the rest:
damage is detected. Nothing here unpickles.
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
    """The folder that a path names, links resolved. Raises InvalidRequest for what is no path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise InvalidRequest(f"checkpoint={path!r:.60}: give the name of a folder, such as job.ckpt")
    return Path(os.path.realpath(path))


def new_folder(path: Any) -> Path:
    """The folder of a new checkpoint, which must not exist or be empty. Raises InvalidRequest."""
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
    """A checkpoint's request.json: what it is of. Raises CheckpointError."""
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
    """Writes an object with its digest. It gets to the disk after all that was put before, and before this returns."""
    with _errors(folder):
        sync(folder)
        _put(folder / name, json.dumps({**value, "sha256": _digest_of(value)}, separators=(",", ":")).encode())
        sync(folder)


def get_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads what `put_json` wrote. Raises CheckpointError if it is damaged, FileNotFoundError if it isn't there."""
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
    """Writes a safetensors file; returns its name, stem-digest.safetensors. Tensors may be on any device."""
    import safetensors.torch
    import torch

    # Copies: safetensors writes no tensors that share memory.
    layout = torch.contiguous_format
    copies = {key: one.detach().to("cpu", copy=True, memory_format=layout) for key, one in tensors.items()}
    data = safetensors.torch.save(copies)
    name = f"{stem}-{hashlib.sha256(data).hexdigest()[:DIGEST]}.safetensors"
    with _errors(folder):
        _put(folder / name, data)
    return name


def get_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Reads a file's tensors to the CPU. Raises CheckpointError if it is missing or damaged."""
    import safetensors.torch  # here, so that "there is no checkpoint" is said without loading torch

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
    """Removes a checkpoint; renamed first, so that no half of one is found."""
    gone = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    with _errors(folder):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


class Lock:
    """A folder's lock: held by one request at a time, and released by the system when its process ends."""

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
    """Brings a folder's names to the disk; not needed where folders can't be opened (Windows)."""
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
