"""Colors of decoded frames: HDR (PQ, HLG) and other primaries to SDR BT.709, in linear light.

    signal -> light of the display (BT.2100; SDR: BT.1886) -> BT.709 primaries -> highlights -> signal (BT.1886)

Light is 1 at white. HDR has its white at 203 nits (BT.2408), and highlights up to 10,000 nits. Up to KNEE of the SDR
signal nothing changes; what is brighter is rolled off by Reinhard's curve, applied to the brightest of R, G and B, so
that hues stay: white at 203 nits becomes 247 of 255. Colors outside of BT.709 are clipped. Codes are those of H.273.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvid.errors import MediaError

LINEAR, PQ, HLG = 8, 16, 18
LOGARITHMIC = {9: "logarithmic (100:1)", 10: "logarithmic (316:1)", 17: "ST 428"}
BT709, UNSPECIFIED, BT2020 = 1, 2, 9
BT2020_MATRICES, BT2020_TRANSFERS = (9, 10), (14, 15)
WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}  # primaries that hold colors BT.709 does not
PRIMARIES = {  # code -> xy of red, green, blue and white
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316)),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), (0.3127, 0.3290)),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), (0.3127, 0.3290)),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), (0.3127, 0.3290)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), (0.3127, 0.3290)),
}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593])
WHITE = 203.0  # nits
HLG_PEAK, PQ_PEAK = 1000.0, 10000.0  # nits; the nominal display of HLG, whose system gamma is 1.2
GAMMA = 2.4  # BT.1886
KNEE = 0.94  # of the SDR signal
BAND = 1 << 18  # pixels converted at once


# ---------------------------------------------------------------- formulas


def pq_light(signal: np.ndarray) -> np.ndarray:
    """BT.2100's EOTF of PQ: signal 0 to 1 -> nits / WHITE."""
    root = signal ** (1 / 78.84375)
    nits = 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    return nits / WHITE


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """BT.2100's inverse OETF of HLG: signal 0 to 1 -> light of the scene, 0 to 1."""
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def to_bt709(primaries: int) -> np.ndarray:
    """The matrix [3, 3] from light in these primaries to light in BT.709's, white to white (Bradford)."""
    source, target = _to_xyz(primaries), _to_xyz(BT709)
    gains = (BRADFORD @ target.sum(1)) / (BRADFORD @ source.sum(1))
    adapted = np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD
    return np.asarray(np.linalg.inv(target) @ adapted @ source)


def _to_xyz(primaries: int) -> np.ndarray:
    """RGB to CIE XYZ (SMPTE RP 177)."""
    *colors, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in PRIMARIES[primaries])
    columns = np.stack(colors, 1)
    return np.asarray(columns * np.linalg.solve(columns, white))


def rolled_off(signal: np.ndarray, peak: float) -> np.ndarray:
    """The SDR signal of a signal that may be above 1; `peak` becomes 1 (Reinhard's extended curve, from KNEE on)."""
    x, most = (signal - KNEE) / (1 - KNEE), (peak - KNEE) / (1 - KNEE)
    return np.where(x <= 0, signal, KNEE + (1 - KNEE) * x * (1 + x / most**2) / (1 + np.maximum(x, 0)))


# ---------------------------------------------------------------- frames


def use_stated(frame: Any, stated: tuple[int, int, int]) -> None:
    """Give a frame that does not say its transfer the container's HDR (matrix, transfer, primaries): some programs
    write it there alone."""
    if int(frame.color_trc) == UNSPECIFIED and stated[1] in (PQ, HLG):
        matrix = stated[0] if int(frame.colorspace) == UNSPECIFIED else frame.colorspace
        frame.colorspace, frame.color_trc, frame.color_primaries = matrix, *stated[1:]


def check_colors(frame: Any, name: str) -> str:
    """What is to be said about a frame's colors; "" if nothing. Raises MediaError for a matrix that is not read."""
    matrix, transfer = int(frame.colorspace), int(frame.color_trc)
    if matrix in UNREAD:
        raise MediaError(f"{name} has its colors in {UNREAD[matrix]}, which is not read; convert it to BT.709 first")
    if transfer in (PQ, HLG):
        kind = "PQ" if transfer == PQ else "HLG"
        return f"{name} is HDR ({kind}, BT.2020); it is converted to SDR BT.709, with 203 nits as white"
    if transfer in LOGARITHMIC:
        return f"{name} has {LOGARITHMIC[transfer]} transfer, which is not converted: it may look pale"
    if wide := WIDE.get(primaries_of(frame)):
        return f"{name} has the colors of {wide}; they are converted to BT.709"
    return ""


