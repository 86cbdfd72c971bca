"""Pictures: read as Pillow reads them, sizes checked before pixels, and resized to the last bit of a known formula."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastvid.errors import MediaError
from fastvid.media.clip import open_clip
from fastvid.media.images import resize

SIDE = st.integers(1, 150)


def draw(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise that reaches both ends of the range, so that overshoot is cut."""
    values = np.random.default_rng(height * 1000 + width).normal(128, 120, (height, width, channels))
    return values.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_the_camera_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    frame = draw(64, 96)
    Image.fromarray(frame).save("a.bin", kind, exif=exif, **options)
    want = np.asarray(ImageOps.exif_transpose(Image.open("a.bin")).convert("RGB")).astype(int)
    found = open_clip("a.bin").read()[0]
    assert found.shape == want.shape and np.abs(found - want).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_read_as_pillow_reads_them(mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    try:
        Image.fromarray(draw(64, 96)).convert(mode).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    except OSError:
        pytest.skip(f"{kind} can't be {mode}")
    Path("a").write_bytes(buffer.getvalue())
    want = np.asarray(Image.open(buffer).convert("RGB"))
    assert np.array_equal(open_clip("a").read()[0], want)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_16_bits_is_rounded(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (32, 48)).astype(np.uint16)
    Image.fromarray(values).save("a", kind)
    want = np.minimum((values.astype(int) + 128) >> 8, 255)
    for source in ("a", Image.open("a")):
        assert np.array_equal(open_clip(source).read()[0], np.repeat(want[..., None], 3, -1))


def test_floating_point_is_refused() -> None:
    for values in (np.zeros((32, 32), np.float32), np.zeros((32, 32), np.int32)):
        Image.fromarray(values).save("a.tiff")
        for source in ("a.tiff", Image.fromarray(values)):
            with pytest.raises(MediaError, match="more than 16 bits"):
                open_clip(source)


def test_a_transparent_color_and_damaged_exif() -> None:
    Image.fromarray(draw(32, 32)).save("a.png", transparency=(1, 2, 3), exif=b"Exif\0\0nonsense")
    assert np.array_equal(open_clip("a.png").read()[0], draw(32, 32))


def test_an_animated_webp_is_refused() -> None:
    pictures = [Image.fromarray(draw(32, 32 + i)).resize((32, 32)) for i in range(2)]
    pictures[0].save("a.webp", save_all=True, append_images=pictures[1:])
    with pytest.raises(MediaError, match="animated WebP"):
        open_clip("a.webp")


def test_limits_of_the_program_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (64, 64)).save("a.png")
    assert open_clip("a.png").width == 64 and not recwarn.list and Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@given(cut=st.floats(0, 0.99))
def test_a_cut_picture_is_refused(kind: str, cut: float) -> None:
    buffer = io.BytesIO()
    Image.fromarray(draw(64, 64)).save(buffer, kind)
    data = buffer.getvalue()
    Path("cut").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(MediaError, match="^cut"):
        open_clip("cut")


# ---------------------------------------------------------------- resizing


def by_formula(picture: np.ndarray, size: int, method: str) -> np.ndarray:
    """The first dimension resized as Pillow's `src/libImaging/Resample.c` does: weights of 22 fractional bits."""
    before = len(picture)
    if before == size:
        return picture
    scale = before / size
    widen = max(scale, 1.0)
    reach = {"bicubic": 2.0, "lanczos": 3.0}[method] * widen
    center = (np.arange(size)[:, None] + 0.5) * scale
    index = np.arange(before)
    inside = (index >= np.trunc(center - reach + 0.5)) & (index < np.trunc(center + reach + 0.5))
    weights = np.where(inside, by_distance((index - center + 0.5) / widen, method), 0.0)
    weights = weights / weights.sum(1, keepdims=True) * 2**22
    sums = np.einsum("ab,b...->a...", np.trunc(weights + np.sign(weights) * 0.5), picture.astype(float))
    return np.floor((sums + 2**21) / 2**22).clip(0, 255).astype(np.uint8)


def by_distance(x: np.ndarray, method: str) -> np.ndarray:
    if method == "lanczos":
        return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
@given(before=st.tuples(SIDE, SIDE), after=st.tuples(SIDE, SIDE), channels=st.sampled_from([1, 3]))
@example(before=(137, 64), after=(137, 224), channels=3)
@example(before=(64, 64), after=(64, 64), channels=1)
@example(before=(1, 150), after=(150, 1), channels=3)
@example(before=(150, 20), after=(3, 20), channels=3)
def test_resize_equals_the_formula(method: str, before: tuple[int, int], after: tuple[int, int], channels: int) -> None:
    """Rows first, whatever the version of Pillow: Pillow 13 would choose."""
    picture = draw(*before, channels)
    rows = by_formula(picture.swapaxes(0, 1), after[1], method).swapaxes(0, 1)
    np.testing.assert_array_equal(resize(picture, *after, method), by_formula(rows, after[0], method))


@pytest.mark.parametrize(("before", "after"), [((77, 120), (64, 48)), ((20, 31), (55, 64)), ((130, 90), (65, 45))])
def test_resize_equals_one_call_of_pillow(before: tuple[int, int], after: tuple[int, int]) -> None:
    picture = draw(*before)
    expected = np.array(Image.fromarray(picture).resize(after[::-1], Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize(picture, *after), expected)


def test_pictures_of_a_batch_are_resized_one_by_one() -> None:
    pictures = np.stack([draw(40, 30), draw(40, 30)[::-1]])
    both = resize(pictures[None], 17, 51)
    assert both.shape == (1, 2, 17, 51, 3)
    assert np.array_equal(both[0, 1], resize(pictures[1], 17, 51))


@pytest.mark.parametrize(
    ("picture", "size", "method"),
    [
        (np.zeros((4, 4, 3)), (2, 2), "lanczos"),
        (np.zeros((4, 4), np.uint8), (2, 2), "lanczos"),
        (np.zeros((4, 4, 4), np.uint8), (2, 2), "lanczos"),
        (np.zeros((0, 4, 3), np.uint8), (2, 2), "lanczos"),
        (np.zeros((4, 4, 3), np.uint8), (0, 2), "lanczos"),
        (np.zeros((4, 4, 3), np.uint8), (2, 2), "nearest"),
    ],
)
def test_what_cannot_be_resized(picture: np.ndarray, size: tuple[int, int], method: str) -> None:
    with pytest.raises(ValueError, match="resize"):
        resize(picture, *size, method)
