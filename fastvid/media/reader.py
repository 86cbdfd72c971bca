"""Videos as sources of frames, and any path as a source.

Sequential reading is fastest, since a video's decoder keeps its position. Memory does not grow with the number of
frames.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastvid import notices
from fastvid.errors import MediaError
from fastvid.files import open_regular
from fastvid.media.alpha import AlphaDecoder, has_alpha
from fastvid.media.color import check_colors, use_stated
from fastvid.media.containers import CHECKS
from fastvid.media.files import (
    KNOWN,
    MAX_CLIP_PIXELS,
    PICTURES,
    check_fps,
    check_frame_count,
    check_picture_size,
    kind_of,
    open_guarded,
)
from fastvid.media.images import read_picture, to_rgb
from fastvid.media.pieces import strip_png
from fastvid.media.sound import SoundFile, find_sound
from fastvid.media.sources import ArraySource, NpySource, Source, folder_source
from fastvid.media.units import GuardedFile, check_packet

SEEKABLE = ("mov", "matroska")  # formats that seek exactly to a key frame
VP8_SHOWN = 0x10  # bit of a packet's first byte (RFC 6386, 9.1); libvpx also writes packets that are not shown
THREADS = 4  # maximum of a decoder


# ---------------------------------------------------------------- videos


@dataclass(frozen=True)
class FrameIndex:
    """A video's frames in presentation order.

    pts: their times in ticks; None if the file has no reliable times (then decoded frames are counted). keys: times of
    key frames, ascending. last_duration: of the last frame in ticks, 0 if unknown.
    """

    count: int
    pts: tuple[int, ...] | None
    keys: tuple[int, ...]
    last_duration: int


class VideoSource(Source):
    """The first video track of a file, one frame per packet. If a packet can't be decoded, the previous frame is
    repeated, like in players, so that the frame count and times stay correct."""

    def __init__(self, file: BinaryIO, kind: str, name: str) -> None:
        self._file, self.kind, self._name = file, kind, name
        self._lock = threading.Lock()
        self._size: tuple[int, int] | None = None
        self._is_told = False  # about its colors
        self._index = self._scan()
        self.num_frames = self._index.count
        self.fps, self.times = self._rate()
        self._decoded: Iterator[tuple[int, Any]] = iter(())
        self._at = -1  # index of _frame
        self._ahead: tuple[int, Any] | None = None
        self._frame = self._first()
        self.height, self.width = self._frame.shape[:2]

    # ------------------------------------------------------------ the first pass: no decoding

    def _scan(self) -> FrameIndex:
        pts: list[int | None] = []
        key_times, hidden, empty, latest, last = [], 0, 0, None, 0
        with contextlib.closing(self._open()) as container:
            stream = _track(container, self._name)
            for packet in container.demux(stream):
                self._guarded.moved()
                if packet.size == 0 or packet.is_discard or _shows_nothing(stream, packet):
                    hidden, empty = hidden + (packet.size > 0), empty + (packet.size == 0)
                    check_frame_count(self._name, max(hidden, empty))
                    continue
                pts.append(packet.pts)
                check_frame_count(self._name, len(pts))
                if packet.pts is not None and packet.is_keyframe:
                    key_times.append(packet.pts)
                if packet.pts is not None and (latest is None or packet.pts > latest):
                    latest, last = packet.pts, packet.duration or 0
            self._guarded.check()
            self._has_sound = bool(container.streams.audio)
            self._time_base, self._average = stream.time_base, stream.average_rate or stream.base_rate
            declared = stream.frames if self.kind == "mov" else 0
        if not pts:
            raise MediaError(f"{self._name}: there are no frames in it")
        if declared > len(pts) + hidden:
            raise MediaError(f"{self._name} is cut off: it has {len(pts) + hidden} of {declared} frames")
        # An .avi states only decoding times, so its decoded frames are counted.
        times = sorted(time for time in pts if time is not None)
        known = self.kind != "avi" and len(set(times)) == len(pts)
        return FrameIndex(len(pts), tuple(times) if known else None, tuple(sorted(key_times)), last)

    def _rate(self) -> tuple[float | None, np.ndarray | None]:
        """Frames per second, and the times of all frames (see `Source`)."""
        fps, index = float(self._average or 0), self._index
        if index.pts is None:
            if index.count > 1 or fps:
                check_fps(self._name, fps)
            return (fps, np.arange(index.count + 1) / fps) if fps else (None, None)
        times = (np.array(index.pts, np.float64) - index.pts[0]) * float(self._time_base)
        if index.count > 1 and times[-1] > 0:
            fps = fps or (index.count - 1) / times[-1]
        if index.count == 1 and not fps:
            return None, None
        check_fps(self._name, fps)
        usual = float(np.median(np.diff(times))) if index.count > 1 else 1 / fps
        # Some files give the last frame one tick, which would make it invisible.
        end = times[-1] + max(index.last_duration * float(self._time_base), usual)
        return fps, np.append(times, end)

    def sound(self) -> SoundFile | None:
        return self._sound

    @functools.cached_property
    def _sound(self) -> SoundFile | None:
        start = 0.0 if self._index.pts is None else float(self._index.pts[0] * self._time_base)
        return find_sound(self._name, self.kind, start) if self._has_sound else None

    # ------------------------------------------------------------ decoding

    def _open(self) -> Any:
        """A new container. Its pieces are counted at the first time."""
        if self.kind in CHECKS and not hasattr(self, "_index"):
            CHECKS[self.kind](self._file, self._name)
        self._guarded = GuardedFile(self._file, self.kind, self._name, watched=True)
        return open_guarded(self._guarded, self.kind)

    def frame(self, number: int) -> np.ndarray:
        with self._lock:
            if number < self._at or number > self._at + 1 and self._worth_seeking(number):
                self._restart(number)
            while self._at < number:
                self._step()
            return self._frame

    def _worth_seeking(self, number: int) -> bool:
        """Whether there is a key frame between the current frame and this one."""
        pts = self._index.pts
        return self.kind in SEEKABLE and pts is not None and self._key(number) > pts[max(self._at, 0)]

    def _key(self, number: int) -> int:
        """The time of the last key frame at or before a frame; the first key frame if there is none."""
        pts, keys = self._index.pts or (0,), self._index.keys or (0,)
        return max((key for key in keys if key <= pts[number]), default=keys[0])

    def _restart(self, number: int) -> None:
        """Restart decoding at the key frame before a frame, or at the beginning if the file can't seek exactly."""
        self._begin()
        if self.kind not in SEEKABLE or self._index.pts is None or self._key(number) <= self._index.pts[0]:
            return
        self._container.seek(self._key(number), stream=self._stream, backward=True, any_frame=False)
        self._decoded = self._decode()
        self._ahead = next(self._decoded, None)
        if self._ahead is None or self._ahead[0] > number:
            return self._begin()
        self._at = self._ahead[0] - 1

    def _begin(self) -> None:
        self.close()
        self._container = self._open()
        self._stream = _track(self._container, self._name)
        codec = self._stream.codec_context
        self._stated = int(codec.colorspace), int(codec.color_trc), int(codec.color_primaries)
        self._alpha = AlphaDecoder(codec.name) if has_alpha(self._stream) else None
        # Not FRAME: frame threads hold more frames, and PyAV hangs when it frees them mid-stream.
        codec.thread_count, codec.thread_type = min(THREADS, os.cpu_count() or 1), "SLICE"
        # strict: assume maximum reordering for H.264 streams that do not state it, so that no frame is late
        codec.options = {"max_pixels": str(MAX_CLIP_PIXELS), "strict": "1"}
        self._decoded, self._ahead, self._at = self._decode(), None, -1

    def _decode(self) -> Iterator[tuple[int, Any]]:
        """Yield (frame number, decoded frame) in decoding order; skips frames that are not in the index."""
        order = None if self._index.pts is None else {pts: number for number, pts in enumerate(self._index.pts)}
        for count, frame in enumerate(self._frames()):
            number = count if order is None else order.get(frame.pts, -1)
            if 0 <= number < self._index.count:
                yield number, frame

    def _frames(self) -> Iterator[Any]:
        import av

        for packet in self._container.demux(self._stream):
            check_packet(self._stream.codec_context, bytes(packet), self._name)
            if self._alpha is not None:
                self._alpha.put(packet)
            if self._stream.codec_context.name == "png" and packet.size:
                packet = _strip_packet(packet, self._name)
            with contextlib.suppress(av.error.InvalidDataError):
                yield from self._stream.codec_context.decode(packet if packet.size else None)
            self._guarded.moved()

    def _step(self) -> None:
        """Advance to the next frame. If it can't be decoded, the previous picture stays."""
        if self._ahead is None or self._ahead[0] <= self._at:
            self._ahead = next((item for item in self._decoded if item[0] > self._at), None)
        self._at += 1
        if self._ahead is not None and self._ahead[0] == self._at:
            self._show(self._ahead[1])

    def _show(self, frame: Any) -> None:
        self._size = self._size or (frame.width, frame.height)
        use_stated(frame, self._stated)
        if (said := check_colors(frame, self._name)) and not self._is_told:
            self._is_told = True
            notices.warn(said)
        self._frame = to_rgb(frame, self._size, self._alpha.plane(frame.pts) if self._alpha is not None else None)

    def _first(self) -> np.ndarray:
        """The first frame that can be decoded. It determines the size and replaces undecodable frames before it."""
        self._begin()
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width and height:
            check_picture_size(self._name, width, height, MAX_CLIP_PIXELS)
        self._ahead = next(self._decoded, None)
        if self._ahead is None:
            codec = self._stream.codec_context.name
            raise MediaError(
                f"{self._name}: none of its {self._index.count} frames can be decoded ({codec}, at most "
                f"{MAX_CLIP_PIXELS} pixels a frame)"
            )
        frame = self._ahead[1]
        check_picture_size(self._name, frame.width, frame.height, MAX_CLIP_PIXELS)
        self._show(frame)
        return self._frame

    def close(self) -> None:
        """Release the decoder. The next read opens a new one."""
        container = getattr(self, "_container", None)
        if container is not None:
            self._decoded = iter(())
            container.close()
            self._container = None


