"""Files of millions of tiny pieces, of every format: refused or read within 2 s and 256 MiB. And files as encoders
write them, which the limits have to let through."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hostile_media import check_refused
from mutations import damaged, fuzz, peak, refuses, seeds
from PIL import Image

from fastvid.errors import Error, MediaError
from fastvid.media import pieces, units
from fastvid.media.clip import open_clip

H264 = {"codec": "libx264"}


# ---------------------------------------------------------------- as encoders write them


def video(
    kind: str, codec: str, pixels: str = "yuv420p", count: int = 12, still: bool = False, **options: str
) -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8) * np.uint8(not still)
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
        stream.codec_context.options = options
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, number, 1), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


GOOD = [
    *(("libx264", kind, "yuv420p") for kind in ("mp4", "mov", "matroska", "avi", "mpegts", "flv", "h264", "asf")),
    *(("mpeg2video", kind, "yuv420p") for kind in ("mpeg", "mpegts", "vob")),
    *(("mpeg4", kind, "yuv420p") for kind in ("avi", "mp4")),
    *(("mjpeg", kind, "yuvj420p") for kind in ("avi", "mov")),
    *(("rawvideo", kind, "yuv420p") for kind in ("avi", "matroska")),
    *(("ffv1", "matroska", "yuv420p"), ("wrapped_avframe", "yuv4mpegpipe", "yuv420p"), ("png", "mov", "rgb24")),
    *(("gif", "gif", "rgb8"), ("apng", "apng", "rgb24"), ("wmv2", "asf", "yuv420p"), ("flv1", "flv", "yuv420p")),
]  # fmt: skip


@pytest.mark.parametrize("still", [False, True], ids=["noise", "black"])
@pytest.mark.parametrize(("codec", "kind", "pixels"), GOOD, ids=lambda value: value)
def test_what_encoders_write_is_read(codec: str, kind: str, pixels: str, still: bool) -> None:
    Path("a").write_bytes(video(kind, codec, pixels, still=still))
    assert open_clip("a").read().shape == (12, 64, 96, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mp4", "matroska", "mpegts", "avi", "flv", "h264"])
def test_long_videos_of_tiny_frames_are_read(kind: str) -> None:
    """Length-prefixed units of 256 to 511 bytes look like starts of units; black frames have very few bytes."""
    for still in (False, True):
        Path("a").write_bytes(video(kind, "libx264", count=6000, still=still, crf="45"))
        assert open_clip("a").num_frames == 6000 and open_clip("a").tail(1).shape[0] == 1


@pytest.mark.parametrize("size", ["60", "200"])
def test_pictures_of_many_slices_are_read(size: str) -> None:
    for kind in ("mp4", "h264", "mpegts"):
        Path("a").write_bytes(video(kind, "libx264", **{"x264-params": f"slice-max-size={size}"}))
        assert len(open_clip("a").read()) == 12


PICTURES: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
    *(("JPEG", mode, {"progressive": True}) for mode in ("RGB", "L", "CMYK")),
    *(("TIFF", "RGB", {"compression": method}) for method in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
    *(("WEBP", mode, {"lossless": True}) for mode in ("RGB", "RGBA")),
    *(("BMP", mode, {}) for mode in ("RGB", "L", "P", "1")),
]


@pytest.mark.parametrize(("kind", "mode", "options"), PICTURES, ids=str)
def test_what_pillow_writes_is_read(
    kind: str, mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a picture is converted in bands of rows."""
    monkeypatch.setattr("fastvid.media.images.BAND", 1000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 4), np.uint8))
    noise.convert("RGB" if mode in ("P", "1", "CMYK") else mode).convert(mode).save("a", kind, **options)
    with Image.open("a") as image:
        alpha = image.mode in ("LA", "RGBA") or "transparency" in image.info
        wanted = np.asarray(image.convert("RGBA" if alpha else "RGB"))
    if alpha:
        wanted = ((wanted[..., :3].astype(np.uint16) * wanted[..., 3:] + 127) // 255).astype(np.uint8)
    assert (open_clip("a").read()[0] == wanted).all()


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_its_exif_says(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save("a.png", exif=exif)
    assert (open_clip("a.png").read()[0] == np.asarray(ImageOps.exif_transpose(Image.open("a.png")))).all()


def test_a_stripped_png_is_a_view() -> None:
    Image.new("RGB", (64, 64)).save("a.png")
    data = Path("a.png").read_bytes()
    with_text = data[:33] + chunk(b"tEXt", b"a\0" + b"x" * 5000) + chunk(b"IDAT") + data[33:]
    view = pieces.strip_png(io.BytesIO(with_text), "a.png")
    assert view.read() == data
    assert view.seek(40) == 40 and view.read(5) == data[40:45] and view.seek(-4, 2) and view.read() == data[-4:]


# ---------------------------------------------------------------- pieces by the million


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(extra: bytes = b"", before_end: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(64 * 193)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + before_end + chunk(b"IEND")


def box(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(data), kind) + data


def element(number: str, data: bytes) -> bytes:
    return bytes.fromhex(number) + (len(data) | 1 << 56).to_bytes(8, "big") + data


def gif(middle: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + bytes(6) + middle + b";"


GIF_PICTURE = b",\0\0\0\0" + struct.pack("<HHB", 64, 64, 0) + b"\2\2L\1\0"


def saved(kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(target, kind, **options)
    return target.getvalue()


def tiff(tags: list[tuple[int, int, int, int]], rest: bytes) -> bytes:
    basic = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (277, 1), (278, 64)]
    entries = [(tag, 4, 1, value) for tag, value in basic] + tags
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + rest


def bmp(side: int, data: bytes) -> bytes:
    head = struct.pack("<IIIIiiHHIIiiII", 0, 0, 54 + 1024, 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + head + bytes(1024) + data


def flv(names: int) -> bytes:
    entries = b"".join(struct.pack(">HI", 4, 0x21212121 + number) + b"\1\1" for number in range(names))
    data = b"\2\0\x0aonMetaData\x08\0\0\0\0" + entries + b"\0\0\x09"
    tag = b"\x12" + len(data).to_bytes(3, "big") + bytes(7) + data + struct.pack(">I", 11 + len(data))
    whole = video("flv", "flv1")
    return whole[:13] + tag + whole[13:]


def muxed(kind: str, storm: bytes, at: int) -> bytes:
    """An H.264 video, one packet of which is a storm of units."""
    target = io.BytesIO()
    with av.open(io.BytesIO(video("mp4", "libx264"))) as source, av.open(target, "w", format=kind) as container:
        [track] = source.streams.video
        copy = container.add_stream_from_template(track)
        for number, packet in enumerate(packet for packet in source.demux(track) if packet.dts is not None):
            if number == at:
                units = av.Packet(storm)
                units.pts, units.dts, units.time_base = packet.pts, packet.dts, packet.time_base
                units.is_keyframe, packet = packet.is_keyframe, units
            packet.stream = copy
            container.mux(packet)
    return target.getvalue()


def into_mkv(data: bytes) -> bytes:
    """Elements before the first cluster."""
    whole = video("matroska", "libx264")
    at = whole.index(b"\x1f\x43\xb6\x75")
    return whole[:at] + data + whole[at:]


def into_jpeg(data: bytes, last: bool = False) -> bytes:
    """Bytes before the last scan, or right behind the start."""
    whole = saved("JPEG", progressive=True)
    at = whole.rindex(b"\xff\xda") if last else 2
    return whole[:at] + data + whole[at:]


def tags(count: int) -> bytes:
    return element(
        "1254c367",
        b"".join(
            element("7373", element("67c8", element("45a3", b"%d" % n) + element("4487", b"a"))) for n in range(count)
        ),
    )


def info(count: int) -> bytes:
    whole = video("avi", "mpeg4")
    entries = b"".join(struct.pack(">I", 0x41414141 + number) + b"\2\0\0\0a\0" for number in range(count))
    return whole[:12] + b"LIST" + struct.pack("<I", 4 + len(entries)) + b"INFO" + entries + whole[12:]


UNITS, LENGTHS = b"\0\0\0\1\x09\xf0" + b"\0\0\1\x09", b"\0\0\0\1\x09"
STORMS: dict[str, Callable[[int], bytes]] = {
    "raw.h264": lambda n: b"\0\0\0\1\x67" + b"\0\0\1\x09" * n,
    "late.h264": lambda n: video("h264", "libx264") + b"\0\0\1\x61" * n,
    "raw.hevc": lambda n: b"\0\0\0\1\x40\1" + b"\0\0\1\x46\1" * n,
    "raw.ivf": lambda n: (
        b"DKIF\0\0\x20\0AV01" + struct.pack("<HHIIIIIQ", 64, 64, 30, 1, 2, 0, 2 * n, 0) + b"\x12\0" * n
    ),
    **{
        f"{name}{at}.{kind}": lambda n, kind=kind, at=at, unit=unit: muxed(kind, UNITS[:6] + unit * n, at)
        for kind in ("avi", "matroska", "mpegts", "flv", "mp4", "asf", "mpeg")
        for name, unit in (("starts", UNITS[6:]), ("lengths", LENGTHS))
        for at in ((0, 5) if kind not in ("avi", "mpegts") else (0,))
    },
    "boxes.mp4": lambda n: (
        box(b"ftyp", b"isom" * 3)
        + box(b"moov", box(b"udta", box(b"meta", bytes(4) + box(b"ilst", box(b"abcd", box(b"data", bytes(9))) * n))))
    ),
    "traks.mp4": lambda n: box(b"ftyp", b"isom" * 3) + box(b"moov", box(b"trak") * n),
    "free.mp4": lambda n: video("mp4", "libx264") + box(b"free") * n,
    "fragments.mp4": lambda n: video("mp4", "libx264") + box(b"moof", box(b"traf")) * n,
    "tags.mkv": lambda n: into_mkv(tags(n // 10)),
    "late.mkv": lambda n: video("matroska", "libx264") + tags(n // 10),
    "voids.mkv": lambda n: into_mkv(b"\xec\x80" * n),
    "clusters.mkv": lambda n: into_mkv(b"\x1f\x43\xb6\x75\x80" * n),
    "blocks.mkv": lambda n: into_mkv(element("1f43b675", b"\xe7\x81\0" + b"\xa3\x84\x81\0\0\x80" * n)),
    "cues.mkv": lambda n: video("matroska", "libx264") + element("1c53bb6b", b"\xbb\x80" * (4 * n)),
    "chunks.webp": lambda n: saved("WEBP") + b"ABCD\0\0\0\0" * n,
    "first.webp": lambda n: b"RIFF\0\0\0\3WEBPVP8X\x0a\0\0\0\0\0\0\0\x3f\0\0\x3f\0\0" + b"ABCD\0\0\0\0" * n,
    "tags.tiff": lambda n: tiff([(40_000 + i, 4, n, 8) for i in range(20_000)], bytes(4 * n)),
    "strips.tiff": lambda n: tiff([(273, 4, n, 200), (279, 4, n, 200)], bytes(4 * n)),
    "runs.bmp": lambda n: bmp(2048, b"\0\0" * (12 * n)),
    "large.bmp": lambda n: bmp(8192, b"\1\1" * n),
    "comment.gif": lambda n: gif(b"!\xfe" + b"\1a" * n + b"\0" + GIF_PICTURE),
    "pixels.gif": lambda n: gif(b",\0\0\0\0" + struct.pack("<HHB", 64, 64, 0) + b"\2" + b"\1L" * n + b"\0"),
    "frames.gif": lambda n: gif(GIF_PICTURE * 20_000),
    "extensions.gif": lambda n: gif(b"!\xfe\0" * n + GIF_PICTURE),
    "scans.jpg": lambda n: into_jpeg(b"\xff\xda\0\x08\1\1\0\x3f\x3f\0\0" * n, last=True),
    "segments.jpg": lambda n: into_jpeg(b"\xff\xe1\0\2" * n),
    "fill.jpg": lambda n: into_jpeg(b"\xff" * (10 * n)),
    "zeros.jpg": lambda n: into_jpeg(b"\xff\0" * n),
    "tables.jpg": lambda n: into_jpeg(b"\xff\xc4\0\2" * n, last=True),
    "texts.png": lambda n: png(chunk(b"tEXt") * n),
    "exif.png": lambda n: png(chunk(b"eXIf") * n),
    "pixels.png": lambda n: png(chunk(b"IDAT") * n),
    "frames.png": lambda n: png(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", bytes(26)) * n),
    "parts.png": lambda n: png(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fdAT") * n),
    "parts.avi": lambda n: b"RIFF\0\0\0\4AVI " + b"JUNK\0\0\0\0" * n,
    "tags.avi": lambda n: info(n // 10),
    "index.avi": lambda n: video("avi", "mpeg4") + b"idx1" + struct.pack("<I", 48 * n) + bytes(48 * n),
    "names.flv": lambda n: flv(n // 5),
    "tags.flv": lambda n: b"FLV\1\1\0\0\0\x09\0\0\0\0" + (b"\x09" + bytes(13) + b"\x0b") * n,
    "pages.ogv": lambda n: (b"OggS\0\2" + bytes(20) + b"\0") * n,
    "packs.mpg": lambda n: b"\0\0\1\xba\x44\0\4\0\4\1\0\0\3\xf8" * n,
    "empty.ts": lambda n: (b"G\x1f\xff\x10" + bytes(184)) * (n // 10),
}  # fmt: skip


FEW = ("raw.h264", "raw.ivf", "lengths0.mp4", "tags.mkv", "comment.gif", "fill.jpg", "exif.png", "tags.tiff")


@pytest.mark.parametrize(
    ("names", "count"),
    [(FEW, 200_000), *(pytest.param(tuple(STORMS), n, marks=pytest.mark.slow) for n in (200_000, 1_500_000))],
)
def test_storms_of_pieces_are_cheap(names: tuple[str, ...], count: int) -> None:
    for name in names:
        Path(name).write_bytes(STORMS[name](count))
    check_refused(dict.fromkeys(names, ""))


@pytest.mark.parametrize("name", ["raw.h264", "lengths0.mp4", "boxes.mp4", "tags.mkv", "segments.jpg", "exif.png"])
def test_what_is_too_much_is_said(name: str) -> None:
    Path(name).write_bytes(STORMS[name](200_000))
    with pytest.raises(MediaError, match=rf"{name} has more than \d+ .*, which is the most that is read"):
        open_clip(name)


def test_time_between_frames_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.ogv").write_bytes(STORMS["pages.ogv"](200_000))
    monkeypatch.setattr(units, "MAX_SECONDS", 0.01)
    with pytest.raises(MediaError, match=r"a\.ogv takes more than 0\.01 seconds to the next frame"):
        open_clip("a.ogv")


@pytest.mark.slow
def test_large_pictures_take_six_times_their_size() -> None:
    """8192x8192 as RGB is 192 MiB."""
    rows = bytes((1 + 8192 * 8) * 8192)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8192, 8192, 16, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND")
    Path("a.png").write_bytes(data)
    for kind, options in (("WEBP", {"lossless": True}), ("JPEG", {"progressive": True, "subsampling": 0}), ("BMP", {})):
        Image.new("RGB", (8192, 8192)).save(f"a.{kind.lower()}", kind, **options)
    check_refused(dict.fromkeys(("a.png", "a.webp", "a.jpeg", "a.bmp"), ""), seconds=30, mebibytes=6 * 192)


# ---------------------------------------------------------------- by the thousand

SEEDS: dict[str, Callable[[], bytes]] = {
    **{f"{codec}.{kind}": lambda c=codec, k=kind, p=pixels: video(k, c, p, count=3) for codec, kind, pixels in GOOD},
    **{f"{kind}-{mode}": lambda k=kind, m=mode: picture(k, m) for kind, mode, _ in PICTURES},
    "npy": lambda: npy(),
}


def picture(kind: str, mode: str) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).convert(mode).save(target, kind)
    return target.getvalue()


def npy() -> bytes:
    target = io.BytesIO()
    np.save(target, np.zeros((2, 32, 32, 3), np.uint8))
    return target.getvalue()


def _read(path: Path) -> None:
    clip = open_clip(path)
    assert clip.tail(1).shape == (1, clip.height, clip.width, 3)


@fuzz(10_000)
def test_mutated_files(count: int) -> None:
    """Large claims in a valid file's header may take the memory of a frame of that size."""
    good = {name: make() for name, make in SEEDS.items()}
    refused = 0
    for data in good.values():
        Path("warm").write_bytes(data)
        refuses(lambda: _read(Path("warm")), Error, seconds=10)
    with peak(64 + 96):
        for attempt in seeds("media", count):
            name = attempt.choice(list(good))
            Path("a").write_bytes(damaged(good[name], attempt))
            refused += refuses(lambda: _read(Path("a")), Error, seconds=4)
    assert 0 < refused < count
