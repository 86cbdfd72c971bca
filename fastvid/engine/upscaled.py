"""Holds an upscaled clip to the clip: made smaller again, the result shows what the clip shows. The model makes the
detail; what it, and decoding, did to the rest is taken back (iterative back-projection, Irani and Peleg, 1991).

Shapes: n frames, H/W their height and width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastvid.media.images import resize
from fastvid.requests.after import Enlarged


def held(frames: np.ndarray, source: Enlarged, start: int) -> np.ndarray:
    """Frames uint8 [n, H, W, 3] of the result, the first of them frame `start` of the clip, with what they differ by
    from it at its own size added."""
    numbers = np.arange(start, start + len(frames)).clip(0, source.num_frames - 1)
    small = source.small
    clip = small.read(int(numbers[0]), int(numbers[-1]) + 1)[numbers - numbers[0]]
    off = clip.astype(np.float32) - resize(frames, small.height, small.width)
    added = F.interpolate(torch.from_numpy(off).movedim(-1, 1), frames.shape[1:3], mode="bicubic").movedim(1, -1)
    return (frames + added.numpy()).round().clip(0, 255).astype(np.uint8)
