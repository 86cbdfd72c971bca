"""Counts the pieces of a picture's file before a decoder sees them: chunks, segments, scans, tags. Millions of them fit
into a few bytes each, and decoders take time or memory for every one.

The limits are far above what encoders write. Each `check_*` reads only what it has to, at most some thousand pieces.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import BinaryIO

from fastvid.errors import MediaError

MAX_CHUNKS = 1 << 17  # of a PNG: FFmpeg writes its pixels in chunks of 4 KiB, others in larger ones
MAX_SMALL = 1 << 24  # bytes of all chunks, segments or tags together that hold no pixels
MAX_ANIMATION = 1 << 14  # frames of a GIF or an animated PNG: each is made from the one before
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"sRGB")
PIXELS = (b"IDAT", b"fdAT")
MAX_SEGMENTS = 4096  # of a JPEG
MAX_FILL = 4096  # fill bytes before a JPEG's pixels
MAX_SCANS = 100  # of a JPEG: one of a few bytes takes as long to decode as the whole picture
MAX_SCANNED = 20 << 26  # pixels of all scans together
MAX_RIFF_CHUNKS = 1 << 14
MAX_TAGS = 1024  # of a TIFF
MAX_STRIPS = 1 << 17
MAX_RLE_PIXELS = 1 << 22  # of a run-length encoded BMP, which Pillow decodes in Python
PIECE = 1 << 20  # bytes


def size_of(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def refuse_many(name: str, count: int, what: str) -> MediaError:
    return MediaError(f"{name} has more than {count} {what}, which is the most that is read")


# ---------------------------------------------------------------- PNG


class Ranges(io.RawIOBase):
    """A file that consists of some ranges of another one's bytes, without a copy."""

    def __init__(self, file: BinaryIO, ranges: list[tuple[int, int]]) -> None:
        self._file, self._ranges, self._at = file, ranges, 0
        self._starts, self._size = [], 0
        for start, end in ranges:
            self._starts.append(self._size)
            self._size += end - start
        self._number = 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        self._number = 0 if self._number >= len(self._starts) or self._at < self._starts[self._number] else self._number
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while self._number < len(self._ranges):
            start, end = self._ranges[self._number]
            inside = self._at - self._starts[self._number]
            if 0 <= inside < end - start:
                self._file.seek(start + inside)
                data = self._file.read(min(len(buffer), end - start - inside))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            self._number += 1
        return 0


def strip_png(file: BinaryIO, name: str) -> BinaryIO:
    """A PNG without texts, profiles and all other chunks that do not affect pixels: a few KB of them may decompress to
    gigabytes. Empty chunks of pixels go as well. Raises MediaError if the PNG is damaged or truncated, or has too many
    chunks."""
    end, at, count, frames, small = size_of(file), 8, 0, 0, 0
    kept = [(0, 8)]
    while at + 12 <= end:
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        after = at + 12 + size
        if after > end or kind in PNG_CHUNKS and not _crc_is_right(file, kind, size):
            break
        count, frames = count + 1, frames + (kind == b"fcTL")
        small += 0 if kind in PIXELS or kind not in PNG_CHUNKS else size
        if count > MAX_CHUNKS or small > MAX_SMALL:
            raise refuse_many(name, MAX_CHUNKS, f"chunks, or {MAX_SMALL >> 20} MiB without pixels")
        if frames > MAX_ANIMATION:
            raise refuse_many(name, MAX_ANIMATION, "frames")
        if kind in PNG_CHUNKS and (size or kind not in PIXELS):
            kept = [*kept[:-1], (kept[-1][0], after)] if kept[-1][1] == at else [*kept, (at, after)]
        if kind == b"IEND":
            return io.BufferedReader(Ranges(file, kept))
        at = after
    raise MediaError(f"{name} is damaged or cut off at byte {at} of {end}")


def png_text(file: BinaryIO, keyword: str, limit: int) -> str | None:
    """The plain text of a PNG under a keyword, of at most `limit` bytes, before its pixels; None if there is none."""
    end, at, start = size_of(file), 8, keyword.encode() + b"\0"
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        if kind == b"IDAT" or at + 12 + size > end:
            return None
        if kind == b"tEXt" and size <= limit and (text := file.read(size)).startswith(start):
            return text.removeprefix(start).decode("latin-1")
        at += 12 + size
    return None


