"""What a verb returns: frames, and everything needed to reproduce them. T frames of H x W pixels."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvid import checks
from fastvid.checks import MAX_SEED, flag, guarded, number, refuse, whole
from fastvid.errors import InvalidRequest
from fastvid.media.files import MAX_INPUT_FPS, MIN_INPUT_FPS
from fastvid.media.sound import Sound, track_of
from fastvid.media.targets import check_writable
from fastvid.media.writer import FrameSink

_FPS = number(MIN_INPUT_FPS, MAX_INPUT_FPS, " frames a second")
_SEED = whole(0, MAX_SEED)
_FRAMES = "a numpy array, uint8 [T, H, W, 3]"


@guarded(_FRAMES)
def _check_frames(name: str, frames: Any) -> None:
    if not isinstance(frames, np.ndarray):
        refuse(name, frames, _FRAMES)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise InvalidRequest(f"{name} must be uint8 [T, H, W, 3], not {frames.dtype!s:.30} {frames.shape!s:.60}")


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """A finished video.

    frames: uint8 RGB [T, H, W, 3]; fps: frames per second; seed: the seed used; latents: denoised and normalized
    [1, C, T', h, w], before cropping, or None; recipe: JSON types, see
    `fastvid.requests.request.Resolved.to_recipe`; audio: the clip's sound along the frames (`samples` float32
    [N, channels] and `rate`), or None; inputs: the files that it was made from, which `save` does not replace.
    """

    frames: np.ndarray
    fps: float
    seed: int
    latents: Any = None
    recipe: dict[str, Any] = field(default_factory=dict)
    audio: Sound | None = None
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_frames("frames", self.frames)
        object.__setattr__(self, "fps", _FPS("fps", self.fps))
        object.__setattr__(self, "seed", _SEED("seed", self.seed))

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write .mp4, .mov, .webm, .gif, .npy, .png or .jpg (one frame), or a folder of PNGs (a name that ends in / or
        has no suffix). The file includes the recipe. Returns the absolute path.

        An existing file is replaced. A link, and a file that the video was made from, are replaced only with
        `overwrite`, which writes to where the link leads. Raises InvalidRequest if this kind of file can't hold the
        video, MediaError if it can't be written. On an error, no new file is created and an existing one is unchanged.
        """
        path = checks.path("path", path)
        shape: dict[str, Any] = {"width": self.width, "height": self.height, "fps": self.fps}
        guard: dict[str, Any] = {"overwrite": flag("overwrite", overwrite), "inputs": self.inputs}
        check_writable(path, num_frames=self.num_frames, **shape, **guard)
        sound = None if self.audio is None else track_of(self.audio, self.seconds)
        with FrameSink(path, **shape, **guard, sound=sound) as sink:
            sink.write(self.frames)
            return sink.close(self.recipe)

    def __len__(self) -> int:
        return self.num_frames

    def __repr__(self) -> str:
        return f"Video({self.num_frames} frames, {self.width}x{self.height}, {self.fps:g} fps, seed {self.seed})"
