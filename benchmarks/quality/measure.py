"""Measures what a clip shows: background, colour, shape and motion, read off its frames alone.

The thing is what differs from the background (the median of the frame's border). Its colour is the median of the
pixels that differ most; its shape is the drawn shape that overlaps best at equal area, centre and best angle; its
motion is read from the path of its centroid, its area and its angle over the first second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastvid.benchmarks.quality.clips import BACKGROUNDS, COLOURS, SHAPES, shape_distance

FARTHEST = 1.25  # radii from a shape's centre to its farthest corner
SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5}


@dataclass(frozen=True)
class Measured:
    """What a clip shows. `path` [F, 2]: the centroid, in shares of width and height; `area` [F]: of the frame."""

    background: str
    colour: str
    shape: str
    motion: str
    path: np.ndarray
    area: np.ndarray


def nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    """The name whose RGB value is nearest."""
    return min(names, key=lambda name: float(np.sum((colour - np.array(names[name])) ** 2)))


def cover(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background colour, the thing's colour, and its share [H, W] of every pixel of one frame [H, W, 3]."""
    pixels = frame.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    distance = np.sqrt(((pixels - background) ** 2).sum(-1))
    strong = distance > max(24.0, 0.6 * np.percentile(distance, 99.5))
    if strong.sum() < 8:
        return background, background, np.zeros(distance.shape)
    colour = np.median(pixels[strong], axis=0)
    axis = colour - background
    share = ((pixels - background) @ axis / (axis @ axis)).clip(0, 1)
    return background, colour, share


def _overlap(mask: np.ndarray, cx: float, cy: float, shape: str, angles: list[float], area: float) -> float:
    """Intersection over union of a mask [H, W] with a drawn shape of the same centre and area, at the best angle."""
    unit = {"circle": math.pi, "square": 4 * 0.88**2, "triangle": 1.299 * 1.18**2, "star": 1.836 * 1.0}[shape]
    radius = math.sqrt(area / unit)
    reach = FARTHEST * radius + 1  # nothing is drawn farther from the centre
    top, bottom = max(0, math.floor(cy - reach)), math.ceil(cy + reach) + 1
    left, right = max(0, math.floor(cx - reach)), math.ceil(cx + reach) + 1
    near = mask[top:bottom, left:right]
    h, w = near.shape
    y = (torch.arange(h).view(1, -1, 1) + top + 0.5 - cy) / radius
    x = (torch.arange(w).view(1, 1, -1) + left + 0.5 - cx) / radius
    turn = torch.tensor(angles).view(-1, 1, 1)
    distance = shape_distance(shape, x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin())
    drawn = (0.5 - distance * radius).clamp(0, 1).numpy()
    unions = np.maximum(near, drawn).sum((1, 2)) + mask.sum() - near.sum()
    return float((np.minimum(near, drawn).sum((1, 2)) / unions).max())


def fit_shape(mask: np.ndarray, spins: bool = True) -> tuple[str, dict[str, float]]:
    """The best fitting shape of a mask [H, W] and every shape's overlap."""
    area = float(mask.sum())
    if area < 8:
        return "none", {}
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    cx, cy = float((x * mask).sum() / area), float((y * mask).sum() / area)
    scores = {}
    for shape in SHAPES:
        n = SYMMETRY[shape]
        angles = [2 * math.pi / n * k / 8 for k in range(8)] if n and spins else [0.0]
        scores[shape] = _overlap(mask, cx, cy, shape, angles, area)
    return max(scores, key=scores.get), scores


def turned(masks: list[np.ndarray], shape: str) -> float:
    """How far the outline turned between neighbouring frames, in radians, by the phase of its n-fold moment."""
    n = SYMMETRY.get(shape, 0)
    if not n:
        return 0.0
    phases = []
    for mask in masks:
        y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
        area = max(float(mask.sum()), 1e-6)
        z = (x - (x * mask).sum() / area) + 1j * (y - (y * mask).sum() / area)
        phases.append(np.angle((mask * z**n).sum()))
    steps = np.angle(np.exp(1j * np.diff(phases)))
    return float(steps.sum() / n)


def classify_motion(path: np.ndarray, area: np.ndarray, turned: float) -> str:
    """Names the motion from the centroid's path [F, 2], the area [F] and the angle turned (radians)."""
    if area.min() <= 0:
        return "lost"
    growth = math.log(area[-3:].mean() / area[:3].mean())
    dx, dy = path[-1] - path[0]
    if abs(growth) > 0.5 and max(abs(dx), abs(dy)) < 0.25:
        return "growing" if growth > 0 else "shrinking"
    if max(abs(dx), abs(dy)) > 0.15:
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    return "spinning" if abs(turned) > 0.6 else "standing still"


@dataclass(frozen=True)
class Trace:
    """Of every frame: background and colour, the thing's share of every pixel, its centroid [F, 2] and area [F]."""

    backgrounds: list[np.ndarray]
    colours: list[np.ndarray]
    masks: list[np.ndarray]
    path: np.ndarray
    area: np.ndarray


def traced(frames: np.ndarray) -> Trace:
    """Where the thing is: uint8 frames [F, H, W, 3]."""
    backgrounds, colours, masks = zip(*map(cover, frames), strict=True)
    size = np.array(frames.shape[2:0:-1])
    path = np.full((len(frames), 2), 0.5)
    for i, m in enumerate(masks):
        if m.sum() > 0:
            y, x = np.mgrid[: m.shape[0], : m.shape[1]] + 0.5
            path[i] = np.array([(x * m).sum(), (y * m).sum()]) / m.sum() / size
    return Trace(list(backgrounds), list(colours), list(masks), path, np.array([m.mean() for m in masks]))


def measure(frames: np.ndarray, fps: float = 16) -> Measured:
    """Measures a clip: uint8 frames [F, H, W, 3]."""
    trace = traced(frames)
    masks, area, path = trace.masks, trace.area, trace.path
    votes = [fit_shape(m)[0] for m in masks[:: max(1, len(masks) // 6)]]
    shape = max(set(votes), key=votes.count)
    second = slice(0, round(fps) + 1)
    return Measured(
        background=nearest(np.median(trace.backgrounds, axis=0), BACKGROUNDS),
        colour=nearest(np.median(trace.colours, axis=0), COLOURS),
        shape=shape,
        motion=classify_motion(path[second], area[second], turned(masks[second], shape)),
        path=path,
        area=area,
    )


def same_motion(shape: str, wanted: str, shown: str) -> bool:
    """Whether a motion is right; a circle that spins looks like one that stands still."""
    if shape == "circle" and wanted == "spinning":
        return shown == "standing still"
    return wanted == shown
