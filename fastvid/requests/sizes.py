"""Sizes and counts of frames: their limits, and the nearest size of an aspect ratio and an area."""

from __future__ import annotations

import math
from fractions import Fraction

from fastvid.checks import BUDGETS, MAX_FRAMES, MAX_SIDE, MAX_VIDEO, MIN_SIDE
from fastvid.errors import InvalidRequest


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check_frames(count: int, source: str) -> None:
    """Raises InvalidRequest for a frame count out of range. source: the arguments that led to it, for the message, such
    as "seconds=0.001 at 16 fps"."""
    if not 1 <= count <= MAX_FRAMES:
        shown_count = count if count <= 10**20 else "more than 10^20"
        raise InvalidRequest(
            f"{source} is {shown_count} frames: allowed is 1 to {MAX_FRAMES}; "
            f"the nearest is num_frames={1 if count < 1 else MAX_FRAMES}"
        )


def check_size(width: int, height: int, num_frames: int) -> None:
    """Raises InvalidRequest for a video larger than 1920x1080 or 1080x1920, or one frame larger than 2048x2048."""
    limit = (MAX_SIDE, MAX_SIDE) if num_frames == 1 else MAX_VIDEO
    limit = limit if width >= height else limit[::-1]
    if width > limit[0] or height > limit[1]:
        raise InvalidRequest(
            f"{width}x{height} with {num_frames} frames: allowed is up to 1920x1080 or 1080x1920 for a video, "
            f"{MAX_SIDE}x{MAX_SIDE} for one frame; the nearest is {min(width, limit[0])}x{min(height, limit[1])}"
        )


def nearest_size(
    ratio: Fraction, area: int, num_frames: int, multiple: int = 16, *, may_exceed: bool = False
) -> tuple[int, int]:
    """The (width, height) nearest to an aspect ratio (width / height) and an area in pixels, within that area.

    Sides are multiples of `multiple`, or those of a common format with exactly this ratio (1080 is not a multiple of
    16). Nearest minimizes |log error| of the area plus twice |log error| of the aspect ratio. The area may be
    exceeded with `may_exceed`, or if even the smallest sides exceed it.
    """
    longest, shortest = (MAX_SIDE, MAX_SIDE) if num_frames == 1 else MAX_VIDEO
    sides = range(round_up(MIN_SIDE, multiple), longest + 1, multiple)
    sizes = [(side, near) for side in sides for near in _multiples_near(side / ratio, sides)]
    sizes += [(near, side) for side in sides for near in _multiples_near(side * ratio, sides)]
    sizes += [pair for w, h in BUDGETS.values() for pair in ((w, h), (h, w)) if Fraction(*pair) == ratio]
    sizes = [pair for pair in sizes if max(pair) <= longest and min(pair) <= shortest]
    within = [] if may_exceed else [pair for pair in sizes if math.prod(pair) <= area]
    return min(within or sizes, key=lambda pair: _size_error(pair, ratio, area))


def _multiples_near(length: Fraction, sides: range) -> set[int]:
    below = int(length) // sides.step * sides.step
    return {min(max(side, sides[0]), sides[-1]) for side in (below, below + sides.step)}


def _size_error(pair: tuple[int, int], ratio: Fraction, area: int) -> float:
    width, height = pair
    return abs(math.log(width * height / area)) + 2 * abs(math.log(width / height / ratio))
