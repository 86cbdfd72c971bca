"""Pictures, clips and masks as callers give them, and what is known of a segment: uint8 arrays, laid on a
segment's frames, encoded.

Shapes: H/W height and width as given, F frames; made_height, made_width and T latent frames of the segment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.engine.decode import decode_chunk
from fastvid.errors import InvalidRequest
from fastvid.media.clip import open_clip
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


def picture(name: str, value: Any) -> np.ndarray:
    """A picture, uint8 RGB [H, W, 3]: a file (of a video its first frame), an array, a tensor or a Pillow image.

    Raises MediaError for a file that can't be read, InvalidRequest for something that is no picture. An array is
    copied: what the caller does to it later is not seen.
    """
    if len(getattr(value, "shape", (0, 0, 0))) != 3:
        raise InvalidRequest(f"{name} is {value.dtype} {list(value.shape)}; it must be uint8 RGB [H, W, 3]")
    with open_clip(value, name=name) as found:
        return found.read(0, 1)[0]


def clip(name: str, value: Any) -> np.ndarray:
    """A clip, uint8 RGB [F, H, W, 3]: a file, an array, a tensor, a `Video`, or pictures of one size. Raises as
    `picture` does."""
    if len(getattr(value, "shape", (0, 0, 0, 0))) != 4:
        raise InvalidRequest(f"{name} is {value.dtype} {list(value.shape)}; it must be uint8 RGB [F, H, W, 3]")
    with open_clip(value, name=name) as found:
        return found.read()


def mask(name: str, value: Any) -> np.ndarray:
    """A mask, uint8 [F, H, W], 255 is white: a file, an array or tensor (bool, or uint8 from 0 to 255) [F, H, W] or
    [H, W], with RGB behind it or not, a Pillow image, or a list of such pictures. F is 1 for a picture.

    Of colours the first channel counts, as in diffusers. Raises as `picture` does.
    """
    if isinstance(value, list | tuple):
        return _stacked(name, [mask(f"{name}[{i}]", one)[0] for i, one in enumerate(value)])
    array = clip(name, value) if isinstance(value, str | os.PathLike) else _array(value)
    kind, shape = array.dtype, list(array.shape)
    if array.ndim > 2 and array.shape[-1] in (1, 3):
        array = array[..., 0]
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or kind not in (np.uint8, np.bool_) or 0 in array.shape:
        raise InvalidRequest(f"{name} is {kind} {shape}; it must be bool, or uint8 0 and 255, [F, H, W] or [H, W]")
    if kind == np.bool_:
        return array.astype(np.uint8) * 255
    if array.max() == 1:
        raise InvalidRequest(f"{name} holds 0 and 1 as uint8, where white is 255; give it as bool, or times 255")
    return np.ascontiguousarray(array)


def _array(value: Any) -> np.ndarray:
    """A copy: what the caller does to it later is not seen, and torch wants memory that can be written to."""
    if hasattr(value, "convert"):  # Pillow's
        value = value.convert("RGB")
    return np.array(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _stacked(name: str, pictures: list[np.ndarray]) -> np.ndarray:
    sizes = {one.shape[:2] for one in pictures}
    if len(sizes) != 1:
        raise InvalidRequest(f"{name} has pictures of {sorted(sizes)} (H, W); one or more of one size are needed")
    return np.stack(pictures)


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
