"""Frames to files: .mp4 (H.264), .webm (VP9), .gif, .png (one frame), .npy, and folders of PNGs.

A path names a folder of PNGs (000000.png, ...) when it ends in a slash, has no suffix, or is a folder already.
`FrameSink` takes uint8 RGB frames [T, H, W, 3] as they come and gives the file its name only when it is whole.
`check_writable` finds out before any work whether that can succeed. Memory does not grow with the length of the video,
and the same frames give the same bytes.

Every kind of file carries the recipe, which `fastvid.media.metadata.read_recipe` reads back: .mp4 and .webm in the tag
"comment", .gif in a comment extension, .png in a text chunk "fastvid" (in a folder: of the first frame), .npy in a
second array behind the frames.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.encoders import ENCODINGS, EncodedWriter, VideoSpec, find_encoder
from fastvid.media.files import media_errors

SUFFIXES = (".mp4", ".webm", ".gif", ".png", ".npy")
MAX_GIF_FPS = 50  # players show frames of less than 2/100 s for 10/100 s
RECIPE_KEY = "fastvid"  # keyword of the PNG text chunk
PNG_LEVEL = 2  # zlib's, 0 to 9: higher ones take much longer for little
MAX_PENDING = 2  # chunks of frames that a BackgroundWriter holds before its `write` waits

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
    """Checks that a video can be written there, by writing a small file next to it and removing that again.

    Raises InvalidRequest for a name or a kind of file that cannot hold this video, MediaError for a folder that is
    missing, read-only or full, or an encoder that is missing. Give what is known of the video.
    """
    target = _parse_target(path)
    if target.kind == ".png" and (num_frames or 1) != 1:
        raise InvalidRequest(f"{path}: a .png holds one frame, not {num_frames}; give a folder such as {path}/ or .mp4")
    if target.kind == ".gif" and fps is not None and fps > MAX_GIF_FPS:
        raise InvalidRequest(f"{path}: a .gif plays at most {MAX_GIF_FPS} fps, not {fps:g}; give .mp4 or .webm")
    with media_errors(path):
        _check_location(target)
        if target.kind == ".npy" and num_frames and width and height:
            _check_free_space(target, num_frames * width * height * 3)
    if target.kind in ENCODINGS:
        find_encoder(ENCODINGS[target.kind])
    return target


def _parse_target(path: PathLike) -> Target:
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


def _check_location(target: Target) -> None:
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


def _check_free_space(target: Target, num_bytes: int) -> None:
    free = shutil.disk_usage(target.path.parent).free
    if free < num_bytes:
        raise MediaError(f"{target.path} would take {num_bytes / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free")


# ---------------------------------------------------------------- one writer for each kind of file


class Writer(Protocol):
    """Fills a staging path, which `FrameSink` names, renames and removes."""

    def write(self, frame: np.ndarray) -> None:
        """Take one uint8 RGB frame [H, W, 3]."""

    def finish(self, recipe: str | None) -> Path:
        """Complete the file; return the path of the whole one (or folder)."""

    def discard(self) -> None:
        """Let go of open files, in any state."""


def save_png(path: Path, frame: np.ndarray, recipe: str | None = None) -> None:
    """Write a uint8 RGB frame [H, W, 3]."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(RECIPE_KEY, recipe)
    Image.fromarray(frame).save(path, "PNG", pnginfo=info, compress_level=PNG_LEVEL)


class PngWriter:
    """One picture, or a folder of 000000.png, 000001.png, ...; the recipe is in the first one."""

    def __init__(self, stage: Path, folder: bool) -> None:
        self._stage, self._folder, self._count = stage, folder, 0
        if folder:
            stage.mkdir()

    def _path(self, number: int) -> Path:
        return self._stage / f"{number:06d}.png" if self._folder else self._stage

    def write(self, frame: np.ndarray) -> None:
        if self._count == 0:
            self._first = frame.copy()
        elif not self._folder:
            raise MediaError("a .png holds one frame; for more give a folder (a name ending in /), .gif, .webm or .mp4")
        save_png(self._path(self._count), frame)
        self._count += 1

    def finish(self, recipe: str | None) -> Path:
        save_png(self._path(0), self._first, recipe)
        return self._stage

    def discard(self) -> None: ...


