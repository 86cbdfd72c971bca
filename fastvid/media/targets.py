"""Where a video is to be written: what a name means, and whether that can be done without touching anything else.

A path names a folder of PNGs (000000.png, ...) if it ends in a slash, has no suffix, or is an existing folder. An
existing file is replaced when the new one is complete. A link is not written through, and an input of the request is
not replaced, unless the caller says so. In a folder only pictures that fastvid wrote are replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvid import checks
from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.encoders import ENCODINGS, find_encoder
from fastvid.media.files import media_errors
from fastvid.media.metadata import read_recipe

PICTURES = (".png", ".jpg", ".jpeg")
SUFFIXES = (".mp4", ".mov", ".webm", ".gif", *PICTURES, ".npy")
MAX_GIF_FPS = 50  # players show frames shorter than 0.02 s for 0.1 s
OVERWRITE = "overwrite it (overwrite=True, --overwrite)"
NEXT = "next.partial"  # the picture of a folder that is being written

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Target:
    """Where to write. path: absolute, its folder's links resolved; kind: a suffix, or "" for a folder of PNGs."""

    path: Path
    kind: str

    @property
    def _inside(self) -> bool:
        """Whether the temporary path is inside: a folder that is there may be the only place for us."""
        return self.kind == "" and self.path.is_dir()

    def staging(self) -> Path:
        """A new temporary path in the same file system. Its name has at most 255 bytes and ends in .partial."""
        return self._place / f"{self._prefix}{secrets.token_hex(4)}.partial"

    @property
    def _place(self) -> Path:
        return self.path if self._inside else self.path.parent

    @property
    def _prefix(self) -> str:
        name = os.fsencode(self.path.name)[:232].decode(errors="ignore")
        return "" if self._inside else f"{name}."

    def remove_partial(self, name: str) -> None:
        """Removes the unfinished file or folder that an ended process left under this name for this target."""
        if re.fullmatch(re.escape(self._prefix) + r"[0-9a-f]{8}\.partial", name):
            remove_partial(self._place / name)


def remove_partial(path: Path) -> None:
    """Removes an unfinished file, or an unfinished folder with the pictures in it; nothing else, and no link."""
    with contextlib.suppress(OSError):
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            path.unlink()
        elif stat.S_ISDIR(mode):
            for name in os.listdir(path):
                if number_of(name) is not None or name == NEXT:
                    (path / name).unlink()
            path.rmdir()


def number_of(name: str) -> int | None:
    """The frame number of a picture in a folder; None for other names."""
    return int(name[:6]) if re.fullmatch(r"[0-9]{6}\.png", name) else None


def check_writable(
    path: PathLike,
    *,
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    fps: float | None = None,
    overwrite: bool = False,
    inputs: Iterable[Any] = (),
) -> Target:
    """Check that a video can be written to a path, by creating and removing a small file next to it.

    Pass the properties of the video that are known. overwrite: whether a link may be followed, and one of `inputs`
    (anything that names files, nested or not) be replaced. Raises InvalidRequest if the name is invalid or the kind of
    file can't hold this video, MediaError if the folder is missing, read-only or full, or the encoder is missing.
    """
    target = _parse_target(path, overwrite)
    if target.kind in PICTURES and (num_frames or 1) != 1:
        name = Path(os.fspath(path)).with_suffix("")
        raise InvalidRequest(
            f"{path}: a {target.kind} holds one frame, not {num_frames}; give a folder such as {name}/, or {name}.mp4"
        )
    if target.kind == ".gif" and fps is not None and fps > MAX_GIF_FPS:
        raise InvalidRequest(f"{path}: a .gif plays at most {MAX_GIF_FPS} fps, not {fps:g}; give .mp4 or .webm")
    if not overwrite:
        _check_inputs(os.fspath(path), target, inputs)
    with media_errors(path):
        _check_location(target, overwrite)
        if target.kind == ".npy" and num_frames and width and height:
            _check_free_space(target, num_frames * width * height * 3)
    if target.kind in ENCODINGS:
        find_encoder(ENCODINGS[target.kind])
    return target


# ---------------------------------------------------------------- names


