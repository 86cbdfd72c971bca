"""What drives a character in a segment: its picture, the skeletons and the face of the frames, and what else is known
of them (the segment before, a background). For models whose way is DRIVEN.

Shapes: F frames of the segment's stream, H/W its height and width, S side of the face encoder's pictures.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvid.engine import pixels
from fastvid.engine.pixels import KnownFrames
from fastvid.media.images import resize
from fastvid.models.loaded import Model
from fastvid.models.wan import animate_conditioning
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment

NO_FACE = -1.0  # every pixel of the face that the negative prompt's branch sees


class Driving(NamedTuple):
    """channels: [1, 4 + C, 1 + T, h, w], behind the noisy latents. pose: latents [1, C, T, h, w]. face: [1, 3, F, S, S]
    in [-1, 1], on the host."""

    channels: Tensor
    pose: Tensor
    face: Tensor

    def arguments(self, negative: bool) -> dict[str, Tensor]:
        """What the transformer's context takes; for the negative prompt's branch, a face of one frame."""
        face = torch.full_like(self.face[:, :, :1], NO_FACE) if negative else self.face
        return {"pose": self.pose, "face": face}


def prepare(model: Model, request: Resolved, segment: Segment, known: KnownFrames) -> Driving:
    """What drives a segment, encoded on the model's device. known: the last frames of the segment before."""
    encode = partial(pixels.encode, model, segment=segment)
    first, count = segment.source_start - segment.skip, segment.model_frames
    side = model.face_side
    pose = encode(_stream(pixels.fit(clip_frames(request.pose_video, first, count), segment)))
    face = _stream(pixels.fit_pictures(torch.from_numpy(clip_frames(request.face_video, first, count)), side, side))
    frames, mask = known_video(request, segment, known)
    character = pixels.pad(letterboxed(request.image, segment.height, segment.width)[None], segment)
    channels = animate_conditioning.animate_condition(
        encode, character, _stream(frames), mask, temporal=segment.temporal
    )
    return Driving(channels, pose, face)


def known_video(request: Resolved, segment: Segment, known: KnownFrames) -> tuple[Tensor, Tensor]:
    """What is known of a segment's frames: pixels [F, 3, H, W] in [-1, 1], 0 where nothing is, and where [F, H, W], 1
    for pixels that stay. Of a character that replaces a person, all but the person is known."""
    first, count = segment.source_start - segment.skip, segment.model_frames
    size, kind = (segment.model_height, segment.model_width), torch.float32
    if request.mode == "replace":
        frames = pixels.fit(clip_frames(request.background_video, first, count), segment)
        masks = request.mask_video[back_and_forth(first, count, len(request.mask_video))]
        mask = 1 - (pixels.fit(masks[..., None], segment)[:, 0] + 1) / 2
    else:
        frames, mask = torch.zeros(count, 3, *size, dtype=kind), torch.zeros(count, *size, dtype=kind)
    if known.left is not None:
        frames[: len(known.left)], mask[: len(known.left)] = pixels.pad(known.left, segment), 1
    return frames, mask


def back_and_forth(first: int, count: int, length: int) -> np.ndarray:
    """The frames of a clip of `length` that stand for frames first to first + count - 1 of a video: from the clip's end
    it runs back to its start, and so on."""
    if length == 1:
        return np.zeros(count, np.int64)
    place = np.arange(first, first + count) % (2 * length - 2)
    return np.minimum(place, 2 * length - 2 - place)


def clip_frames(clip: Any, first: int, count: int) -> np.ndarray:
    """Frames first to first + count - 1 of a video, uint8 [count, h, w, 3], from a clip that may be shorter."""
    places = back_and_forth(first, count, len(clip))
    start = int(places.min())
    frames: np.ndarray = clip.read(start, int(places.max()) + 1)[places - start]
    return frames


def letterboxed(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] scaled (bilinear) to fit into height x width, with black around it."""
    tall, wide = picture.shape[:2]
    narrow = wide * height <= width * tall
    h, w = height if narrow else max(1, tall * width // wide), max(1, wide * height // tall) if narrow else width
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2 - h // 2, width // 2 - w // 2
    canvas[top : top + h, left : left + w] = resize(picture, h, w, "bilinear")
    return canvas


def _stream(frames: Tensor) -> Tensor:
    """Frames [F, 3, H, W] as a video [1, 3, F, H, W]."""
    return frames.transpose(0, 1)[None]
