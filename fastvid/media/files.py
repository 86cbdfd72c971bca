"""Opens untrusted media files. The first bytes determine the format, and no other format is tried, so a playlist can't
refer to other files. Sizes and counts are checked before anything is decoded or allocated.

PyAV gets an open file instead of a name, and the detected format. So FFmpeg neither guesses formats, nor uses the
network or opens other files. It decodes nothing while it opens a file (`codec_whitelist`).
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from fastvid.checks import MAX_FRAMES
from fastvid.errors import Error, MediaError

MIN_INPUT_SIDE, MAX_INPUT_SIDE = 16, 8192  # pixels
MAX_CLIP_PIXELS = 1 << 25  # in a video frame (8K). A still picture may have MAX_INPUT_SIDE on both sides.
MIN_INPUT_FPS, MAX_INPUT_FPS = 0.01, 1000.0
MAX_INDEX = 1 << 26  # bytes of an .mp4 outside of `mdat`
MAX_SAMPLES = 1 << 21  # in all tracks of an .mp4 together; the reader needs 24 bytes for each
MAX_BOXES = 1 << 17

PICTURES = ("png", "jpeg", "webp", "bmp", "tiff")
KINDS: tuple[tuple[str, bytes], ...] = (
    ("apng", rb"\x89PNG\r\n\x1a\n.{0,4000}?acTL"),
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("jpeg", rb"\xff\xd8\xff"),
    ("webp", rb"RIFF.{4}WEBP"),
    ("bmp", rb"BM.{4}\0\0\0\0"),
    ("tiff", rb"II\*\0|MM\0\*"),
    ("npy", rb"\x93NUMPY"),
    ("gif", rb"GIF8[79]a"),
    ("mov", rb".{4}(ftyp|moov|mdat|moof|styp|wide|free|skip|pnot)"),
    ("matroska", rb"\x1aE\xdf\xa3"),
    ("avi", rb"RIFF.{4}AVI "),
    ("mpegts", rb"G.{187}G|.{4}G.{191}G"),
    ("mpeg", rb"\x00\x00\x01\xba"),
    ("mpegvideo", rb"\x00\x00\x01\xb3"),
    ("flv", rb"FLV\x01"),
    ("ogg", rb"OggS"),
    ("asf", rb"0&\xb2u\x8ef\xcf\x11"),
    ("ivf", rb"DKIF"),
    ("yuv4mpegpipe", rb"YUV4MPEG2 "),
    ("h264", rb"\x00?\x00\x00\x01[\x09\x27\x47\x67]"),
    ("hevc", rb"\x00?\x00\x00\x01[\x40\x46]"),
    ("json", rb"\s*\{"),
)
# Pillow raises SyntaxError for a damaged header.
SYSTEM_ERRORS = (OSError, ValueError, RuntimeError, ArithmeticError, LookupError, EOFError, SyntaxError)
KNOWN = "mp4, mov, webm, mkv, gif, avi, mpg, ts, flv, ogv, wmv, ivf, y4m, png, jpg, webp, bmp, tiff, npy"


@contextlib.contextmanager
def media_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors of the system, Pillow and PyAV to MediaError with the path in the message."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        if not isinstance(error, SYSTEM_ERRORS) and not type(error).__module__.startswith(("av.", "PIL.")):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{os.fspath(path)}: {reason}", getattr(error, "errno", None)) from error


def kind_of(file: BinaryIO) -> str:
    """The format of a file from its first bytes: "png", "mov" (also .mp4), ...; "" if it is not supported."""
    file.seek(0)
    start = file.read(4096)
    file.seek(0)
    return next((name for name, magic in KINDS if re.match(magic, start, re.DOTALL)), "")


def check_picture_size(name: str, width: int, height: int, most: int = MAX_INPUT_SIDE**2) -> None:
    """Raise MediaError if the sides or the area are out of bounds. most: maximum area in pixels."""
    low, high = MIN_INPUT_SIDE, MAX_INPUT_SIDE
    if not (min(width, height) >= low and max(width, height) <= high and width * height <= most):
        area = "" if most == high**2 else f", at most {most} pixels a frame"
        raise MediaError(f"{name} is {width}x{height}; allowed are sides of {low} to {high} pixels{area}")


def check_frame_count(name: str, count: int) -> None:
    if count > MAX_FRAMES:
        raise MediaError(f"{name} has more than {MAX_FRAMES} frames, which is the most that is read; cut it")


def check_fps(name: str, fps: float) -> None:
    if not MIN_INPUT_FPS <= fps <= MAX_INPUT_FPS:
        raise MediaError(f"{name} states {fps:g} frames a second; allowed are {MIN_INPUT_FPS:g} to {MAX_INPUT_FPS:g}")


class _AnonymousFile:
    """A file for PyAV without a name, from which FFmpeg would guess the format."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def open_container(file: BinaryIO, kind: str, name: str) -> Any:
    """Open a file of a known kind as a PyAV container. Decodes nothing and opens no other file."""
    import av

    if kind == "mov":
        check_boxes(file, name)
    file.seek(0)
    options = {"codec_whitelist": "none", "protocol_whitelist": "none", "enable_drefs": "0"}
    return av.open(_AnonymousFile(file), format=kind, container_options=options, io_open=_refuse, buffer_size=1 << 17)


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise MediaError("a video that names other files is not read")


