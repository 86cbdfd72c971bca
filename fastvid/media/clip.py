"""Clips: frames from any source, read on demand. F frames of H x W pixels, uint8 RGB [F, H, W, 3].

    clip = open_clip("phone.mp4")
    clip.num_frames, clip.height, clip.width, clip.fps
    clip.resampled(16).resized(480, 832).tail(17)

Only requested frames are in memory. Alpha is composited over black, rotation is applied, and pixels are assumed to be
square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastvid import checks, notices
from fastvid.checks import MAX_FPS, MAX_FRAMES, MAX_SIDE, MIN_FPS, is_array, is_pillow, number, one_of, whole
from fastvid.errors import InvalidRequest, OutOfMemory
from fastvid.media.arrays import as_array, is_signed
from fastvid.media.files import media_errors
from fastvid.media.images import resize
from fastvid.media.metadata import stated_fps
from fastvid.media.reader import open_source
from fastvid.media.sound import Sound, Span, Track
from fastvid.media.sources import ArraySource, PictureSource, Source

FITS = ("cover", "stretch")
FPS = number(MIN_FPS, MAX_FPS, " frames a second")
UNEVEN = 0.1  # seconds that sound may be off the frames before it is told
EVEN = 0.25  # of a frame: frames this close to an even grid count as evenly spaced, since files round their times


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """Frames that are read on demand. Create one with `open_clip`.

    num_frames is exact. height, width: of the frames that `read` returns. fps: frames per second, None for pictures and
    arrays. source_frames: for each frame of the clip, its index in the source.
    """

    source: Source
    source_frames: np.ndarray
    height: int
    width: int
    fps: float | None
    fit: str = "cover"
    name: str = "video"

    @property
    def num_frames(self) -> int:
        return len(self.source_frames)

    @property
    def seconds(self) -> float | None:
        return self.num_frames / self.fps if self.fps else None

    def __len__(self) -> int:
        return self.num_frames

    def __repr__(self) -> str:
        rate = f"{self.fps:g} fps" if self.fps else "no rate"
        return f"Clip({self.name}: {self.num_frames} frames, {self.width}x{self.height}, {rate})"

    # ------------------------------------------------------------ reading

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames start to stop - 1 as a new array, uint8 [stop - start, H, W, 3]. Reading in order is fastest.

        Raises InvalidRequest unless 0 <= start <= stop <= num_frames, MediaError if the file has changed.
        """
        stop = self.num_frames if stop is None else self._count("stop", stop)
        start = self._count("start", start, stop)
        frames = self._room(stop - start)
        last = None
        with media_errors(self.name):
            for index, number in enumerate(self.source_frames[start:stop].tolist()):
                frames[index] = frames[index - 1] if number == last else self._sized(self.source.frame(number))
                last = number
        return frames

    def head(self, count: int) -> np.ndarray:
        """The first `count` frames."""
        return self.read(0, self._count("count", count))

    def tail(self, count: int) -> np.ndarray:
        """The last `count` frames."""
        return self.read(self.num_frames - self._count("count", count))

    def chunks(self, count: int = 16) -> Iterator[np.ndarray]:
        """All frames, `count` at a time."""
        count = whole(1, MAX_FRAMES)("count", count)
        return (self.read(n, min(n + count, self.num_frames)) for n in range(0, self.num_frames, count))

    def _count(self, name: str, value: Any, most: int | None = None) -> int:
        most = self.num_frames if most is None else most
        return whole(0, most, f" ({self.name:.60} has {self.num_frames} frames)")(name, value)

    def _room(self, count: int) -> np.ndarray:
        """Memory for `count` frames."""
        try:
            return np.empty((count, self.height, self.width, 3), np.uint8)
        except MemoryError:
            size = count * self.height * self.width * 3 / 2**30
            raise OutOfMemory(f"{count} frames take {size:.1f} GiB, which is more than there is; read fewer") from None

    def _sized(self, frame: np.ndarray) -> np.ndarray:
        if frame.shape[:2] == (self.height, self.width):
            return frame
        box: tuple[slice, ...] = ()
        if self.fit == "cover":
            box = center_crop(frame.shape[0], frame.shape[1], self.height, self.width)
        return resize(frame[box], self.height, self.width)

    # ------------------------------------------------------------ other rates and sizes

    def resampled(self, fps: float | None = None) -> Clip:
        """The same clip at another rate (default: its own). Frame n is the one nearest in time to n / fps; ties take
        the later one, like FFmpeg's filter `fps`. Unevenly spaced frames (phones, screen recordings) become evenly
        spaced. A clip without a rate keeps its frames and gets this rate.

        Raises InvalidRequest if the rate is out of bounds or results in too many frames.
        """
        if fps is None and self.fps is None:
            return self
        rate = FPS("fps", self.fps if fps is None else fps)
        if self.fps is None or self.num_frames == 1:
            return replace(self, fps=rate)
        times = self._times()
        if abs(rate - self.fps) < 1e-3 * rate and np.abs(times[:-1] * rate - np.arange(len(self))).max() <= EVEN:
            return replace(self, fps=rate)
        slots = np.floor(times * rate + 0.5)
        if slots[-1] > MAX_FRAMES:
            raise InvalidRequest(
                f"{self.name} at {rate:g} fps has {int(slots[-1])} frames: allowed are {MAX_FRAMES}; "
                f"the nearest is {MAX_FRAMES / times[-1]:g} fps"
            )
        indices = np.searchsorted(slots[:-1], np.arange(max(1, int(slots[-1]))), side="right") - 1
        return replace(self, source_frames=self.source_frames[indices], fps=rate)

    def _times(self) -> np.ndarray:
        """The start of each frame and the end of the last one, in seconds."""
        source_times = self.source.times
        if source_times is not None and np.array_equal(self.source_frames, np.arange(self.source.num_frames)):
            return source_times
        assert self.fps is not None
        return np.arange(self.num_frames + 1) / self.fps

    @property
    def has_sound(self) -> bool:
        return self.source.sound() is not None

    def audio(self) -> Sound | None:
        """All of the clip's sound, in memory; None if there is none."""
        span = None if self.fps is None else self.sound(0, self.num_frames, self.fps)
        return None if span is None else Track((span,), span.seconds).read()

    def sound(self, start: int, stop: int, fps: float) -> Span | None:
        """The sound of frames start to stop - 1 when they are played at `fps`; None if there is none. Frames that are
        not spaced as they were in the file are told, since sound keeps its speed."""
        source = self.source.sound()
        if source is None:
            return None
        times = self._times() if self.fps else np.arange(self.num_frames + 1) / fps
        begin, seconds = float(times[start]), (stop - start) / fps
        lasting = float(times[stop]) - begin
        if abs(lasting - seconds) > UNEVEN:
            notices.warn(
                f"{self.name}: its frames last {lasting:.2f} s in the file and {seconds:.2f} s here, so that they and "
                "its sound drift apart"
            )
        return Span(source, 0.0, begin, seconds)

    def resized(self, height: int, width: int, fit: str = "cover") -> Clip:
        """The same clip at another size, scaled with Pillow's Lanczos filter. fit "cover": crop the center to the new
        aspect ratio, then scale; "stretch": scale without cropping. Raises InvalidRequest for an invalid size or
        fit."""
        side = whole(1, MAX_SIDE, " pixels")
        return replace(self, height=side("height", height), width=side("width", width), fit=one_of(FITS)("fit", fit))

    def close(self) -> None:
        """Release the file's decoder; the next read opens it again."""
        self.source.close()

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def center_crop(height: int, width: int, new_height: int, new_width: int) -> tuple[slice, slice]:
    """The largest centered crop with the new aspect ratio."""
    cut_height = min(height, max(1, round(width * new_height / new_width)))
    cut_width = min(width, max(1, round(height * new_width / new_height)))
    top, left = (height - cut_height) // 2, (width - cut_width) // 2
    return slice(top, top + cut_height), slice(left, left + cut_width)


