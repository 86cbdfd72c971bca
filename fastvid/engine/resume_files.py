"""Reads, writes and removes a checkpoint's files.

Each file is written under a temporary name, synced to disk and then renamed, so a file under its final name is
complete. Damage is detected: a tensor file's name holds the digest of its bytes, and a JSON file the digest of its
other entries. Nothing is unpickled.

A folder may come from a stranger, and other files may lie in it. So names are matched before they are used, links are
not followed, sizes are bounded, and only the files of a list that the folder keeps (`fastvid-files`, one name a line,
appended before the file is made) are ever removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.files import open_regular, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = 16  # hex digits of the digest in a file name
PARTIAL = ".partial"
FORMAT = 1  # version of the folder's format
MAX_JSON, MAX_PARTS = 1 << 22, 200_000  # bytes of a JSON file, and values in it
MAX_LIST = 1 << 23  # bytes that are read of a list of files
MAX_HEADER = 1 << 20  # bytes of a tensor file's header
CHUNK = 1 << 20

LIST = "fastvid-files"
TITLE = "The files that fastvid wrote into this folder, and may remove:\n"
FIXED = ("request.json", "head.json", "output.json", "lock")  # rank 0's; the others have a number or a digest
TENSORS = re.compile(
    r"(?:clean-[0-9]{6,12}-[0-9]{1,6}|(?:state|cache|steps)-[0-9]{8,12}(?:-r[0-9]{1,5})?)-[0-9a-f]{16}\.safetensors"
)
OURS = re.compile(rf"(?:{TENSORS.pattern}|rank-[0-9]{{1,5}}-[0-9]{{8,12}}\.json)")
RANK = re.compile(r"(?:cache|steps)-[0-9]+-r([0-9]+)-.*|rank-([0-9]+)-.*")
Shape = tuple[str, tuple[int, ...]]
"""A tensor's dtype, by safetensors' name, and its shape."""
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2}


# ---------------------------------------------------------------- the folder


def folder_of(path: Any) -> Path:
    """The folder at a path, links resolved. Raises InvalidRequest if the value is not a path."""
    try:
        text = os.fspath(path)
        if isinstance(text, str) and text and "\0" not in text:
            os.fsencode(text)
            return Path(os.path.realpath(text))
    except (TypeError, ValueError, OSError):
        pass
    raise InvalidRequest(f"checkpoint={path!r:.60}: give the name of a folder, such as job.ckpt")


def new_folder(path: Any, output: str | os.PathLike[str] | None = None) -> Path:
    """The folder for a new checkpoint; it must not exist, or be empty. output: the video's place, which may not be in
    it. Raises InvalidRequest otherwise."""
    folder = folder_of(path)
    if (folder / "request.json").exists():
        raise InvalidRequest(f"checkpoint: {path} holds one already; resume it (fastvid resume {path}), or remove it")
    if folder.exists() and (not folder.is_dir() or _foreign(folder)):
        raise InvalidRequest(
            f"checkpoint: {path} is there already and is no empty folder; give a new name, such as "
            f"{Path(path) / 'job.ckpt' if folder.is_dir() else f'{path}.ckpt'}"
        )
    if not folder.parent.is_dir():
        raise InvalidRequest(f"checkpoint: there is no folder {folder.parent}; make it first")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise InvalidRequest(f"checkpoint: {folder.parent} is read-only; give a place that can be written to")
    check_outside(folder, output)
    return folder


def check_outside(folder: Path, output: str | os.PathLike[str] | None) -> None:
    """Raises InvalidRequest for an output in a checkpoint's folder, which belongs to the checkpoint alone."""
    if output is None:
        return
    place = Path(os.path.realpath(output))
    if place in folder.parents:
        raise InvalidRequest(
            f"{folder} is in {output}, the folder of the video's frames; give the checkpoint another place"
        )
    if place == folder or folder in place.parents:
        raise InvalidRequest(
            f"{output} is in {folder}, which is the checkpoint's and is removed with it; give the video another place, "
            f"such as {folder.with_name(place.name if place != folder else 'out.mp4')}"
        )


def _foreign(folder: Path) -> set[str]:
    """The names in a folder that are not on its lists."""
    return set(os.listdir(folder)) - owned(folder)


def remove(folder: Path, more: Iterable[str] = ()) -> None:
    """Removes a checkpoint's files, and the folder unless it holds others. more: files of it that no list names.

    A folder without other files is renamed first, so that nobody finds half of one.
    """
    names = owned(folder, more)
    with contextlib.suppress(OSError):  # a place where folders cannot be renamed
        if not set(os.listdir(folder)) - names:
            folder = folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}"))
    for name in sorted(names, key=lambda name: (name.startswith(LIST), name != "request.json")):  # the list last
        discard(folder, name)
    with contextlib.suppress(OSError):
        folder.rmdir()


def discard(folder: Path, name: str) -> None:
    """Removes a file of the checkpoint's; not a link or a folder that is there under its name."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.lstat(folder / name).st_mode):
            os.unlink(folder / name)


# ---------------------------------------------------------------- the list of files


def owned(folder: Path, more: Iterable[str] = ()) -> set[str]:
    """The names in a folder of files that checkpoints have written there: those on its lists, and `more`."""
    with _errors(folder):
        present = set(os.listdir(folder))
    known = {*more}
    for file in present:
        if re.fullmatch(rf"{LIST}(-r[0-9]{{1,5}})?", file) and (names := listed(folder, file)) is not None:
            known |= {file, *names}
    if known:
        known |= {*FIXED}
    return present & (known | {name + PARTIAL for name in known})


def listed(folder: Path, file: str = LIST) -> set[str] | None:
    """The names on one of a folder's lists; None if this is no such list."""
    try:
        with open_regular(folder / file, links=False) as opened:
            title, *lines = opened.read(MAX_LIST).decode("ascii", "ignore").split("\n")
    except OSError:
        return None
    return {line for line in lines if OURS.fullmatch(line)} if title + "\n" == TITLE else None


