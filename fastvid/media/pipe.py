"""Writes an .mp4 to a pipe while its frames are made, as fragments, which need no seeking (ISO/IEC 14496-12, 8.8)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.encoders import MP4, EncodedWriter, VideoSpec
from fastvid.media.files import media_errors
from fastvid.media.sound import Track
from fastvid.media.writer import as_json, exact_rate

NAME = "-"


def check_pipe(width: int | None, height: int | None) -> None:
    """Raise InvalidRequest for a size that H.264 can't hold; a file states it at its end, beside the even one."""
    sides = [None if side is None else side + side % 2 for side in (width, height)]
    if sides != [width, height]:
        near = "x".join("?" if side is None else str(side) for side in sides)
        raise InvalidRequest(
            f"{NAME}: a video on standard output has even sides, not {width or '?'}x{height or '?'}; the nearest is "
            f"{near}; or give a file such as out.mp4"
        )


class PipeSink:
    """Writes uint8 RGB frames [T, H, W, 3] to a file descriptor. What is written before an error stays written."""

    def __init__(
        self,
        descriptor: int,
        *,
        width: int,
        height: int,
        fps: float,
        recipe: dict[str, Any] | None = None,
        sound: Track | None = None,
    ) -> None:
        check_pipe(width, height)
        self.num_frames = 0
        self._shape = (height, width, 3)
        with self._errors():
            spec = VideoSpec(width, height, exact_rate(fps))
            self._writer = EncodedWriter(MP4, descriptor, spec, as_json(recipe), sound)

    def write(self, frames: np.ndarray) -> None:
        """Append frames. Raises MediaError, also if the reader has gone."""
        assert frames.shape[1:] == self._shape and frames.dtype == np.uint8, (frames.shape, frames.dtype)
        with self._errors():
            for frame in frames:
                self._writer.write(frame)
                self.num_frames += 1

    def close(self, recipe: dict[str, Any] | None = None) -> str:
        """Write what is left. recipe: not used; it stands at the front."""
        with self._errors():
            if self.num_frames == 0:
                raise MediaError(f"{NAME}: there are no frames to write")
            self._writer.complete()
        return NAME

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with media_errors("standard output"):
            yield

    def __enter__(self) -> PipeSink:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.discard()
