"""One still picture, or one decoded frame, as uint8 RGB [H, W, 3].

Everything a file can say about how it is to be seen is applied: colour matrix and range, the turn that a phone notes
instead of turning the pixels, and alpha (over black, which is what a video player shows behind a video).
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np

from fastvid.errors import MediaError
from fastvid.media.files import MAX_SIDE, THREADS, check_picture_size

MAX_FILE = 1 << 28  # bytes of a picture
MAX_SCANS = 100  # of a progressive JPEG: each is a few bytes, and costs as much as the whole picture
DECODERS = {"png": "png", "jpeg": "mjpeg", "webp": "webp", "bmp": "bmp", "tiff": "tiff"}
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"sRGB")
# ITU-T H.273 matrix -> swscale's code for it
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
BT709, BT601 = 1, 5
TIFF = (b"II*\0", b"MM\0*")


# ---------------------------------------------------------------- files


def read_picture(file: BinaryIO, kind: str, name: str) -> np.ndarray:
    """A still picture, uint8 RGB [H, W, 3]. Its size is checked before it is decoded. Raises MediaError."""
    import av

    file.seek(0)
    data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise MediaError(f"{name} has more than {MAX_FILE >> 20} MiB, which is the most that is read of a picture")
    if kind != "tiff":  # whose size only the decoder finds; it keeps the same limit
        check_picture_size(name, *_SIZES[kind](data, name))
    decoder = av.CodecContext.create(DECODERS[kind], "r")
    decoder.thread_count, decoder.thread_type = THREADS, "SLICE"
    decoder.options = {
        "max_pixels": str(MAX_SIDE * MAX_SIDE),
        "err_detect": "explode" if kind != "tiff" else "crccheck",
    }
    packet = av.Packet(plain_png(data, name) if kind == "png" else data)
    frames = [*decoder.decode(packet), *decoder.decode(None)]
    if not frames or frames[0].is_corrupt:
        raise MediaError(f"{name} is damaged or cut off, or larger than {MAX_SIDE}x{MAX_SIDE}")
    check_picture_size(name, frames[0].width, frames[0].height)
    return _turned(_pixels(frames[0]), _EXIF_TURNS.get(_orientation(data)))


def plain_png(data: bytes, name: str) -> bytes:
    """A PNG without what does not change its pixels: texts and profiles there may be bombs (a few KB that inflate to
    gigabytes). Raises MediaError for one that is cut off or damaged."""
    at, kept = 8, [data[:8]]
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data) or zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            break
        if kind in PNG_CHUNKS:
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    raise MediaError(f"{name} is damaged or cut off at byte {at} of {len(data)}")


def _png_size(data: bytes, name: str) -> tuple[int, int]:
    return struct.unpack(">II", data[16:24].ljust(8, b"\0"))


def _bmp_size(data: bytes, name: str) -> tuple[int, int]:
    width, height = struct.unpack("<ii", data[18:26].ljust(8, b"\0"))
    if len(data) < int.from_bytes(data[2:6], "little"):
        raise MediaError(f"{name} is cut off: {len(data)} bytes of {int.from_bytes(data[2:6], 'little')}")
    return width, abs(height)


def _jpeg_size(data: bytes, name: str) -> tuple[int, int]:
    """From the start-of-frame marker."""
    if data.count(b"\xff\xda") > MAX_SCANS or b"\xff\xd9" not in data:
        raise MediaError(f"{name} is damaged or cut off, or has more than {MAX_SCANS} scans")
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise MediaError(f"{name} is a damaged JPEG: it does not say how large it is")


def _webp_size(data: bytes, name: str) -> tuple[int, int]:
    """Of the three kinds of first chunk: lossy, lossless, extended."""
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise MediaError(f"{name} is cut off: {len(data)} bytes of {8 + int.from_bytes(data[4:8], 'little')}")
    kind, body = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X" and body[0] & 2:
        raise MediaError(f"{name} is an animated WebP, which is not read; give a .gif or .mp4")
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _orientation(data: bytes) -> int:
    """EXIF's tag 274 in a JPEG, PNG, WebP or TIFF: how the camera was held, 1 to 8; 1 where nothing says it."""
    ends = data if len(data) < 1 << 18 or data[:4] in TIFF else data[: 1 << 17] + data[-(1 << 17) :]
    found = re.search(rb"(?:\A|Exif\0\0|eXIf|EXIF....)(II\*\0|MM\0\*)", ends, re.DOTALL)
    if found is None:
        return 1
    exif, order = found.string[found.start(1) :], "<" if found[1][:1] == b"I" else ">"
    with contextlib.suppress(struct.error):
        (at,) = struct.unpack_from(order + "I", exif, 4)
        for entry in range(struct.unpack_from(order + "H", exif, at)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, at + 2 + 12 * entry)
            if tag == 274:
                return value
    return 1