def _parse_target(path: PathLike, overwrite: bool) -> Target:
    text = checks.path("path", path)
    if text == "-":
        raise InvalidRequest("- is standard output on the command line alone; give a name such as out.mp4")
    with media_errors(path):
        text.encode()  # FFmpeg takes file names in UTF-8 only
        real = _resolved(path, text, overwrite)
        if text.endswith(("/", os.sep)) or real.is_dir():
            return Target(real, "")
    kind = Path(text).suffix.lower()
    if kind and kind not in SUFFIXES:
        near = _nearest_suffix(kind)
        raise InvalidRequest(
            f"{path}: unknown kind of file {kind}; allowed are {', '.join(SUFFIXES)} and a folder of PNGs (a name "
            f"ending in /); the nearest is {Path(text).with_suffix(near)}"
        )
    return Target(real, kind)


def _resolved(path: PathLike, text: str, overwrite: bool) -> Path:
    """The absolute path, the links of its folder resolved. Raises InvalidRequest if the name itself is a link."""
    plain = Path(os.path.abspath(text))
    real = Path(os.path.realpath(plain.parent)) / plain.name
    if not real.is_symlink():
        return real
    if not overwrite:
        raise InvalidRequest(
            f"{path} is a link to {os.readlink(real)}, which would be replaced; give that name, or a new one, or "
            f"{OVERWRITE}"
        )
    return Path(os.path.realpath(real))


def _nearest_suffix(kind: str) -> str:
    known = {".m4v": ".mp4", ".avi": ".mp4", ".mkv": ".webm", ".webp": ".png", ".bmp": ".png", ".tiff": ".png"}
    return known.get(kind) or max(SUFFIXES, key=lambda suffix: len(set(suffix) & set(kind)))


# ---------------------------------------------------------------- what is there


def paths_in(value: Any) -> Iterator[str]:
    """The paths in a value: itself, or those of its items."""
    if isinstance(value, str | os.PathLike):
        if isinstance(text := os.fspath(value), str) and text and "\0" not in text:
            yield text
    elif isinstance(value, list | tuple | set | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from paths_in(item)


def _check_inputs(path: str, target: Target, inputs: Iterable[Any]) -> None:
    """Raises InvalidRequest if the target is an input of the request, holds one, or is a picture of one."""
    for given in paths_in([*inputs]):
        if any(_same(target.path, file) for file in _files_of(Path(given), target.kind == "")):
            near = f"{target.path.stem}-2{target.path.suffix if target.kind else '/'}"
            raise InvalidRequest(
                f"{path} is read by this request ({given}), and would be replaced; give another name, such as "
                f"{os.path.join(os.path.dirname(path.rstrip('/')), near)}, or {OVERWRITE}"
            )


def _files_of(given: Path, folders: bool) -> Iterator[Path]:
    """An input's file and its pictures, or the folders that they are in."""
    yield given
    with contextlib.suppress(OSError):
        if folders and given.is_file():
            yield given.parent
        elif not folders and given.is_dir():
            yield from given.iterdir()


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _check_location(target: Target, overwrite: bool) -> None:
    path = target.path
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check_existing(target, path.lstat().st_mode, overwrite)
    if not path.parent.is_dir():
        raise MediaError(f"{path}: there is no folder {path.parent}; make it first")
    probe = target.staging()
    try:
        with probe.open("xb") as file:
            file.write(bytes(4096))
    except OSError as error:
        raise MediaError(f"{path}: no file can be made in {probe.parent}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _check_existing(target: Target, mode: int, overwrite: bool) -> None:
    path = target.path
    if target.kind == "":
        if not stat.S_ISDIR(mode):
            raise MediaError(f"{path} is a file, not a folder; give a new name, or one ending in {', '.join(SUFFIXES)}")
        _check_folder(path, overwrite)
    elif not stat.S_ISREG(mode):
        raise MediaError(f"{path} is not a regular file; give a new name")
    elif not os.access(path, os.W_OK):
        raise MediaError(f"{path} is read-only; give a new name, or make it writable")


def _check_folder(path: Path, overwrite: bool) -> None:
    """Raises MediaError for a folder that holds anything but the frames of a video that fastvid wrote."""
    names = [name for name in os.listdir(path) if not re.fullmatch(r"[0-9a-f]{8}\.partial", name)]
    if others := [name for name in names if number_of(name) is None]:
        raise MediaError(f"{path} holds other files ({min(others)}, ...); give an empty or a new folder")
    if not names or overwrite:
        return
    try:
        read_recipe(path)
    except MediaError:
        raise MediaError(
            f"{path} holds pictures that fastvid did not write ({min(names)} has no recipe); give an empty or a new "
            f"folder, or {OVERWRITE}"
        ) from None


def _check_free_space(target: Target, num_bytes: int) -> None:
    free = shutil.disk_usage(target.path.parent).free
    if free < num_bytes:
        raise MediaError(f"{target.path} would take {num_bytes / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free")
