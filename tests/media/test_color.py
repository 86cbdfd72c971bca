"""HDR and other primaries to SDR BT.709 against the standards' formulas in float64, written down here once more; and
the alpha of WebM."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastvid
from fastvid.errors import MediaError
from fastvid.media.clip import open_clip
from fastvid.media.color import KNEE, rolled_off, to_bt709

# ITU-R BT.2087 and SMPTE EG 432 / RP 177, as published, to four digits
BT2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
DISPLAY_P3 = [[1.2249, -0.2249, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]
SMPTE_C = [[0.9395, 0.0502, 0.0103], [0.0178, 0.9658, 0.0164], [-0.0016, -0.0044, 1.0060]]
EBU = [[1.0440, -0.0440, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0118, 0.9882]]


def write(path: str, frames: np.ndarray, pixels: str, tags: tuple[int, int, int], codec: str = "ffv1") -> str:
    """Frames uint16 [F, H, W, 3] of 16-bit R'G'B', tagged (matrix, transfer, primaries)."""
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=16)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        names = ("colorspace", "color_trc", "color_primaries")
        for each in zip(names, tags, strict=True):
            setattr(stream.codec_context, *each)
        if codec == "libx265":
            params = "log-level=none:bframes=0:pools=1:frame-threads=1"
            stream.codec_context.options = {"crf": "2", "preset": "fast", "x265-params": params}
        stream.codec_context.color_range = 2 if pixels.startswith("gbr") else 1
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb48le")
            options: dict[str, Any] = (
                {} if pixels.startswith("gbr") else {"dst_colorspace": tags[0], "dst_color_range": 1}
            )
            picture = picture.reformat(format=pixels, src_color_range=2, **options)
            picture.pts, picture.time_base = i, Fraction(1, 16)
            for each in zip(names, tags, strict=True):
                setattr(picture, *each)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def read(path: str) -> tuple[np.ndarray, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with open_clip(path) as clip:
            frames = clip.read()
            clip.read(0, 1)
    return frames, [str(w.message) for w in said if issubclass(w.category, fastvid.FastvidWarning)]


def pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    y = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(nits: np.ndarray) -> np.ndarray:
    """BT.2100 for a display of 1000 nits."""
    luma = (nits / 1000 @ [0.2627, 0.6780, 0.0593])[..., None]
    scene = nits / 1000 * np.where(luma > 0, luma, 1) ** (1 / 1.2 - 1)
    a = 0.17883277
    high = a * np.log(np.maximum(12 * scene - (1 - 4 * a), 1e-12)) + 0.5 - a * np.log(4 * a)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def sdr(nits: np.ndarray, peak: float) -> np.ndarray:
    """What light in BT.2020 comes out as: BT.709 levels."""
    light = nits / 203 @ np.transpose(BT2020)
    most = light.max(-1, keepdims=True)
    signal, top = np.maximum(most, 1e-9) ** (1 / 2.4), (peak / 203) ** (1 / 2.4)
    x, end = (signal - 0.94) / 0.06, (top - 0.94) / 0.06
    rolled = np.where(x > 0, 0.94 + 0.06 * x * (1 + x / end**2) / (1 + np.maximum(x, 0)), signal)
    rolled = np.minimum(rolled, 1)
    return 255 * (light * (rolled / signal) ** 2.4).clip(0, 1) ** (1 / 2.4)


def scene(most: float) -> np.ndarray:
    """Light in nits, float64 [2, 64, 64, 3]: from black to `most`, in and near BT.709, and gray."""
    draw = np.random.default_rng(0)
    light = most * draw.uniform(0, 1, (2, 64, 64, 1)) ** 3 * draw.uniform(0.3, 1, (2, 64, 64, 3))
    light[:, :16] = light[:, :16, :, :1]
    return light


@pytest.mark.parametrize(("curve", "code", "peak"), [(pq, 16, 10000.0), (hlg, 18, 1000.0)])
@pytest.mark.parametrize("most", [203.0, 1000.0])
def test_hdr_is_converted_by_the_formulas(curve: Any, code: int, peak: float, most: float) -> None:
    light = scene(most)
    light[curve(light).max(-1) > 1] = 0  # saturated colors that HLG cannot hold at this brightness
    signal = np.rint(curve(light) * 65535).astype(np.uint16)
    found, said = read(write("a.mkv", signal, "gbrp16le", (0, code, 9)))
    wanted = sdr(light, peak)
    assert np.abs(found - wanted).max() <= 1.5 and len(said) == 1 and light.max() > 0.8 * most
    assert "is HDR" in said[0] and "203 nits" in said[0] and ("PQ" if code == 16 else "HLG") in said[0]


@pytest.mark.parametrize(("curve", "code", "peak"), [(pq, 16, 10000.0), (hlg, 18, 1000.0)])
def test_hdr_as_phones_write_it(curve: Any, code: int, peak: float) -> None:
    """H.265 of 10 bits, 4:2:0, limited range: large patches."""
    patches = np.array([[203, 203, 203], [100, 60, 40], [40, 70, 40], [20, 30, 120], [700, 650, 600], [5, 5, 5]])
    light = patches[np.newaxis, np.newaxis].repeat(2, 0).repeat(64, 1).repeat(16, 2).astype(np.float64)
    signal = np.rint(curve(light).clip(0, 1) * 65535).astype(np.uint16)
    found, said = read(write("a.mp4", signal, "yuv420p10le", (9, code, 9), "libx265"))
    middle = slice(8, None, 16)
    assert np.abs(found[:, 32, middle] - sdr(light, peak)[:, 32, middle]).max() <= 3 and len(said) == 1


def test_hdr_that_the_container_alone_states() -> None:
    light = np.full((2, 64, 64, 3), 100.0)
    signal = np.rint(hlg(light) * 65535).astype(np.uint16)
    write("plain.mp4", signal, "yuv420p10le", (2, 2, 2), "libx265")
    with av.open("plain.mp4") as source, av.open("a.mp4", "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for name, code in (("colorspace", 9), ("color_trc", 18), ("color_primaries", 9)):
            setattr(stream.codec_context, name, code)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    found, said = read("a.mp4")
    assert np.abs(found - sdr(light, 1000.0)).max() <= 3 and len(said) == 1 and "HLG" in said[0]


@given(levels=st.lists(st.floats(0, 6), min_size=2, max_size=20), peak=st.sampled_from([1.943, 5.071]))
def test_highlights_are_rolled_off(levels: list[float], peak: float) -> None:
    """Nothing changes below the knee, order stays, white stays white, and the peak is the end."""
    signal = np.sort(levels)
    found = rolled_off(signal, peak)
    assert np.all(np.diff(found) >= 0) and np.array_equal(found[signal <= KNEE], signal[signal <= KNEE])
    assert found[signal <= peak].max(initial=0) <= 1 + 1e-9
    assert abs(float(rolled_off(np.array(1.0), peak)) * 255 - 255) <= 8 and float(rolled_off(np.array(peak), peak)) == 1


@pytest.mark.parametrize(("primaries", "matrix"), [(9, BT2020), (12, DISPLAY_P3), (6, SMPTE_C), (5, EBU)])
def test_other_primaries_are_converted(primaries: int, matrix: Any) -> None:
    assert np.abs(to_bt709(primaries) - matrix).max() < 5e-4
    frames = np.random.default_rng(0).integers(0, 1 << 16, (2, 32, 32, 3)).astype(np.uint16)
    found, said = read(write("a.mkv", frames, "gbrp16le", (0, 1, primaries)))
    wanted = 255 * ((frames / 65535) ** 2.4 @ np.transpose(to_bt709(primaries))).clip(0, 1) ** (1 / 2.4)
    assert np.abs(found - wanted).max() <= 1
    told = {9: "colors of BT.2020", 12: "colors of Display P3"}.get(primaries, "")
    assert len(said) == bool(told) and told in "".join(said)


@pytest.mark.parametrize("tags", [(9, 14, 2), (9, 2, 2), (1, 15, 2)])
def test_bt2020_without_its_primaries_is_converted(tags: tuple[int, int, int]) -> None:
    """Matrix and transfer of BT.2020 say it too."""
    frames = np.full((2, 64, 64, 3), (9000, 40000, 20000), np.uint16)
    found, said = read(write("a.mkv", frames, "yuv444p10le", tags))
    wanted = 255 * ((frames / 65535) ** 2.4 @ np.transpose(BT2020)).clip(0, 1) ** (1 / 2.4)
    assert np.abs(found - wanted).max() <= 2 and len(said) == 1 and "BT.2020" in said[0]


def test_white_of_other_primaries_is_white() -> None:
    for primaries in (4, 5, 6, 7, 9, 11, 12, 22):
        assert np.abs(to_bt709(primaries).sum(1) - 1).max() < 1e-3


@pytest.mark.parametrize("tags", [(1, 1, 1), (2, 2, 2), (1, 13, 1), (5, 6, 2), (6, 1, 1), (9, 14, 1)])
def test_sdr_is_left_alone(tags: tuple[int, int, int]) -> None:
    """As swscale makes it, to the last bit."""
    frames = (np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)) * 257).astype(np.uint16)
    found, said = read(write("a.mkv", frames, "yuv444p", tags))
    from av.video.reformatter import ColorRange, Interpolation

    with av.open("a.mkv") as container:
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        space = {1: 1, 2: 5, 5: 5, 6: 5, 9: 9}[tags[0]]
        options = {"src_colorspace": space, "src_color_range": 1, "dst_color_range": ColorRange.JPEG}
        wanted = [
            frame.reformat(format="rgb24", interpolation=int(flags), **options).to_ndarray()
            for frame in container.decode(video=0)
        ]
    assert np.array_equal(found, wanted) and said == []


