"""The limits of requests, and checks of single arguments: type, NaN, range; errors name the nearest valid value.

Every check is `check(name, value) -> converted value` and raises InvalidRequest. This module imports neither numpy nor
torch; it recognizes their scalars, arrays and tensors by their attributes.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NoReturn

from fastvid.errors import InvalidRequest

MIN_SIDE, MAX_SIDE = 64, 2048
MAX_VIDEO = (1920, 1080)  # or 1080x1920; a single frame may have both sides up to MAX_SIDE
MAX_FRAMES = 1 << 17
MAX_STEPS = 1000
MAX_SHOTS = 1000
MAX_SEED = 2**63 - 1
MIN_FPS, MAX_FPS = 0.1, 240.0
MAX_PROMPT = 100_000  # characters
SOLVERS = ("unipc", "euler", "dpm++", "redraw")
SCHEDULES = ("windows", "staggered")
BUDGETS = {"240p": (416, 240), "360p": (640, 360), "480p": (832, 480), "720p": (1280, 720), "1080p": (1920, 1080)}

Check = Callable[[str, Any], Any]


def shown(value: Any) -> str:
    """A short form of any value, for error messages."""
    if isinstance(value, int) and abs(value) >= 10**21:  # Python refuses to print very long numbers
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, Fraction)):
        return str(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:50]!r}... ({len(value)} characters)"
    if hasattr(value, "shape"):
        return f"{value!s:.40}" if tuple(value.shape) == () else f"<{type(value).__name__} {tuple(value.shape)}>"
    return f"<{type(value).__name__}>"


def refuse(name: str, value: Any, allowed: str, nearest: Any = None) -> NoReturn:
    hint = "" if nearest is None else f"; the nearest is {nearest}"
    raise InvalidRequest(f"{name}={shown(value)}: allowed is {allowed}{hint}")


def _is_scalar(value: Any) -> bool:
    """True for Python and numpy numbers and tensors without dimensions; False for booleans of any library."""
    if isinstance(value, (bool, str, bytes)) or "bool" in type(value).__name__ + str(getattr(value, "dtype", "")):
        return False
    return not getattr(value, "ndim", 0) and (hasattr(value, "__index__") or hasattr(value, "__float__"))


def _as_number(name: str, value: Any, allowed: str) -> int | float:
    """An int stays exact (seeds pass 2**53); everything else becomes a float. Refuses NaN."""
    if not _is_scalar(value):
        refuse(name, value, allowed)
    for convert in (operator.index, float):
        try:
            converted = convert(value)
        except Exception:  # foreign objects may raise anything
            continue
        return converted if converted == converted else refuse(name, converted, allowed)
    refuse(name, value, allowed)


def whole(low: int, high: int, unit: str = "") -> Callable[[str, Any], int]:
    """A check for integers from low to high."""
    allowed = f"a whole number from {low} to {high}{unit}"

    def check(name: str, value: Any) -> int:
        converted = _as_number(name, value, allowed)
        if not low <= converted <= high:
            refuse(name, converted, allowed, low if converted < low else high)
        if converted != int(converted):
            refuse(name, converted, allowed, round(converted))
        return int(converted)

    return check


def number(low: float, high: float, unit: str = "") -> Callable[[str, Any], float]:
    allowed = f"a number from {low:g} to {high:g}{unit}"

    def check(name: str, value: Any) -> float:
        converted = _as_number(name, value, allowed)
        if not low <= converted <= high:
            refuse(name, converted, allowed, f"{low if converted < low else high:g}")
        return float(converted)

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(name, value, "one string")
    if len(value) > MAX_PROMPT:
        refuse(name, value, f"at most {MAX_PROMPT} characters", f"its first {MAX_PROMPT}")
    if "\0" in value:
        refuse(name, value, "text without NUL characters", "the same without them")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        refuse(name, value, f"valid Unicode (character {error.start} is half of a surrogate pair)")
    return str(value)


def one_of(names: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            refuse(name, value, "one of " + ", ".join(names))
        if value not in names:
            refuse(name, value, "one of " + ", ".join(names), nearest_name(value, names))
        return str(value)

    return check


def sigmas(name: str, value: Any) -> tuple[float, ...]:
    """Descending noise levels in (0, 1], without the final zero, which the sampler adds."""
    allowed = f"1 to {MAX_STEPS} numbers in (0, 1], each below the one before, without the final zero"
    if isinstance(value, (str, bytes, dict)) or getattr(value, "ndim", 1) != 1 or not hasattr(value, "__len__"):
        refuse(name, value, allowed)
    if not 1 <= len(value) <= MAX_STEPS:
        raise InvalidRequest(f"{name} has {len(value)} values: allowed is {allowed}")
    levels = [_as_number(f"{name}[{i}]", level, allowed) for i, level in enumerate(value)]
    for i, level in enumerate(levels):
        if not 0 < level <= 1 or (i > 0 and level >= levels[i - 1]):
            refuse(f"{name}[{i}]", level, allowed)
    return tuple(float(level) for level in levels)


def folder(name: str, value: Any) -> Any:
    """The name of a folder."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in str(value):
        raise InvalidRequest(f"{name}={value!r:.60}: give the name of a folder, such as job.ckpt")
    return value


