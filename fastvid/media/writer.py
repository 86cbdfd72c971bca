"""Frames <-> files: .mp4 (H.264), .webm (VP9), .gif, .png (one frame), .npy, and folders of PNGs.

A path names a folder of PNGs (000000.png, ...) when it ends in a slash, has no suffix, or is a folder already.
`FrameSink` takes uint8 RGB frames [T, H, W, 3] as they come and gives the file its name only when it is whole.
`check_writable` finds out before any work whether that can succeed. Every kind of file carries the recipe:
.mp4 and .webm in the tag "comment", .gif in a comment extension, .png in a text chunk "fastvid" (in a folder: of the
first frame), .npy in a second array behind the frames. `read_recipe` reads it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.encoders import ENCODINGS, Spec, find_encoder
from fastvid.media.metadata import media_errors, read_recipe, read_video
from fastvid.media.write import Writer, open_writer

__all__ = ["FrameSink", "Target", "check_writable", "exact_rate", "read_recipe", "read_video"]

SUFFIXES = (".mp4", ".webm", ".gif", ".png", ".npy")
MAX_GIF_FPS = 50  # players show frames of less than 2/100 s for 10/100 s

PathLike = str | os.PathLike[str]


def exact_rate(fps: float) -> Fraction:
    """Frames a second as a file states them: 23.976, 29.97 and 59.94 are n * 1000/1001."""
    ntsc = Fraction(round(fps) * 1000, 1001)
    return ntsc if 0 < abs(fps - ntsc) < 1e-3 and fps != round(fps) else Fraction(fps).limit_denominator(100_000)


# ---------------------------------------------------------------- before any work


@dataclass(frozen=True)
class Target:
    """Where frames go: an absolute path with links followed, and its kind, a suffix or "" for a folder of PNGs."""

    path: Path
    kind: str

    def staging(self) -> Path:
        """A new name in the same file system, at most 255 bytes long, ending in .partial."""
        token = f"{secrets.token_hex(4)}.partial"
        if self.kind == "" and self.path.is_dir():
            return self.path / token
        name = os.fsencode(self.path.name)[: 250 - len(token)].decode(errors="ignore")
        return self.path.with_name(f"{name}.{token}")


def check_writable(
    path: PathLike,
    *,
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    fps: float | None = None,
) -> Target:
    """Whether a video can be written there, found out by trying: a probe file is made beside it and removed.

    Raises InvalidRequest for a name or a kind of file that cannot hold this video, MediaError for a folder that is
    missing, read-only or full, or an encoder that is missing. What is known of the video may be given.
    """
    target = _target(path)
    if target.kind == ".png" and (num_frames or 1) != 1:
        raise InvalidRequest(f"{path}: a .png holds one frame, not {num_frames}; give a folder such as {path}/ or .mp4")
    if target.kind == ".gif" and fps is not None and fps > MAX_GIF_FPS:
        raise InvalidRequest(f"{path}: a .gif plays at most {MAX_GIF_FPS} fps, not {fps:g}; give .mp4 or .webm")
    with media_errors(path):
        _check_place(target)
        if target.kind == ".npy" and num_frames and width and height:
            _check_room(target, num_frames * width * height * 3)
    if target.kind in ENCODINGS:
        find_encoder(ENCODINGS[target.kind])
    return target


def _target(path: PathLike) -> Target:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidRequest(f"the output must be a path such as out.mp4, not {path!r:.60}")
    with media_errors(path):
        text.encode()  # FFmpeg takes file names in UTF-8 only
        real = Path(os.path.realpath(text))
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


def _nearest_suffix(kind: str) -> str:
    known = {".mov": ".mp4", ".m4v": ".mp4", ".avi": ".mp4", ".mkv": ".webm", ".jpg": ".png", ".jpeg": ".png"}
    return known.get(kind) or max(SUFFIXES, key=lambda suffix: len(set(suffix) & set(kind)))


def _check_place(target: Target) -> None:
    path = target.path
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check_existing(target, path.stat().st_mode)
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


def _check_existing(target: Target, mode: int) -> None:
    path = target.path
    if target.kind == "" and not stat.S_ISDIR(mode):
        raise MediaError(f"{path} is a file, not a folder; give a new name, or one ending in {', '.join(SUFFIXES)}")
    if target.kind != "" and not stat.S_ISREG(mode):
        raise MediaError(f"{path} is not a regular file; give a new name")
    if target.kind != "" and not os.access(path, os.W_OK):
        raise MediaError(f"{path} is read-only; give a new name, or make it writable")
    if target.kind == "" and (others := [name for name in os.listdir(path) if not _is_ours(name)]):
        raise MediaError(f"{path} holds other files ({min(others)}, ...); give an empty or a new folder")


def _is_ours(name: str) -> bool:
    return re.fullmatch(r"\d{6}\.png|[0-9a-f]{8}\.partial", name) is not None


def _check_room(target: Target, num_bytes: int) -> None:
    free = shutil.disk_usage(target.path.parent).free
    if free < num_bytes:
        raise MediaError(f"{target.path} would take {num_bytes / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free")


# ---------------------------------------------------------------- writing


class FrameSink:
    """Writes uint8 RGB frames as they come. Sides in pixels, fps in frames a second.

        with FrameSink("out.mp4", width=64, height=64, fps=16) as sink:
            sink.write(frames)      # [T, 64, 64, 3], any T, again and again
            sink.close(recipe)      # now out.mp4 is there, whole

    Until then the frames are in a file beside it whose name ends in .partial (of an .mp4 it plays as far as it is
    written). Anything that goes wrong, an exception in the block or a full disk, removes it and leaves the path as it
    was. An existing file is replaced at once; in an existing folder of frames the old ones go.
    """

    def __init__(
        self, path: PathLike, *, width: int, height: int, fps: float, recipe: dict[str, Any] | None = None
    ) -> None:
        self.path, self.num_frames, self.closed = path, 0, False
        self._target = check_writable(path, fps=fps)
        self._spec = Spec(width, height, exact_rate(fps))
        self._recipe = _as_json(recipe)
        self._stage = self._target.staging()
        self._writer: Writer | None = None

    def write(self, frames: np.ndarray) -> None:
        """Frames [T, H, W, 3] in order. Raises MediaError; then nothing is left of the file."""
        frames = np.asarray(frames)
        wanted = (self._spec.height, self._spec.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != wanted or frames.dtype != np.uint8:
            self.abort()
            raise MediaError(
                f"frames must be uint8 [T, {wanted[0]}, {wanted[1]}, 3], not {frames.dtype} {frames.shape}"
            )
        with self._aborting():
            for frame in frames:
                self._open().write(frame)
                self.num_frames += 1

    def _open(self) -> Writer:
        if self.closed:
            raise MediaError(f"{self.path}: the sink is closed")
        if self._writer is None:
            self._writer = open_writer(self._target.kind, self._stage, self._spec, self._recipe)
        return self._writer

    def close(self, recipe: dict[str, Any] | None = None) -> Path:
        """Complete the file, with this recipe or that given at first, and give it its name. Once is enough."""
        if self.closed:
            return self._target.path
        with self._aborting():
            if self.num_frames == 0:
                raise MediaError(f"{self.path}: there are no frames to write")
            whole = self._open().finish(self._recipe if recipe is None else _as_json(recipe))
            _put(whole, self._target)
        self.closed = True
        self._clean()
        return self._target.path

    def abort(self) -> None:
        """Remove what was written; the path stays as it was. Does nothing after `close`."""
        if not self.closed:
            self.closed = True
            if self._writer is not None:
                self._writer.discard()
            self._clean()

    def _clean(self) -> None:
        for path in (self._stage, self._stage.with_name(self._stage.name + "2")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        try:
            with media_errors(self.path):
                yield
        except BaseException:  # Ctrl-C too
            self.abort()
            raise

    def __enter__(self) -> FrameSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _as_json(recipe: dict[str, Any] | None) -> str | None:
    """In ASCII: every container takes it, and no name of a code page is needed."""
    return None if recipe is None else json.dumps(recipe, allow_nan=False)


def _put(whole: Path, target: Target) -> None:
    """Give a whole file its name. What is not on the disk yet would be lost by a crash after the rename: sync first."""
    if not whole.is_dir():
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(whole, target.path)
    elif not target.path.exists():
        whole.rename(target.path)
    else:
        new = sorted(os.listdir(whole))
        for name in new:
            os.replace(whole / name, target.path / name)
        for name in set(os.listdir(target.path)) - set(new) - {whole.name}:
            if re.fullmatch(r"\d{6}\.png", name):
                (target.path / name).unlink()
