"""The clip that an edit starts from, as the latents and masks of a segment's windows; encoded as windows get to it, so
that memory does not grow with its length.

Shapes: C channels, t columns of a window, h/w latent height and width, H/W the height and width that come out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.device.precision import ieee_fp32
from fastvid.engine import pixels
from fastvid.engine.pixels import Known
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment


class SourceClip:
    """A segment's source. mask: uint8 [F or 1, H, W], 255 where something shall change, or None for everywhere."""

    def __init__(self, parts: Model, segment: Segment, known: Known, mask: np.ndarray | None) -> None:
        self.parts, self.segment, self.known, self.mask = parts, segment, known, mask
        self._encoded: Tensor | None = None  # columns from _first on
        self._first, self._cache = 0, None
        self.head: Tensor | None = None  # the first column

    @torch.no_grad()
    def latents(self, start: int, stop: int, forget: bool = True) -> Tensor:
        """The clean latents [1, C, t, h, w] of these columns. forget: those before `start`, which a window has left."""
        end = self._first + (0 if self._encoded is None else self._encoded.shape[2])
        with ieee_fp32():
            while end < stop:
                frames = pixels.pad(self.frames(*self._frames_of(end)), self.segment).transpose(0, 1)[None]
                frames = frames.to(self.parts.device, self.parts.vae_dtype)
                made, self._cache = self.parts.vae.encode(frames, self._cache, bands=self.parts.bands)
                self.head = made[:, :, :1] if self.head is None else self.head
                self._encoded = made if self._encoded is None else torch.cat((self._encoded, made), dim=2)
                end += made.shape[2]
        if forget and self._encoded is not None and start > self._first:
            self._encoded, self._first = self._encoded[:, :, start - self._first :], start
        return self._encoded[:, :, start - self._first : stop - self._first]

    def _frames_of(self, column: int) -> tuple[int, int]:
        """The stream's frames that a column holds."""
        column -= self.segment.lead
        stop = column * self.segment.temporal + 1
        return max(0, stop - self.segment.temporal), stop

    def frames(self, start: int, stop: int) -> np.ndarray:
        """The stream's frames, uint8 [n, H, W, 3]: what stands before it, then the clip, its last frame held."""
        left = self.known.left
        before = [] if left is None or start >= len(left) else [left[start:stop]]
        first = max(start, self.segment.left) - self.segment.skip + self.segment.source_start
        count = stop - max(start, self.segment.left)
        if count <= 0:
            return before[0]
        clip: Any = self.segment.source
        frames = clip.read(min(first, clip.num_frames - 1), min(first + count, clip.num_frames))
        held = [frames[-1:]] * (count - len(frames))
        return np.concatenate((*before, frames, *held))

    def places(self, start: int, stop: int, patch: int = 2) -> Tensor:
        """Where nothing changes in these columns: bool [1, 1, t, h, w]. A token is known if all of its pixels in all of
        its frames are."""
        side = self.segment.spatial * patch
        found = []
        for column in range(start, stop):
            changed = self.changed_pixels(*self._frames_of(column))
            found.append(F.max_pool2d(changed, side)[:, 0].amax(0) == 0)
        tokens = torch.stack(found)
        return tokens.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[None, None].to(self.parts.device)

    def changed(self, start: int, stop: int) -> np.ndarray:
        """What shall change in the stream's frames: bool [n, H, W]."""
        return self.masks(start, stop) > 127

    def masks(self, start: int, stop: int) -> np.ndarray:
        """The mask of the stream's frames, uint8 [n, H, W]; the clip's last one held, as its frame is."""
        picks = np.arange(start, stop) - self.segment.skip + self.segment.source_start
        return self.mask[picks.clip(0, len(self.mask) - 1)]

    def changed_pixels(self, start: int, stop: int) -> Tensor:
        """The same on frames as the model makes them: fp32 [n, 1, made_height, made_width], 1 where it changes."""
        changed = torch.from_numpy(self.changed(start, stop).astype(np.float32))[:, None]
        right, bottom = self.segment.made_width - self.segment.width, self.segment.made_height - self.segment.height
        return F.pad(changed, (0, right, 0, bottom), mode="replicate") if right or bottom else changed

    def keep(self, made: np.ndarray, start: int) -> np.ndarray:
        """Frames that come out [n, H, W, 3], from number `start` on, with the clip's own pixels where it stays."""
        first = self.segment.skip + start
        changed = self.changed(first, first + len(made))
        return np.where(changed[..., None], made, self.frames(first, first + len(made)))
