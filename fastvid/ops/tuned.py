"""The user's table: which back end `fastvid tune` has found right and fastest, on this machine.

The table is a file in the user's cache folder, one for each device. Its key names the device, its driver, torch and
Triton, and on a CPU the number of threads; a table with another key counts as empty. A row names the source of its
kernel too, which whoever takes the row compares (`sources.source_hash`); `write` drops rows of other sources.

`auto` runs what the table says, so nobody else may be able to write it: folder and file belong to this user, nobody
else can write to them, and links are not followed. A table that breaks this, or that is damaged, is refused. Writers
take turns, and a file is written under another name and then renamed, so that readers see it whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastvid import notices
from fastvid.device.devices import architecture, cpu_name, driver
from fastvid.errors import Error
from fastvid.files import cache_folder, open_regular, reason
from fastvid.ops.sources import file_of, source_hash

VERSION = 1  # of the format
MAX_BYTES, MAX_ROWS, MAX_TEXT = 1 << 22, 4000, 400
TEXTS = ("op", "dtype", "shape_class", "backend", "machine", "file", "source")
REJECTED = ("op", "dtype", "shape_class", "backend", "source", "why")
Row = dict[str, Any]
"""op, dtype, shape_class; backend, the fastest that is right; machine ("sm_90", or a CPU's name); file and source of
its kernel; median_us of a call; next, the next best back end, and next_us (both None if no other was right); times_us,
the median of every back end that was right. `read` adds result, the table's path."""


class TableRefused(Error):
    """The table cannot be trusted or read; the message names the file and says what to do."""


def key(device: torch.device) -> dict[str, Any]:
    """What a table depends on; with another key it is not used."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "driver": (driver() or _cuda_of_driver()) if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def machine(device: torch.device) -> str:
    """The machine of a row: "sm_90" or "gfx942" for a GPU, else the CPU's name."""
    return cpu_name() if device.type == "cpu" else architecture(device)


def folder() -> Path:
    """The folder of the tables."""
    return cache_folder() / "tune"


def path_of(device: torch.device) -> Path:
    """The file of a device's table. A CPU has one for each number of threads."""
    known = key(device)
    name = known["device"] + (f" {known['threads']} threads" if known["threads"] else "")
    return folder() / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:100]}.json"


# ---------------------------------------------------------------- reading


def read(device: torch.device) -> dict[str, Any]:
    """`load`; where the table is refused, warns and returns an empty one."""
    try:
        return load(device)
    except TableRefused as error:
        notices.warn(f"{error}; until then auto goes without it")
        return _empty(device)


def load(device: torch.device) -> dict[str, Any]:
    """{"key", "rows", "rejected"} of a device's table, both lists empty if there is none. Raises TableRefused.

    rejected: what was not right or could not run: op, dtype, shape_class, backend, source, why.
    """
    path, none = path_of(device), _empty(device)
    if not os.path.lexists(path):
        return none
    content = content_of(path)
    if content["key"] != none["key"]:
        return none
    rows = [row | {"result": str(path)} for row in content["rows"]]
    return {"key": content["key"], "rows": rows, "rejected": content["rejected"]}


def _empty(device: torch.device) -> dict[str, Any]:
    return {"key": key(device), "rows": [], "rejected": []}


def content_of(path: Path) -> dict[str, Any]:
    """What a table's file holds, whatever its key. Raises TableRefused."""
    check_folder(path.parent)
    try:
        with open_regular(path, links=False) as file:
            check_status(path, os.fstat(file.fileno()))
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TableRefused(f"{path} cannot be read ({reason(error)}); remove it (fastvid tune --clear)") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        content = json.loads(data, parse_constant=_no_constant)
        check_content(content)
    except (ValueError, RecursionError) as error:
        raise TableRefused(f"{path} is damaged ({error!s:.200}); remove it (fastvid tune --clear)") from None
    return content


def check_folder(path: Path) -> None:
    """Raises TableRefused unless the folder is this user's, and nobody else can write to it."""
    for place, others in ((path.parent, stat.S_IWOTH), (path, stat.S_IWOTH | stat.S_IWGRP)):
        try:
            status = os.lstat(place)
        except OSError as error:
            raise TableRefused(f"{place} cannot be read ({reason(error)}); look at its permissions") from None
        if not stat.S_ISDIR(status.st_mode):
            raise TableRefused(f"{place} is not a folder but a link or a file; remove it")
        check_status(place, status, others, f"take that away (chmod go-w {place})")


def check_status(
    path: Path,
    status: os.stat_result,
    others: int = stat.S_IWOTH | stat.S_IWGRP,
    remedy: str = "remove it (fastvid tune --clear), and run fastvid tune",
) -> None:
    """Raises TableRefused unless this user owns the file and others cannot write to it. others: their bits. remedy:
    what to do where they can."""
    if not hasattr(os, "geteuid"):
        return  # on Windows a user's folders are closed to others by their place
    if status.st_uid != os.geteuid():
        raise TableRefused(f"{path} belongs to another user (number {status.st_uid}); remove it, or have it removed")
    if status.st_mode & others:
        raise TableRefused(f"{path} can be written by others; {remedy}")


