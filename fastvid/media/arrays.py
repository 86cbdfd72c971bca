"""Pictures and clips in memory: arrays, tensors and Pillow images. Finds their layout and range, and refuses what could
be read in two ways.

Layouts are named by their dimensions: F frames, H/W height and width, C channels (1 gray, 3 RGB, 4 RGBA). Ranges: uint8
0 to 255, bool, and floating point 0 to 1 or -1 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastvid.checks import guarded, is_pillow, tensor
from fastvid.errors import InvalidRequest
from fastvid.media.files import MIN_INPUT_SIDE
from fastvid.media.images import pillow_pixels

CHANNELS = (1, 3, 4)
CANDIDATES = {2: ("HW",), 3: ("HWC", "CHW", "FHW"), 4: ("FHWC", "FCHW", "CFHW")}  # by the number of dimensions
HALF_LEVEL = 0.5 / 255  # tolerance of a range: rounding errors of resized or half-precision pictures
CLEARLY_SIGNED = -0.25  # a lowest value between this and 0 may be the overshoot of a resized picture in 0 to 1


def as_array(value: Any, name: str) -> np.ndarray:
    """Arrays, tensors and Pillow images as numpy arrays, the first two without copying."""
    return _pillow_array(name, value) if is_pillow(value) else _plain_array(name, tensor(name, value))


@guarded("a Pillow image that can be read")
def _pillow_array(name: str, image: Any) -> np.ndarray:
    return pillow_pixels(image, name)


@guarded("a uint8 array [F, H, W, 3] that can be read")
def _plain_array(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    array: np.ndarray = tensor(name, np.asarray(value))
    return array


# ---------------------------------------------------------------- layout


def layout_of(shape: tuple[int, ...], name: str, picture: bool = False) -> str:
    """The layout of an array. picture: whether it holds one frame. Raises InvalidRequest for a shape that is none of
    `CANDIDATES`, or two of them: [3, H, W] is a picture with its channels first, or three gray frames."""
    found = [layout for layout in CANDIDATES.get(len(shape), ()) if _fits(layout, shape, picture)]
    large = [layout for layout in found if min(_sides(layout, shape)) >= MIN_INPUT_SIDE]
    found = large or found[:1]  # too small a picture is refused later, by its size
    single = [layout for layout in found if "F" not in layout or shape[layout.index("F")] == 1]
    if len(found) > 1 and shape[0] == 1:  # all of them are one frame, or one is a batch of one
        found = single[:1]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidRequest(f"{name} has shape {list(shape)}; it must be {wanted(picture)}")
    raise InvalidRequest(
        f"{name} has shape {list(shape)}, whose first dimension may count channels or frames; give {wanted(picture)}, "
        "with channels last"
    )


def wanted(picture: bool) -> str:
    return f"uint8 RGB {'' if picture else '[F, H, W, 3] or '}[H, W, 3] (or gray, or RGBA)"


def _fits(layout: str, shape: tuple[int, ...], picture: bool) -> bool:
    sizes = dict(zip(layout, shape, strict=True))
    return 0 not in shape and sizes.get("C", 1) in CHANNELS and (not picture or sizes.get("F", 1) == 1)


def _sides(layout: str, shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[layout.index("H")], shape[layout.index("W")]


def in_order(array: np.ndarray, layout: str) -> np.ndarray:
    """A view [F, H, W, C] of an array of this layout."""
    array = array.transpose([layout.index(letter) for letter in "FHWC" if letter in layout])
    array = array if "F" in layout else array[None]
    return array if "C" in layout else array[..., None]


def as_frames(array: np.ndarray, name: str, picture: bool = False) -> np.ndarray:
    """A view [F, H, W, C] of an array of any layout; a batch of one is taken for what is in it."""
    if array.ndim == 5 and len(array) == 1:
        array = array[0]
    if array.dtype.kind not in "fb" and array.dtype != np.uint8:
        raise InvalidRequest(f"{name} is {array.dtype} {list(array.shape)}; it must be {wanted(picture)}")
    return in_order(array, layout_of(array.shape, name, picture))


# ---------------------------------------------------------------- range


def is_signed(arrays: Iterable[np.ndarray], name: str) -> bool:
    """Whether floating point frames are in -1 to 1 rather than in 0 to 1. All arrays belong together.

    Raises InvalidRequest for other ranges, for a range that may be either, and for uint8 frames that hold 0 and 1
    alone, where white is 255.
    """
    low, high, most = 0.0, 0.0, 0
    for array in arrays:
        if array.dtype.kind == "f":
            least, greatest = float(array.min()), float(array.max())
            if not (np.isfinite(least) and np.isfinite(greatest)):
                raise InvalidRequest(f"{name} holds NaN or infinity; its values must be in 0 to 1 (or -1 to 1)")
            low, high = min(low, least), max(high, greatest)
        elif array.dtype == np.uint8 and most <= 1:
            most = max(most, int(array.max()))
    if most == 1:
        raise InvalidRequest(f"{name} holds 0 and 1 as uint8, where white is 255; give it as bool, or times 255")
    if low < -1 - HALF_LEVEL or high > 1 + HALF_LEVEL:
        raise InvalidRequest(
            f"{name} is floating point from {low:g} to {high:g}; its range must be 0 to 1 or -1 to 1, or uint8 0 to 255"
        )
    if CLEARLY_SIGNED < low < -HALF_LEVEL:
        raise InvalidRequest(
            f"{name} is floating point from {low:g} to {high:g}, which may be a part of -1 to 1 or of 0 to 1; give "
            "uint8 0 to 255, or values in 0 to 1"
        )
    return low < -HALF_LEVEL


def to_uint8(frame: np.ndarray, signed: bool) -> np.ndarray:
    """A frame of any dtype as uint8. signed: see `is_signed`."""
    if frame.dtype == np.uint8:
        return frame
    if frame.dtype == np.bool_:
        return frame.astype(np.uint8) * np.uint8(255)
    frame = frame.astype(np.float32 if frame.dtype == np.float16 else frame.dtype)
    return np.rint((frame + 1) * 127.5 if signed else frame * 255).clip(0, 255).astype(np.uint8)
