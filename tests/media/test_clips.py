"""Clips from anything: count, order, rate, size, colours and turns of what comes out."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastvid
from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.clip import Clip, open_clip
from fastvid.media.images import resize
from fastvid.media.writer import FrameSink

BITS = 8


def picture(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A picture that says its number in bright and dark stripes, in shades that differ by channel."""
    stripe = width // BITS
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        frame[:, bit * stripe : (bit + 1) * stripe] = (220, 200, 180) if number >> bit & 1 else (30, 40, 50)
    return frame


def number_of(frame: np.ndarray) -> int:
    stripe = frame.shape[1] // BITS
    middle = frame[8:-8, stripe // 4 :: stripe].mean((0, 2))
    return sum(1 << bit for bit in range(BITS) if middle[bit] > 120)


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def ours(path: Path | str, count: int, fps: float = 16, width: int = 96, height: int = 64) -> str:
    with FrameSink(path, width=width, height=height, fps=fps, recipe={"fastvid": "0", "fps": fps}) as sink:
        for i in range(count):
            sink.write(picture(i, height, width)[None])
    return str(path)


def theirs(path: Path, codec: str, pixels: str, times: list[int], *, ticks: int = 25, **options: str) -> str:
    """A file as others write it: any codec, B-frames, times in 1 / ticks seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=ticks)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 20, 2_000_000
        stream.codec_context.options = options
        stream.time_base = stream.codec_context.time_base = Fraction(1, ticks)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time, Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


# ---------------------------------------------------------------- count and order

FILES = [
    ("a.mp4", "libx264", "yuv420p", {"bf": "3"}),
    ("b.mkv", "libx264", "yuv420p10le", {"bf": "3"}),
    ("c.webm", "libvpx-vp9", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("d.webm", "libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("e.avi", "libx264", "yuv420p", {"bf": "3"}),
    ("f.ts", "libx264", "yuv420p", {"bf": "3"}),
    ("g.mpg", "mpeg2video", "yuv420p", {"bf": "2"}),
    ("h.mov", "png", "rgba", {}),
    ("i.mov", "prores_ks", "yuv422p10le", {}),
    ("j.h264", "libx264", "yuv420p", {"bf": "3"}),
    ("k.mkv", "ffv1", "yuv444p", {}),
    ("l.apng", "apng", "rgb24", {}),
]


@pytest.mark.parametrize(("name", "codec", "pixels", "options"), FILES, ids=[file[0] for file in FILES])
def test_frames_of_any_file_are_exact(name: str, codec: str, pixels: str, options: dict[str, str]) -> None:
    clip = open_clip(theirs(Path(name), codec, pixels, list(range(50)), **options))
    assert (clip.num_frames, clip.height, clip.width, clip.fps) == (50, 64, 96, 25)
    assert numbers(clip.read()) == list(range(50))
    order = np.random.default_rng(0).permutation(50)[:12].tolist()
    assert [number_of(clip.read(i, i + 1)[0]) for i in order] == order
    assert numbers(clip.tail(3)) == [47, 48, 49] and numbers(clip.head(2)) == [0, 1]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.npy", "out/"])
@given(data=st.data())
def test_our_own_files_are_exact(name: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    clip = open_clip(ours(name, count, 12.5))
    assert (clip.num_frames, clip.fps) == (count, 12.5)
    for _ in range(2):
        start = data.draw(st.integers(0, count))
        stop = data.draw(st.integers(start, count))
        assert numbers(clip.read(start, stop)) == list(range(start, stop))
    assert [len(part) for part in clip.chunks(16)] == [min(16, count - at) for at in range(0, count, 16)]
    clip.close()
    assert numbers(clip.tail(1)) == [count - 1]


def test_reading_outside_is_refused() -> None:
    clip = open_clip(np.zeros((5, 64, 64, 3), np.uint8))
    for ask in (lambda: clip.read(-1, 2), lambda: clip.read(3, 2), lambda: clip.read(0, 6), lambda: clip.tail(6)):
        with pytest.raises(InvalidRequest, match="of 5|has 5"):
            ask()


def test_sound_and_a_cover_are_left_alone() -> None:
    with av.open("a.mp4", "w") as container:
        sound, stream = container.add_stream("aac", rate=8000), container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), format="fltp", layout="mono")
            noise.sample_rate, noise.pts = 8000, i * 800
            container.mux(sound.encode(noise))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    assert numbers(open_clip("a.mp4").read()) == list(range(10))


# ---------------------------------------------------------------- what a clip may be made of


def test_everything_that_has_frames() -> None:
    frames = np.stack([picture(i) for i in range(3)])
    video = fastvid.Video(frames, 8.0, 0)
    for source in (frames, torch.from_numpy(frames), list(frames), [Image.fromarray(f) for f in frames], video):
        clip = open_clip(source)
        assert np.array_equal(clip.read(), frames) and clip.fps == (8 if source is video else None)
    assert open_clip(clip) is clip and len(clip) == 3 and "96x64" in repr(clip)
    ours("out/", 3)
    assert np.array_equal(open_clip([f"out/{i:06d}.png" for i in range(3)]).read(), frames)
    assert np.array_equal(open_clip(frames[0]).read(), frames[:1])
    assert np.array_equal(open_clip(Image.fromarray(frames[1])).read(), frames[1:2])
    gray = frames[[0, 1, 2, 1, 0], ..., 0]
    assert np.array_equal(open_clip(gray).read(), np.repeat(gray[..., None], 3, -1))


def test_what_comes_out_is_a_copy() -> None:
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    open_clip(frames).read()[:] = 9
    assert frames.max() == 0


def test_alpha_is_over_black() -> None:
    rgba = np.full((1, 64, 64, 4), 200, np.uint8)
    rgba[..., 3] = np.arange(64) * 4
    want = np.repeat(np.round(200.0 * rgba[..., 3:] / 255), 3, -1)
    Image.fromarray(rgba[0]).save("a.png")
    for source in (rgba, rgba[0], "a.png", Image.open("a.png")):
        assert np.array_equal(open_clip(source).read(), want)


def test_names_of_pngs_count_as_numbers() -> None:
    Path("shots").mkdir()
    for i in (2, 10, 1):
        Image.fromarray(picture(i)).save(f"shots/frame{i}.png")
    assert numbers(open_clip("shots").read()) == [1, 2, 10]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.full((2, 64, 64, 3), 200.0), "floating point from 0 to 200"),
        (np.zeros((2, 64, 64, 5), np.uint8), r"\[2, 64, 64, 5\]"),
        (np.zeros((0, 64, 64, 3), np.uint8), "0, 64"),
        (np.zeros((1, 1, 1, 3), np.uint8), "1x1.*16 to 8192"),
        (np.zeros((1, 16, 9000, 3), np.uint8), "9000x16"),
        ([], "one picture or more"),
        ([picture(0), picture(0, 64, 80)], "picture 1 is 80x64, the first one 96x64"),
        ([np.zeros((2, 64, 64, 3), np.uint8)], r"video\[0\] has shape \[2, 64, 64, 3\]"),
        (SimpleNamespace(frames=np.zeros((2, 64, 64, 3), np.uint8), fps=0.0), "video.fps=0"),
        (7, "video=7: allowed is a file"),
        ("", "the name of a file or folder"),
    ],
)
def test_what_has_no_frames_is_told(source: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        open_clip(source).read()


# ---------------------------------------------------------------- time


def by_ffmpeg(times: list[int], ticks: int, rate: Fraction) -> list[int]:
    """What FFmpeg's own filter makes of frames at these times."""
    graph = av.filter.Graph()
    source = graph.add("buffer", f"video_size=16x16:pix_fmt=gray:time_base=1/{ticks}:pixel_aspect=1/1")
    fps, sink = graph.add("fps", f"{rate.numerator}/{rate.denominator}"), graph.add("buffersink")
    source.link_to(fps)
    fps.link_to(sink)
    graph.configure()
    for i, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), i, np.uint8), format="gray")
        frame.pts, frame.time_base = time, Fraction(1, ticks)
        source.push(frame)
    source.push(None)
    found = []
    while True:
        try:
            found.append(int(sink.pull().to_ndarray()[0, 0]))
        except (BlockingIOError, EOFError):
            return found


