"""Noise from a counter: the published generator, the same in every window, and normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.errors import InvalidRequest
from fastvid.sampling.noise import latent_noise, philox4x32

LARGE = (16, 4, 60, 104)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_random123_known_answers(counter: str, key: str, expected: str) -> None:
    """From the authors' tests/kat_vectors (DEShawResearch/random123), in one call of three different counters."""
    words = np.array([[int(word, 16)] for word in counter.split()], dtype=np.uint64)
    others = np.concatenate([words ^ np.uint64(1), words, words ^ np.uint64(2)], axis=1)
    low, high = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox4x32(others, (low, high))[:, 1].tolist()] == expected.split()


def reference_element(seed: int, index: int, draw: int, element: int) -> float:
    """One element in plain Python integers and floats."""
    c = [element // 4, draw, index % 2**32, (index >> 32) % 2**32]
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(right >> 32) ^ c[1] ^ k0, right % 2**32, (left >> 32) ^ c[3] ^ k1, left % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    pair = element % 4 % 2 * 2
    radius = math.sqrt(-2 * math.log((c[pair] + 0.5) / 2**32))
    turn = 2 * math.pi * c[pair + 1] / 2**32
    return radius * (math.sin(turn) if element % 4 >= 2 else math.cos(turn))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    start=st.integers(-(2**40), 2**40),
    draw=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    data=st.data(),
)
def test_elements_follow_the_formula(
    seed: int, start: int, draw: int, shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    channels, frames, height, width = shape
    noise = latent_noise(seed, shape, start=start, draw=draw)
    assert noise.shape == (1, *shape) and noise.dtype == torch.float32
    c, t, y, x = (data.draw(st.integers(0, size - 1)) for size in shape)
    expected = reference_element(seed, start + t, draw, (c * height + y) * width + x)
    assert noise[0, c, t, y, x].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_chunks_join_without_a_seam() -> None:
    """A frame longer than one chunk and not a multiple of four still follows the formula around every chunk's edge."""
    size = 2 * 4 * 8192 + 7
    flat = latent_noise(5, (1, 1, 1, size), start=-3).view(-1)
    for element in (0, 4 * 8192 - 1, 4 * 8192, 8 * 8192 - 1, 8 * 8192, size - 1):
        assert flat[element].item() == pytest.approx(reference_element(5, -3, 0, element), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), start=st.integers(-9, 9), first=st.integers(0, 6), length=st.integers(1, 6))
def test_windows_are_slices(seed: int, start: int, first: int, length: int) -> None:
    whole = latent_noise(seed, (3, 12, 5, 7), start=start)
    window = latent_noise(seed, (3, length, 5, 7), start=start + first)
    assert torch.equal(window, whole[:, :, first : first + length])


def test_noise_is_normal() -> None:
    noise = latent_noise(0, LARGE).double().flatten()
    count = noise.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        deviation = (noise**power).mean() - moment
        assert abs(deviation) < 4.5 * math.sqrt(variance / count), power
    ordered = noise.sort().values
    exact = torch.special.ndtr(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((exact - steps[:-1]).max(), (steps[1:] - exact).max())
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": 2**32},
        {"seed": 2**63 - 1},
        {"draw": 1},
        {"draw": 2**32 - 1},
        {"start": 4},
        {"start": -4},
        {"start": 2**32},
        {"seed": 4, "start": 4},
    ],
)
def test_other_seeds_frames_and_draws_are_independent(other: dict[str, int]) -> None:
    base = latent_noise(0, LARGE)
    changed = latent_noise(other.pop("seed", 0), LARGE, **other)
    limit = 4.5 / math.sqrt(base.numel())
    assert abs(correlation(base, changed)) < limit
    assert abs(correlation(base**2, changed**2)) < limit


@pytest.mark.parametrize("shift", [(1, -1), (2, -1), (4, -1), (1, -2), (1, 2), (1, 1)])
def test_neighbouring_elements_are_independent(shift: tuple[int, int]) -> None:
    base = latent_noise(3, LARGE)
    moved = base.roll(*shift)
    assert abs(correlation(base, moved)) < 4.5 / math.sqrt(base.numel())
    assert abs(correlation(base**2, moved**2)) < 4.5 / math.sqrt(base.numel())


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_refused_seeds(seed: int) -> None:
    with pytest.raises(InvalidRequest, match=r"outside 0\.\.2\^63-1"):
        latent_noise(seed, (1, 1, 1, 1))


def test_no_frames_is_empty() -> None:
    assert latent_noise(0, (4, 0, 2, 2)).shape == (1, 4, 0, 2, 2)
