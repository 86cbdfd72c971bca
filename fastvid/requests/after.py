"""What is made of a finished clip: frames between its frames (`interpolate`), and larger ones (`upscale`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastvid.errors import InvalidRequest
from fastvid.media.sound import Span
from fastvid.requests.methods import FACTOR, MOST_FACTOR, SCALE

WHOLE = 0.01  # how far a ratio of frame rates may be from a whole number (60 and 29.97)


@dataclass(frozen=True, eq=False)
class Between:
    """A clip at `factor` times its rate: each frame, and between two of them the same faded into each other."""

    original: Any
    factor: int

    @property
    def num_frames(self) -> int:
        return (int(self.original.num_frames) - 1) * self.factor + 1

    @property
    def height(self) -> int:
        return int(self.original.height)

    @property
    def width(self) -> int:
        return int(self.original.width)

    @property
    def fps(self) -> float | None:
        return None if self.original.fps is None else self.original.fps * self.factor

    def __len__(self) -> int:
        return self.num_frames

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames start to stop - 1, uint8 [n, H, W, 3]."""
        numbers = np.arange(start, stop)
        first = start // self.factor
        last = min((max(start, stop - 1) // self.factor) + 2, self.original.num_frames)
        known = self.original.read(first, last)
        before = numbers // self.factor - first
        after = np.minimum(before + 1, len(known) - 1)
        share = (numbers % self.factor / self.factor).astype(np.float32)[:, None, None, None]
        faded: np.ndarray = ((1 - share) * known[before] + share * known[after]).round().astype(np.uint8)
        return faded

    def known(self, start: int, stop: int) -> dict[int, np.ndarray]:
        """The clip's own frames [H, W, 3] among start to stop - 1, by number."""
        first, end = -(-max(0, start) // self.factor), (max(0, stop - 1)) // self.factor + 1
        end = min(end, self.original.num_frames)
        if stop <= 0 or first >= end:
            return {}
        return {n * self.factor: frame for n, frame in enumerate(self.original.read(first, end), first)}

    def sound(self, start: int, stop: int, fps: float) -> Span | None:
        """See `Clip.sound`."""
        whole: Span | None = self.original.sound(0, self.original.num_frames, self.original.fps or fps / self.factor)
        if whole is None:
            return None
        return replace(whole, begin=whole.begin + start / fps, seconds=(stop - start) / fps)


@dataclass(frozen=True, eq=False)
class Enlarged:
    """A clip at a larger size. clip: resized. small: about as large as it was, cropped to the same shape."""

    clip: Any
    small: Any

    @property
    def num_frames(self) -> int:
        return int(self.clip.num_frames)

    @property
    def height(self) -> int:
        return int(self.clip.height)

    @property
    def width(self) -> int:
        return int(self.clip.width)

    @property
    def fps(self) -> float | None:
        rate: float | None = self.clip.fps
        return rate

    def __len__(self) -> int:
        return self.num_frames

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames start to stop - 1, uint8 [n, H, W, 3]."""
        frames: np.ndarray = self.clip.read(start, stop)
        return frames


def on_larger(clip: Any, resized: Any) -> Any:
    """The source of an upscaled clip: `Enlarged`, or the resized clip itself if it is not larger."""
    scale = max(resized.height / clip.height, resized.width / clip.width)
    if scale <= 1:
        return resized
    return Enlarged(resized, clip.resized(round(resized.height / scale), round(resized.width / scale)))


def between(request: Any, clip: Any) -> dict[str, Any]:
    """The values of an interpolation: its clip at the rate of the result, and factor and rate. Raises
    InvalidRequest."""
    if clip.num_frames < 2:
        raise InvalidRequest("interpolate: video has one frame, and makes frames between two; give a clip")
    factor = request.factor or FACTOR
    if request.fps is not None and clip.fps is not None:
        factor = _factor_of(request.fps, clip.fps)
    made = Between(clip, factor)
    rate = made.fps if request.fps is None else request.fps
    return {"video": made, "factor": factor, "num_frames": made.num_frames, "fps": rate}


def _factor_of(fps: float, rate: float) -> int:
    ratio = fps / rate
    factor = min(max(2, round(ratio)), MOST_FACTOR)
    if abs(ratio - factor) > WHOLE * factor:
        raise InvalidRequest(
            f"fps={fps:g} is {ratio:.4g} times the rate of video, {rate:g}; allowed is 2, 3, ... {MOST_FACTOR} times; "
            f"the nearest is {rate * factor:g}"
        )
    return factor


def enlarged(request: Any, clip: Any) -> Any:
    """The request of an upscaled clip, with width and height instead of `scale`. Raises InvalidRequest."""
    if any(getattr(request, name) is not None for name in ("width", "height", "aspect", "budget")):
        return request
    scale = SCALE if request.scale is None else request.scale
    return replace(request, scale=None, width=round(clip.width * scale), height=round(clip.height * scale))