@given(
    gaps=st.lists(st.integers(1, 200), min_size=2, max_size=30),
    rate=st.sampled_from([Fraction(n) for n in (1, 5, 16, 24, 30, 60)] + [Fraction(30000, 1001), Fraction(25, 2)]),
)
def test_other_rates_are_as_ffmpeg_has_them(gaps: list[int], rate: Fraction) -> None:
    """FFmpeg's filter does not know how long the last frame is seen, so that is left out."""
    times = np.cumsum([0, *gaps])
    source = open_clip(np.stack([np.full((16, 16, 3), i, np.uint8) for i in range(len(times))])).source
    source.times = np.append(times, times[-1] + 1) / 1000  # type: ignore[misc]
    clip = Clip(source, np.arange(len(times)), 16, 16, 1.0).resampled(float(rate))
    found, wanted = clip.read()[:, 0, 0, 0].tolist(), by_ffmpeg(times.tolist(), 1000, rate)
    both = min(len(found), len(wanted))
    assert found[:both] == wanted[:both] and abs(len(found) - len(wanted)) <= 1
    assert clip.num_frames == max(1, int(np.floor(source.times[-1] * float(rate) + 0.5)))


def test_uneven_times_are_laid_on_a_grid() -> None:
    times = [0, 100, 200, 700, 800, 900]  # half a second of nothing new
    clip = open_clip(theirs(Path("a.mkv"), "libx264", "yuv420p", times, ticks=1000))
    even = clip.resampled(10)
    assert numbers(even.read()) == [0, 1, 2, 2, 2, 2, 2, 3, 4, 5] and even.fps == 10 and even.seconds == 1
    assert numbers(even.tail(4)) == [2, 3, 4, 5]


