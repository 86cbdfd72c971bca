"""Sound of clips: read from their files piece by piece, laid out along a video, and encoded beside its frames.

Samples are float32 [N, channels] in -1 to 1, channels 1 or 2 (more are mixed down); rates are samples a second. Memory
does not grow with the length of the sound, except for `Sound`, which is in memory.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fastvid import notices
from fastvid.checks import shown
from fastvid.errors import InvalidRequest, MediaError
from fastvid.files import open_regular
from fastvid.media.files import media_errors, open_container

CODECS = ("aac", "ac3", "alac", "eac3", "flac", "mp2", "mp3", "mp3float", "opus", "vorbis", "wmav1", "wmav2")
MIN_RATE, MAX_RATE, MAX_CHANNELS = 4000, 192_000, 16
PIECE = 1 << 14  # samples
GAP = 0.1  # seconds: stated times that are off by less are rounding, and the samples are continuous
PROBED = 64  # packets within which a sample has to be found
ENCODERS = {"mp4": ("aac",), "mov": ("aac",), "matroska": ("aac",), "webm": ("libopus",)}
LAYOUTS = {1: "mono", 2: "stereo"}
BIT_RATE = 96_000  # of a channel


@dataclass(frozen=True, eq=False, repr=False)
class Sound:
    """Sound in memory. samples: float32 [N, channels] in -1 to 1; rate: samples a second."""

    samples: np.ndarray
    rate: int

    def __post_init__(self) -> None:
        samples: Any = self.samples
        if not isinstance(samples, np.ndarray) or samples.dtype != np.float32 or samples.shape[1:] not in ((1,), (2,)):
            raise InvalidRequest(f"samples={shown(samples)}: allowed are float32 numbers [N, 1 or 2]")
        if not np.isfinite(samples).all():
            raise InvalidRequest("samples holds NaN or infinity; all must be finite")
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise InvalidRequest(f"rate={self.rate}: allowed are {MIN_RATE} to {MAX_RATE} samples a second")

    @property
    def channels(self) -> int:
        return int(self.samples.shape[1])

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def __repr__(self) -> str:
        return f"Sound({self.seconds:.3f} s, {self.rate} Hz, {self.channels} channel{'s' * (self.channels > 1)})"


@dataclass(frozen=True)
class SoundFile:
    """The sound of a video file, read on demand. start: the time in the file of the clip's first frame, in seconds."""

    path: str
    kind: str
    start: float
    rate: int
    channels: int


# ---------------------------------------------------------------- along a video


@dataclass(frozen=True)
class Span:
    """A stretch of a video with sound. at: its start in the video; begin: its start in the source, counted from the
    clip's first frame; all in seconds."""

    source: Sound | SoundFile
    at: float
    begin: float
    seconds: float


@dataclass(frozen=True)
class Track:
    """The sound of a whole video: spans in order, silence between them. seconds: of the video."""

    spans: tuple[Span, ...]
    seconds: float

    @property
    def rate(self) -> int:
        return self.spans[0].source.rate

    @property
    def channels(self) -> int:
        return max(span.source.channels for span in self.spans)

    def pieces(self, rate: int | None = None) -> Iterator[np.ndarray]:
        """All samples at a rate (default: that of the first source), float32 [n, channels], at most `PIECE` at once."""
        rate, done = rate or self.rate, 0
        for span in self.spans:
            start = round(span.at * rate)
            yield from _silence(start - done, self.channels)
            done = max(start, done) + (count := round(span.seconds * rate))
            yield from _exactly(count, _played(span, rate, self.channels), self.channels)
        yield from _silence(round(self.seconds * rate) - done, self.channels)

    def read(self) -> Sound:
        """All samples in memory."""
        none = np.empty((0, self.channels), np.float32)
        return Sound(np.concatenate((none, *self.pieces())), self.rate)


def track_of(sound: Sound, seconds: float) -> Track:
    """Sound in memory beside a video of this length."""
    return Track((Span(sound, 0.0, 0.0, min(seconds, sound.seconds)),), seconds)


def _silence(count: int, channels: int) -> Iterator[np.ndarray]:
    for start in range(0, count, PIECE):
        yield np.zeros((min(PIECE, count - start), channels), np.float32)


def _exactly(count: int, pieces: Iterable[np.ndarray], channels: int) -> Iterator[np.ndarray]:
    """The first `count` samples of these pieces, with silence after the last one."""
    for piece in pieces:
        if count <= 0:
            return
        for start in range(0, min(len(piece), count), PIECE):
            yield piece[start : min(start + PIECE, count)]
        count -= len(piece)
    yield from _silence(count, channels)


def _played(span: Span, rate: int, channels: int) -> Iterator[np.ndarray]:
    """A span's samples; a file that can't be read any more is told and goes on as silence."""
    source = span.source
    try:
        for piece in _resampled(_native(source, span.begin), source.channels, source.rate, rate):
            yield piece if source.channels == channels else piece.repeat(channels, axis=1)  # as loud as before
    except (MediaError, OSError) as error:
        notices.warn(f"its sound cannot be read and is left out from there on: {error}")


def _native(source: Sound | SoundFile, begin: float) -> Iterator[np.ndarray]:
    """Samples of a source from `begin` seconds on, with its own rate and channels."""
    if isinstance(source, SoundFile):
        with media_errors(source.path):
            yield from _decoded(source, begin)
        return
    start = round(begin * source.rate)
    for first in range(start, len(source.samples), PIECE):
        yield source.samples[first : first + PIECE]


