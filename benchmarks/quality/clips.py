"""Draws captioned clips: "a {colour} {shape} {motion} on a {background} background".

The world is defined in seconds and in fractions of the frame, so that a motion is well defined at any size and
length: speeds are per second, and what moves or grows turns at its limits. Shapes are drawn from signed distances,
anti-aliased over one pixel. Shapes of tensors: frames [F, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLOURS = {
    "red": (230, 25, 25),
    "green": (20, 170, 40),
    "blue": (30, 60, 230),
    "yellow": (245, 225, 30),
    "purple": (135, 30, 175),
    "orange": (250, 140, 20),
    "cyan": (30, 215, 225),
    "pink": (250, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = (
    "moving right",
    "moving left",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "standing still",
    "spinning",
)
BACKGROUNDS = {
    "white": (248, 248, 248),
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "navy": (16, 20, 72),
    "beige": (226, 206, 168),
}

FPS = 16
SPEED = 0.38  # of the frame's width or height, per second
RADIUS = 0.20  # of the shorter side; moving, still and spinning things
RADIUS_RANGE = (0.12, 0.38)  # growing and shrinking things turn at these
GROWTH = 0.13  # of the shorter side, per second
TURN = math.pi / 2  # radians per second
START_SPREAD = 0.08  # how far from its starting border, as a share of the frame, a thing may begin

DIRECTIONS = {"moving right": (1, 0), "moving left": (-1, 0), "moving up": (0, -1), "moving down": (0, 1)}


@dataclass(frozen=True)
class Scene:
    """One clip: what its caption says, and where in its motion it begins.

    `phase` is the time in seconds since the motion's own beginning; `along`, `across` place the thing in the frame.
    """

    colour: str
    shape: str
    motion: str
    background: str
    along: float = 0.0  # 0..1, share of START_SPREAD for things that move, of the free range for others
    across: float = 0.5  # 0..1, share of the free range across the motion
    phase: float = 0.0

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"


def random_scene(generator: torch.Generator, mid_stream: bool = False) -> Scene:
    """A random scene; with `mid_stream` it begins anywhere in its motion, after turns too."""

    def pick(names: tuple[str, ...] | list[str]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator))]

    along, across, phase = torch.rand(3, generator=generator).tolist()
    scene = Scene(pick(list(COLOURS)), pick(SHAPES), pick(MOTIONS), pick(list(BACKGROUNDS)), along, across)
    return replace(scene, phase=phase * 6.0) if mid_stream else scene


def bounce(position: Tensor, low: float, high: float) -> Tensor:
    """Folds an unbounded position into [low, high], turning at both ends."""
    span = high - low
    return low + span - ((position - low) % (2 * span) - span).abs()


def path(scene: Scene, frames: int, height: int, width: int, fps: float = FPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, y (pixels), radius (pixels) and angle (radians) of the thing in every frame, each [F]."""
    t = scene.phase + torch.arange(frames, dtype=torch.float64) / fps
    side = min(height, width)
    radius = torch.full_like(t, RADIUS)
    low, high = RADIUS_RANGE
    if scene.motion == "growing":
        radius = bounce(low + 0.02 * scene.along + GROWTH * t, low, high)
    elif scene.motion == "shrinking":
        radius = bounce(high - 0.02 * scene.along - GROWTH * t, low, high)
    centre = []
    dx, dy = DIRECTIONS.get(scene.motion, (0, 0))
    for direction, size, free in ((dx, width, scene.along), (dy, height, scene.across)):
        margin = RADIUS * side / size
        if scene.motion in ("growing", "shrinking"):
            margin = 0.45
        span = 1 - 2 * margin
        if direction:
            travelled = START_SPREAD * scene.along + SPEED * t
            x = bounce(margin + travelled, margin, 1 - margin)
            x = x if direction > 0 else 1 - x
        else:
            share = scene.across if dx or dy else free
            x = torch.full_like(t, margin + span * share)
        centre.append(x * size)
    angle = TURN * t if scene.motion == "spinning" else torch.zeros_like(t)
    return centre[0], centre[1], radius * side, angle


def _polygon_distance(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a simple polygon, negative inside (after Quilez, "2D distance functions")."""
    best = torch.full_like(x, math.inf)
    sign = torch.ones_like(x)
    previous = corners[-1]
    for corner in corners:
        ex, ey = previous[0] - corner[0], previous[1] - corner[1]
        wx, wy = x - corner[0], y - corner[1]
        share = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        best = torch.minimum(best, (wx - ex * share) ** 2 + (wy - ey * share) ** 2)
        above, below = y >= corner[1], y < previous[1]
        left = ex * wy > ey * wx
        flip = (above & below & left) | (~above & ~below & ~left)
        sign = torch.where(flip, -sign, sign)
        previous = corner
    return sign * best.sqrt()


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    radii = [1.0, inner] * points
    angles = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


# Corners for a unit radius: sized so that all shapes cover a similar extent.
_CORNERS = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(1.18 * x, 1.18 * y) for x, y in _star(3, 0.5)[::2]],
    "star": [(1.22 * x, 1.22 * y) for x, y in _star(5, 0.42)],
}


def shape_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the shape of unit radius around the origin, negative inside."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - 1.0
    return _polygon_distance(x, y, _CORNERS[shape])


def draw(scene: Scene, frames: int, height: int, width: int, fps: float = FPS) -> Tensor:
    """Draws a scene: float32 frames [F, 3, H, W] in [-1, 1]."""
    cx, cy, radius, angle = (v.float().view(-1, 1, 1) for v in path(scene, frames, height, width, fps))
    y = torch.arange(height).view(1, -1, 1) + 0.5 - cy
    x = torch.arange(width).view(1, 1, -1) + 0.5 - cx
    cos, sin = angle.cos(), angle.sin()
    distance = shape_distance(scene.shape, (x * cos + y * sin) / radius, (y * cos - x * sin) / radius) * radius
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    colour = torch.tensor(COLOURS[scene.colour]).view(1, 3, 1, 1) / 127.5 - 1
    background = torch.tensor(BACKGROUNDS[scene.background]).view(1, 3, 1, 1) / 127.5 - 1
    return background + cover * (colour - background)