def check_content(content: Any) -> None:
    """Raises ValueError unless this is what `write` writes."""
    if not isinstance(content, dict) or set(content) != {"version", "key", "rows", "rejected"}:
        raise ValueError("it has other entries than version, key, rows and rejected")
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']!r:.20}, not {VERSION}")
    if not isinstance(content["key"], dict):
        raise ValueError("its key is not an object")
    for name, check in (("rows", _check_row), ("rejected", _check_rejected)):
        rows = content[name]
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise ValueError(f"{name} is not a list of at most {MAX_ROWS} rows")
        for row in rows:
            check(row)


def _check_row(row: Any) -> None:
    _check_entries(row, TEXTS, {"median_us", "next", "next_us", "times_us"})
    times = row["times_us"]
    if not isinstance(times, dict) or not all(_is_text(name) and _is_time(us) for name, us in times.items()):
        raise ValueError("times_us is not an object of times")
    best, following = row["backend"], row["next"]
    if best not in times or times[best] != row["median_us"]:
        raise ValueError("median_us is not the back end's time in times_us")
    if following is None and row["next_us"] is None:
        return
    if not isinstance(following, str) or following not in times or times[following] != row["next_us"]:
        raise ValueError("next and next_us are neither a back end and its time in times_us nor null")


def _check_rejected(row: Any) -> None:
    _check_entries(row, REJECTED, set())


def _check_entries(row: Any, texts: Sequence[str], more: set[str]) -> None:
    if not isinstance(row, dict) or set(row) != {*texts, *more}:
        raise ValueError(f"a row has other entries than {', '.join((*texts, *sorted(more)))}")
    if not all(_is_text(row[name]) for name in texts):
        raise ValueError(f"one of {', '.join(texts)} is not a text of at most {MAX_TEXT} characters")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


# ---------------------------------------------------------------- writing


def write(device: torch.device, rows: Sequence[Row], rejected: Sequence[Row] = ()) -> Path:
    """Puts rows into a device's table, in place of those of the same operation, dtype and shape class; a refused table
    is an error. Rows of another driver, torch or Triton, or of another source, leave it. Returns the file.

    Raises TableRefused, and Error where the folder cannot be written to.
    """
    path = path_of(device)
    try:
        _make_folder(path.parent)
        with _locked(path.parent):
            before = load(device)
            done = {_class_of(row) for row in (*rows, *rejected)}
            content = {
                "version": VERSION,
                "key": before["key"],
                "rows": [*_others(before["rows"], done), *map(_stored, rows)],
                "rejected": [*_others(before["rejected"], done), *map(_stored, rejected)],
            }
            _replace(path, content)
    except OSError as error:
        raise Error(f"the table cannot be written to {path} ({reason(error)})") from error
    return path


def clear() -> list[Path]:
    """Removes the tables of all devices, also those that are refused; returns what was removed. A link is removed, not
    what it leads to."""
    place, removed = folder(), []
    if place.is_symlink():
        place.unlink()
        return [place]
    try:
        for path in sorted(place.iterdir() if place.is_dir() else ()):
            if path.suffix in (".json", ".partial") or path.name == "lock":
                path.unlink()
                removed += [path] if path.suffix == ".json" else []
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    except OSError as error:
        raise Error(f"{place} cannot be cleared ({reason(error, named=True)})") from error
    return removed


def _class_of(row: Row) -> tuple[str, str, str]:
    return row["op"], row["dtype"], row["shape_class"]


def _others(rows: Sequence[Row], done: set[tuple[str, str, str]]) -> list[Row]:
    """The rows of other classes, as far as their kernels are as they were."""
    return [_stored(row) for row in rows if _class_of(row) not in done and _is_current(row)]


def _is_current(row: Row) -> bool:
    file = row["file"] if "file" in row else file_of(row["op"], row["backend"], row["shape_class"])
    return row["source"] == source_hash(row["backend"], file)


def _stored(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name != "result"}


def _make_folder(path: Path) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # whatever umask allows: others may not write here
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    check_folder(path)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Waits until no other process writes to the folder. Without fcntl (Windows) the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: dict[str, Any]) -> None:
    check_content(content)
    data = (json.dumps(content, indent=1) + "\n").encode()
    if len(data) > MAX_BYTES:
        raise TableRefused(f"{path} would be larger than {MAX_BYTES:,} bytes; remove it (fastvid tune --clear)")
    part = path.with_name(f"{secrets.token_hex(8)}.partial")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _cuda_of_driver() -> str | None:
    """The CUDA version that the driver has, where its own version is not told."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # not there in torch for CPUs
    return f"CUDA {version()}" if version else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
