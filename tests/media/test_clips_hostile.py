"""Files that are made to hurt: refused within 2 s and 256 MiB, with what is wrong, each in a process of its own."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hostile_media import READ, check_refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvid.errors import Error, MediaError
from fastvid.media.clip import open_clip
from fastvid.media.metadata import read_recipe
from fastvid.media.writer import FrameSink


def picture(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def mp4(count: int = 8, name: str = "good.mp4", size: int = 64) -> bytes:
    with FrameSink(name, width=size, height=size, fps=16) as sink:
        sink.write(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))
    return Path(name).read_bytes()


def png_bytes(frame: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "PNG")
    return target.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def box(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def patched(data: bytes, kind: bytes, offset: int, value: int) -> bytes:
    """The 32 bits at an offset behind a box's name, changed."""
    at = data.index(kind) + 4 + offset
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


def equal_samples(data: bytes, count: int) -> bytes:
    """Claims so many frames of one size, in one chunk: no byte of the file grows with them."""
    data = patched(patched(data, b"stsz", 4, 1), b"stsz", 8, count)
    return patched(patched(data, b"stsc", 12, count), b"stts", 8, count)


def fragments(count: int) -> bytes:
    """A header, and a fragment that claims frames without a byte for each."""
    target = io.BytesIO()
    flags = "frag_keyframe+empty_moov+default_base_moof"
    with av.open(target, "w", format="mp4", options={"movflags": flags}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(64, 64), format="rgb24")))
        container.mux(stream.encode(None))
    data = target.getvalue()
    run = box(b"trun", struct.pack(">II", 0, count))
    head = box(b"tfhd", struct.pack(">IIII", 0x20018, 1, 1, 1))
    return data + box(b"moof", box(b"mfhd", bytes(8)), box(b"traf", head, run)) + box(b"mdat", bytes(64))


def still_times(data: bytes) -> bytes:
    """All frames at once: 0 seconds long, and no rate."""
    return patched(patched(data, b"stts", 12, 0), b"mvhd", 16, 0)


def npy(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(1000)


def huge_video(kind: str, codec: str) -> bytes:
    """One black frame, larger than is read."""
    target = io.BytesIO()
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 8000, 4208, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(8000, 4208, "yuv420p")))
        container.mux(stream.encode(None))
    return target.getvalue()


def jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    scan = b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + scan + b"\xff\xd9"


def tiff(width: int, height: int) -> bytes:
    """Gray, in one strip without bytes."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 0)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def bombs() -> dict[str, tuple[bytes, str]]:
    """Files that take seconds to make: name -> (bytes, what is said)."""
    bomb = zlib.compress(bytes(400 << 20))
    return {
        "large.mkv": (huge_video("matroska", "mpeg4"), "8000x4208.*at most 33554432"),
        "large.ts": (huge_video("mpegts", "mpeg2video"), "8000x4208|at most 33554432"),
        "text.png": (png(64, 64, b"", chunk(b"zTXt", b"a\0\0" + bomb)), "text.png"),
        "profile.png": (png(64, 64, b"", chunk(b"iCCP", b"a\0\0" + bomb)), "profile.png"),
        "inflate.png": (png(64, 64, bytes(200 << 20)), ""),
        "most.mp4": (equal_samples(mp4(), (1 << 21) - 1), "most.mp4"),
    }


def files() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, what is said)."""
    good, text = mp4(), b"This is not a video.\n" * 100
    gif = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0x80, 0, 0) + bytes(6)
    gif += b",\0\0\0\0" + struct.pack("<HHB", 60000, 60000, 0) + b"\2\2L\1\0;"
    return {
        "text.mp4": (text, "not a video or picture"),
        "empty.mp4": (b"", "not a video or picture"),
        "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n", "not a video"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "not a video"),
        "list.ffconcat": (b"ffconcat version 1.0\nfile good.mp4\n", "not a video"),
        "list.sdp": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nm=video 9 RTP/AVP 96\n", "not a video"),
        "list.mpd": (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "not a video"),
        "half.mp4": (good[: len(good) // 2], "cut off: it has"),
        "header.mp4": (good[:200], "header.mp4"),
        "zeros.mp4": (b"\0\0\0\x18ftypisom" + bytes(5000), "zeros.mp4"),
        "many.mp4": (equal_samples(good, 1 << 28), "claims more than 2097152"),
        "fragment.mp4": (fragments(1 << 28), "claims more than 2097152"),
        "still.mp4": (still_times(good), ""),
        "packed.mp4": (box(b"ftyp", b"isom" * 3) + box(b"moov", box(b"cmov", bytes(99))), "compressed index"),
        "tiles.heic": (box(b"ftyp", b"heic" * 3) + box(b"meta", bytes(4), box(b"iinf", bytes(8))), "HEIC"),
        "fast.mp4": (patched(good, b"mdhd", 12, 1 << 30), "frames a second; allowed are 0.01 to 1000"),
        "bomb.png": (png(20000, 20000, bytes(1 << 20)), "20000x20000; allowed are sides of 16 to 8192"),
        "wide.png": (png(1 << 31, 16), "allowed are sides"),
        "one.png": (png_bytes(picture(1, 1)), "1x1; allowed are sides"),
        "half.png": (png_bytes(np.zeros((64, 64, 3), np.uint8))[:-20], "cut off"),
        "bomb.gif": (gif, "60000x60000"),
        "bomb.jpg": (jpeg(20000, 20000), "20000x20000"),
        "scans.jpg": (jpeg(8000, 8000)[:-2] + b"\xff\xda" * 1000 + b"\xff\xd9", "100 scans"),
        "bomb.bmp": (b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 20000, 20000, 1, 24, *[0] * 6), "20000x"),
        "bomb.webp": (b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\0\xff\xff\0", "65536x65536"),
        "bomb.tiff": (tiff(20000, 20000), "20000x20000"),
        "empty.tiff": (tiff(64, 64), "damaged or cut off"),
        "lossless.webp": (b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9), "16384x16384"),
        "bomb.npy": (npy((1 << 40, 64, 64, 3)), "more than 131072 frames"),
        "short.npy": (npy((5, 64, 64, 3)), "cut off"),
        "wide.npy": (npy((1, 64, 1 << 40, 3)), "allowed are sides"),
        "object.npy": (npy((1, 64, 64, 3), "|O"), "object"),
        "rate.y4m": (b"YUV4MPEG2 W64 H64 F0:1 C420\n" + (b"FRAME\n" + bytes(6144)) * 3, ""),
        "large.y4m": (b"YUV4MPEG2 W20000 H20000 F25:1 C420\nFRAME\n" + bytes(6144), "large.y4m"),
    }


