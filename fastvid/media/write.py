"""Writers: frames in, one at a time, a whole file out. Memory stays constant whatever the length of the video.

A writer fills a staging path that its sink (`fastvid.media.writer.FrameSink`) names, renames and removes. The same
frames give the same bytes. Here are those of pictures and arrays; encoded video is in `fastvid.media.encoders`.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from fastvid.errors import MediaError
from fastvid.media.encoders import ENCODINGS, EncodedWriter, Spec

RECIPE_KEY = b"fastvid"  # keyword of the PNG text chunk


class Writer(Protocol):
    def write(self, frame: np.ndarray) -> None:
        """Take one uint8 RGB frame [H, W, 3]."""

    def finish(self, recipe: str | None) -> Path:
        """Complete the file; return the path of the whole one (or folder)."""

    def discard(self) -> None:
        """Let go of open files, in any state."""


def png_bytes(frame: np.ndarray, recipe: str | None = None) -> bytes:
    """A whole PNG file of a uint8 RGB frame [H, W, 3], each row stored as its difference to the one above."""
    height, width, _ = frame.shape
    rows = np.ascontiguousarray(frame).reshape(height, width * 3)
    filtered = np.full((height, 1 + width * 3), 2, np.uint8)  # 2: the filter "up"
    filtered[0, 1:], filtered[1:, 1:] = rows[0], rows[1:] - rows[:-1]
    text = [] if recipe is None else [(b"tEXt", RECIPE_KEY + b"\0" + recipe.encode("ascii"))]
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    chunks = [header, *text, (b"IDAT", zlib.compress(filtered.tobytes(), 4)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


class PngWriter:
    """One picture, with the recipe in a text chunk."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self._frame: np.ndarray | None = None

    def write(self, frame: np.ndarray) -> None:
        if self._frame is not None:
            raise MediaError("a .png holds one frame; for more give a folder (a name ending in /), .gif, .webm or .mp4")
        self._frame = frame.copy()

    def finish(self, recipe: str | None) -> Path:
        assert self._frame is not None
        self._stage.write_bytes(png_bytes(self._frame, recipe))
        return self._stage

    def discard(self) -> None:
        self._frame = None


class PngFolderWriter:
    """000000.png, 000001.png, ...; the first one has the recipe in a text chunk."""

    def __init__(self, stage: Path) -> None:
        self._stage, self._count = stage, 0
        stage.mkdir()

    def write(self, frame: np.ndarray) -> None:
        if self._count == 0:
            self._first = frame.copy()
        (self._stage / f"{self._count:06d}.png").write_bytes(png_bytes(frame))
        self._count += 1

    def finish(self, recipe: str | None) -> Path:
        (self._stage / "000000.png").write_bytes(png_bytes(self._first, recipe))
        return self._stage

    def discard(self) -> None: ...


class NpyWriter:
    """uint8 [T, H, W, 3], followed by a second array in the same file, the recipe's bytes: np.load reads the first."""

    def __init__(self, stage: Path, spec: Spec) -> None:
        self._stage, self._spec, self._count = stage, spec, 0
        self._file = stage.open("wb")
        self._file.write(self._header())

    def _header(self) -> bytes:
        """Always 128 bytes, so that it can be written again when the number of frames is known."""
        shape = (self._count, self._spec.height, self._spec.width, 3)
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()

    def write(self, frame: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(frame).data)
        self._count += 1

    def finish(self, recipe: str | None) -> Path:
        if recipe is not None:
            np.save(self._file, np.frombuffer(recipe.encode("ascii"), np.uint8), allow_pickle=False)
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()
        return self._stage

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()


def open_writer(kind: str, stage: Path, spec: Spec, recipe: str | None) -> Writer:
    """`kind` is a suffix with its dot, or "" for a folder of PNGs; `recipe` is JSON in ASCII."""
    if kind == ".npy":
        return NpyWriter(stage, spec)
    if kind == ".png":
        return PngWriter(stage)
    if kind == "":
        return PngFolderWriter(stage)
    return EncodedWriter(ENCODINGS[kind], stage, spec, recipe)
