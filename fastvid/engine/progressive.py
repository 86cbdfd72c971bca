"""Progressive resolution: the first steps of every window are made at half the size, the others at full size.

The small stage is a draft, the full stage its finalizing: at the last small row the model's prediction of the clean
video is taken, enlarged, and noised to the level at which the full stage begins. What is known (pictures, a clip's
frames, an earlier window's columns) is scaled for the small stage and exact in the full one. Source of the idea:
Bottleneck Sampling (arXiv 2503.18940); LightX2V calls it changing resolution.

Shapes: C channels, t columns (latent frames) of a window, h/w latent height and width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.engine.conditioning import SegmentDenoiser, batched
from fastvid.engine.pixels import KnownFrames
from fastvid.media.images import resize
from fastvid.ops.upload import upload
from fastvid.requests.timeline import Segment
from fastvid.sampling.guidance import Denoise
from fastvid.sampling.noise_table import TableRow


def scaled(known: KnownFrames, small: Segment) -> KnownFrames:
    """The known frames for the small stage. Pictures are fitted to a segment anyway."""
    left, right = (None if one is None else resize(one, small.height, small.width) for one in (known.left, known.right))
    return replace(known, left=left, right=right)


def resample(latents: Tensor, height: int, width: int) -> Tensor:
    """Latents [B, C, t, h, w] at another size: bicubic, averaged where they shrink."""
    sized = F.interpolate(latents.flatten(1, 2), (height, width), mode="bicubic", antialias=True)
    return sized.unflatten(1, latents.shape[1:3])


def averaged(noise: Tensor, height: int, width: int) -> Tensor:
    """White noise [B, C, t, h, w] at a smaller size: means of its blocks, scaled back to variance 1. So the small stage
    starts towards the video that the full size would make."""
    counts = [_block_sizes(n, m) for n, m in zip(noise.shape[3:], (height, width), strict=True)]
    scale = torch.outer(*counts).sqrt().to(noise)
    return F.adaptive_avg_pool2d(noise.flatten(1, 2), (height, width)).unflatten(1, noise.shape[1:3]) * scale


def _block_sizes(size: int, parts: int) -> Tensor:
    """How many of `size` rows are in each of the blocks of an adaptive pooling."""
    at = torch.arange(parts, dtype=torch.int64)
    return (-((at + 1) * -size // parts) - at * size // parts).double()


class TwoStages:
    """The denoisers of a segment's two sizes (`fastvid.sampling.loop.Stages`)."""

    def __init__(self, full: SegmentDenoiser, small: SegmentDenoiser) -> None:
        self.full, self._small = full, small
        pairs = list(zip(full.together, small.together, strict=True))
        for one, draft in pairs:
            draft.conditions = replace(draft.conditions, embeds=one.conditions.embeds)
        if not any(one.conditions.given for one, _ in pairs):  # a text's keys and values are the same at any size
            small.share_contexts(full)
        small.levers = full.levers  # one step cache, which forgets tokens of another number
        small.kept = full.kept
        self._first: tuple[Tensor, Tensor] | None = None  # the segment's first column, and the same small

    @property
    def small_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the small latents."""
        return self._small.noise.shape

    def initial(self, start: int, stop: int) -> Tensor:
        """The columns that enter a window at full size."""
        return self.full.initial(start, stop)

    def is_small(self, latents: Tensor) -> bool:
        return latents.shape[3:] == self.small_shape[1:]

    def denoiser(self, row: TableRow, prompt: int) -> Denoise:
        """See `SegmentDenoiser.denoiser`."""
        if not row.small:
            return self.full.denoiser(row, prompt)
        self._small.first = self._small_first()
        return self._small.denoiser(row, prompt)

    def shrunk(self, row: TableRow, known: Tensor | None) -> Tensor:
        noise = averaged(self._noise(row), *self.small_shape[1:])
        return _with_known(self._small, row, noise, None if known is None else self._shrink(known))

    def grown(self, row: TableRow, clean: Tensor, known: Tensor | None) -> Tensor:
        level = upload(row.sigma, clean.device, clean.dtype).view(1, 1, -1, 1, 1)
        latents = (1 - level) * resample(clean, *self.full.noise.shape[1:]) + level * self._noise(row)
        return _with_known(self.full, row, latents, known)

    def _noise(self, row: TableRow) -> Tensor:
        return batched([one.noise.initial(row.start, row.stop) for one in self.full.together])

    def _shrink(self, latents: Tensor) -> Tensor:
        return resample(latents, *self.small_shape[1:])

    def _small_first(self) -> Tensor | None:
        if (first := self.full.first) is None:
            return None
        if self._first is None or self._first[0] is not first:
            self._first = first, self._shrink(first)
        return self._first[1]


def _with_known(stage: SegmentDenoiser, row: TableRow, latents: Tensor, known: Tensor | None) -> Tensor:
    """A window's latents with those that are known: of the segment, and of an earlier window."""
    pairs = zip(stage.together, latents.split(1), strict=True)
    latents = batched([one.with_known(row.start, row.stop, each) for one, each in pairs])
    return latents if known is None else torch.cat((known.to(latents), latents[:, :, known.shape[2] :]), dim=2)