def test_what_cannot_be_converted_is_told() -> None:
    frames = np.zeros((2, 64, 64, 3), np.uint16)
    plain = write("a.mkv", frames, "yuv444p", (1, 9, 1))
    assert "logarithmic (100:1)" in read(plain)[1][0]
    write("b.mkv", frames, "yuv444p10le", (14, 16, 9))
    with pytest.raises(MediaError, match=r"b.mkv has its colors in ICtCp"):
        open_clip("b.mkv")


def test_memory_of_a_conversion_is_that_of_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frames in bands of one row."""
    signal = np.rint(pq(scene(500.0)) * 65535).astype(np.uint16)
    path = write("a.mkv", signal, "gbrp16le", (0, 16, 9))
    whole = read(path)[0]
    monkeypatch.setattr("fastvid.media.color.BAND", 64)
    assert np.array_equal(read(path)[0], whole)


# ---------------------------------------------------------------- alpha


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_alpha_of_webm_is_over_black(codec: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 96)[None, :, None], (64, 96, 1))
    frames = [np.dstack([np.full((64, 96, 3), 60 + 30 * i), ramp]).astype(np.uint8) for i in range(6)]
    with av.open("a.webm", "w") as out:
        stream = out.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuva420p"
        stream.codec_context.options = {"crf": "4", "b": "4M", "auto-alt-ref": "0"}
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format="yuva420p")
            picture.pts, picture.time_base = i, Fraction(1, 16)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    wanted = np.stack([frame[..., :3] * (frame[..., 3:] / 255) for frame in frames])
    clip = open_clip("a.webm")
    assert np.abs(clip.read() - wanted).mean() < 3
    for number in (5, 1, 4, 0):
        assert np.array_equal(clip.read(number, number + 1)[0], clip.read()[number])
    assert Path("a.webm").exists()