def test_all_are_refused_in_time_and_memory() -> None:
    cases = files()
    for name, (data, _) in cases.items():
        Path(name).write_bytes(data)
    os.mkfifo("pipe.mp4")
    with Path("sparse.mp4").open("wb") as file:
        file.truncate(1 << 40)
    check_refused(
        {name: said for name, (_, said) in cases.items()}
        | {
            "pipe.mp4": "not an ordinary file",
            "/dev/zero": "not an ordinary file",
            "sparse.mp4": "not a video",
            "none.mp4": "No such file",
            "http://127.0.0.1:9/a.mp4": "No such file",
            "concat:good.mp4|good.mp4": "No such file",
            "%03d.png": "No such file",
        }
    )


@pytest.mark.slow
def test_bombs_are_refused_in_time_and_memory() -> None:
    cases = bombs()
    for name, (data, _) in cases.items():
        Path(name).write_bytes(data)
    check_refused({name: said for name, (_, said) in cases.items()})


def test_texts_and_profiles_are_not_inflated() -> None:
    """A small bomb, beside pixels that are there."""
    for kind in (b"zTXt", b"iCCP", b"iTXt"):
        Path("a.png").write_bytes(png(64, 64, bytes(64 * 193), chunk(kind, b"a\0\0" + zlib.compress(bytes(8 << 20)))))
        assert open_clip("a.png").read().shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_memory_does_not_grow_with_length() -> None:
    """480 frames of 640x360 are 316 MiB as RGB, which reading all at once shows: the measure measures. (The decoder's
    own buffers reach their number within 160 frames.)"""
    for name, count in (("short.mp4", 200), ("long.mp4", 480)):
        with FrameSink(name, width=640, height=360, fps=16) as sink:
            for i in range(count):
                sink.write(np.full((1, 360, 640, 3), i % 256, np.uint8))
    peaks = []
    for name, reading in (
        ("short.mp4", "sum(len(part) for part in clip.chunks(8))"),
        ("long.mp4", "sum(len(part) for part in clip.chunks(8))"),
        ("long.mp4", "clip.read()"),
    ):
        words = [sys.executable, "-c", textwrap.dedent(READ.replace("clip.tail(1)", reading)), json.dumps([name])]
        _, said, _, grown = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        assert said is None
        peaks.append(grown)
    assert abs(peaks[1] - peaks[0]) < 24 and peaks[2] > 300


@given(place=st.floats(0, 1), value=st.integers(0, 255), kind=st.sampled_from(["mp4", "mkv", "gif", "png", "avi"]))
def test_a_flipped_byte_is_read_or_told(place: float, value: int, kind: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    if kind == "png":
        Path("a.png").write_bytes(png_bytes(frames[0]))
    else:
        codec, pixels = {"gif": ("gif", "rgb8"), "avi": ("mpeg4", "yuv420p")}.get(kind, ("libx264", "yuv420p"))
        with av.open(f"a.{kind}", "w") as container:
            stream = container.add_stream(codec, rate=16)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for i, frame in enumerate(frames):
                made = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
                made.pts, made.time_base = i, Fraction(1, 16)
                container.mux(stream.encode(made))
            container.mux(stream.encode(None))
    data = bytearray(Path(f"a.{kind}").read_bytes())
    data[int(place * (len(data) - 1))] = value
    Path(f"b.{kind}").write_bytes(data)
    try:
        clip = open_clip(f"b.{kind}")
        assert clip.read().shape == (clip.num_frames, clip.height, clip.width, 3)
    except Error as error:
        assert f"b.{kind}" in str(error)


def test_a_pipe_has_no_recipe() -> None:
    os.mkfifo("pipe.json")
    with pytest.raises(MediaError, match="not an ordinary file"):
        read_recipe("pipe.json")
