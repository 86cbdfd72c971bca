"""Frames between known ones: what the model makes is held to the known frames, in pixels.

A latent frame of a causal VAE is several frames, of which only some are known, so the known ones cannot be put into the
latents. Instead the model's prediction of the clean video is decoded in every step, the known frames are put back, what
decoding and model got wrong on them is taken off the frames between them, and the result is encoded again. The decoded
video gets the same, so that the known frames come out as they are.

Shapes: C channels, t columns (latent frames) of a window, n frames, H/W their height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fastvid.engine import pixels
from fastvid.engine.decode import decode_chunk, decode_rgb
from fastvid.engine.source_clip import SourceClip
from fastvid.ops.upload import upload
from fastvid.requests.after import Between
from fastvid.requests.timeline import Segment
from fastvid.sampling.guidance import Denoise


def corrected(frames: np.ndarray, start: int, known: Mapping[int, np.ndarray]) -> np.ndarray:
    """Frames [n, H, W, 3], the first of them number `start`, with the known ones in place. What they differ by is
    added to the frames between, in proportion to their distance."""
    numbers = sorted(n for n in known if start <= n < start + len(frames))
    if not numbers:
        return frames
    off = {n: known[n].astype(np.float32) - frames[n - start] for n in numbers}
    out = frames.copy()
    for index in range(len(frames)):
        number = start + index
        left = max((n for n in numbers if n <= number), default=numbers[0])
        right = min((n for n in numbers if n >= number), default=numbers[-1])
        share = 0.0 if left == right else (number - left) / (right - left)
        added = off[left] if share == 0 else (1 - share) * off[left] + share * off[right]
        out[index] = known[number] if number in off else (frames[index] + added).round().clip(0, 255)
    return out


def keep_frames(denoise: Denoise, clip: SourceClip, start: int) -> Denoise:
    """`denoise`, except that x0 shows the clip's known frames. start: the window's first column."""

    def held(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoise(x, sigma)
        free = upload(sigma > 0, x0.device).view(1, 1, -1, 1, 1)
        return torch.where(free, _put_back(x0, clip, start).to(x0), x0)

    return held


def _put_back(x0: Tensor, clip: SourceClip, start: int) -> Tensor:
    """A window's clean latents [1, C, t, h, w] with the known frames in them."""
    model, segment = clip.model, clip.segment
    # A window's first column decodes to one frame, the last of those that it stands for; only at the start it is free.
    first, cache, made = start * segment.temporal, None, []
    for chunk in x0.float().split(decode_chunk(segment), dim=2):
        frames, cache = decode_rgb(model, chunk, cache, 1, cache is not None)
        made.append(frames[0].cpu().numpy())
    whole = np.concatenate(made)
    size = segment.height, segment.width
    whole[:, : size[0], : size[1]] = corrected(whole[:, : size[0], : size[1]], first, known_in(clip, first, len(whole)))
    return pixels.encode_stream(model, pixels.to_signed(torch.from_numpy(whole)), segment)


def known_in(clip: SourceClip, start: int, count: int) -> dict[int, np.ndarray]:
    """The clip's known frames by number in the segment's stream."""
    segment = clip.segment
    assert isinstance(segment.source, Between)
    offset = segment.source_start - segment.skip
    found = segment.source.known(start + offset, start + offset + count)
    return {number - offset: frame for number, frame in found.items()}


class KnownBetween:
    """Puts a clip's frames among the decoded ones (the interface of `decode.KnownFrameBlend`). Frames wait for the next
    known one."""

    def __init__(self, clip: SourceClip) -> None:
        self._clip, self._segment = clip, clip.segment
        self._held: list[np.ndarray] = []
        self._next = 0  # number of the first frame that is held

    @property
    def last(self) -> int:
        """The last frame that must be decoded."""
        return self._segment.skip + self._segment.num_frames - 1

    def put(self, frames: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, int]]:
        """Takes the next decoded frames [n, H, W, 3]; yields those that are final, with the number of the first."""
        if not self._held:
            self._next = start
        self._held.extend(frames)
        stop = self._next + len(self._held)
        known = known_in(self._clip, self._next, len(self._held))
        end = stop if stop > self.last else max(known, default=self._next - 1)
        count = end - self._next  # the last known one stays, for those behind it
        if count <= 0:
            return
        out = corrected(np.stack(self._held), self._next, known)[:count]
        first, self._held, self._next = self._next, self._held[count:], end
        begin, until = self._segment.skip, self._segment.skip + self._segment.num_frames
        kept = [frame for number, frame in enumerate(out, first) if begin <= number < until]
        if kept:
            yield np.stack(kept), max(first, begin)


def encoded_again(segment: Segment, steps: int) -> int:
    """Frames that are decoded, and encoded, in the steps of a segment."""
    return segment.model_frames * steps if isinstance(segment.source, Between) else 0