def open_clip(source: Any, *, name: str = "video") -> Clip:
    """Open anything that has frames as a clip.

    Args:
        source: a path (a video, a .gif, a picture, a .npy, a folder of PNGs), a `fastvid.Video` or anything else with
            `frames` and `fps`, a `Clip`, an array or tensor [F, H, W, 3] or [H, W, 3] (gray and RGBA too; uint8, bool,
            or floating point in 0 to 1 or -1 to 1; channels may come first where that is certain), a Pillow image, or
            a list of pictures of one size, each a path, an array, a tensor or a Pillow image. Arrays are not copied.
        name: what error messages call a source that is not a path.

    Raises:
        MediaError: the file is missing, damaged, of an unknown kind, or exceeds the limits, which are checked before
            decoding: sides of 16 to 8192 pixels, 2^25 pixels in a video frame, 2^17 frames, 0.01 to 1000 frames a
            second.
        InvalidRequest: the source has no frames, too many, or too large ones.
    """
    name = checks.text("name", name)
    given = checks.clip(name, source)
    if isinstance(given, Clip):
        return given
    if isinstance(given, str):
        return _of_path(given)
    if isinstance(given, tuple):
        return _clip(_of_list(given, name), None, name)
    if is_pillow(given) or is_array(given):
        return _clip(_of_array(given, name), None, name)
    frames, rate, sound = _parts_of(name, given)
    return _clip(ArraySource(as_array(frames, name), name, signed=False, sound=sound), FPS(f"{name}.fps", rate), name)


