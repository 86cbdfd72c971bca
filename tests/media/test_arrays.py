"""Pictures and clips in memory: every layout and range gives the frames that were put in, or is refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipe import Recipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastvid
from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.clip import open_clip, open_picture
from fastvid.requests.inputs import read_mask
from fastvid.requests.request import Request


def frames(count: int, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, channels), np.uint8)


def rearranged(array: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(["FHWC".index(letter) for letter in layout]))


RANGES = {
    "uint8": lambda a: a,
    "unsigned": lambda a: a.astype(np.float64) / 255,
    "signed": lambda a: a.astype(np.float32) / 127.5 - 1,
    "half": lambda a: (a.astype(np.float32) / 255).astype(np.float16),
}


@given(
    layout=st.sampled_from(["FHWC", "FCHW", "CFHW"]),
    count=st.integers(5, 7),
    scaled=st.sampled_from(sorted(RANGES)),
    as_tensor=st.booleans(),
)
def test_clips_of_every_layout_and_range(layout: str, count: int, scaled: str, as_tensor: bool) -> None:
    wanted = frames(count)
    given = RANGES[scaled](rearranged(wanted, layout))
    source: Any = torch.from_numpy(given) if as_tensor else given
    for one in (source, source[None]):
        assert np.array_equal(open_clip(one).read(), wanted)


@pytest.mark.parametrize("scaled", sorted(RANGES))
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_layout_and_range(scaled: str, channels: int) -> None:
    wanted = frames(1, channels=channels)
    picture, rgb = RANGES[scaled](wanted), np.broadcast_to(wanted[0], (24, 32, 3))
    given = [picture, picture[0], rearranged(picture, "FCHW"), rearranged(picture, "FCHW")[0]]
    given += [rearranged(picture, "CFHW")] + ([picture[0, ..., 0]] if channels == 1 else [])
    for one in given:
        for source in (one, torch.from_numpy(one)):
            assert np.array_equal(open_picture(source, "image"), rgb)


def test_numbers_of_16_bits_of_other_programs() -> None:
    wanted = frames(1)[0]
    tensor = (torch.from_numpy(wanted) / 255).to(torch.bfloat16)
    assert np.abs(open_picture(tensor, "image").astype(int) - wanted).max() <= 1
    black_and_white = wanted > 127
    assert np.array_equal(open_picture(black_and_white, "image"), np.uint8(255) * black_and_white)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((3, 24, 32), np.uint8), r"video has shape \[3, 24, 32\].*channels or frames"),
        (np.zeros((3, 4, 24, 32), np.uint8), r"\[3, 4, 24, 32\].*channels or frames"),
        (np.zeros((24, 32, 5), np.uint8), r"5"),
        (np.zeros((2, 2, 24, 32, 3), np.uint8), r"\[2, 2, 24, 32, 3\]"),
        (np.ones((24, 32, 3), np.uint8), "0 and 1 as uint8, where white is 255"),
        (np.full((24, 32, 3), 255.0), "from 0 to 255.*0 to 1"),
        (np.full((24, 32, 3), -0.1), "may be a part of"),
        (np.full((24, 32, 3), np.nan), "NaN"),
        (np.full((24, 32, 3), 7, np.int64), "int64"),
        (torch.zeros(24, 32, 3, device="meta"), "this tensor is without data"),
        ([np.full((24, 32, 3), 0.5), np.full((24, 32, 3), 2.0)], "from 0 to 2"),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(source: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        open_clip(source)


def test_a_list_has_one_range() -> None:
    """A bright picture in -1 to 1 has no value below 0; beside a dark one it is read right."""
    bright, dark = np.full((24, 32, 3), 0.5, np.float32), np.full((24, 32, 3), -1.0, np.float32)
    assert open_clip([bright, dark]).read()[:, 0, 0, 0].tolist() == [191, 0]
    assert open_clip([bright]).read()[0, 0, 0, 0] == 128
    black = np.zeros((24, 32, 3), np.uint8)
    assert open_clip([black, black + np.uint8(1), black + np.uint8(9)]).read()[:, 0, 0, 0].tolist() == [0, 1, 9]


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_pillow_image_equals_its_file(turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(frames(1)[0]).save("a.png", exif=exif)
    wanted = open_clip("a.png").read()
    for source in (Image.open("a.png"), [Image.open("a.png")]):
        assert np.array_equal(open_clip(source).read(), wanted)
    assert np.array_equal(read_mask("mask", Image.open("a.png")), read_mask("mask", "a.png"))


@pytest.mark.parametrize("mode", ["I;16", "CMYK", "P", "LA", "PA", "RGBa", "1", "YCbCr", "HSV"])
def test_pillow_images_of_other_modes_equal_their_file(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (24, 32)).astype(np.uint16))
    else:
        image = Image.fromarray(frames(1, channels=4)[0])
        image = image.convert("RGB" if mode in ("CMYK", "P", "YCbCr", "HSV") else "RGBA")
        image = image.convert("LA").convert(mode) if mode == "PA" else image.convert(mode)
        if mode == "P":
            image.info["transparency"] = 3
    stored = {"PA": "RGBA", "RGBa": "RGBA", "YCbCr": "RGB", "HSV": "RGB"}.get(mode, mode)
    image.convert(stored).save("a.tiff" if mode == "CMYK" else "a.png")
    assert np.array_equal(open_picture(image, "image"), open_picture("a.tiff" if mode == "CMYK" else "a.png", "image"))


def test_a_damaged_pillow_image_is_told() -> None:
    Image.fromarray(frames(1)[0]).save("a.png")
    with open("a.png", "r+b") as file:
        file.truncate(500)
    with pytest.raises(MediaError, match="image cannot be read"):
        open_picture(Image.open("a.png"), "image")


def test_an_animated_pillow_image_is_no_single_picture() -> None:
    pictures = [Image.fromarray(frame) for frame in frames(3)]
    pictures[0].save("a.gif", save_all=True, append_images=pictures[1:])
    with pytest.raises(InvalidRequest, match="3 frames; give its file"):
        open_clip(Image.open("a.gif"))


def test_pictures_of_a_list_may_have_their_channels_first() -> None:
    wanted = frames(3)
    given = [torch.from_numpy(rearranged(one[None], "FCHW")[0]) / 255 for one in wanted]
    assert np.array_equal(open_clip(given).read(), wanted)


def test_a_phones_jpeg_with_a_preview_is_one_picture() -> None:
    pictures = [Image.fromarray(frame) for frame in frames(2)]
    pictures[0].save("a.jpg", "MPO", save_all=True, append_images=pictures[1:], quality=100)
    assert Image.open("a.jpg").n_frames == 2  # type: ignore[attr-defined]
    wanted = open_clip("a.jpg").read()
    for source in (Image.open("a.jpg"), [Image.open("a.jpg")]):
        assert np.array_equal(open_clip(source).read(), wanted)


def test_npy_files_have_the_same_layouts() -> None:
    wanted = frames(5)
    for array in (wanted, rearranged(wanted, "FCHW")):
        np.save("a.npy", array)
        assert np.array_equal(open_clip("a.npy").read(), wanted)
    np.save("a.npy", rearranged(wanted[:1], "FCHW")[0])
    with pytest.raises(MediaError, match="channels or frames"):
        open_clip("a.npy")


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        lambda m: m > 0,
        lambda m: m / 255,
        lambda m: m[..., None].repeat(3, -1),
        lambda m: m[:, None].repeat(3, 1),
        lambda m: torch.from_numpy(m),
        lambda m: torch.from_numpy(m / 255).float()[:, None],
        lambda m: fastvid.Video(m[..., None].repeat(3, -1), 16.0, 0),
        lambda m: [Image.fromarray(one) for one in m],
    ],
)
def test_masks_of_every_layout_and_range(change: Any) -> None:
    wanted = np.uint8(255) * (frames(5, channels=1)[..., 0] > 127)
    assert np.array_equal(read_mask("mask", change(wanted)), wanted)


def test_one_mask_in_other_layouts() -> None:
    wanted = np.uint8(255) * (frames(1, channels=1)[0, ..., 0] > 127)
    for array in (wanted, wanted[None], wanted[..., None], wanted[None].repeat(3, 0), wanted[..., None].repeat(3, -1)):
        assert np.array_equal(read_mask("mask", array), wanted[None])
    three = np.stack([wanted, wanted, 255 - wanted])
    assert np.array_equal(read_mask("mask", three), three)
    for array, says in (
        (np.dstack([wanted] * 4), "must be bool"),
        (np.dstack([wanted] * 2), "must be bool"),
        (wanted / 100, "from 0 to 2.55"),
        (wanted / 127.5 - 1, "below 0"),
        (wanted[:0], "must be bool"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            read_mask("mask", array)


# ---------------------------------------------------------------- errors


def test_a_media_error_is_an_os_error() -> None:
    for path, number in (("nope.png", 2), ("/", 0)):
        with pytest.raises(OSError, match=path) as caught:
            open_picture(path, "image")
        assert isinstance(caught.value, MediaError) and (caught.value.errno or 0) == number


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keyframes": {9: 0}, "num_frames": 9}, "keyframes frame=9: the video has 9 frames.*nearest is 8"),
        ({"keyframes": {17: 0}}, "keyframes frame=17: the video has 17 frames"),
        ({"keyframes": {0: 0}, "image": 0}, "image and keyframes both give frame 0"),
        ({"keyframes": {8: 0}, "last_image": 0, "num_frames": 9}, "last_image and keyframes both give frame 8"),
        ({"image": 0, "last_image": 0, "num_frames": 1}, "last_image and image both give frame 0"),
    ],
)
def test_pictures_that_have_no_frame_are_refused(options: dict[str, Any], says: str) -> None:
    picture = frames(1)[0]
    named = {
        name: {frame: picture for frame in value}
        if isinstance(value, dict)
        else picture
        if name != "num_frames"
        else value
        for name, value in options.items()
    }
    with pytest.raises(InvalidRequest, match=says):
        Request.make(prompt="a", **named).resolve(Recipe(num_frames=17))


# ---------------------------------------------------------------- what is stretched is told


def told(options: dict[str, Any]) -> list[str]:
    pipe = fastvid.load("embedded", device="cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipe.plan("a red circle", **options)
    return [str(each.message) for each in said if issubclass(each.category, fastvid.FastvidWarning)]


def test_a_picture_of_another_shape_is_told() -> None:
    wide = frames(1, 64, 128)[0]
    assert told({"image": wide, "num_frames": 5}) == told({"image": wide, "size": "128x80", "num_frames": 5}) == []
    said = told({"keyframes": {3: wide}, "size": "64x64", "num_frames": 5})
    assert said == ["keyframes[3] is 128x64 and the video 64x64, so that it is stretched"]
    clip, wider = frames(5, 64, 64), frames(5, 64, 128)
    assert told({"verb": "blend", "video": clip, "video_2": clip, "seconds": 0.25}) == []
    said = told({"verb": "blend", "video": clip, "video_2": wider, "seconds": 0.25})
    assert said == ["video_2 is 128x64 and the video 64x64, so that it is cropped"]


def test_a_mask_of_another_size_is_stretched_and_told() -> None:
    clip, mask = frames(5, 64, 64), np.zeros((32, 128), bool)
    mask[:16] = True
    said = told({"verb": "edit", "video": clip, "mask": mask})
    assert len(said) == 1 and "mask is 128x32 and video 64x64" in said[0]
    assert told({"verb": "edit", "video": clip, "mask": np.ones((64, 64), bool)}) == []
    pipe = fastvid.load("embedded", device="cpu")
    with pytest.warns(fastvid.FastvidWarning, match="mask"):
        made = pipe.edit(clip, "a red circle", mask=mask, num_inference_steps=1, seed=1)
    assert np.array_equal(made.frames[:, 32:], clip[:, 32:]) and not np.array_equal(made.frames[:, :32], clip[:, :32])