class NpyWriter:
    """uint8 [T, H, W, 3], followed by a second array in the same file, the recipe's bytes: np.load reads the first."""

    def __init__(self, stage: Path, spec: VideoSpec) -> None:
        self._stage, self._spec, self._count = stage, spec, 0
        self._file = stage.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """Of constant length, so that it can be overwritten once the number of frames is known."""
        shape = (self._count, self._spec.height, self._spec.width, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, frame: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(frame).data)
        self._count += 1

    def finish(self, recipe: str | None) -> Path:
        if recipe is not None:
            np.save(self._file, np.frombuffer(recipe.encode("ascii"), np.uint8), allow_pickle=False)
        self._file.seek(0)
        self._write_header()
        self._file.close()
        return self._stage

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()


def open_writer(target: Target, stage: Path, spec: VideoSpec, recipe: str | None) -> Writer:
    """`recipe` is JSON in ASCII."""
    if target.kind == ".npy":
        return NpyWriter(stage, spec)
    if target.kind in ("", ".png"):
        return PngWriter(stage, folder=target.kind == "")
    return EncodedWriter(ENCODINGS[target.kind], stage, spec, recipe)


# ---------------------------------------------------------------- the sink


class FrameSink:
    """Writes uint8 RGB frames to a file as they come. Sides in pixels, fps in frames a second.

        with FrameSink("out.mp4", width=64, height=64, fps=16) as sink:
            sink.write(frames)      # [T, 64, 64, 3], any T, again and again
            sink.close(recipe)      # now out.mp4 is there, whole

    Until then the frames are in a file next to it whose name ends in .partial (that of an .mp4 already plays). An
    exception in the block or a full disk removes it and leaves the path as it was. An existing file is replaced in one
    step; in an existing folder of frames the old frames are removed.
    """

    def __init__(
        self, path: PathLike, *, width: int, height: int, fps: float, recipe: dict[str, Any] | None = None
    ) -> None:
        self.path, self.num_frames, self.closed = path, 0, False
        self._target = check_writable(path, fps=fps)
        self._spec = VideoSpec(width, height, exact_rate(fps))
        self._recipe = _as_json(recipe)
        self._stage = self._target.staging()
        self._writer: Writer | None = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames [T, H, W, 3]. Raises MediaError; then nothing is left of the file."""
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
            self._writer = open_writer(self._target, self._stage, self._spec, self._recipe)
        return self._writer

    def close(self, recipe: dict[str, Any] | None = None) -> Path:
        """Complete the file, with this recipe or the one given first, and give it its name. A second call does
        nothing."""
        if self.closed:
            return self._target.path
        with self._aborting():
            if self.num_frames == 0:
                raise MediaError(f"{self.path}: there are no frames to write")
            whole = self._open().finish(self._recipe if recipe is None else _as_json(recipe))
            _publish(whole, self._target)
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

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _as_json(recipe: dict[str, Any] | None) -> str | None:
    """In ASCII, which every container takes."""
    return None if recipe is None else json.dumps(recipe, allow_nan=False)


def _publish(whole: Path, target: Target) -> None:
    """Give a whole file its name. It is synced first, or a crash after the rename could lose its content."""
    if not whole.is_dir():
        with whole.open("r+b") as file:  # Windows syncs only what is open for writing
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


class BackgroundWriter:
    """Hands frames to a sink in a thread, in order; the file is the same.

        with FrameSink(...) as sink:
            with BackgroundWriter(sink) as writer:
                writer.write(frames)    # again and again
                writer.finish()
            sink.close(recipe)

    An error of the sink is raised by a later `write`, or by `finish`. Leaving the block waits for the write under way
    and drops those that have not begun: put it inside of the sink's own block. seconds: how long the sink was at work.
    """

    def __init__(self, sink: FrameSink) -> None:
        self._sink, self.seconds = sink, 0.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastvid-write")
        self._pending: deque[Future[None]] = deque()

    def write(self, frames: np.ndarray) -> None:
        """uint8 RGB frames [T, H, W, 3]; they must not change any more. Waits while `MAX_PENDING` are pending, so that
        memory stays bounded."""
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._write, frames))

    def finish(self) -> None:
        """Wait until all frames are written."""
        while self._pending:
            self._pending.popleft().result()

    def _write(self, frames: np.ndarray) -> None:
        start = time.perf_counter()
        self._sink.write(frames)
        self.seconds += time.perf_counter() - start

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
