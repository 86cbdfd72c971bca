"""Known frames of a segment as pixels: reads them from neighboring segments and clips, places them in the segment's
stream of frames, and encodes them. Also prepares pictures for the VAE, a control branch and CLIP.

Shapes: H/W height and width of the input, F frames; model_height x model_width frames and T latent frames of the
segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.engine import finite
from fastvid.engine.decode import decode_chunk
from fastvid.media.images import resize
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Edge, Segment


@dataclass(frozen=True)
class KnownFrames:
    """The known frames of a segment: uint8 [n, H, W, 3] at its left and right end, and pictures [H, W, 3] by output
    frame number. after: the frame [H, W, 3] that follows the last output frame; it is the first of `right`, unless
    the model generates surplus frames between the two."""

    left: np.ndarray | None = None
    right: np.ndarray | None = None
    pictures: Mapping[int, np.ndarray] = field(default_factory=dict)
    after: np.ndarray | None = None

    def __bool__(self) -> bool:
        return self.left is not None or self.right is not None or bool(self.pictures)

    def clip_candidates(self) -> list[np.ndarray]:
        """The known frames that CLIP may see, first to last."""
        left = [] if self.left is None else [self.left[-1]]
        right = [] if self.right is None else [self.right[-1]]
        return [*left, *(self.pictures[frame] for frame in sorted(self.pictures)), *right]


class SegmentEnds:
    """The first and last frames of the finished segments, at most `most` of each: the context of their neighbors."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ends: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, number: int, frames: np.ndarray) -> None:
        """Adds the next frames [n, H, W, 3] of a segment."""
        first, last = self._ends.get(number, (frames[:0], frames[:0]))
        first = first if len(first) >= self._most else np.concatenate((first, frames))[: self._most]
        self._ends[number] = (first, np.concatenate((last, frames))[-self._most :])

    def known(self, segment: Segment) -> KnownFrames:
        """The known frames of a segment: context from its neighbors, and its pictures."""
        left = self._frames(segment.before, segment.left, before=True) if segment.left else None
        right = self._frames(segment.after, segment.right, before=False) if segment.right else None
        if right is None or segment.over == 0:
            return KnownFrames(left, right, segment.pictures, None if right is None else right[0])
        assert segment.after is not None
        after = replace(segment.after, start=segment.after.start - segment.over)
        return KnownFrames(left, right, segment.pictures, self._frames(after, 1, before=False)[0])

    def _frames(self, edge: Edge | None, count: int, before: bool) -> np.ndarray:
        """`count` frames before or after an edge; a clip's last frame is repeated past its end."""
        assert edge is not None
        if edge.segment is not None:
            first, last = self._ends[edge.segment]
            frames = last[-count:] if before else first[edge.start : edge.start + count]
        elif before:
            frames = edge.clip.read(edge.start - count, edge.start)
        else:
            end = edge.clip.num_frames
            frames = edge.clip.read(min(edge.start, end - 1), min(edge.start + count, end))
        return hold_last(frames, count)


