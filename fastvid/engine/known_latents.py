"""The latents of a segment's known frames, for models that take them as latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastvid.engine import pixels
from fastvid.engine.pixels import KnownFrames
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment

LEAD_IN = 4
"""Latent frames of stills put before a clip that is encoded as if in the middle of a stream. The clip's first latent
then differs from the one encoded in mid-stream by 29 % of its norm with one still latent, by 12 % with four, and by no
less with more (embedded model's VAE). The difference was not visible in videos (6 clips extended to the left, 6
blends)."""


def lead_in(segment: Segment) -> int:
    """Pixel frames that encode to LEAD_IN latent frames."""
    return 1 + (LEAD_IN - 1) * segment.temporal


def known_latents(model: Model, segment: Segment, known: KnownFrames) -> Iterator[tuple[int, Tensor]]:
    """(first column, latents) of every run of known columns."""
    if known.left is not None:
        yield segment.lead, pixels.encode_stream(model, pixels.pad(known.left, segment), segment)
    if known.right is not None:
        # A causal VAE encodes a stream's first latents differently, so stills precede the clip and are cut off again.
        stills = np.repeat(known.right[:1], lead_in(segment), axis=0)
        latents = pixels.encode_stream(model, pixels.pad(np.concatenate((stills, known.right)), segment), segment)
        yield segment.columns - segment.right_columns, latents[:, :, LEAD_IN:]
    by_column: dict[int, list[tuple[int, np.ndarray]]] = {}
    for frame, picture in sorted(known.pictures.items()):
        by_column.setdefault(segment.picture_column(frame), []).append((segment.skip + frame, picture))
    for column, pictures in by_column.items():
        yield column, _still(model, segment, column, pictures)


def _still(model: Model, segment: Segment, column: int, pictures: list[tuple[int, np.ndarray]]) -> Tensor:
    """The latent of a column with some known frames; its other frames repeat the nearest known one. The first column,
    and that of a picture behind the video, are one frame each."""
    if column == segment.lead or (segment.tail and column == segment.columns - 1):
        return pixels.encode_stream(model, pixels.fit(pictures[0][1][None], segment), segment)
    first = (column - segment.lead - 1) * segment.temporal + 1
    frames = [_nearest(pictures, frame) for frame in range(first, first + segment.temporal)]
    stills = torch.cat([pixels.fit(frame[None], segment) for frame in (frames[0], *frames)])
    return pixels.encode_stream(model, stills, segment)[:, :, 1:]


def _nearest(pictures: list[tuple[int, np.ndarray]], frame: int) -> np.ndarray:
    return min(pictures, key=lambda one: abs(one[0] - frame))[1]