def tensor(name: str, value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        refuse(name, value, "a tensor or a numpy array")
    return value


def picture(name: str, value: Any) -> Any:
    """A file, an array or a Pillow image; its contents are checked when it is read."""
    array = hasattr(value, "shape") and hasattr(value, "dtype")
    if not array and not hasattr(value, "convert") and not isinstance(value, (str, os.PathLike)):
        refuse(name, value, "a file, a uint8 RGB array [H, W, 3] or a Pillow image")
    return value


def clip(name: str, value: Any) -> Any:
    """A file, an array, a Video, or pictures; its contents are checked when it is read."""
    if isinstance(value, (list, tuple)):
        if not value:
            refuse(name, value, "one frame or more")
        return tuple(picture(f"{name}[{i}]", one) for i, one in enumerate(value))
    kinds = ("frames", "shape", "convert", "__fspath__")
    if not isinstance(value, str) and not any(hasattr(value, kind) for kind in kinds):
        refuse(name, value, "a file, an array [F, H, W, 3] (a mask: [F, H, W]), a Video or pictures")
    return value


def pictures(name: str, value: Any) -> tuple[Any, ...]:
    """One picture or several."""
    if not isinstance(value, (list, tuple)):
        value = list(value) if getattr(value, "ndim", 0) == 4 else [value]
    if not value:
        refuse(name, value, "one picture or more (left out: none)")
    return tuple(picture(f"{name}[{i}]", one) for i, one in enumerate(value))


def scale(name: str, value: Any) -> float | tuple[float, ...]:
    """A number, or a sequence with one for each layer."""
    check = number(-100.0, 100.0)
    if not isinstance(value, (list, tuple)) and getattr(value, "ndim", 0) != 1:
        return check(name, value)
    return tuple(check(f"{name}[{i}]", one) for i, one in enumerate(value))


def keyframes(name: str, value: Any) -> dict[int, Any]:
    """{frame: picture}."""
    if not isinstance(value, dict) or not value:
        refuse(name, value, "a dict of frames and pictures, such as {8: 'middle.png'}")
    index = whole(0, MAX_FRAMES - 1)
    return {index(f"{name} frame", frame): picture(f"{name}[{frame}]", one) for frame, one in value.items()}


def shots(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """((prompt, seconds), ...)."""
    allowed = 'a list such as [("a red circle", 2.0), ("a blue star", 1.5)]'
    if not isinstance(value, (list, tuple)) or not value or len(value) > MAX_SHOTS:
        refuse(name, value, f"{allowed}, of 1 to {MAX_SHOTS} shots")
    if not all(isinstance(shot, (list, tuple)) and len(shot) == 2 for shot in value):
        refuse(name, value, allowed)
    long = number(1 / MAX_FPS, MAX_FRAMES / MIN_FPS, " seconds")
    return tuple((text(f"{name}[{i}]", p), long(f"{name}[{i}] seconds", s)) for i, (p, s) in enumerate(value))


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        refuse(name, value, "True or False")
    return value


def aspect(name: str, value: Any) -> Fraction:
    """Width divided by height, as "16:9" or a number."""
    allowed = 'width:height such as "16:9", between 1:32 and 32:1'
    try:
        parts = [float(part) for part in value[:60].split(":")] if isinstance(value, str) else [value]
        numbers = [Fraction(_as_number(name, part, allowed)) for part in parts]
        ratio = numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
    except (ValueError, OverflowError, ZeroDivisionError):  # not a number, infinite, ":0"
        refuse(name, value, allowed)
    if len(numbers) > 2 or not Fraction(1, 32) <= ratio <= 32:
        refuse(name, value, allowed)
    return ratio.limit_denominator(1000)  # 16 / 9 as a float is 16:9


def budget(name: str, value: Any) -> int:
    """An area in pixels, by its common name or as a number."""
    if isinstance(value, str) and value.lower() in BUDGETS:
        return math.prod(BUDGETS[value.lower()])
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, str):
        refuse(name, value, f"one of {', '.join(BUDGETS)}, or a number of pixels", nearest_name(value, tuple(BUDGETS)))
    return whole(MIN_SIDE**2, MAX_SIDE**2, " pixels")(name, value)


def size(name: str, value: Any) -> tuple[int, int]:
    """(width, height) of "832x480"."""
    parts = value.lower().replace("×", "x").split("x") if isinstance(value, str) and len(value) < 40 else []
    if len(parts) != 2 or not all(p.strip().isdecimal() for p in parts):
        refuse(name, value, 'widthxheight in pixels, such as "832x480"')
    return int(parts[0]), int(parts[1])


NEAR = 0.7
"""How alike two names are, of 0 to 1, from which on one may be meant for the other."""


def nearest_name(given: str, names: tuple[str, ...]) -> str:
    return max(names, key=lambda name: difflib.SequenceMatcher(None, given[:60].lower(), name).ratio())


def near_name(given: str, names: tuple[str, ...]) -> str:
    """The nearest name if it may be what was meant: more than a misspelling or two apart it is no help, and "" is
    returned."""
    near = nearest_name(given, names)
    return near if difflib.SequenceMatcher(None, given[:60].lower(), near).ratio() >= NEAR else ""


# ---------------------------------------------------------------- sizes and counts


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
