"""Opens untrusted media files. The first bytes determine the format, and no other format is tried, so a playlist can't
refer to other files. Sizes and counts are checked before anything is decoded or allocated.

PyAV gets an open file instead of a name, and the detected format. So FFmpeg neither guesses formats, nor uses the
network or opens other files. It decodes nothing while it opens a file (`codec_whitelist`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from fastvid.checks import MAX_FRAMES
from fastvid.errors import Error, MediaError
from fastvid.media.containers import CHECKS
from fastvid.media.units import GuardedFile

MIN_INPUT_SIDE, MAX_INPUT_SIDE = 16, 8192  # pixels
MAX_CLIP_PIXELS = 1 << 25  # in a video frame (8K). A still picture may have MAX_INPUT_SIDE on both sides.
MIN_INPUT_FPS, MAX_INPUT_FPS = 0.01, 1000.0
MAX_STREAMS = 256

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


def open_container(file: BinaryIO, kind: str, name: str) -> Any:
    """Open a file of a known kind as a PyAV container. Decodes nothing and opens no other file. Raises MediaError."""
    if kind in CHECKS:
        CHECKS[kind](file, name)
    return open_guarded(GuardedFile(file, kind, name), kind)


def open_guarded(file: GuardedFile, kind: str) -> Any:
    """Like `open_container`, for a file whose pieces were counted before."""
    import av

    file.seek(0)
    options = {"codec_whitelist": "none", "protocol_whitelist": "none", "enable_drefs": "0"}
    options["max_streams"] = str(MAX_STREAMS)
    container = av.open(file, format=kind, container_options=options, io_open=_refuse, buffer_size=1 << 15)
    file.opened([stream.codec_context for stream in container.streams.video if stream.codec_context is not None])
    return container


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise MediaError("a video that names other files is not read")
