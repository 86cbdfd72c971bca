"""Reads and writes a checkpoint's files. Each file is written under a temporary name, synced to disk and then
renamed, so a file under its final name is complete. Damage is detected: a tensor file's name holds the digest of its
bytes, and a JSON file the digest of its other entries. Nothing is unpickled.
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

DIGEST = 16  # hex digits of the digest in a file name
PARTIAL = ".partial"
FORMAT = 1  # version of the folder's format


def folder_of(path: Any) -> Path:
    """The folder at a path, links resolved. Raises InvalidRequest if the value is not a path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise InvalidRequest(f"checkpoint={path!r:.60}: give the name of a folder, such as job.ckpt")
    return Path(os.path.realpath(path))


def new_folder(path: Any) -> Path:
    """The folder for a new checkpoint; it must not exist, or be empty. Raises InvalidRequest otherwise."""
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
    """A checkpoint's request.json. Raises CheckpointError if there is none, or for another format."""
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
    """Writes an object with its digest. It is on disk after all files written before it, and before this returns."""
    with _errors(folder):
        sync(folder)
        _put(folder / name, json.dumps({**value, "sha256": _digest_of(value)}, separators=(",", ":")).encode())
        sync(folder)


def get_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads an object that `put_json` wrote. Raises CheckpointError if it is damaged, FileNotFoundError if missing."""
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

    # Copies, because safetensors rejects tensors that share memory.
    layout = torch.contiguous_format
    copies = {key: tensor.detach().to("cpu", copy=True, memory_format=layout) for key, tensor in tensors.items()}
    data = safetensors.torch.save(copies)
    name = f"{stem}-{hashlib.sha256(data).hexdigest()[:DIGEST]}.safetensors"
    with _errors(folder):
        _put(folder / name, data)
    return name


def get_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Reads a file's tensors to the CPU. Raises CheckpointError if it is missing or damaged."""
    import safetensors.torch  # not at the top: a missing checkpoint is reported without loading torch

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
    """Removes a checkpoint. It is renamed first, so that nobody finds half of one."""
    renamed = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    with _errors(folder):
        folder.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


class Lock:
    """A folder's lock: held by one request at a time; the system releases it when the process ends."""

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
    except ImportError:  # Windows: no flock, and an open file already blocks removing the folder
        return
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _put(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(folder: Path) -> None:
    """Syncs a folder's directory entries to disk; not needed where folders cannot be opened (Windows)."""
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
