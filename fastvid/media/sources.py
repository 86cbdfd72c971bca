"""Sources of frames: arrays, .npy files, pictures. Each supports random access to its frames, uint8 RGB [H, W, 3].

`times` holds the start of each frame and the end of the last one in seconds, float64 [num_frames + 1]; None for
pictures and arrays. Videos are in `fastvid.media.reader`.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastvid.errors import InvalidRequest, MediaError
from fastvid.files import open_regular
from fastvid.media.arrays import as_frames, in_order, is_signed, layout_of, to_uint8, wanted
from fastvid.media.files import PICTURES, check_frame_count, check_picture_size, kind_of
from fastvid.media.images import over_black, read_picture
from fastvid.media.pieces import size_of
from fastvid.media.sound import Sound, SoundFile

MAX_HEADER = 1 << 14  # bytes of a .npy file's header


class Source:
    num_frames: int
    height: int
    width: int
    fps: float | None = None
    times: np.ndarray | None = None

    def frame(self, number: int) -> np.ndarray:
        """Frame `number`, uint8 RGB [H, W, 3]. It may be shared memory: do not write to it."""
        raise NotImplementedError

    def sound(self) -> Sound | SoundFile | None:
        """The sound beside the frames, which begins with the first one; None if there is none."""
        return None

    def close(self) -> None:
        """Release resources that the next read can open again."""


# ---------------------------------------------------------------- pictures and arrays


class ArraySource(Source):
    """Frames in memory, of any layout and range of `fastvid.media.arrays`. picture: whether it must be one frame.
    signed: as `is_signed` finds it; None: find it."""

    def __init__(
        self,
        array: np.ndarray,
        name: str,
        picture: bool = False,
        signed: bool | None = None,
        sound: Sound | None = None,
    ) -> None:
        self._sound = sound
        self._frames = as_frames(array, name, picture)
        self.num_frames, self.height, self.width = self._frames.shape[:3]
        try:
            check_frame_count(name, self.num_frames)
            check_picture_size(name, self.width, self.height)
        except MediaError as error:
            raise InvalidRequest(str(error)) from None
        self._signed = is_signed(self._frames, name) if signed is None else signed

    def frame(self, number: int) -> np.ndarray:
        return over_black(to_uint8(self._frames[number], self._signed))

    def sound(self) -> Sound | None:
        return self._sound


def npy_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, Fortran order, dtype, start of the data) of a .npy file. An unfinished one of ours states no frames: it
    has as many as there are bytes for. Raises MediaError."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_HEADER))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except Exception as error:  # what a damaged header raises depends on how it is damaged
        raise MediaError(f"{name} has a damaged header: {str(error)[:200]}") from None
    size, start = size_of(file), head.tell()
    if len(shape) == 4 and shape[0] == 0 and 0 not in shape[1:] and dtype == np.uint8:
        shape = ((size - start) // math.prod(shape[1:]), *shape[1:])
    return shape, fortran, dtype, start


class NpySource(Source):
    """A .npy file, read frame by frame. Its array must be uint8 in C order, in a layout with the frames first."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        shape, fortran, dtype, self._start = npy_header(file, name)
        layout = self._layout(shape, dtype, name)
        self._frame_shape, self._frame_layout = shape[layout.startswith("F") :], layout.removeprefix("F")
        self.num_frames = shape[0] if layout.startswith("F") else 1
        self.height, self.width = (shape[layout.index(side)] for side in "HW")
        check_frame_count(name, self.num_frames)
        check_picture_size(name, self.width, self.height)
        self._file, self._name = file, name
        self._bytes = math.prod(self._frame_shape)
        missing = self._start + self._bytes * self.num_frames - file.seek(0, os.SEEK_END)
        if fortran or missing > 0:
            raise MediaError(f"{name} is {'in Fortran order' if fortran else f'cut off: {missing} bytes are missing'}")

    @staticmethod
    def _layout(shape: tuple[int, ...], dtype: np.dtype, name: str) -> str:
        try:
            layout = layout_of(shape, name)
        except InvalidRequest as error:
            raise MediaError(str(error)) from None
        if dtype != np.uint8 or layout == "CFHW":
            raise MediaError(f"{name} is {dtype} {list(shape)}; it must be {wanted(picture=False)}")
        return layout

    def frame(self, number: int) -> np.ndarray:
        self._file.seek(self._start + number * self._bytes)
        data = np.frombuffer(self._file.read(self._bytes), np.uint8).reshape(self._frame_shape)
        return over_black(in_order(data, self._frame_layout)[0])


class PictureSource(Source):
    """Pictures of one size, each read on demand. The first is read immediately to determine the size."""

    def __init__(self, count: int, read: Callable[[int], np.ndarray], name: str) -> None:
        if count == 0:
            raise MediaError(f"{name}: there are no pictures in it")
        check_frame_count(name, count)
        self.num_frames, self._read, self._name = count, read, name
        self._last = (0, read(0))
        self.height, self.width = self._last[1].shape[:2]

    def frame(self, number: int) -> np.ndarray:
        if self._last[0] == number:
            return self._last[1]
        picture = self._read(number)
        if picture.shape != (self.height, self.width, 3):
            raise InvalidRequest(
                f"{self._name}: picture {number} is {picture.shape[1]}x{picture.shape[0]}, the first one "
                f"{self.width}x{self.height}; all pictures of a clip must have one size"
            )
        self._last = (number, picture)
        return picture


def folder_source(folder: Path) -> PictureSource:
    """The .png files of a folder, in the order of the numbers in their names."""

    def order(file: Path) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file.name[:255])]

    files = sorted((file for file in folder.iterdir() if file.suffix.lower() == ".png"), key=order)
    return PictureSource(len(files), lambda number: _read_file(files[number]), str(folder))


def _read_file(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        kind = kind_of(file)
        if kind not in PICTURES:
            raise MediaError(f"{path} is not a picture; known are {', '.join(PICTURES)}")
        return read_picture(file, kind, str(path))