UNREAD = {8: "YCgCo", 11: "Y'D'zD'x", 13: "a chromaticity-derived matrix", 14: "ICtCp", 16: "YCgCo-R", 17: "YCgCo-R"}
UNREAD |= {15: "IPT (Dolby Vision profile 5)"}


def primaries_of(frame: Any) -> int:
    """A frame's primaries. Where it does not say them, a matrix or a transfer that BT.2020 alone has says them."""
    stated = int(frame.color_primaries)
    of_bt2020 = int(frame.colorspace) in BT2020_MATRICES or int(frame.color_trc) in BT2020_TRANSFERS
    return BT2020 if stated == UNSPECIFIED and of_bt2020 else stated


def conversion_of(frame: Any) -> Conversion | None:
    """How a frame becomes SDR BT.709; None if it is."""
    transfer, primaries = int(frame.color_trc), primaries_of(frame)
    if transfer in (PQ, HLG):
        return _conversion(transfer, primaries if primaries in PRIMARIES else BT2020)
    if primaries in (BT709, UNSPECIFIED) and transfer != LINEAR or primaries not in PRIMARIES:
        return None
    return _conversion(transfer if transfer == LINEAR else BT709, primaries)


@functools.lru_cache(maxsize=16)
def _conversion(transfer: int, primaries: int) -> Conversion:
    signal = np.arange(1 << 16) / 65535
    lights = {PQ: pq_light(signal), HLG: hlg_scene(signal), LINEAR: signal}
    light, matrix = lights.get(transfer, signal**GAMMA), to_bt709(primaries)
    table, matrix = light.astype(np.float32), np.ascontiguousarray(matrix.T, np.float32)
    if transfer not in (PQ, HLG):
        return Conversion(transfer, table, matrix)
    peak = (HLG_PEAK if transfer == HLG else PQ_PEAK) / WHITE
    brightest = peak * float(matrix.clip(0).sum(0).max())  # colors outside of BT.709 are beyond the peak
    most = (brightest * signal**2) ** (1 / GAMMA)
    rolled = np.minimum(rolled_off(most, peak ** (1 / GAMMA)), 1)
    gains = np.where(most > KNEE, rolled / np.maximum(most, KNEE), 1) ** GAMMA
    return Conversion(transfer, table, matrix, gains.astype(np.float32), brightest)


# Tables are of the square root of light, which makes them dense where the signal is steep.
_LEVELS = np.rint(255 * (np.arange(1 << 16) / 65535) ** (2 / GAMMA)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Conversion:
    """light: of each signal of 16 bits, float32 [65536]; for HLG, of the scene. matrix: float32 [3, 3], for rows.
    gains: float32 [65536], of the square root of the brightest channel's share of `brightest`; None for SDR."""

    transfer: int
    light: np.ndarray
    matrix: np.ndarray
    gains: np.ndarray | None = None
    brightest: float = 1.0

    def to_sdr(self, pixels: np.ndarray) -> np.ndarray:
        """RGB uint16 [H, W, 3] -> uint8 [H, W, 3]; in bands of rows, so that memory stays small."""
        result, rows = np.empty(pixels.shape, np.uint8), max(1, BAND // pixels.shape[1])
        for top in range(0, len(pixels), rows):
            result[top : top + rows] = self._band(pixels[top : top + rows])
        return result

    def _band(self, pixels: np.ndarray) -> np.ndarray:
        light = self.light[pixels]
        if self.transfer == HLG:  # the OOTF of BT.2100
            luma = light @ BT2020_LUMA.astype(np.float32)
            light *= (HLG_PEAK / WHITE * luma**0.2)[..., None]
        light = light @ self.matrix
        if self.gains is not None:
            most = np.sqrt((light.max(-1) / np.float32(self.brightest)).clip(0, 1))
            light *= self.gains[(most * 65535 + np.float32(0.5)).astype(np.uint16)][..., None]
        return _LEVELS[(np.sqrt(light.clip(0, 1)) * np.float32(65535) + np.float32(0.5)).astype(np.uint16)]
