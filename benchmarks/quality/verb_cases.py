"""Clips for the verbs to work on, and what is measured on what they make.

A case is chosen as a user would choose one, and so that it can be done in the embedded model's world, where the speed
of everything is fixed:

- clips are drawn at 64x64, 17 frames; every other one begins in mid-stream, and every fourth is made by the model
  itself (a clip with the VAE's errors in it).
- what goes on (extend) is compared with the drawn clip's own past or future, so a thing that turns at the border
  meanwhile is right if it turns.
- a bridge of `loop` is as long as the motion needs to return to where the clip begins; so that it is between half a
  second and 20 frames, things with long periods (moving, growing) get a longer clip.
- `blend` joins two stretches of one scene with a gap between them: the bridge has to fill the gap.

Shapes: frames uint8 [F, H, W, 3]. Change is the mean absolute difference of pixels of two frames, in levels of 255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import fastvid
from fastvid.benchmarks.quality.clips import (
    DIRECTIONS,
    FPS,
    GROWTH,
    RADIUS,
    RADIUS_RANGE,
    SPEED,
    TURN,
    Scene,
    draw,
    random_scene,
)
from fastvid.benchmarks.quality.measure import Measured, Trace, cover, measure, traced, turned

CLIP, SIDE = 17, 64  # frames and pixels of an input clip
BRIDGE = (8, 20)  # frames of a loop's bridge
SEAM = 1.5  # times what is allowed anyhow
PATH = 0.10  # of the frame


# ---------------------------------------------------------------- clips


def to_uint8(clip: Tensor) -> np.ndarray:
    """[F, 3, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return ((clip + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def drawn(scene: Scene, frames: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A drawn clip."""
    return to_uint8(draw(scene, frames, height, width))


@dataclass(frozen=True)
class Case:
    """One case: its scene, seed, and the whole stretch of frames that is true around and in the clip; None where the
    clip is the model's own, of which nobody knows how it goes on."""

    scene: Scene
    seed: int
    truth: np.ndarray | None
    clip: np.ndarray


def case(pipe: fastvid.Pipeline, number: int, seed: int, before: int = 0, after: int = 0, frames: int = CLIP) -> Case:
    """Case `number`: a clip of so many frames, with so many true ones before and after it."""
    generator = torch.Generator().manual_seed(seed + number)
    scene = random_scene(generator, mid_stream=number % 2 == 1)
    if number % 4 == 2:
        return Case(scene, seed + number, None, pipe.generate(scene.caption, seed=seed + number).frames)
    truth = drawn(scene, before + frames + after)
    return Case(scene, seed + number, truth, truth[before : before + frames])


def period(scene: Scene) -> float:
    """Frames after which a scene is as it was."""
    if scene.motion in DIRECTIONS:
        return 2 * (1 - 2 * RADIUS) / SPEED * FPS
    if scene.motion in ("growing", "shrinking"):
        return 2 * (RADIUS_RANGE[1] - RADIUS_RANGE[0]) / GROWTH * FPS
    symmetry = {"square": 4, "triangle": 3, "star": 5}.get(scene.shape)
    if scene.motion == "spinning" and symmetry:
        return 2 * math.pi / symmetry / TURN * FPS
    return 1.0


def loop_lengths(scene: Scene) -> tuple[int, int]:
    """Frames of a clip and of the bridge after which the scene is back at the clip's start, as near as can be."""
    each, found = period(scene), []
    for frames in (17, 21, 25, 29, 33, 37, 41, 45, 49):
        for bridge in range(BRIDGE[0], BRIDGE[1] + 1):
            rest = (frames + bridge) / each
            found.append((round(abs(rest - round(rest)) * each, 1) > 0.5, frames, -bridge))
    _, frames, bridge = min(found)
    return frames, -bridge


# ---------------------------------------------------------------- what a clip shows


def kind(frames: np.ndarray, shape: str) -> str:
    """How things move in a stretch of a clip, whichever way and with turns on the way: across, along (up or down),
    resizing, spinning, still; or lost. Thresholds grow with the stretch up to a second, and are under what is left of a
    motion that turns in its middle."""
    share = min(1.0, len(frames) / CLIP)
    trace = traced(frames)
    masks, area = trace.masks, trace.area
    if area.min() <= 0.003:
        return "lost"
    spans = np.ptp(trace.path, axis=0)
    smooth = np.convolve(area, np.ones(3) / 3, "valid") if len(area) > 4 else area  # outlines that waver do not grow
    growth = abs(np.log(smooth.max() / smooth.min()))
    if growth > 0.3 * share and spans.max() < 0.25 * share + 0.05 and growth > 3 * spans.max():
        return "resizing"
    if spans.max() > 0.12 * share:
        return "across" if spans[0] > spans[1] else "along"
    return "spinning" if shape != "circle" and abs(turned(masks, shape)) > 0.6 * share else "still"


def named_kind(scene: Scene) -> str:
    """The kind of motion that a caption names."""
    if scene.motion in DIRECTIONS:
        return "across" if DIRECTIONS[scene.motion][0] else "along"
    if scene.motion in ("growing", "shrinking"):
        return "resizing"
    return "spinning" if scene.motion == "spinning" and scene.shape != "circle" else "still"


def holds(scene: Scene, made: np.ndarray, truth: np.ndarray | None) -> dict[str, bool]:
    """Whether colour, background and kind of motion hold in what was made; shape beside them."""
    shown = measure(made)
    wanted = named_kind(scene) if truth is None else kind(truth, scene.shape)
    return {
        "colour": shown.colour == scene.colour,
        "background": shown.background == scene.background,
        "motion": kind(made, scene.shape) == wanted,
        "shape": shown.shape == scene.shape,
    }


def single(frame: np.ndarray) -> bool:
    """Whether a frame shows one thing: hardly anything of it lies far from its middle."""
    _, _, mask = cover(frame)
    area = mask.sum()
    if area < 8:
        return False
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    far = np.hypot(x - (x * mask).sum() / area, y - (y * mask).sum() / area) > 2.2 * math.sqrt(area / math.pi)
    return bool(mask[far].sum() < 0.1 * area)


def path_error(a: Measured | Trace, b: Measured | Trace) -> float:
    """The largest distance of two centroids at one time, in shares of the frame."""
    return float(np.abs(a.path - b.path).max())


def another(scene: Scene, number: int, kinds: tuple[str, ...] = ("colour", "shape", "colour", "background")) -> Scene:
    """The same scene with one other word: a colour in most cases, else a shape or a background."""
    what = kinds[number % len(kinds)]
    if what == "shape":
        return replace(scene, shape="square" if scene.shape == "circle" else "circle")
    if what == "background":
        return replace(scene, background="black" if scene.background in ("white", "beige") else "white")
    near = {"red": "blue", "orange": "blue", "yellow": "blue", "pink": "green", "purple": "yellow"}
    return replace(scene, colour=near.get(scene.colour, "red"))


def changed_word(old: Scene, new: Scene) -> str:
    """The trait in which two scenes differ."""
    return next(t for t in ("colour", "shape", "background") if getattr(old, t) != getattr(new, t))


# ---------------------------------------------------------------- seams and given pictures


def changes(frames: np.ndarray) -> np.ndarray:
    """Change from every frame to the next [F - 1]."""
    return np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))


def vae_error(pipe: fastvid.Pipeline, frames: np.ndarray, frame: int) -> float:
    """The VAE's mean error at a frame of a clip, in levels."""
    count = (len(frames) - 1) // 4 * 4 + 1
    first = min(max(0, frame - count + 1), len(frames) - count)
    again = pipe.decode(pipe.encode(frames[first : first + count]))
    return float(np.abs(again[frame - first].astype(int) - frames[frame].astype(int)).mean())


def seam(pipe: fastvid.Pipeline, video: np.ndarray, at: int, clip: np.ndarray, frame: int) -> float:
    """The change into frame `at` of a video, as a share of what is allowed before the factor of SEAM: the largest of
    the 95th percentile of change within the clip, the VAE's error at the clip's frame beside the seam, one level."""
    allowed = max(float(np.percentile(changes(clip), 95)), vae_error(pipe, clip, frame), 1.0)
    return float(changes(video[[at - 1, at]])[0]) / allowed


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 frames, in dB."""
    return float(-10 * np.log10(max(np.square((a.astype(float) - b) / 255).mean(), 1e-12)))


def still_db(pipe: fastvid.Pipeline, picture: np.ndarray, head: bool) -> float:
    """What the VAE alone makes of a picture: as the first frame of a stream, or held for a later latent of one."""
    frames = np.repeat(picture[None], 1 if head else 5, axis=0)
    return psnr(pipe.decode(pipe.encode(frames))[-1], picture)