def test_even_times_stay() -> None:
    clip = open_clip(ours("a.webm", 20, 23.976))  # whose times are in milliseconds
    assert np.array_equal(clip.resampled().source_frames, clip.source_frames)
    assert numbers(clip.resampled(48).read(0, 6)) == [0, 0, 1, 1, 2, 2]
    assert open_clip(picture(3)).resampled(12).fps == 12
    assert open_clip(picture(3)).resampled().fps is None
    with pytest.raises(InvalidRequest, match="fps=1000"):
        clip.resampled(1000)


# ---------------------------------------------------------------- size


def test_sizes_are_covered_around_the_middle_or_stretched() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 128, 3), np.uint8)
    clip = open_clip(frames)
    assert np.array_equal(clip.resized(32, 32).read(), resize(frames[:, :, 32:96], 32, 32))
    assert np.array_equal(clip.resized(32, 32, "stretch").read(), resize(frames, 32, 32))
    assert clip.resized(100, 20).read().shape == (2, 100, 20, 3) and clip.resized(64, 128).read().shape == frames.shape
    with pytest.raises(InvalidRequest, match="fit=.*cover"):
        clip.resized(32, 32, "crop")


# ---------------------------------------------------------------- colours and turns


@pytest.mark.parametrize("size", [(96, 64), (1280, 720)])
@pytest.mark.parametrize("matrix", [1, 5, 6, 9])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_what_the_file_says(size: tuple[int, int], matrix: int, full: bool) -> None:
    """Against the definition: ITU-T H.273 for the weights, for gray edges of the range too."""
    colour = np.array([200, 120, 40])
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    luma = red * 200 + (1 - red - blue) * 120 + blue * 40
    chroma = [(40 - luma) / (2 - 2 * blue), (200 - luma) / (2 - 2 * red)]
    planes = (
        [luma, *(128 + c for c in chroma)] if full else [16 + luma * 219 / 255, *(128 + c * 224 / 255 for c in chroma)]
    )
    width, height = size
    with av.open("a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        # A matrix of BT.2020 alone stands for its primaries too.
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        frame = av.VideoFrame(width, height, "yuv444p")
        for plane, value in zip(frame.planes, planes, strict=True):
            plane.update(bytes([round(value)]) * plane.buffer_size)
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        frame.color_primaries = frame.color_trc = 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(open_clip("a.mkv").read().astype(int) - colour).max() <= 2


TURNS = {
    90: ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),  # clockwise, as a phone held upright writes it
    180: ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    270: ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_videos_are_turned(turn: Any) -> None:
    plain = open_clip(theirs(Path("a.mp4"), "libx264", "yuv420p", [0, 1, 2])).read()
    signs, turned = TURNS[turn]
    data = bytearray(Path("a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    for place, sign in zip((0, 1, 3, 4), signs, strict=True):
        struct.pack_into(">i", data, matrix + 4 * place, sign << 16)
    Path("b.mp4").write_bytes(data)
    clip = open_clip("b.mp4")
    want = np.stack([turned(frame) for frame in plain])
    assert (clip.height, clip.width) == want.shape[1:3] and np.array_equal(clip.read(), want)
    with av.open("b.mp4") as container:  # the same as what others make of it
        rotation = next(container.decode(video=0)).rotation
    assert turn == "mirrored" or rotation % 360 == -turn % 360


def test_a_picture_that_is_a_list_of_files_names_the_broken_one() -> None:
    ours("out/", 3)
    Path("out/000001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(MediaError, match="000001.png"):
        open_clip("out").read()