def _resampled(pieces: Iterable[np.ndarray], channels: int, rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """The same sound at another rate."""
    if rate == new_rate:
        yield from pieces
        return
    import av

    layout = LAYOUTS[channels]
    resampler = av.AudioResampler("fltp", layout, new_rate)
    for piece in pieces:
        for frame in resampler.resample(_frame(piece, rate, layout)):
            yield frame.to_ndarray().T
    for frame in resampler.resample(None):
        yield frame.to_ndarray().T


def _frame(piece: np.ndarray, rate: int, layout: str) -> Any:
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece.T), format="fltp", layout=layout)
    frame.sample_rate = rate
    return frame


# ---------------------------------------------------------------- files


def find_sound(path: str, kind: str, start: float) -> SoundFile | None:
    """The sound of a video file; None if it has none. Sound that can't be read is told and left out.

    start: the time of the first frame in the file.
    """
    path = os.path.abspath(path)
    try:
        with media_errors(path), _opened(path, kind) as (container, stream):
            if stream is None:
                return None
            if stream.codec_context is None or not _is_readable(stream.codec_context.name):
                name = "unknown" if stream.codec_context is None else stream.codec_context.name
                raise MediaError(f"its codec is {name}, readable are {', '.join(CODECS)} and PCM")
            first = next(_frames(container, stream, PROBED), None)
            if first is None:
                raise MediaError("no sample of it can be decoded")
            rate, channels = first.sample_rate, first.layout.nb_channels
            if not (MIN_RATE <= rate <= MAX_RATE and 1 <= channels <= MAX_CHANNELS):
                raise MediaError(f"it has {channels} channels of {rate} samples a second")
    except MediaError as error:
        notices.warn(f"{path}: its sound is left out: {error}")
        return None
    if channels > 2:
        notices.warn(f"{path}: its sound has {channels} channels, which are mixed down to 2")
    return SoundFile(path, kind, start, rate, min(channels, 2))


def _is_readable(codec: str) -> bool:
    return codec in CODECS or codec.startswith("pcm_")


@contextlib.contextmanager
def _opened(path: str, kind: str) -> Iterator[tuple[Any, Any]]:
    """A file's container and its first track of sound, which alone is read; None if there is none."""
    import av.stream

    with open_regular(path) as file, contextlib.closing(open_container(file, kind, path)) as container:
        stream = container.streams.audio[0] if container.streams.audio else None
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
        yield container, stream


def _frames(container: Any, stream: Any, most: int | None = None) -> Iterator[Any]:
    """Decoded frames. most: packets to try."""
    import av

    for count, packet in enumerate(container.demux(stream)):
        if most is not None and count >= most:
            return
        with contextlib.suppress(av.error.InvalidDataError):
            yield from stream.codec_context.decode(packet if packet.size else None)


def _decoded(source: SoundFile, begin: float) -> Iterator[np.ndarray]:
    """The samples of a file from a time on, placed by their stated times: gaps are silent, overlaps are cut."""
    import av

    layout, resampler, described = LAYOUTS[source.channels], None, None
    at: int | None = None  # where the next sample belongs, counted from `begin`
    done = 0  # samples that were yielded
    with _opened(source.path, source.kind) as (container, stream):
        if stream is None:
            raise MediaError(f"{source.path} has changed: there is no sound in it any more")
        for frame in _frames(container, stream):
            if described != (described := (frame.format.name, frame.layout.name, frame.sample_rate)):
                resampler = av.AudioResampler("fltp", layout, source.rate)
            assert resampler is not None
            samples = [part.to_ndarray().T for part in resampler.resample(frame)]
            if frame.pts is not None and frame.time_base:
                stated = round((float(frame.pts * frame.time_base) - source.start - begin) * source.rate)
                at = stated if at is None or abs(stated - at) > GAP * source.rate else at
            at = at or 0
            yield from _silence(at - done, source.channels)
            done = max(done, at)
            for piece in samples:
                fresh = np.nan_to_num(piece[max(0, done - at) :], nan=0, posinf=0, neginf=0)  # in a damaged file
                at += len(piece)
                done += len(fresh)
                yield fresh


# ---------------------------------------------------------------- writing


class SoundWriter:
    """Encodes a track into a stream of a container that is being written, piece by piece. The same sound gives the same
    bytes."""

    def __init__(self, container: Any, track: Track, encoder: str) -> None:
        import av

        rates = av.Codec(encoder, "w").audio_rates or [track.rate]
        self._rate = min(rates, key=lambda rate: (rate < track.rate, abs(rate - track.rate)))
        self._layout = LAYOUTS[track.channels]
        self._stream = container.add_stream(encoder, rate=self._rate, layout=self._layout)
        self._stream.bit_rate = BIT_RATE * track.channels
        self._container, self._pieces, self._done = container, track.pieces(self._rate), 0

    def write_until(self, seconds: float) -> None:
        """Encode what belongs before a time, so that sound and frames alternate in the file."""
        while self._done < seconds * self._rate and (piece := next(self._pieces, None)) is not None:
            frame = _frame(piece, self._rate, self._layout)
            frame.pts, frame.time_base = self._done, Fraction(1, self._rate)
            self._done += len(piece)
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Encode the rest."""
        self.write_until(math.inf)
        self._container.mux(self._stream.encode(None))


def sound_encoder(container: str) -> str | None:
    """The first encoder of sound for a container that this build of PyAV has."""
    import av

    for name in ENCODERS.get(container, ()):
        with contextlib.suppress(Exception):  # PyAV raises several types for an unknown encoder
            av.Codec(name, "w")
            return name
    return None