def hold_last(frames: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last of the frames [n, H, W, 3] until there are `count`."""
    copies = [frames[-1:]] * (count - len(frames))
    return np.concatenate((frames, *copies)) if copies else frames


# ---------------------------------------------------------------- onto a segment


def fit(frames: np.ndarray, segment: Segment) -> Tensor:
    """uint8 [F, H, W, C] -> fp32 [F, C, model_height, model_width] in [-1, 1]: stretched (Lanczos) to the output size,
    then padded to the model's size by repeating the edge."""
    return widen(to_signed(torch.from_numpy(resize(frames, segment.height, segment.width))), segment)


def stretched(pictures: Mapping[int, np.ndarray], segment: Segment) -> dict[int, np.ndarray]:
    """Pictures uint8 [H, W, 3], stretched (Lanczos) to the output size as in `fit`."""
    return {frame: resize(picture, segment.height, segment.width) for frame, picture in pictures.items()}


def pad(frames: np.ndarray, segment: Segment) -> Tensor:
    """uint8 [F, height, width, C] -> fp32 [F, C, model_height, model_width] in [-1, 1]: padded, not resized."""
    return widen(to_signed(torch.from_numpy(np.array(frames))), segment)


def widen(frames: Tensor, segment: Segment) -> Tensor:
    """Pads frames [F, C, height, width] to the model's size by repeating the edge."""
    right, bottom = segment.model_width - segment.width, segment.model_height - segment.height
    return F.pad(frames, (0, right, 0, bottom), mode="replicate") if right or bottom else frames


def place(known: KnownFrames, segment: Segment, last_only: bool = False) -> dict[int, Tensor]:
    """The known frames, fp32 [3, model_height, model_width], by number in the stream. last_only: only the last of those
    on the right."""
    placed: dict[int, Tensor] = {}
    if known.left is not None:
        placed |= dict(enumerate(pad(known.left, segment)))
    for frame, picture in known.pictures.items():
        placed[segment.skip + frame] = fit(picture[None], segment)[0]
    if known.right is not None:
        frames = dict(enumerate(pad(known.right, segment), segment.model_frames - len(known.right)))
        placed |= dict([max(frames.items())]) if last_only else frames
    return placed


def encode_stream(model: Model, frames: Tensor, segment: Segment) -> Tensor:
    """Latents [1, C, T, h, w] of a stream of frames [F, 3, model_height, model_width]."""
    return encode(model, frames.transpose(0, 1)[None], segment)


def encode(model: Model, frames: Tensor, segment: Segment) -> Tensor:
    """Latents [1, C, T, h, w] of frames [1, 3, F, model_height, model_width], encoded in chunks of the decoder's
    length."""
    step, latents, cache = segment.temporal * decode_chunk(segment), [], None
    first = step - segment.temporal + 1
    rest = frames[:, :, first:]
    for chunk in (frames[:, :, :first], *(rest.split(step, dim=2) if rest.shape[2] else ())):
        encoded, cache = model.vae.encode(chunk.to(model.device, model.vae_dtype), cache, bands=model.bands)
        latents.append(encoded)
    return finite.check_encoded(torch.cat(latents, dim=2), model)


def to_signed(pictures: Tensor) -> Tensor:
    """Pictures uint8 [..., H, W, 3] -> fp32 [..., 3, H, W] in [-1, 1]."""
    return (2 * (pictures.float() / 255) - 1).movedim(-1, -3)


def fit_pictures(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures uint8 [..., H, W, 3], stretched (Lanczos) as in diffusers' pipelines: fp32 [..., 3, height, width]."""
    return to_signed(torch.from_numpy(resize(pictures.numpy(), height, width)))


def fit_reference(picture: Tensor, height: int, width: int, *, spatial: int = 8) -> Tensor:
    """A VACE reference picture uint8 [H, W, 3], scaled with its aspect ratio and centered on white: fp32 [3, height,
    width] in [-1, 1]."""
    picture = fit_pictures(picture, *(side // spatial * spatial for side in picture.shape[:2]))
    scale = min(height / picture.shape[1], width / picture.shape[2])
    h, w = int(picture.shape[1] * scale), int(picture.shape[2] * scale)
    top, left = (height - h) // 2, (width - w) // 2
    canvas = picture.new_ones(3, height, width)
    canvas[:, top : top + h, left : left + w] = F.interpolate(picture[None], (h, w), mode="bilinear")[0]
    return canvas


# OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers; the same in every published preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(pictures: Tensor, size: int = 224) -> Tensor:
    """CLIP's input for pictures uint8 [B, H, W, 3]: the center square, normalized, fp32 [B, 3, size, size].

    The shorter side is resized to `size` (bicubic, as in Pillow) and the longer one cropped, as in transformers'
    CLIPImageProcessor and diffusers; Wan's original code squeezes the whole picture into the square instead. Raises
    ValueError for another layout.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"pictures are uint8 [B, H, W, 3], not {list(pictures.shape)}")
    height, width = pictures.shape[1:3]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    pictures = torch.from_numpy(resize(pictures.numpy(), height, width, "bicubic"))
    top, left = (height - size) // 2, (width - size) // 2
    square = pictures[:, top : top + size, left : left + size]
    values = (square.double() * (1 / 255)).float()  # in fp64, then rounded, as in transformers
    return ((values - values.new_tensor(CLIP_MEAN)) / values.new_tensor(CLIP_STD)).permute(0, 3, 1, 2).contiguous()