def _crc_is_right(file: BinaryIO, kind: bytes, size: int) -> bool:
    crc = zlib.crc32(kind)
    while size:
        data = file.read(min(size, PIECE))
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc == int.from_bytes(file.read(4), "big")


# ---------------------------------------------------------------- JPEG


def check_jpeg(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many segments or fill bytes before the pixels."""
    file.seek(2)
    segments = fill = small = 0
    while (byte := file.read(1)) in (b"\xff", b"\0"):
        marker = file.read(1)
        while marker == b"\xff" and fill <= MAX_FILL:
            fill, marker = fill + 1, file.read(1)
        fill += byte == b"\0"
        if marker == b"" or marker == b"\xda":
            break
        if marker[0] >= 0xC0 and not 0xD0 <= marker[0] <= 0xD9:
            segments += 1
            size = int.from_bytes(file.read(2), "big")
            small += size
            file.seek(max(0, size - 2), os.SEEK_CUR)
        else:
            fill += 1
        if segments > MAX_SEGMENTS or fill > MAX_FILL or small > 2 * MAX_SMALL:
            raise refuse_many(name, MAX_SEGMENTS, "pieces or fill bytes before its pixels")


def check_scans(file: BinaryIO, name: str, pixels: int) -> None:
    """Raise MediaError for too many scans."""
    file.seek(0)
    scans = _count(file, b"\xff\xda")
    most = MAX_SCANS if scans > MAX_SCANS else MAX_SCANNED // pixels
    if scans > most:
        raise refuse_many(name, most, f"scans of {pixels:,} pixels")


def _count(file: BinaryIO, what: bytes) -> int:
    """How often bytes occur from here on."""
    count, last = 0, b""
    while data := file.read(PIECE):
        count += (last + data).count(what)
        last = data[len(data) - len(what) + 1 :]
    return count


# ---------------------------------------------------------------- WebP, BMP, TIFF


def check_webp(file: BinaryIO, name: str) -> tuple[int, int]:
    """Width and height. Raises MediaError for an animation, or too many chunks."""
    file.seek(12)
    head = file.read(18)
    at, end = 12, size_of(file)
    for _ in range(MAX_RIFF_CHUNKS):
        if at + 8 > end:
            break
        file.seek(at + 4)
        size = int.from_bytes(file.read(4), "little")
        at += 8 + size + size % 2
    else:
        raise refuse_many(name, MAX_RIFF_CHUNKS, "chunks")
    kind, body = head[:4], head[8:].ljust(10, b"\0")
    if kind == b"VP8X":
        if body[0] & 2:
            raise MediaError(f"{name} is an animated WebP, which is not read; give a .gif or .mp4")
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def check_bmp(file: BinaryIO, name: str) -> None:
    """Raise MediaError for a large run-length encoded BMP, or one of many runs without pixels."""
    file.seek(14)
    size, width, height, _, _, method = struct.unpack("<IiiHHI", file.read(20).ljust(20, b"\0"))
    pixels = abs(width * height)
    if size >= 40 and method in (1, 2) and (pixels > MAX_RLE_PIXELS or size_of(file) > 4 * pixels + MAX_SEGMENTS):
        raise MediaError(
            f"{name} is a run-length encoded BMP of many pixels or runs, which is not read; save it as .png"
        )


def check_tiff(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many tags, strips or tiles in a TIFF's first directory, or too many bytes of tags."""
    sizes = (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)
    file.seek(0)
    order = "<" if file.read(4)[:1] == b"I" else ">"
    file.seek(int.from_bytes(file.read(4), "little" if order == "<" else "big"))
    count = int.from_bytes(file.read(2), "little" if order == "<" else "big")
    data = file.read(12 * min(count, MAX_TAGS + 1))
    total = 0
    for tag, kind, length in (struct.unpack_from(f"{order}HHI", data, at) for at in range(0, len(data) - 11, 12)):
        total += length * (sizes[kind] if kind < len(sizes) else 1)
        if tag in (273, 279, 324, 325) and length > MAX_STRIPS:
            raise refuse_many(name, MAX_STRIPS, "strips or tiles")
    if count > MAX_TAGS or total > 2 * MAX_SMALL:
        raise refuse_many(name, MAX_TAGS, f"tags, or {2 * MAX_SMALL >> 20} MiB of them")
