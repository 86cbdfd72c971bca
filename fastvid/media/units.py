"""Watches what FFmpeg reads for storms of tiny units of H.264, HEVC and AV1 streams, and for the time between frames.

FFmpeg splits a picture into its units before any code of ours sees it, in parsers and while it opens a file, and takes
some KiB for each. An encoder starts a picture at least every few hundred units. Empty parts of other kinds take only
time, while FFmpeg looks for the next frame.
"""

from __future__ import annotations

import re
import time
from typing import Any, BinaryIO

from fastvid.errors import MediaError
from fastvid.media.pieces import MAX_SCANS, refuse_many

MAX_UNITS = 4096  # from one picture's start to the next
MAX_OPENING = 1 << 14  # while a file with length-prefixed units is opened, whose lengths may look like starts
MAX_SECONDS = 1.5  # of CPU time while a file is opened, and from one frame to the next
START = b"\0\0\1"  # of a unit
TAIL = 6  # bytes that decide whether a unit starts a picture
H264, HEVC = rb"[\x01\x21\x41\x61\x05\x25\x45\x65][\x80-\xff]", rb"[\x00-\x2b][\x01-\x07][\x80-\xff]"
# Pictures of MPEG-1 and 2, MPEG-4 part 2 and VC-1 too: programs do not say early what they hold.
OTHERS = rb"\x00.[\x08-\x3f\x48-\x7f\x88-\xbf\xc8-\xff]|\xb6[^\0]|\x0d[^\0]"


def _pattern(*pictures: bytes) -> re.Pattern[bytes]:
    """Finds units; group 1 if one starts a picture."""
    return re.compile(START + b"(" + b"|".join(pictures) + b")?", re.DOTALL)


UNITS = {"h264": _pattern(H264), "hevc": _pattern(HEVC), "": _pattern(H264, HEVC, OTHERS)}
KINDS = {"h264": "h264", "hevc": "hevc", "mpegts": "", "mpeg": ""}  # format -> key of UNITS, from the first byte on
MARKS = (
    b"H264",
    b"h264",
    b"X264",
    b"x264",
    b"AVC1",
    b"avc1",
    b"DAVC",
    b"HEVC",
    b"hevc",
    b"H265",
    b"h265",
    b"hvc1",
    b"/AVC",
)
MARKS_AV1 = (b"AV01", b"av01", b"V_AV1")
FRAMED = ("avi", "asf", "matroska", "flv", "mov", "ivf")  # formats that state the codec, and frame its pictures
PERIODS, SAMPLE, STRIDE, MAX_PERIODIC = (2, 3, 4, 5), 256, 1024, 16


class GuardedFile:
    """A file for PyAV, without a name, from which FFmpeg would guess the format. `read` raises MediaError in a storm,
    and if the next frame takes longer than MAX_SECONDS of CPU time. watched: `moved` is called for each frame."""

    def __init__(self, file: BinaryIO, kind: str, name: str, watched: bool = False) -> None:
        self._file, self._kind, self._name, self._watched = file, kind, name, watched
        self._units = UNITS[KINDS[kind]] if kind in KINDS else None
        self._most, self._opening, self._av1 = MAX_UNITS, True, False
        self._run, self._tail, self._periodic = 0, b"", 0
        self._error: MediaError | None = None
        self.tell = file.tell
        self.moved()

    def moved(self) -> None:
        """Another frame was found."""
        self._since = time.thread_time()

    def check(self) -> None:
        """Raise the error of a `read` that FFmpeg took for the end of the file."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = 0) -> int:
        self._run, self._tail, self._periodic = 0, b"", 0
        return self._file.seek(offset, whence)

    def read(self, size: int) -> bytes:
        if self._error is not None:  # FFmpeg tries again; PyAV prints errors that it did not expect
            return b""
        data = self._file.read(size)
        try:
            self._watch(data)
        except MediaError as error:
            self._error = error
            raise
        return data

    def _watch(self, data: bytes) -> None:
        if (self._opening or self._watched) and time.thread_time() - self._since > MAX_SECONDS:
            raise MediaError(f"{self._name} takes more than {MAX_SECONDS:g} seconds to the next frame")
        if self._opening:
            self._look_for_codec(data)
        if self._units is not None:
            self._count_units(data)
        if self._av1:
            self._find_periods(data)

    def opened(self, codecs: list[Any]) -> None:
        """FFmpeg knows the codecs of the file's videos now: PyAV's CodecContexts."""
        self.check()
        self.moved()
        self._opening, self._av1 = False, any("av1" in codec.name or "dav1d" in codec.name for codec in codecs)
        if self._kind not in KINDS:
            starts = [codec.name for codec in codecs if codec.name in UNITS and not _length_size(codec)]
            self._units, self._most = (UNITS[starts[0]] if starts else None), MAX_UNITS

    def _look_for_codec(self, data: bytes) -> None:
        if self._kind not in FRAMED:
            return
        self._av1 = self._av1 or any(mark in data for mark in MARKS_AV1)
        if self._units is None and self._kind not in ("mov", "ivf"):
            marked = self._kind == "flv" or any(mark in data for mark in MARKS)
            self._units = UNITS[""] if marked else None
            self._most = MAX_UNITS if self._kind in ("avi", "asf") else MAX_OPENING

    def _count_units(self, data: bytes) -> None:
        data, run = self._tail + data, self._run
        last = len(data) - TAIL
        if START in data:
            assert self._units is not None
            for match in self._units.finditer(data):
                if match.start() >= last:
                    break
                run = 0 if match[1] else run + 1
                if run > self._most:
                    raise refuse_many(self._name, self._most, "units in a picture")
        self._run, self._tail = run, data[max(0, last) :]

    def _find_periods(self, data: bytes) -> None:
        for at in range(0, len(data) - SAMPLE, STRIDE):
            part = data[at : at + SAMPLE]
            same = any(part[period:] == part[:-period] for period in PERIODS) and part.count(part[0]) < SAMPLE
            self._periodic = self._periodic + 1 if same else 0
            if self._periodic > MAX_PERIODIC:
                raise MediaError(f"{self._name} has thousands of tiny units, which is no picture")


def check_packet(codec: Any, data: bytes, name: str) -> None:
    """Raise MediaError if one picture of a PyAV CodecContext has too many units or scans."""
    if codec.name in ("h264", "hevc", "vvc"):
        # FFmpeg looks for starts too where lengths are wrong.
        if max(data.count(START), _prefixed_units(data, _length_size(codec))) > MAX_UNITS:
            raise refuse_many(name, MAX_UNITS, "units in a picture")
    elif codec.name == "mjpeg" and data.count(b"\xff\xda") > MAX_SCANS:
        raise refuse_many(name, MAX_SCANS, "scans in a picture")


def _length_size(codec: Any) -> int:
    """The bytes of a unit's length; 0 if units have starts instead (ISO/IEC 14496-15, 5.3.3.1 and 8.3.3.1)."""
    extra = codec.extradata or b""
    at = {"h264": 4, "hevc": 21}.get(codec.name, len(extra))
    return (extra[at] & 3) + 1 if len(extra) > at and extra[0] == 1 else 0


def _prefixed_units(data: bytes, size: int) -> int:
    """The number of units, each after its length; stops counting above the limit."""
    at = count = 0
    while size and at + size < len(data) and count <= MAX_UNITS:
        at += size + int.from_bytes(data[at : at + size], "big")
        count += 1
    return count
