"""Numbers of 8 and 16 bits: from fp32 as the hardware rounds, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def bf16_of(x: F32) -> NDArray[np.uint16]:
    """To nearest, ties to even; NaN is 0x7FFF."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f16_of(x: F32) -> NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_f16(bits: NDArray[np.uint16]) -> F32:
    return bits.view(np.float16).astype(np.float32)


def _e4m3_values() -> F32:
    made = []
    for code in range(128):
        exponent, fraction = code >> 3, code & 7
        made.append((8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9)
    made[127] = np.nan
    return np.array([*made, *(-value for value in made)], np.float32)


E4M3 = _e4m3_values()


def e4m3_of(x: F32) -> NDArray[np.uint16]:
    """Codes; what is beyond 448 becomes it, NaN 0x7F."""
    size = np.abs(x).astype(np.float64)
    _, exponent = np.frexp(np.maximum(size, 2.0**-6))
    step = np.ldexp(1.0, exponent - 4)
    rounded = np.minimum(np.rint(size / step) * step, 448)
    codes = np.searchsorted(E4M3[:127], rounded.astype(np.float32))
    return np.where(np.isnan(x), 0x7F, codes | np.signbit(x) << 7).astype(np.uint16)


def from_e4m3(codes: NDArray[np.uint8]) -> F32:
    return E4M3[codes]


def from_e5m2(codes: NDArray[np.uint8]) -> F32:
    """The upper byte of fp16."""
    return from_f16(codes.astype(np.uint16) << 8)


def from_s8(codes: NDArray[np.uint8]) -> F32:
    return codes.view(np.int8).astype(np.float32)


# kind of a product's factor -> (bytes, from bits)
FACTORS = {"bf16": (2, from_bf16), "f16": (2, from_f16), "e4m3": (1, from_e4m3), "s8": (1, from_s8)}
