"""The limits of requests, and checks of single arguments: type, NaN, range; errors name the nearest valid value.

Every check is `check(name, value) -> converted value` and raises InvalidRequest, whatever a foreign object raises when
it is looked at; messages show values cut. There is one check for each kind of value, which every public function uses.
This module imports neither numpy nor torch; it recognizes their scalars, arrays and tensors by their attributes.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn, TypeVar

from fastvid.errors import Error, InvalidRequest

MIN_SIDE, MAX_SIDE = 64, 2048
MAX_VIDEO = (1920, 1080)  # or 1080x1920; a single frame may have both sides up to MAX_SIDE
MAX_FRAMES = 1 << 17
MAX_STEPS = 1000
MAX_SHOTS = 1000
MAX_PICTURES = 1000  # reference pictures, LoRAs, control layers
MAX_SEED = 2**63 - 1
MIN_FPS, MAX_FPS = 0.1, 240.0
MAX_PROMPT = 100_000  # characters
MAX_PATH, MAX_NAME = 4095, 255  # of a path and of a name in it: characters, bytes
SOLVERS = ("unipc", "euler", "dpm++", "redraw")
SCHEDULES = ("windows", "staggered")
BUDGETS = {"240p": (416, 240), "360p": (640, 360), "480p": (832, 480), "720p": (1280, 720), "1080p": (1920, 1080)}

Check = Callable[[str, Any], Any]
T = TypeVar("T")


# ---------------------------------------------------------------- messages


def shown(value: Any) -> str:
    """A short form of any value, for error messages. Never raises."""
    try:
        return _shown(value)
    except Exception:  # a foreign object may raise anything
        return f"<{_type_name(value)}>"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):  # Python refuses to print very long numbers
        return str(int(value)) if abs(value) < 10**21 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return str(float(value))
    if isinstance(value, Fraction):
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        return str(value) if bits < 140 else f"a fraction of {bits} bits"
    if isinstance(value, str):
        plain = str.__str__(value)
        return repr(plain) if len(plain) <= 60 else f"{plain[:50]!r}... ({len(plain)} characters)"
    if isinstance(value, Decimal):
        return f"{value!s:.40}"
    if isinstance(value, os.PathLike):
        return _shown(str(os.fspath(value)))
    if hasattr(value, "shape"):
        return f"{value!s:.40}" if tuple(value.shape) == () else f"<{_type_name(value)} {tuple(value.shape)!s:.60}>"
    return f"<{_type_name(value)}{f' of {len(value)}' if isinstance(value, list | tuple | dict) else ''}>"


def _type_name(value: Any) -> str:
    return f"{type.__dict__['__name__'].__get__(type(value)):.60}"


def refuse(name: str, value: Any, allowed: str, nearest: Any = None) -> NoReturn:
    hint = "" if nearest is None else f"; the nearest is {nearest}"
    raise InvalidRequest(f"{name}={shown(value)}: allowed is {allowed}{hint}")


def nearest_name(given: str, names: Iterable[str]) -> str:
    return max(names, key=lambda name: difflib.SequenceMatcher(None, given[:60].lower(), name).ratio())


NEAR = 0.7
"""How alike two names are, of 0 to 1, from which on one may be meant for the other."""


def near_name(given: str, names: Iterable[str]) -> str:
    """The nearest name if it may be what was meant: more than a misspelling or two apart it is no help, and "" is
    returned."""
    near = nearest_name(given, names)
    return near if difflib.SequenceMatcher(None, given[:60].lower(), near).ratio() >= NEAR else ""


def guarded(allowed: str) -> Callable[[Callable[[str, Any], T]], Callable[[str, Any], T]]:
    """A check in which whatever else is raised (by a foreign object's methods) refuses the value. allowed: what is."""

    def decorate(check: Callable[[str, Any], T]) -> Callable[[str, Any], T]:
        @functools.wraps(check)
        def guard(name: str, value: Any) -> T:
            try:
                return check(name, value)
            except Error:
                raise
            except Exception:
                pass
            refuse(name, value, allowed)  # out here, so that the error holds no other, which would hold the value

        return guard

    return decorate


# ---------------------------------------------------------------- numbers


_REAL_DTYPE = re.compile(r"(torch\.|[<>=|])?(u?int|b?float|[iuf])\d")


def _is_scalar(value: Any) -> bool:
    """True for Python and numpy numbers and tensors without dimensions; False for booleans of any library, complex
    numbers and dates."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, (bool, str, bytes, bytearray)) or (dtype is not None and not _REAL_DTYPE.match(str(dtype))):
        return False
    return not getattr(value, "ndim", 0) and (hasattr(value, "__index__") or hasattr(value, "__float__"))


def _as_number(name: str, value: Any, allowed: str) -> int | float:
    """An int if the value is whole (seeds pass 2**53), else a float, infinite if it is out of a float's range. Refuses
    NaN."""
    if not _is_scalar(value):
        refuse(name, value, allowed)
    try:
        return int(operator.index(value))
    except Exception:  # not an integer type, or a foreign object's own error
        pass
    try:
        approximate = float(value)
    except OverflowError:
        approximate = math.inf if value > 0 else -math.inf
    if approximate != approximate:
        refuse(name, approximate, allowed)
    if abs(approximate) < 2.0**65 and (exact := int(value)) == value:
        return exact
    return approximate


def whole(low: int, high: int, unit: str = "") -> Callable[[str, Any], int]:
    """A check for integers from low to high."""
    allowed = f"a whole number from {low} to {high}{unit}"

    @guarded(allowed)
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

    @guarded(allowed)
    def check(name: str, value: Any) -> float:
        converted = _as_number(name, value, allowed)
        if not low <= converted <= high:
            refuse(name, converted, allowed, f"{low if converted < low else high:g}")
        return float(converted)

    return check


@guarded("True or False")
def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if "bool" in str(getattr(value, "dtype", "")) and not value.ndim:  # numpy's and torch's
        return bool(value)
    refuse(name, value, "True or False")


# ---------------------------------------------------------------- text


@guarded("one string")
def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(name, value, "one string")
    plain = str.__str__(value)
    if len(plain) > MAX_PROMPT:
        refuse(name, plain, f"at most {MAX_PROMPT} characters", f"its first {MAX_PROMPT}")
    if "\0" in plain:
        refuse(name, plain, "text without NUL characters", "the same without them")
    try:
        plain.encode()
    except UnicodeEncodeError as error:
        refuse(name, plain, f"valid Unicode (character {error.start} is half of a surrogate pair)")
    return plain


def one_of(names: Iterable[str]) -> Callable[[str, Any], str]:
    """A check for one of these names."""
    names = tuple(names)
    listed = ", ".join(names)
    allowed = "one of " + (listed if len(listed) <= 160 else f"{listed[:150].rpartition(', ')[0]}, ... ({len(names)})")

    @guarded(allowed)
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            refuse(name, value, allowed)
        plain = str.__str__(value)
        if plain not in names:
            refuse(name, plain, allowed, nearest_name(plain, names))
        return plain

    return check


_PATHS = "the name of a file or folder, such as clip.mp4 or job.ckpt"


@guarded(_PATHS)
def path(name: str, value: Any) -> str:
    """The name of a file or folder, as text. Looks at no file."""
    if not is_path(value):
        refuse(name, value, _PATHS)
    plain = os.fspath(value)
    plain = os.fsdecode(plain) if isinstance(plain, bytes) else str.__str__(plain)
    if not plain or "\0" in plain:
        refuse(name, plain, f"{_PATHS}, not empty and without NUL characters")
    if len(plain) > MAX_PATH:
        refuse(name, plain, f"{_PATHS}, of at most {MAX_PATH} characters")
    try:
        longest = max(map(len, os.fsencode(plain).split(os.fsencode(os.sep))))
    except UnicodeEncodeError as error:
        refuse(name, plain, f"valid Unicode (character {error.start} is half of a surrogate pair)")
    return plain if longest <= MAX_NAME else refuse(name, plain, f"{_PATHS}, each part of at most {MAX_NAME} bytes")


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


# ---------------------------------------------------------------- pictures, clips, tensors

_ARRAYS = "a tensor or a numpy array of real numbers, with its data"
_PICTURES = "a file, a uint8 RGB array [H, W, 3] or a Pillow image"
_CLIPS = "a file, an array [F, H, W, 3] (a mask: [F, H, W]), a Video or pictures"


def is_array(value: Any) -> bool:
    """Whether this is an array or a tensor, of any library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_pillow(value: Any) -> bool:
    """Whether this is a Pillow image; without importing Pillow, which is imported if it is one."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


@guarded(_ARRAYS)
def tensor(name: str, value: Any) -> Any:
    """An array or tensor of real numbers or booleans, with its data in memory, in rows and columns."""
    if not is_array(value) or not all(int(side) >= 0 for side in value.shape):
        refuse(name, value, _ARRAYS)
    plain = str(value.dtype)
    layout, device = str(getattr(value, "layout", "")), getattr(getattr(value, "device", None), "type", "")
    if layout not in ("", "torch.strided") or device == "meta":
        kind = "without data" if device == "meta" else layout.removeprefix("torch.")
        refuse(name, value, f"{_ARRAYS}; this tensor is {kind.replace('_', ' ')}")
    if not _REAL_DTYPE.match(plain) and plain not in ("bool", "torch.bool"):
        refuse(name, value, f"{_ARRAYS}; this is of {plain:.40}")
    return value


@guarded(_PICTURES)
def picture(name: str, value: Any) -> Any:
    """A file, an array or a Pillow image; its contents are checked when it is read."""
    if is_path(value):
        return path(name, value)
    if is_pillow(value):
        return value
    if not is_array(value):
        refuse(name, value, _PICTURES)
    return tensor(name, value)


@guarded(_CLIPS)
def clip(name: str, value: Any) -> Any:
    """A file, an array, a Video, or pictures; its contents are checked when it is read."""
    if is_list(value):
        return _pictures(name, items(name, value, f"one picture or more, at most {MAX_FRAMES}", MAX_FRAMES))
    if is_path(value) or is_pillow(value) or is_array(value):
        return picture(name, value)
    if not hasattr(value, "fps") or not (hasattr(value, "frames") or hasattr(value, "read")):
        refuse(name, value, _CLIPS)
    return value


# ---------------------------------------------------------------- several values


def is_list(value: Any) -> bool:
    """Whether this is a list of any kind. Text and bytes are none, and neither are arrays and tensors."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def items(name: str, value: Any, allowed: str, most: int, least: int = 1) -> list[Any]:
    """A list of `least` to `most` things, as a new list."""
    if not is_list(value) or not least <= len(value) <= most:
        refuse(name, value, allowed)
    made = list(itertools.islice(value, most + 1))
    return made if least <= len(made) <= most else refuse(name, value, allowed)


def entries(name: str, value: Any, allowed: str, most: int) -> Iterator[tuple[Any, Any]]:
    """The keys and values of a mapping of 1 to `most`; no more of one that says less than it has."""
    if not isinstance(value, Mapping) or not 1 <= len(value) <= most:
        refuse(name, value, allowed)
    return itertools.islice(value.items(), most)


@guarded("one picture or more")
def pictures(name: str, value: Any) -> tuple[Any, ...]:
    """One picture or several."""
    allowed = f"one picture or more, at most {MAX_PICTURES}"
    if is_list(value):
        return _pictures(name, items(name, value, allowed, MAX_PICTURES))
    if is_path(value) or getattr(value, "ndim", 0) != 4:
        return _pictures(name, [value])
    return _pictures(name, list(value) if 1 <= len(value) <= MAX_PICTURES else refuse(name, value, allowed))


def _pictures(name: str, value: list[Any]) -> tuple[Any, ...]:
    return tuple(picture(f"{name}[{i}]", one) for i, one in enumerate(value))


@guarded("a number, or a list of numbers")
def scale(name: str, value: Any) -> float | tuple[float, ...]:
    """A number, or a sequence with one for each layer."""
    check = number(-100.0, 100.0)
    if not is_list(value) and getattr(value, "ndim", 0) != 1:
        return check(name, value)
    if len(value) > MAX_PICTURES:
        refuse(name, value, f"at most {MAX_PICTURES} numbers")
    return tuple(check(f"{name}[{i}]", one) for i, one in enumerate(value))


_SIGMAS = f"1 to {MAX_STEPS} numbers in (0, 1], each below the one before, without the final zero"


@guarded(_SIGMAS)
def sigmas(name: str, value: Any) -> tuple[float, ...]:
    """Descending noise levels in (0, 1], without the final zero, which the sampler adds."""
    if not is_list(value) and getattr(value, "ndim", 0) != 1:
        refuse(name, value, _SIGMAS)
    if not 1 <= len(value) <= MAX_STEPS:
        raise InvalidRequest(f"{name} has {len(value)} values: allowed is {_SIGMAS}")
    levels = [_as_number(f"{name}[{i}]", level, _SIGMAS) for i, level in enumerate(value)]
    for i, level in enumerate(levels):
        if not 0 < level <= 1 or (i > 0 and level >= levels[i - 1]):
            refuse(f"{name}[{i}]", level, _SIGMAS)
    return tuple(float(level) for level in levels)


_frame = whole(0, MAX_FRAMES - 1)
_KEYFRAMES = "a dict of frames and pictures, such as {8: 'middle.png'}"


@guarded(_KEYFRAMES)
def keyframes(name: str, value: Any) -> dict[int, Any]:
    """{frame: picture}."""
    made: dict[int, Any] = {}
    for given, one in entries(name, value, _KEYFRAMES, MAX_FRAMES):
        frame = _frame(f"{name} frame", given)
        if frame in made:
            refuse(f"{name} frame", frame, "each frame once")
        made[frame] = picture(f"{name}[{frame}]", one)
    return made


_SHOTS = f'a list such as [("a red circle", 2.0), ("a blue star", 1.5)], of 1 to {MAX_SHOTS} shots'


@guarded(_SHOTS)
def shots(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """((prompt, seconds), ...)."""
    listed = items(name, value, _SHOTS, MAX_SHOTS)
    if not all(is_list(shot) and len(shot) == 2 for shot in listed):
        refuse(name, value, _SHOTS)
    long = number(1 / MAX_FPS, MAX_FRAMES / MIN_FPS, " seconds")
    return tuple((text(f"{name}[{i}]", p), long(f"{name}[{i}] seconds", s)) for i, (p, s) in enumerate(listed))


# ---------------------------------------------------------------- sizes as they are given

_ASPECT = 'width:height such as "16:9", between 1:32 and 32:1'


@guarded(_ASPECT)
def aspect(name: str, value: Any) -> Fraction:
    """Width divided by height, as "16:9" or a number."""
    parts = [float(part) for part in value.split(":")] if isinstance(value, str) and len(value) <= 60 else [value]
    numbers = [Fraction(_as_number(name, part, _ASPECT)) for part in parts]  # raises for infinity
    ratio = numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
    if len(numbers) > 2 or not Fraction(1, 32) <= ratio <= 32:
        refuse(name, value, _ASPECT)
    return ratio.limit_denominator(1000)  # 16 / 9 as a float is 16:9


@guarded(f"one of {', '.join(BUDGETS)}, or a number of pixels")
def budget(name: str, value: Any) -> int:
    """An area in pixels, by its common name or as a number."""
    if isinstance(value, str) and value.lower() in BUDGETS:
        return math.prod(BUDGETS[value.lower()])
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, str):
        refuse(name, value, f"one of {', '.join(BUDGETS)}, or a number of pixels", nearest_name(value, BUDGETS))
    return whole(MIN_SIDE**2, MAX_SIDE**2, " pixels")(name, value)


@guarded('widthxheight in pixels, such as "832x480"')
def size(name: str, value: Any) -> tuple[int, int]:
    """(width, height) of "832x480"."""
    parts = value.lower().replace("×", "x").split("x") if isinstance(value, str) and len(value) < 40 else []
    if len(parts) != 2 or not all(p.strip().isdecimal() for p in parts):
        refuse(name, value, 'widthxheight in pixels, such as "832x480"')
    return int(parts[0]), int(parts[1])
