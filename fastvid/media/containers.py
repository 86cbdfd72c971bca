"""Counts the pieces of a video file before FFmpeg sees them: boxes, elements, sub-blocks, tags.

FFmpeg keeps an entry for most of them, and looks each tag up among all others. `CHECKS` has what is checked before a
file is opened, by its kind.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

from fastvid.errors import MediaError
from fastvid.media.pieces import MAX_ANIMATION, PIECE, refuse_many, size_of

MAX_INDEX = 1 << 25  # bytes of an .mp4 outside of `mdat`, of an .avi's index
MAX_CUES = 1 << 22  # bytes of a .mkv's index
MAX_SAMPLES = 1 << 21  # in all tracks of an .mp4 together; the reader needs 24 bytes for each
MAX_BOXES = 1 << 17  # at the top level of an .mp4: fragments
MAX_INNER = 1 << 14  # boxes within an .mp4's index, elements of a .mkv outside of its clusters, parts of an .avi
MAX_CLUSTERS = 1 << 18  # of a .mkv
MAX_FLV_TAGS = 1 << 19
MAX_COMMENTS = 4096  # of an .ogv or .avi

# ---------------------------------------------------------------- .mp4 and .mov

CONTAINERS = {
    b"trak",
    b"mdia",
    b"minf",
    b"stbl",
    b"udta",
    b"meta",
    b"ilst",
    b"edts",
    b"dinf",
    b"mvex",
    b"gmhd",
    b"tref",
}


def check_boxes(file: BinaryIO, name: str) -> None:
    """Raise MediaError if an .mp4's index claims too many samples or has too many boxes. A file of 1 KB may claim 2^32
    samples of equal size, and FFmpeg would allocate memory for all of them."""
    samples = index = 0
    for kind, start, end in _boxes(file, 0, size_of(file), name):
        if kind in (b"mdat", b"free", b"skip", b"wide"):
            continue
        index += end - start
        if index > MAX_INDEX:
            raise MediaError(f"{name} has an index of more than {MAX_INDEX >> 20} MiB, which is the most that is read")
        parts = [(kind, start, end)] if kind != b"moov" else [*_boxes(file, start, end, name)]
        inner_boxes = 0
        for inner, begin, stop in parts:
            file.seek(begin)
            data = file.read(stop - begin)
            samples += _samples(inner, data, name)
            _check_unit_lengths(data, name)
            if samples > MAX_SAMPLES:
                raise MediaError(
                    f"{name} claims more than {MAX_SAMPLES} frames and pieces of sound, the most that is read"
                )
            inner_boxes += _inner_boxes(inner, data, name)
            if inner_boxes > MAX_INNER:
                raise refuse_many(name, MAX_INNER, "boxes in its index")


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
    if kind in (b"stsz", b"stz2", b"trun"):  # its own head counts too
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


def _check_unit_lengths(data: bytes, name: str) -> None:
    """Raise MediaError for H.264 or HEVC whose units have no lengths, in which nothing bounds their number."""
    has_units = re.search(rb"stsd.{12,16}(avc[1-4]|hev1|hvc1|dvh1|dvhe|vvc1|vvi1)", data, re.DOTALL)
    if has_units and re.search(rb"avcC|hvcC|vvcC", data) is None:
        raise MediaError(f"{name} does not say how its H.264 or HEVC is stored; write it again, as ffmpeg does")


def _inner_boxes(kind: bytes, data: bytes, name: str) -> int:
    """The number of boxes inside a box of the index, at any depth; stops counting above the limit."""
    if kind == b"keys" and len(data) > PIECE:
        raise refuse_many(name, MAX_INNER, "names of tags")
    count, ranges = 1, [(kind, 0, len(data))]
    while ranges and count <= MAX_INNER:
        parent, at, end = ranges.pop()
        if parent not in CONTAINERS:
            continue
        if parent == b"meta" and data[at + 4 : at + 8] != b"hdlr":
            at += 4
        while at + 8 <= end and count <= MAX_INNER:
            size, inner = struct.unpack_from(">I4s", data, at)
            if size < 8 or inner == b"keys" and size > PIECE:
                break
            ranges.append((inner, at + 8, min(at + size, end)))
            count, at = count + 1, at + size
    return count


# ---------------------------------------------------------------- .mkv and .webm

SEGMENT, CLUSTER, CUES = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\x1c\x53\xbb\x6b"
# Segment, Tracks and what is in a track, Tags, Chapters, Attachments, SeekHead, Info
MASTERS = {SEGMENT, b"\x16\x54\xae\x6b", b"\xae", b"\xe0", b"\xe1", b"\x6d\x80", b"\x62\x40"}
MASTERS |= {
    b"\x12\x54\xc3\x67",
    b"\x73\x73",
    b"\x63\xc0",
    b"\x67\xc8",
    b"\x10\x43\xa7\x70",
    b"\x45\xb9",
    b"\xb6",
    b"\x80",
}
MASTERS |= {b"\x19\x41\xa4\x69", b"\x61\xa7", b"\x11\x4d\x9b\x74", b"\x4d\xbb", b"\x15\x49\xa9\x66"}
LEVEL_1 = re.compile(rb"\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b|\x12\x54\xc3\x67|\x10\x43\xa7\x70|\x19\x41\xa4\x69")


def check_elements(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many elements of a .mkv or .webm outside of its clusters, or too many clusters."""
    at, end, elements, clusters = 0, size_of(file), 0, 0
    while at < end:
        found = _element(file, at)
        if found is None:
            return
        kind, start, size = found
        clusters += kind == CLUSTER
        elements += kind != CLUSTER
        if clusters > MAX_CLUSTERS or elements > MAX_INNER or kind == CUES and (size or 0) > MAX_CUES:
            raise refuse_many(name, MAX_INNER, f"elements, {MAX_CLUSTERS} clusters or {MAX_CUES >> 20} MiB of index")
        if kind in MASTERS:
            at = start
        elif size is None:  # a stream, which was written without going back
            at = _next_level_1(file, start)
        else:
            at = start + size


