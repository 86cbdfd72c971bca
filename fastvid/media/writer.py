"""Writes frames to files: .mp4 (H.264), .webm (VP9), .gif, .png (one frame), .npy, and folders of PNGs.

A path names a folder of PNGs (000000.png, ...) if it ends in a slash, has no suffix, or is an existing folder.
`FrameSink` writes uint8 RGB frames [T, H, W, 3] incrementally and renames the file to its final name when it is
complete. `check_writable` checks beforehand whether that can succeed. Memory does not grow with the length of the
video, and the same frames give the same bytes.

Every file includes the recipe (`fastvid.media.metadata.read_recipe` reads it): .mp4 and .webm in the tag "comment",
.gif in a comment extension, .png in a text chunk "fastvid" (in a folder: of the first frame), .npy in a second array
after the frames.
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

from fastvid import notices
from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.encoders import ENCODINGS, EncodedWriter, VideoSpec, find_encoder
from fastvid.media.files import media_errors
from fastvid.media.sound import Track, sound_encoder

SUFFIXES = (".mp4", ".webm", ".gif", ".png", ".npy")
MAX_GIF_FPS = 50  # players show frames shorter than 0.02 s for 0.1 s
RECIPE_KEY = "fastvid"  # keyword of the PNG text chunk
PNG_LEVEL = 2  # of zlib, 0 to 9: higher levels are much slower and save little
MAX_PENDING = 2  # chunks of frames that a BackgroundWriter queues before `write` blocks

PathLike = str | os.PathLike[str]


def exact_rate(fps: float) -> Fraction:
    """The exact frame rate to store in a file: 23.976, 29.97 and 59.94 mean n * 1000/1001."""
    ntsc = Fraction(round(fps) * 1000, 1001)
    return ntsc if 0 < abs(fps - ntsc) < 1e-3 and fps != round(fps) else Fraction(fps).limit_denominator(100_000)


# ---------------------------------------------------------------- before any work


@dataclass(frozen=True)
class Target:
    """Where to write. path: absolute, with links of its folder resolved, no link itself; kind: a suffix, or "" for a
    folder of PNGs."""

    path: Path
    kind: str

    def staging(self) -> Path:
        """A new temporary path in the same file system. Its name has at most 255 bytes and ends in .partial."""
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
    """Check that a video can be written to a path, by creating and removing a small file next to it.

    Pass the properties of the video that are known. Raises InvalidRequest if the name is invalid or the kind of file
    can't hold this video, MediaError if the folder is missing, read-only or full, or the encoder is missing.
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
    if os.path.islink(text) and (real.is_file() or not real.exists()):
        raise MediaError(f"{path} is a link, which is not written through; give {real}, or another name")
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
    """Writes one kind of file to a staging path. `FrameSink` chooses, renames and removes that path."""

    def write(self, frame: np.ndarray) -> None:
        """Write one uint8 RGB frame [H, W, 3]."""

    def finish(self, recipe: str | None) -> Path:
        """Complete the file or folder and return its path."""

    def discard(self) -> None:
        """Close open files, in any state."""


def save_png(path: Path, frame: np.ndarray, recipe: str | None = None) -> None:
    """Write a uint8 RGB frame [H, W, 3]."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(RECIPE_KEY, recipe)
    Image.fromarray(frame).save(path, "PNG", pnginfo=info, compress_level=PNG_LEVEL)


class PngWriter:
    """Writes one picture, or a folder of 000000.png, 000001.png, ...; the first one includes the recipe."""

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
    """Writes uint8 [T, H, W, 3] and then the recipe's bytes as a second array, which np.load ignores."""

    def __init__(self, stage: Path, spec: VideoSpec) -> None:
        self._stage, self._spec, self._count = stage, spec, 0
        self._file = stage.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """The header has constant length, so it can be overwritten once the number of frames is known."""
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


def open_writer(target: Target, stage: Path, spec: VideoSpec, recipe: str | None, sound: Track | None = None) -> Writer:
    """The writer for a kind of file. recipe: JSON in ASCII. sound: for kinds of files that hold it."""
    if target.kind == ".npy":
        return NpyWriter(stage, spec)
    if target.kind in ("", ".png"):
        return PngWriter(stage, folder=target.kind == "")
    return EncodedWriter(ENCODINGS[target.kind], stage, spec, recipe, sound)


