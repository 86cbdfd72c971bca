"""Resampling of pictures against Pillow, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fastvid.ops import resample

METHODS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
SIDE = st.integers(1, 150)


def pillow(picture: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    """The two passes one by one: Pillow 13 chooses their order, which used to be this one."""
    rows = Image.fromarray(picture).resize((width, len(picture)), METHODS[method])
    return np.array(rows.resize((width, height), METHODS[method]))


def draw(height: int, width: int) -> np.ndarray:
    """Noise that reaches both ends of the range, so that overshoot is cut."""
    values = np.random.default_rng(height * 1000 + width).normal(128, 120, (height, width, 3))
    return values.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("method", METHODS)
@given(before=st.tuples(SIDE, SIDE), after=st.tuples(SIDE, SIDE))
@example(before=(137, 64), after=(137, 224))
@example(before=(64, 64), after=(64, 64))
@example(before=(1, 150), after=(150, 1))
def test_equals_pillow(method: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    picture = draw(*before)
    ours = resample.resize(torch.from_numpy(picture), *after, method).numpy()
    np.testing.assert_array_equal(ours, pillow(picture, *after, method))


@pytest.mark.parametrize(("before", "after"), [((77, 120), (64, 48)), ((20, 31), (55, 64)), ((130, 90), (65, 45))])
def test_equals_one_call_of_pillow(before: tuple[int, int], after: tuple[int, int]) -> None:
    picture = draw(*before)
    expected = np.array(Image.fromarray(picture).resize(after[::-1], METHODS["lanczos"]))
    np.testing.assert_array_equal(resample.resize(torch.from_numpy(picture), *after).numpy(), expected)


def test_pictures_of_a_batch_do_not_meet() -> None:
    pictures = torch.from_numpy(np.stack([draw(40, 30), draw(40, 30)[::-1]]))
    both = resample.resize(pictures[None], 17, 51)
    assert both.shape == (1, 2, 17, 51, 3)
    assert torch.equal(both[0, 1], resample.resize(pictures[1], 17, 51))


@pytest.mark.parametrize(
    ("picture", "size", "method"),
    [
        (torch.zeros(4, 4, 3), (2, 2), "lanczos"),
        (torch.zeros(4, 4, dtype=torch.uint8), (2, 2), "lanczos"),
        (torch.zeros(0, 4, 3, dtype=torch.uint8), (2, 2), "lanczos"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), (0, 2), "lanczos"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), (2, 2), "nearest"),
    ],
)
def test_what_cannot_be_resized(picture: torch.Tensor, size: tuple[int, int], method: str) -> None:
    with pytest.raises(ValueError, match="uint8|method"):
        resample.resize(picture, *size, method)
