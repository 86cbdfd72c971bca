"""The known frames of a segment: uint8 arrays, laid on its stream of frames and encoded.

Shapes: H/W height and width as given, F frames; made_height, made_width and T latent frames of the segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.engine.decode import decode_chunk
from fastvid.models.loaded import Model
from fastvid.models.wan import conditioning
from fastvid.ops import resample
from fastvid.requests.timeline import Segment


@dataclass(frozen=True)
class Known:
    """The known frames of a segment: uint8 [n, H, W, 3] at its left and right end, and pictures [H, W, 3] by the number
    of their frame among those that come out. after: the frame [H, W, 3] that follows what comes out: the first of
    `right`, where nothing is made between the two."""

    left: np.ndarray | None = None
    right: np.ndarray | None = None
    pictures: Mapping[int, np.ndarray] = field(default_factory=dict)
    after: np.ndarray | None = None

    def __bool__(self) -> bool:
        return self.left is not None or self.right is not None or bool(self.pictures)

    def shown(self) -> list[np.ndarray]:
        """The known pictures that say most, first to last."""
        ends = ([] if self.left is None else [self.left[-1]], [] if self.right is None else [self.right[-1]])
        return [*ends[0], *(self.pictures[frame] for frame in sorted(self.pictures)), *ends[1]]


# ---------------------------------------------------------------- onto a segment


def fit(frames: np.ndarray, segment: Segment) -> Tensor:
    """uint8 [F, H, W, C] -> fp32 [F, C, made_height, made_width] in [-1, 1]: stretched (Lanczos) to the size that was
    asked for, and the edge repeated where the model makes more."""
    # One at a time, since the sums are taken in float64.
    sized = [resample.resize(torch.from_numpy(frame), segment.height, segment.width) for frame in frames]
    return _widen(conditioning.to_signed(torch.stack(sized)), segment)


def pad(frames: np.ndarray, segment: Segment) -> Tensor:
    """uint8 [F, height, width, C] -> fp32 [F, C, made_height, made_width] in [-1, 1]: as they are."""
    return _widen(conditioning.to_signed(torch.from_numpy(np.array(frames))), segment)


def _widen(frames: Tensor, segment: Segment) -> Tensor:
    right, bottom = segment.made_width - segment.width, segment.made_height - segment.height
    return F.pad(frames, (0, right, 0, bottom), mode="replicate") if right or bottom else frames


def place(known: Known, segment: Segment, last_only: bool = False) -> dict[int, Tensor]:
    """What is known, by frame of the stream: fp32 [3, made_height, made_width]. last_only: of those on the right."""
    placed: dict[int, Tensor] = {}
    if known.left is not None:
        placed |= dict(enumerate(pad(known.left, segment)))
    for frame, one in known.pictures.items():
        placed[segment.skip + frame] = fit(one[None], segment)[0]
    if known.right is not None:
        frames = dict(enumerate(pad(known.right, segment), segment.made_frames - len(known.right)))
        placed |= dict([max(frames.items())]) if last_only else frames
    return placed


def encode_stream(parts: Model, frames: Tensor, segment: Segment) -> Tensor:
    """Latents [1, C, T, h, w] of a stream of frames [F, 3, made_height, made_width]."""
    return encode(parts, frames.transpose(0, 1)[None], segment)


def encode(parts: Model, frames: Tensor, segment: Segment) -> Tensor:
    """Latents [1, C, T, h, w] of frames [1, 3, F, made_height, made_width], as many at once as are decoded at once."""
    step, latents, cache = segment.temporal * decode_chunk(segment), [], None
    first = step - segment.temporal + 1
    rest = frames[:, :, first:]
    for chunk in (frames[:, :, :first], *(rest.split(step, dim=2) if rest.shape[2] else ())):
        made, cache = parts.vae.encode(chunk.to(parts.device, parts.vae_dtype), cache, bands=parts.bands)
        latents.append(made)
    return torch.cat(latents, dim=2)