# ---------------------------------------------------------------- .mp4 and .mov


def check_boxes(file: BinaryIO, name: str) -> None:
    """Raise MediaError if an .mp4's index claims too many samples. A file of 1 KB may claim 2^32 samples of equal size,
    and FFmpeg would allocate memory for all of them."""
    samples = index = 0
    for kind, start, end in _boxes(file, 0, file.seek(0, os.SEEK_END), name):
        if kind == b"mdat":
            continue
        index += end - start
        if index > MAX_INDEX:
            raise MediaError(f"{name} has an index of more than {MAX_INDEX >> 20} MiB, which is the most that is read")
        parts = [(kind, start, end)] if kind != b"moov" else [*_boxes(file, start, end, name)]
        for inner, begin, stop in parts:
            file.seek(begin)
            samples += _samples(inner, file.read(stop - begin), name)
            if samples > MAX_SAMPLES:
                raise MediaError(
                    f"{name} claims more than {MAX_SAMPLES} frames and pieces of sound, the most that is read"
                )


def _boxes(file: BinaryIO, start: int, end: int, name: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of the content of each box in a range of bytes. The last box may be truncated."""
    for _ in range(MAX_BOXES):
        file.seek(start)
        head = file.read(16)
        if start + 8 > end or len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head[:8])
        skip = 8
        if size == 1 and len(head) == 16:
            size, skip = struct.unpack(">Q", head[8:])[0], 16
        size = end - start if size == 0 else size
        if size < skip:
            raise MediaError(f"{name} is damaged: a part of {size} bytes at byte {start}")
        yield kind, start + skip, min(start + size, end)
        start += size
    raise MediaError(f"{name} is in more than {MAX_BOXES} parts, which is the most that is read")


def _samples(kind: bytes, data: bytes, name: str) -> int:
    """The number of samples that a box claims. FFmpeg accepts sample tables at any depth, so all bytes that look like
    one are counted."""
    if b"cmov" in data or kind == b"cmov":
        raise MediaError(f"{name} has a compressed index, which is not read; write it again, as ffmpeg -c copy does")
    if b"iinf" in data:
        raise MediaError(f"{name} is a HEIC or AVIF picture, which is not read; save it as a .png or .jpg")
    data = kind + data
    total = 0
    for match in re.finditer(rb"(stsz|stz2).{4}(.{4})(.{4})", data, re.DOTALL):
        count = int.from_bytes(match[3], "big")
        total += 0 if kind == b"trak" and _is_plain_sound(data, count) else count
    for match in re.finditer(rb"trun.{4}(.{4})", data, re.DOTALL):
        total += int.from_bytes(match[1], "big")
    return total


def _is_plain_sound(track: bytes, count: int) -> bool:
    """Whether a track is uncompressed sound. FFmpeg reads that in chunks, so its millions of samples are harmless."""
    alone = track.count(b"stsz") == track.count(b"stts") == 1 and b"stz2" not in track
    one_tick = struct.pack(">III", 1, count, 1)  # one run of `count` samples, each one tick long
    times = track[(at := track.find(b"stts") + 8) : at + 12]
    return alone and b"soun" in track and b"vide" not in track and times == one_tick
