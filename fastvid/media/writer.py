"""Writes frames to files: .mp4, .mov (H.264), .webm (VP9), .gif, .png, .jpg (one frame), .npy, and folders of PNGs.

`FrameSink` writes uint8 RGB frames [T, H, W, 3] incrementally and renames the file to its final name when it is
complete. `fastvid.media.targets` says what a name means, and checks beforehand whether that can succeed. Memory does
not grow with the length of the video, and the same frames give the same bytes.

Every file includes the recipe (`fastvid.media.metadata.read_recipe` reads it): .mp4, .mov and .webm in the tag
"comment", .gif in a comment extension, .png in a text chunk "fastvid" (in a folder: of the first frame), .jpg in
comment segments, .npy in a second array after the frames.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastvid import notices
from fastvid.errors import MediaError
from fastvid.media.encoders import ENCODINGS, EncodedWriter, OutputFile, VideoSpec
from fastvid.media.files import media_errors
from fastvid.media.metadata import JPEG_COMMENT
from fastvid.media.sound import Track, sound_encoder
from fastvid.media.targets import NEXT, PICTURES, PathLike, Target, check_writable, number_of, remove_partial

RECIPE_KEY = "fastvid"  # keyword of the PNG text chunk
PNG_LEVEL = 2  # of zlib, 0 to 9: higher levels are much slower and save little
JPEG_QUALITY = 95
MAX_PENDING = 2  # chunks of frames that a BackgroundWriter queues before `write` blocks


def exact_rate(fps: float) -> Fraction:
    """The exact frame rate to store in a file: 23.976, 29.97 and 59.94 mean n * 1000/1001."""
    ntsc = Fraction(round(fps) * 1000, 1001)
    return ntsc if 0 < abs(fps - ntsc) < 1e-3 and fps != round(fps) else Fraction(fps).limit_denominator(100_000)


# ---------------------------------------------------------------- one writer for each kind of file


class Writer(Protocol):
    """Writes one kind of file to a staging path. `FrameSink` chooses, renames and removes that path."""

    def write(self, frame: np.ndarray) -> None:
        """Write one uint8 RGB frame [H, W, 3]."""

    def finish(self, recipe: str | None) -> Path:
        """Complete the file or folder and return its path."""

    def discard(self) -> None:
        """Close open files, in any state."""


def png_bytes(frame: np.ndarray, recipe: str | None = None) -> bytes:
    """A uint8 RGB frame [H, W, 3] as a .png file."""
    from PIL import Image, PngImagePlugin

    info, made = PngImagePlugin.PngInfo(), io.BytesIO()
    if recipe is not None:
        info.add_text(RECIPE_KEY, recipe)
    Image.fromarray(frame).save(made, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return made.getvalue()


def jpeg_bytes(frame: np.ndarray, recipe: str | None = None) -> bytes:
    """A uint8 RGB frame [H, W, 3] as a .jpg file. The recipe is in comment segments after the first two bytes and the
    JFIF header (ITU-T T.81, B.2.4.5), as many as it needs."""
    from PIL import Image

    made = io.BytesIO()
    Image.fromarray(frame).save(made, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    data, text = made.getvalue(), (recipe or "").encode("ascii")
    start = 4 + int.from_bytes(data[4:6], "big")
    size = 65533 - len(JPEG_COMMENT)
    parts = [JPEG_COMMENT + text[i : i + size] for i in range(0, len(text), size)]
    comments = b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
    return data[:start] + comments + data[start:]


class PictureWriter:
    """Writes one picture, when it is complete."""

    def __init__(self, stage: Path, kind: str) -> None:
        self._stage, self._kind = stage, kind
        self._frame: np.ndarray | None = None

    def write(self, frame: np.ndarray) -> None:
        if self._frame is not None:
            raise MediaError(f"a {self._kind} holds one frame; for more give a folder (a name ending in /) or .mp4")
        self._frame = frame.copy()

    def finish(self, recipe: str | None) -> Path:
        assert self._frame is not None
        made = png_bytes(self._frame, recipe) if self._kind == ".png" else jpeg_bytes(self._frame, recipe)
        with self._stage.open("xb") as file:
            file.write(made)
        return self._stage

    def discard(self) -> None: ...


class FolderWriter:
    """Writes a folder of 000000.png, 000001.png, ...; the first one includes the recipe. Each is complete under its
    name."""

    def __init__(self, stage: Path) -> None:
        self._stage, self._count = stage, 0
        stage.mkdir()

    def _put(self, number: int, data: bytes) -> None:
        unfinished = self._stage / NEXT
        with unfinished.open("wb") as file:
            file.write(data)
        os.replace(unfinished, self._stage / f"{number:06d}.png")

    def write(self, frame: np.ndarray) -> None:
        if self._count == 0:
            self._first = frame.copy()
        self._put(self._count, png_bytes(frame))
        self._count += 1

    def finish(self, recipe: str | None) -> Path:
        self._put(0, png_bytes(self._first, recipe))
        return self._stage

    def discard(self) -> None: ...


class NpyWriter:
    """Writes uint8 [T, H, W, 3] and then the recipe's bytes as a second array, which np.load ignores. The file can be
    loaded at any moment, with the frames that were written."""

    def __init__(self, stage: Path, spec: VideoSpec) -> None:
        self._stage, self._spec, self._count = stage, spec, 0
        self._file = OutputFile(stage, "x")
        self._file.write(self._header())

    def _header(self) -> bytes:
        """It has constant length, so it can be overwritten after every frame."""
        made, shape = io.BytesIO(), (self._count, self._spec.height, self._spec.width, 3)
        np.lib.format.write_array_header_1_0(made, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return made.getvalue()

    def write(self, frame: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(frame).data)
        self._count += 1
        self._file.seek(0)
        self._file.write(self._header())
        self._file.seek(0, os.SEEK_END)

    def finish(self, recipe: str | None) -> Path:
        if recipe is not None:
            made = io.BytesIO()
            np.save(made, np.frombuffer(recipe.encode("ascii"), np.uint8), allow_pickle=False)
            self._file.write(made.getvalue())
        self._file.close()
        return self._stage

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()


def open_writer(target: Target, stage: Path, spec: VideoSpec, recipe: str | None, sound: Track | None = None) -> Writer:
    """The writer for a kind of file. recipe: JSON in ASCII. sound: for kinds of files that hold it."""
    if target.kind == ".npy":
        return NpyWriter(stage, spec)
    if target.kind == "":
        return FolderWriter(stage)
    if target.kind in PICTURES:
        return PictureWriter(stage, target.kind)
    return EncodedWriter(ENCODINGS[target.kind], stage, spec, recipe, sound)


def playable(sound: Track | None, target: Target) -> Track | None:
    """The sound, if this kind of file holds it. If not, warns that it is left out."""
    encoding = ENCODINGS.get(target.kind)
    if sound is None or encoding is not None and encoding.final is not None and sound_encoder(encoding.container):
        return sound
    holding = ", ".join(kind for kind, other in ENCODINGS.items() if other.final is not None)
    what = f"a {target.kind}" if target.kind else "a folder of pictures"
    notices.warn(f"{target.path}: the clip's sound is left out, because {what} holds none here; {holding} do")
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
    replaced atomically; in an existing folder of frames, the old frames are removed. overwrite, inputs: see
    `check_writable`. target, stage: where it writes.
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
        overwrite: bool = False,
        inputs: Iterable[Any] = (),
    ) -> None:
        self.path, self.num_frames, self.closed = path, 0, False
        self.target = check_writable(path, fps=fps, overwrite=overwrite, inputs=inputs)
        self._spec = VideoSpec(width, height, exact_rate(fps))
        self._recipe, self._sound = as_json(recipe), playable(sound, self.target)
        self.stage = self.target.staging()
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
            self._writer = open_writer(self.target, self.stage, self._spec, self._recipe, self._sound)
        return self._writer

    def close(self, recipe: dict[str, Any] | None = None) -> Path:
        """Complete the file and rename it to its final name. recipe: None for the constructor's. A second call does
        nothing."""
        if self.closed:
            return self.target.path
        with self._aborting():
            if self.num_frames == 0:
                raise MediaError(f"{self.path}: there are no frames to write")
            complete = self._open().finish(self._recipe if recipe is None else as_json(recipe))
            _publish(complete, self.target)
        self.closed = True
        self._clean()
        return self.target.path

    def abort(self) -> None:
        """Remove the partial file; the target path is unchanged. Does nothing after `close`."""
        if not self.closed:
            self.closed = True
            if self._writer is not None:
                self._writer.discard()
            self._clean()

    def _clean(self) -> None:
        remove_partial(self.stage)
        remove_partial(self.stage.with_name(self.stage.name + "2"))

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


def as_json(recipe: dict[str, Any] | None) -> str | None:
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
        new = sorted(name for name in os.listdir(complete) if number_of(name) is not None)
        for name in new:
            os.replace(complete / name, target.path / name)
        for name in set(os.listdir(target.path)) - set(new):
            if number_of(name) is not None:
                (target.path / name).unlink()


class Sink(Protocol):
    """What takes frames, in order."""

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 RGB frames [T, H, W, 3]."""


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

    def __init__(self, sink: Sink) -> None:
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
