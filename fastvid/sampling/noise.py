"""Noise from a counter: a latent frame's noise depends only on (seed, absolute latent index, draw, frame shape).

So it is the same in any window, on any rank and device. Indices may be negative: frames before the first one.
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives four 32-bit words for each
counter and key; Box-Muller makes four normal numbers of them, in float64, rounded to float32.

Key: the seed's low and high word. Counter: (group of four elements in the frame's [C, h, w] order, draw, low and high
word of the latent index).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastvid.errors import InvalidRequest
from fastvid.ops.upload import upload

_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 1 << 13  # groups at a time, so that the arrays stay in the cache: twice as fast


def latent_noise(seed: int, shape: tuple[int, int, int, int], *, start: int = 0, draw: int = 0) -> torch.Tensor:
    """Standard normal noise for the latent frames start .. start + T - 1: float32 [1, C, T, h, w] on the CPU.

    shape: (C, T, h, w). start: absolute latent index of the first one, may be negative. draw: 0 for the initial noise,
    then counting up, 0 to 2^32-1. Raises `InvalidRequest` for a seed outside 0..2^63-1.

    Magnitudes stay below 6.77 (32-bit uniforms). Two machines may differ in the last bit of one number in millions,
    where their sine or logarithm does.
    """
    channels, frames, height, width = shape
    if not 0 <= seed < 2**63:
        raise InvalidRequest(f"seed={seed} is outside 0..2^63-1. Nearest that works: {min(max(seed, 0), 2**63 - 1)}.")
    assert 0 <= draw < 2**32 and -(2**63) <= start <= 2**63 - max(frames, 1), (draw, start)
    out = np.empty((1, channels, frames, height, width), dtype=np.float32)
    for t in range(frames):
        out[0, :, t] = _frame(seed, start + t, draw, channels * height * width).reshape(channels, height, width)
    return torch.from_numpy(out)


@dataclass
class StreamNoise:
    """The noise of a stream of columns (latent frames), fp32 on a device.

    shape: (C, h, w) of a column. origin: absolute latent index of column 0. given: initial noise [1, C, T, h, w] of the
    whole stream to use in place of the seed's.
    """

    seed: int
    shape: tuple[int, int, int]
    origin: int
    device: torch.device
    given: Any = None
    _last: tuple[tuple[int, int], torch.Tensor] | None = None

    def initial(self, start: int, stop: int) -> torch.Tensor:
        """What sampling starts from [1, C, stop - start, h, w]; the last one asked for is kept."""
        if self._last is None or self._last[0] != (start, stop):
            self._last = (start, stop), self._draw(start, stop)
        return self._last[1].clone()

    def fresh(self, start: int, draws: torch.Tensor) -> torch.Tensor:
        """New noise for the columns from `start` on: draws int64 [T], from 1 on."""
        columns = enumerate(draws.tolist(), start)
        noise = torch.cat([self._noise(at, at + 1, draw) for at, draw in columns], dim=2)
        return upload(noise, self.device)

    def _draw(self, start: int, stop: int) -> torch.Tensor:
        if self.given is not None:
            return torch.as_tensor(self.given)[:, :, start:stop].to(self.device, torch.float32, copy=True)
        return upload(self._noise(start, stop), self.device)

    def _noise(self, start: int, stop: int, draw: int = 0) -> torch.Tensor:
        channels, height, width = self.shape
        shape = (channels, stop - start, height, width)
        return latent_noise(self.seed, shape, start=self.origin + start, draw=draw)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32. counter: [4, n] words in uint64; key: two words. Returns [4, n] words in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (right >> _HALF) ^ c1 ^ np.uint64(k0)
        c2 = (left >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = right & _WORD, left & _WORD
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def _frame(seed: int, index: int, draw: int, size: int) -> np.ndarray:
    """The noise of one latent frame, float32 [size]."""
    groups = -(-size // 4)
    out = np.empty((groups, 4), dtype=np.float32)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for begin in range(0, groups, _CHUNK):
        end = min(begin + _CHUNK, groups)
        counter = np.empty((4, end - begin), dtype=np.uint64)
        counter[0] = np.arange(begin, end, dtype=np.uint64)
        # Python's shift and mask give the words of two's complement, for negative indices too.
        counter[1], counter[2], counter[3] = draw, index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF
        out[begin:end] = _box_muller(philox4x32(counter, key)).T
    return out.reshape(-1)[:size]


def _box_muller(words: np.ndarray) -> np.ndarray:
    """[4, n] uniform 32-bit words -> [4, n] normal numbers, float64. Adding 0.5 avoids log(0)."""
    radius = np.sqrt(-2 * np.log((words[0::2] + 0.5) * 2.0**-32))
    angle = words[1::2] * (2 * math.pi * 2.0**-32)
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