def start_list(folder: Path) -> None:
    """Begins the list, before any other file is made. Raises CheckpointError if something else has its name."""
    _append(folder, LIST, "")
    if listed(folder) is None:
        raise CheckpointError(f"{folder}: {LIST} in it is not fastvid's; give the checkpoint another folder")


def rank_of(name: str) -> int:
    """The rank that writes the file of this name."""
    match = RANK.fullmatch(name)
    return int(match[1] or match[2]) if match else 0


def _list_of(name: str) -> str:
    """The list that a file is on: each rank has its own."""
    return f"{LIST}-r{rank}" if (rank := rank_of(name)) else LIST


def _append(folder: Path, file: str, line: str) -> None:
    with _errors(folder):
        descriptor = _open(folder / file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, ("" if os.fstat(descriptor).st_size else TITLE).encode() + line.encode())
        finally:
            os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    """The descriptor of a regular file of the checkpoint's, never of what a link points to, without waiting for
    anybody. Raises OSError."""
    more = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    for flag in more:
        flags |= flag
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} in it is not a regular file")
    return descriptor


# ---------------------------------------------------------------- JSON


def put_json(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    """Writes an object with its digest. It is on disk after all files written before it, and before this returns."""
    with _errors(folder):
        sync(folder)
        _put(folder, name, json.dumps({**value, "sha256": _digest_of(value)}, separators=(",", ":")).encode())
        sync(folder)


def get_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads an object that `put_json` wrote. Raises CheckpointError if it is damaged, FileNotFoundError if missing."""
    path = folder / name
    try:
        data = read_bytes(path, MAX_JSON, links=False)
        if sum(map(data.count, (b",", b"[", b"{"))) <= MAX_PARTS:
            value = json.loads(data, parse_constant=_refuse)
            if value.pop("sha256") == _digest_of(value):
                return dict(value)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise damaged(path)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _digest_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- tensors


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
        _put(folder, name, data)
    return name


def get_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Reads a file's tensors to the CPU. Raises CheckpointError if it is missing or damaged."""
    import safetensors.torch  # not at the top: a missing checkpoint is reported without loading torch

    with _reading(folder, name), open_regular(folder / name, links=False) as file:
        data = file.read()
        if hashlib.sha256(data).hexdigest()[:DIGEST] == _digest_in(name):
            return safetensors.torch.load(data)
    raise damaged(folder / name)


def shapes(folder: Path, name: str) -> dict[str, Shape]:
    """The dtype and shape of a file's tensors, from its header, which has to match its size. Raises CheckpointError if
    it is missing or damaged."""
    with _reading(folder, name), open_regular(folder / name, links=False) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length <= MAX_HEADER else {}
        found, end = {}, 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            whole = all(type(side) is int and 0 <= side < 1 << 40 for side in shape)
            start, end = end, end + ITEM_BYTES[dtype] * math.prod(shape) if whole else -1
            if entry["data_offsets"] != [start, end]:
                raise damaged(folder / name)
            found[key] = dtype, shape
        if found and 8 + length + end == size:
            return found
    raise damaged(folder / name)


def check_digest(folder: Path, name: str) -> None:
    """Raises CheckpointError if a tensor file does not hold what was written."""
    digest = hashlib.sha256()
    with _reading(folder, name), open_regular(folder / name, links=False) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    if digest.hexdigest()[:DIGEST] != _digest_in(name):
        raise damaged(folder / name)


def _digest_in(name: str) -> str:
    return Path(name).stem[-DIGEST:]


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    import safetensors

    wrong = (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, safetensors.SafetensorError)
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing from this checkpoint; start the request anew") from None
    except wrong:
        raise damaged(folder / name) from None


def damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: it does not hold what was written there; start the request anew, with another folder"
    )


# ---------------------------------------------------------------- lock and disk


class Lock:
    """A folder's lock: held by one request at a time; the system releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        with _errors(folder):
            self._file = _open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            _lock(self._file)
        except OSError:
            os.close(self._file)
            raise CheckpointError(f"{folder} is the checkpoint of a request that is running; wait, or end it") from None

    def release(self) -> None:
        os.close(self._file)


def _lock(number: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no flock, and an open file already blocks removing the folder
        return
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _put(folder: Path, name: str, data: bytes) -> None:
    """Writes a file. What an ended process left half-written of it is replaced. Raises OSError."""
    partial, file = name + PARTIAL, _list_of(name)
    if os.path.lexists(folder / partial) and (name in FIXED or name in (listed(folder, file) or ())):
        discard(folder, partial)
    if name not in FIXED:
        _append(folder, file, name + "\n")
    descriptor = _open(folder / partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(folder / partial, folder / name)
    except BaseException:
        discard(folder, partial)
        raise


def sync(folder: Path) -> None:
    """Syncs a folder's directory entries to disk; not needed where folders cannot be opened (Windows)."""
    with contextlib.suppress(PermissionError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        at = f" ({Path(error.filename).name})" if isinstance(error.filename, str | os.PathLike) else ""
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written: {reason}{at}; what was saved before is whole"
        ) from error
