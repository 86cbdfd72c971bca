"""The source clip of an edit: its latents and masks for the windows of a segment. It is encoded window by window, so
memory does not grow with its length.

Shapes: C channels, t columns (latent frames) of a window, h/w latent height and width, H/W output height and width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.engine import finite, pixels
from fastvid.engine.pixels import KnownFrames
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment


class SourceClip:
    """A segment's source clip. mask: uint8 [F or 1, H, W], 255 where pixels may change; None: everywhere.
    first: the first column's latents, once encoded."""

    def __init__(self, model: Model, segment: Segment, known: KnownFrames, mask: np.ndarray | None) -> None:
        self.model, self.segment, self.known, self.mask = model, segment, known, mask
        self.first: Tensor | None = None
        self._columns: list[Tensor] = []  # latents of single columns; the first is column _start
        self._start = 0
        self._cache: Any = None  # the VAE's state between columns

    def latents(self, start: int, stop: int, forget: bool = True) -> Tensor:
        """The clean latents [1, C, t, h, w] of columns start to stop - 1. forget: drop the columns before `start`."""
        for column in range(self._start + len(self._columns), stop):
            frames = pixels.pad(self.frames(*self._frames_of(column)), self.segment).transpose(0, 1)[None]
            frames = frames.to(self.model.device, self.model.vae_dtype)
            latents, self._cache = self.model.vae.encode(frames, self._cache, bands=self.model.bands)
            finite.check_encoded(latents, self.model)
            self.first = latents if self.first is None else self.first
            self._columns.append(latents)
        if forget and start > self._start:
            del self._columns[: start - self._start]
            self._start = start
        return torch.cat(self._columns[start - self._start : stop - self._start], dim=2)

    def _frames_of(self, column: int) -> tuple[int, int]:
        """(start, stop) of a column's frames in the stream."""
        column -= self.segment.lead
        stop = column * self.segment.temporal + 1
        return max(0, stop - self.segment.temporal), stop

    def frames(self, start: int, stop: int) -> np.ndarray:
        """Frames of the stream, uint8 [n, H, W, 3]: the known ones on the left, then the clip, its last frame
        repeated."""
        left = self.known.left
        before = [] if left is None or start >= len(left) else [left[start:stop]]
        first = max(start, self.segment.left) - self.segment.skip + self.segment.source_start
        count = stop - max(start, self.segment.left)
        if count <= 0:
            return before[0]
        clip: Any = self.segment.source
        frames = clip.read(min(first, clip.num_frames - 1), min(first + count, clip.num_frames))
        return np.concatenate((*before, pixels.hold_last(frames, count)))

    def known_mask(self, start: int, stop: int, patch: int = 2) -> Tensor:
        """The unchanged region of these columns: bool [1, 1, t, h, w] on the CPU. A token is unchanged if all pixels of
        all its frames are."""
        side = self.segment.spatial * patch
        unchanged = []
        for column in range(start, stop):
            changed = torch.from_numpy(self.changed(*self._frames_of(column)).astype(np.float32))[:, None]
            unchanged.append(F.max_pool2d(pixels.widen(changed, self.segment), side)[:, 0].amax(0) == 0)
        tokens = torch.stack(unchanged)
        return tokens.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[None, None]

    def changed(self, start: int, stop: int) -> np.ndarray:
        """Which pixels of the stream's frames may change: bool [n, H, W]."""
        return self.masks(start, stop) > 127

    def masks(self, start: int, stop: int) -> np.ndarray:
        """The masks of the stream's frames, uint8 [n, H, W]; the last one is repeated past the end."""
        assert self.mask is not None
        indices = np.arange(start, stop) - self.segment.skip + self.segment.source_start
        return self.mask[indices.clip(0, len(self.mask) - 1)]

    def keep(self, frames: np.ndarray, start: int) -> np.ndarray:
        """Output frames [n, H, W, 3], from number `start` on, with unmasked pixels taken from the clip."""
        first = self.segment.skip + start
        changed = self.changed(first, first + len(frames))
        return np.where(changed[..., None], frames, self.frames(first, first + len(frames)))
