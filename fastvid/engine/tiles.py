"""Frames in tiles: a model that was trained on smaller frames sees a large one part by part. In every step the tiles'
velocities are blended where they overlap, so all tiles share one video (MultiDiffusion, arXiv 2302.08113).

Shapes: B batch, C channels, t columns (latent frames), h/w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.requests.timeline import Segment

OVERLAP = 0.25
"""Of a tile's side, that the next tile has too; at least."""
PATCH = 2

Span = tuple[int, int]


def spans(size: int, tile: int) -> list[Span]:
    """(start, stop) of tiles along a side, in latents: evenly spaced, on whole tokens."""
    if tile >= size:
        return [(0, size)]
    step = max(PATCH, int(tile * (1 - OVERLAP)))
    count = -(-(size - tile) // step)
    starts = [round(i * (size - tile) / count / PATCH) * PATCH for i in range(count + 1)]
    return [(start, start + tile) for start in starts]


def tiles_of(segment: Segment) -> list[tuple[Span, Span]]:
    """Rows and columns, in latents, of each tile of a segment; one if it is not made in tiles."""
    height, width = segment.latent_shape(1)[2:]
    if segment.tile is None:
        return [((0, height), (0, width))]
    tall, wide = (side // segment.spatial for side in segment.tile)
    return [(rows, columns) for rows in spans(height, tall) for columns in spans(width, wide)]


def words(segment: Segment) -> tuple[str, ...]:
    """What a plan says of the tiles of a segment."""
    if segment.tile is None:
        return ()
    height, width = segment.tile
    return (f"each frame is made in {len(tiles_of(segment))} tiles of {width}x{height}, which overlap",)


@dataclass(frozen=True)
class Tiled:
    """A transformer on the tiles of a segment."""

    transformer: Any
    segment: Segment

    def __call__(self, latents: Tensor, times: Tensor, context: Any, known: Tensor | None, **options: Any) -> Tensor:
        """The blended velocity [B, C, t, h, w]. times: [B, t] or [B, tokens]. known: extra channels [B, M, t, h, w]."""
        total, weights = torch.zeros_like(latents, dtype=torch.float32), torch.zeros_like(latents[:1, :1, :1])
        for rows, columns in tiles_of(self.segment):
            at = (..., slice(*rows), slice(*columns))
            own = _times(times, latents, rows, columns)
            channels = None if known is None else known[at]
            made = self.transformer(latents[at].contiguous(), own, context, known=channels, **options)
            weight = torch.outer(_ramp(rows), _ramp(columns)).to(latents)
            total[at] += made.float() * weight
            weights[at] += weight
        return (total / weights).to(latents.dtype)


def _ramp(span: Span) -> Tensor:
    """Weights along a tile's side: 1 in the middle, less towards its edges."""
    length = span[1] - span[0]
    edge = max(1, int(length * OVERLAP))
    at = torch.arange(length, dtype=torch.float32)
    return torch.minimum(torch.minimum(at + 1, length - at) / edge, torch.ones(length, dtype=torch.float32))


def _times(times: Tensor, latents: Tensor, rows: Span, columns: Span) -> Tensor:
    """The timesteps of a tile, where each token has its own."""
    _, _, count, height, width = latents.shape
    if times.shape[1] == count:
        return times
    grid = times.view(len(times), count, height // PATCH, width // PATCH)
    part = grid[:, :, rows[0] // PATCH : rows[1] // PATCH, columns[0] // PATCH : columns[1] // PATCH]
    return part.flatten(1)