def _track(container: Any, name: str) -> Any:
    """The first video track that is not a cover picture. Discards the other tracks if the format supports it."""
    import av.stream

    tracks = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not tracks or tracks[0].codec_context is None:
        raise MediaError(f"{name}: there is no video in it that can be decoded")
    for stream in container.streams:
        if stream is not tracks[0]:
            stream.discard = av.stream.Discard.all
    return tracks[0]


def _shows_nothing(stream: Any, packet: Any) -> bool:
    name = stream.codec_context.name
    if name == "gif":
        return _is_gif_comment(bytes(packet))
    return name in ("vp8", "libvpx") and not bytes(packet)[0] & VP8_SHOWN


def _is_gif_comment(block: bytes) -> bool:
    """Whether a block has only extensions (GIF89a, 23 to 26) and no picture."""
    offset = 0
    if block[:3] == b"GIF":
        offset = 13 + (3 << (block[10] & 7) + 1 if block[10] & 0x80 else 0)
    while block[offset : offset + 1] == b"!":
        offset += 2
        while offset < len(block) and block[offset]:
            offset += 1 + block[offset]
        offset += 1
    return block[offset : offset + 1] != b","


def _strip_packet(packet: Any, name: str) -> Any:
    import av

    plain = av.Packet(strip_png(io.BytesIO(bytes(packet)), name).read())
    plain.pts, plain.dts, plain.time_base = packet.pts, packet.dts, packet.time_base
    plain.is_keyframe = packet.is_keyframe
    return plain


# ---------------------------------------------------------------- any path


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file or a folder of PNGs. Raises MediaError, or OSError if it does not exist."""
    path = Path(path)
    if path.is_dir():
        return folder_source(path)
    file, name = open_regular(path), str(path)
    try:
        kind = kind_of(file)
        if kind in ("", "json"):
            raise MediaError(f"{name} is not a video or picture that can be read; known are {KNOWN}")
        if kind in PICTURES:
            with file:
                return ArraySource(read_picture(file, kind, name), name, signed=False)
        if kind == "apng":
            file = strip_png(file, name)
        return NpySource(file, name) if kind == "npy" else VideoSource(file, kind, name)
    except BaseException:
        file.close()
        raise