def playable(sound: Track | None, target: Target) -> Track | None:
    """The sound, if this kind of file holds it. If not, warns that it is left out."""
    encoding = ENCODINGS.get(target.kind)
    if sound is None or encoding is not None and encoding.final is not None and sound_encoder(encoding.container):
        return sound
    holding = ", ".join(kind for kind, other in ENCODINGS.items() if other.final is not None)
    what = f"a {target.kind}" if target.kind else "a folder of pictures"
    notices.warn(f"{target.path}: the clip's sound is left out, which {what} does not hold here; {holding} do")
    return None


# ---------------------------------------------------------------- the sink


class FrameSink:
    """Writes uint8 RGB frames to a file incrementally. Sides in pixels, fps in frames per second. sound: encoded beside
    the frames when the file is closed, where this kind of file holds sound.

        with FrameSink("out.mp4", width=64, height=64, fps=16) as sink:
            sink.write(frames)      # [T, 64, 64, 3], any T, any number of times
            sink.close(recipe)      # creates out.mp4

    Until `close`, the frames are in a file next to it whose name ends in .partial (of an .mp4, it is playable). An
    exception in the block or a full disk removes that file and leaves the target path unchanged. An existing file is
    replaced atomically; in an existing folder of frames, the old frames are removed.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        width: int,
        height: int,
        fps: float,
        recipe: dict[str, Any] | None = None,
        sound: Track | None = None,
    ) -> None:
        self.path, self.num_frames, self.closed = path, 0, False
        self._target = check_writable(path, fps=fps)
        self._spec = VideoSpec(width, height, exact_rate(fps))
        self._recipe, self._sound = _as_json(recipe), playable(sound, self._target)
        self._stage = self._target.staging()
        self._writer: Writer | None = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames [T, H, W, 3]. Raises MediaError, after removing the file."""
        frames = np.asarray(frames)
        frame_shape = (self._spec.height, self._spec.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != frame_shape or frames.dtype != np.uint8:
            self.abort()
            raise MediaError(
                f"frames must be uint8 [T, {frame_shape[0]}, {frame_shape[1]}, 3], not {frames.dtype} {frames.shape}"
            )
        with self._aborting():
            for frame in frames:
                self._open().write(frame)
                self.num_frames += 1

    def _open(self) -> Writer:
        if self.closed:
            raise MediaError(f"{self.path}: the sink is closed")
        if self._writer is None:
            self._writer = open_writer(self._target, self._stage, self._spec, self._recipe, self._sound)
        return self._writer

    def close(self, recipe: dict[str, Any] | None = None) -> Path:
        """Complete the file and rename it to its final name. recipe: None for the constructor's. A second call does
        nothing."""
        if self.closed:
            return self._target.path
        with self._aborting():
            if self.num_frames == 0:
                raise MediaError(f"{self.path}: there are no frames to write")
            complete = self._open().finish(self._recipe if recipe is None else _as_json(recipe))
            _publish(complete, self._target)
        self.closed = True
        self._clean()
        return self._target.path

    def abort(self) -> None:
        """Remove the partial file; the target path is unchanged. Does nothing after `close`."""
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
    """A recipe as JSON in ASCII, which every container supports."""
    return None if recipe is None else json.dumps(recipe, allow_nan=False)


def _publish(complete: Path, target: Target) -> None:
    """Rename a complete file or folder to its final name. Files are synced first, so that a crash can't lose them."""
    if not complete.is_dir():
        with complete.open("r+b") as file:  # Windows can sync only files that are open for writing
            os.fsync(file.fileno())
        os.replace(complete, target.path)
    elif not target.path.exists():
        complete.rename(target.path)
    else:
        new = sorted(os.listdir(complete))
        for name in new:
            os.replace(complete / name, target.path / name)
        for name in set(os.listdir(target.path)) - set(new) - {complete.name}:
            if re.fullmatch(r"\d{6}\.png", name):
                (target.path / name).unlink()


class BackgroundWriter:
    """Writes frames to a sink in a background thread, in order.

        with FrameSink(...) as sink:
            with BackgroundWriter(sink) as writer:
                writer.write(frames)    # any number of times
                writer.finish()
            sink.close(recipe)

    A later `write`, or `finish`, raises the sink's errors. Leaving the block waits for the current write and drops
    queued ones, so nest it in the sink's own block. seconds: the time that the sink spent writing.
    """

    def __init__(self, sink: FrameSink) -> None:
        self._sink, self.seconds = sink, 0.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastvid-write")
        self._pending: deque[Future[None]] = deque()

    def write(self, frames: np.ndarray) -> None:
        """Queue uint8 RGB frames [T, H, W, 3], which must not be modified afterwards. Blocks while `MAX_PENDING` chunks
        are queued, to bound memory."""
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