def _element(file: BinaryIO, at: int) -> tuple[bytes, int, int | None] | None:
    """(id, start of the content, its size or None) of an EBML element; None if there is none."""
    file.seek(at)
    head = file.read(12)
    if len(head) < 2 or not head[0] or head[0] < 0x10:
        return None
    length = 9 - head[0].bit_length()
    first = head[length] if length < len(head) else 0
    if not first:
        return None
    more = 9 - first.bit_length()
    size = int.from_bytes(head[length : length + more], "big") - (1 << 7 * more)
    return head[:length], at + length + more, None if size == (1 << 7 * more) - 1 else size


def _next_level_1(file: BinaryIO, at: int) -> int:
    """Where the next element of the top level is, or the end of the file."""
    file.seek(at)
    while data := file.read(PIECE):
        if match := LEVEL_1.search(data):
            return at + match.start()
        if len(data) < PIECE:
            break
        at += len(data) - 3
        file.seek(at)
    return size_of(file)


# ---------------------------------------------------------------- .avi, .ogv


def check_riff(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many parts, tags or bytes of index in an .avi."""
    at, end, parts = 0, size_of(file), 0
    while at + 8 <= end:
        file.seek(at)
        kind, size, inner = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
        parts += 1
        if parts > MAX_COMMENTS or kind == b"idx1" and size > MAX_INDEX:
            raise refuse_many(name, MAX_COMMENTS, f"parts and tags, or {MAX_INDEX >> 20} MiB of index")
        at += 12 if kind in (b"RIFF", b"LIST") and inner != b"movi" else 8 + size + size % 2


def check_comments(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many comments in an .ogv."""
    file.seek(0)
    data = file.read(PIECE)
    for match in re.finditer(rb"\x81theora|\x03vorbis|OpusTags", data):
        vendor = int.from_bytes(data[match.end() : match.end() + 4], "little")
        at = match.end() + 4 + vendor
        if int.from_bytes(data[at : at + 4], "little") > MAX_COMMENTS:
            raise refuse_many(name, MAX_COMMENTS, "comments")


# ---------------------------------------------------------------- .gif


class _Cursor:
    """Reads a file byte by byte."""

    def __init__(self, file: BinaryIO, at: int) -> None:
        file.seek(at)
        self._file, self._data, self._at = file, b"", 0

    def byte(self) -> int:
        """The next byte; -1 at the end."""
        if self._at >= len(self._data):
            self._at -= len(self._data)
            if self._at:
                self._file.seek(self._at, os.SEEK_CUR)
            self._data, self._at = self._file.read(PIECE), 0
            if not self._data:
                return -1
        self._at += 1
        return self._data[self._at - 1]

    def skip(self, count: int) -> None:
        self._at += count

    def sub_blocks(self, most: int) -> int:
        """Skip a chain of a .gif's sub-blocks; returns their number, which stops above `most`."""
        count, size = 0, 1
        while size > 0 and count <= most:
            data, at = self._data, self._at
            while at < len(data) and size and count <= most:  # calls of `byte` would take several times as long
                size = data[at]
                at += 1 + size
                count += 1
            self._at = at
            if size and count <= most:
                size = self.byte()
                self._at += max(0, size)
                count += 1
        return count


def check_sub_blocks(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many sub-blocks or pictures in a .gif (GIF89a, 15 to 27)."""
    most = MAX_INNER + size_of(file) // 32
    file.seek(10)
    flags = (file.read(1) or b"\0")[0]
    cursor = _Cursor(file, 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    blocks = pictures = 0
    while (kind := cursor.byte()) in (0x21, 0x2C):
        blocks += 1
        if kind == 0x2C:
            pictures += 1
            cursor.skip(8)
            flags = max(0, cursor.byte())
            cursor.skip(3 << (flags & 7) + 1 if flags & 0x80 else 0)
        cursor.skip(1)
        blocks += cursor.sub_blocks(most)
        if blocks > most:
            raise refuse_many(name, most, "sub-blocks")
        if pictures > MAX_ANIMATION:
            raise refuse_many(name, MAX_ANIMATION, "frames")


# ---------------------------------------------------------------- .flv


def check_tags(file: BinaryIO, name: str) -> None:
    """Raise MediaError for too many tags of an .flv, or too many names in its data tags."""
    cursor, names, at, count = _Cursor(file, 13), 0, 13, 0
    while (kind := cursor.byte()) >= 0:
        count += 1
        size = int.from_bytes(bytes(max(0, cursor.byte()) for _ in range(3)), "big")
        cursor.skip(11 + size)
        if kind & 0x1F == 0x12:
            file.seek(at + 11)
            names += _names_of(file.read(size))
            if names > MAX_COMMENTS:
                raise refuse_many(name, MAX_COMMENTS, "names of facts")
            cursor = _Cursor(file, at + 15 + size)
        if count > MAX_FLV_TAGS:
            raise refuse_many(name, MAX_FLV_TAGS, "tags")
        at += 15 + size


def _names_of(data: bytes) -> int:
    """The number of names in AMF 0 data (Action Message Format, 2); stops counting above the limit."""
    sizes = {0: 8, 1: 1, 5: 0, 6: 0, 7: 2, 9: 0, 11: 10}
    at = data.find(b"\x08") if data[:1] == b"\2" else -1
    count, at = 0, at + 5 if at >= 0 else len(data)
    while at + 3 <= len(data) and count <= MAX_COMMENTS:
        length = int.from_bytes(data[at : at + 2], "big")
        count, at = count + 1, at + 3 + length
        kind = data[at - 1] if at <= len(data) else 9
        if kind == 2:
            at += 2 + int.from_bytes(data[at : at + 2], "big")
        elif kind == 8:
            at += 4
        elif kind == 10:
            at += 4 + 9 * int.from_bytes(data[at : at + 4], "big")  # of numbers, as times of key frames are
        else:
            at += sizes.get(kind, 0)
    return count


CHECKS: dict[str, Callable[[BinaryIO, str], None]] = {
    "mov": check_boxes,
    "matroska": check_elements,
    "avi": check_riff,
    "ogg": check_comments,
    "gif": check_sub_blocks,
    "flv": check_tags,
}
