"""What the cases are given: pictures, clips, masks and noise. All from whole numbers or numpy's Philox.

Pictures are uint8 [H, W, 3], clips uint8 [F, H, W, 3], masks bool [H, W] or [F, H, W].
"""

from __future__ import annotations

import numpy as np
import torch

RED = "a red circle moving right on a white background"
BLUE = "a blue square moving left on a white background"
GREEN = "a green star growing on a black background"


def picture(number: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    """Smooth ramps that go up and down, another one for every number."""
    y, x = np.mgrid[:height, :width]
    planes = [(x * (2 + k + number) + y * (3 - k) + 40 * number * (k + 1)) % 512 for k in range(3)]
    return np.stack([np.minimum(plane, 511 - plane) for plane in planes], -1).astype(np.uint8)


def clip(frames: int = 9, height: int = 64, width: int = 64, color: tuple[int, int, int] = (220, 30, 30)) -> np.ndarray:
    """A disc that moves right on white, 3 pixels a frame."""
    y, x = np.mgrid[:height, :width]
    made = np.full((frames, height, width, 3), 255, np.uint8)
    for frame in range(frames):
        inside = (x - 16 - 3 * frame) ** 2 + (y - height // 2) ** 2 < 144
        made[frame][inside] = color
    return made


def still_mask(height: int = 64, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[10:44, 16:60] = True
    return mask


def moving_mask(frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    mask = np.zeros((frames, height, width), bool)
    for frame in range(frames):
        mask[frame, 8:48, 4 * frame : 4 * frame + 24] = True
    return mask


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    """Standard normal numbers, float32."""
    values = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)