@checks.guarded("a Video, or anything else with frames and fps")
def _parts_of(name: str, value: Any) -> tuple[Any, Any, Sound | None]:
    sound = getattr(value, "audio", None)
    return value.frames, value.fps, sound if isinstance(sound, Sound) else None


def _of_array(source: Any, name: str) -> ArraySource:
    array = as_array(source, name)
    if not is_pillow(source):
        return ArraySource(array, name)
    if getattr(source, "n_frames", 1) > 1 and source.format != "MPO":  # a phone's JPEG, with previews behind it
        raise InvalidRequest(f"{name} is a Pillow image of {source.n_frames} frames; give its file, or a list of them")
    return ArraySource(array, name, signed=False)


def open_picture(source: Any, name: str) -> np.ndarray:
    """One picture, uint8 RGB [H, W, 3]: from a file (a video's first frame), an array, a tensor or a Pillow image.
    Raises as `open_clip` does."""
    if is_array(source):
        return np.array(ArraySource(as_array(source, name), name, picture=True).frame(0))  # a copy
    if is_pillow(source):
        return ArraySource(as_array(source, name), name, picture=True, signed=False).frame(0)
    with open_clip(source, name=name) as clip:
        first: np.ndarray = clip.read(0, 1)[0]
    return first


def _of_path(path: str) -> Clip:
    with media_errors(path):
        source = open_source(path)
    return _clip(source, stated_fps(path, source), str(path))


def _clip(source: Source, fps: float | None, name: str) -> Clip:
    return Clip(source, np.arange(source.num_frames), source.height, source.width, fps, name=name)


def _of_list(pictures: Sequence[Any], name: str) -> PictureSource:
    """Pictures of one size, each read on demand. Floating point arrays have one range together."""
    signed = is_signed((as_array(one, name) for one in pictures if is_array(one)), name)

    def read(number: int) -> np.ndarray:
        picture, one = pictures[number], f"{name}[{number}]"
        if is_array(picture):
            return ArraySource(as_array(picture, one), one, picture=True, signed=signed).frame(0)
        if is_pillow(picture):
            return open_picture(picture, one)
        clip = open_clip(picture, name=one)
        if clip.num_frames != 1:
            raise InvalidRequest(f"{one} has {clip.num_frames} frames; a list holds pictures")
        return clip.read()[0]

    return PictureSource(len(pictures), read, name)