# orientation -> a display matrix, see `_display_matrix`
_EXIF_TURNS = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
_SIZES = {"png": _png_size, "jpeg": _jpeg_size, "webp": _webp_size, "bmp": _bmp_size}


# ---------------------------------------------------------------- decoded frames


def to_rgb(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """A video's PyAV frame as uint8 RGB [H, W, 3], scaled to `size` (width, height before turning) if it has another,
    and turned as it is to be seen."""
    return _turned(_pixels(frame, size), _display_matrix(frame))


def _pixels(frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    from av.video.reformatter import ColorRange, Interpolation

    width, height = size or (frame.width, frame.height)
    alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    made = frame.reformat(
        width,
        height,
        "rgba" if alpha else "rgb24",
        src_colorspace=_matrix(frame),
        src_color_range=_range(frame),
        dst_color_range=ColorRange.JPEG,
        interpolation=int(flags),
        threads=1,
    )
    return _over_black(made.to_ndarray()) if alpha else made.to_ndarray()


def _is_yuv(frame: Any) -> bool:
    return not frame.format.is_rgb and not frame.format.has_palette and len(frame.format.components) > 2


def _matrix(frame: Any) -> int | None:
    """What the file says; where it says nothing, BT.709 from 720p on and BT.601 below, as players guess."""
    if not _is_yuv(frame):
        return None
    guess = BT709 if frame.width >= 1280 or frame.height > 576 else BT601
    return MATRICES.get(int(frame.colorspace), guess)


def _range(frame: Any) -> int | None:
    from av.video.reformatter import ColorRange

    if frame.format.is_rgb or frame.format.has_palette:
        return None
    if frame.format.name.startswith("yuvj"):
        return ColorRange.JPEG
    return int(frame.color_range) or (ColorRange.MPEG if _is_yuv(frame) else None)


def _over_black(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    return ((rgba[..., :3].astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def over_black(pictures: np.ndarray) -> np.ndarray:
    """uint8 [..., 1], [..., 3] or [..., 4] (gray, RGB, RGBA) -> RGB [..., 3], alpha over black."""
    if pictures.shape[-1] == 4:
        return _over_black(pictures)
    return np.ascontiguousarray(np.broadcast_to(pictures, (*pictures.shape[:-1], 3)))


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """The signs (a, b, c, d) of a display matrix: a pixel at (x, y) is seen at (ax + cy, bx + dy)."""
    from av.sidedata.sidedata import Type

    found = None
    with contextlib.suppress(ValueError):  # PyAV 18 does not know all kinds of side data of its FFmpeg
        found = frame.side_data.get(Type.DISPLAYMATRIX)
    if found is None:
        return None
    values = np.frombuffer(bytes(found), "=i4")[[0, 1, 3, 4]]
    a, b, c, d = (int(np.sign(value)) if abs(value) > 1 << 15 else 0 for value in values)
    return (a, b, c, d) if (a and d and not b and not c) or (b and c and not a and not d) else None


def _turned(picture: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    if matrix is None or matrix == (1, 0, 0, 1):
        return picture
    a, b, c, d = matrix
    if a == 0:
        picture = picture.swapaxes(0, 1)
    step_x, step_y = (a or c), (d or b)
    return np.ascontiguousarray(picture[::step_y, ::step_x])
