"""Converts still pictures and decoded video frames to uint8 RGB [H, W, 3], and resizes them.

Applies a file's color matrix, color range and rotation. Alpha is composited over black, like in video players.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np

from fastvid.errors import MediaError
from fastvid.media.files import check_picture_size

MAX_FILE = 1 << 28  # bytes of a picture's file
MAX_SCANS = 100  # in a progressive JPEG: a scan of a few bytes takes as long to decode as the whole picture
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"sRGB")
FILTERS = ("bicubic", "lanczos")
# ITU-T H.273 matrix code -> swscale's code
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
BT709, BT601 = 1, 5


# ---------------------------------------------------------------- files


def read_picture(file: BinaryIO, kind: str, name: str) -> np.ndarray:
    """Read a still picture as uint8 RGB [H, W, 3]. Checks its size before decoding. Raises MediaError."""
    file.seek(0)
    data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise MediaError(f"{name} has more than {MAX_FILE >> 20} MiB, which is the most that is read of a picture")
    if kind == "webp":  # Pillow allocates memory for all pixels when it opens a WebP
        check_picture_size(name, *_webp_size(data))
    if kind == "jpeg" and data.count(b"\xff\xda") > MAX_SCANS:
        raise MediaError(f"{name} has more than {MAX_SCANS} scans, which is the most that is read")
    try:
        image = _open(strip_png(data, name) if kind == "png" else data, kind)
        check_picture_size(name, *image.size)
        if kind == "webp" and getattr(image, "is_animated", False):
            raise MediaError(f"{name} is an animated WebP, which is not read; give a .gif or .mp4")
        image.load()
    except MediaError:
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise MediaError(f"{name} is damaged or cut off: {error}") from error
    return pillow_pixels(image, name)


def _open(data: bytes, kind: str) -> Any:
    """Open a Pillow image; reads only its header. Avoids `Image.open`, which applies a process-wide pixel limit and
    warns."""
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    readers: dict[str, Any] = {
        "bmp": BmpImagePlugin.BmpImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "png": PngImagePlugin.PngImageFile,
        "tiff": TiffImagePlugin.TiffImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }
    return readers[kind](io.BytesIO(data))


def pillow_pixels(image: Any, name: str) -> np.ndarray:
    """The pixels of a Pillow image, uint8 RGB [H, W, 3], upright as its EXIF says. Raises MediaError for more than 16
    bits a channel, and for a file that cannot be read any more."""
    from PIL import ImageOps

    try:
        image.load()
    except Exception as error:  # opened, but not read yet: Pillow raises many types for a damaged file
        raise MediaError(f"{name} cannot be read: {error}") from error
    kind = image.format  # lost where it is turned
    with contextlib.suppress(Exception):  # ignore damaged EXIF
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" and kind != "PNG":  # Pillow 10 opens 16-bit PNGs as I
        raise MediaError(f"{name} has more than 16 bits a channel, which is not read; save it with 8")
    if image.mode.startswith("I"):
        rounded = np.minimum((np.asarray(image).astype(np.int64) + 128) >> 8, 255)
        return over_black(rounded.astype(np.uint8)[..., None])
    alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return over_black(np.asarray(image.convert("RGBA" if alpha else "RGB")))


def strip_png(data: bytes, name: str) -> bytes:
    """Remove texts, profiles and all other chunks that do not affect pixels from a PNG: a few KB of them may decompress
    to gigabytes. Raises MediaError if the PNG is damaged or truncated."""
    offset, kept = 8, [data[:8]]
    while offset + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + size
        if end > len(data) or zlib.crc32(data[offset + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            break
        if kind in PNG_CHUNKS:
            kept.append(data[offset:end])
        if kind == b"IEND":
            return b"".join(kept)
        offset = end
    raise MediaError(f"{name} is damaged or cut off at byte {offset} of {len(data)}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk of an extended, lossless or lossy WebP."""
    kind, body = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


# ---------------------------------------------------------------- resizing


def resize(pictures: np.ndarray, height: int, width: int, method: str = "lanczos") -> np.ndarray:
    """Pictures uint8 [..., H, W, C] -> uint8 [..., height, width, C] with Pillow, C 1 or 3; method: "lanczos",
    "bicubic".

    Resizes horizontally, then vertically, in two calls. In a single call Pillow 13 swaps the order if the height
    shrinks much more than the width; the models were trained with the order of earlier versions.
    Raises ValueError for another dtype, layout, size or method.
    """
    from PIL import Image

    if pictures.dtype != np.uint8 or pictures.ndim < 3 or pictures.shape[-1] not in (1, 3) or 0 in pictures.shape:
        raise ValueError(f"resize takes uint8 [..., H, W, 1 or 3], not {pictures.dtype} {list(pictures.shape)}")
    if height < 1 or width < 1 or method not in FILTERS:
        raise ValueError(f"resize makes at least 1x1 with {' or '.join(FILTERS)}, not {width}x{height} with {method!r}")
    *lead, old_height, _, channels = pictures.shape
    resample = Image.Resampling[method.upper()]
    resized = np.empty((*lead, height, width, channels), np.uint8)
    for index in np.ndindex(*lead):
        image = Image.fromarray(pictures[index] if channels == 3 else pictures[index][..., 0])
        image = image.resize((width, old_height), resample).resize((width, height), resample)
        resized[index] = np.asarray(image).reshape(height, width, channels)
    return resized


# ---------------------------------------------------------------- decoded frames


def to_rgb(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """Convert a PyAV frame to uint8 RGB [H, W, 3]: scale it to `size` (width, height before rotation), then apply its
    rotation."""
    from av.video.reformatter import ColorRange, Interpolation

    alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    converted = frame.reformat(
        *size,
        "rgba" if alpha else "rgb24",
        src_colorspace=_matrix(frame),
        src_color_range=_range(frame),
        dst_color_range=ColorRange.JPEG,
        interpolation=int(flags),
        threads=1,
    )
    return _rotated(over_black(converted.to_ndarray()), _display_matrix(frame))


def _is_yuv(frame: Any) -> bool:
    return not frame.format.is_rgb and not frame.format.has_palette and len(frame.format.components) > 2


def _matrix(frame: Any) -> int | None:
    """swscale's code of the color matrix. If the file states none: BT.709 from 720p up, else BT.601, like players."""
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


def over_black(pictures: np.ndarray) -> np.ndarray:
    """Composite over black: uint8 gray [..., 1], RGB [..., 3] or RGBA [..., 4] -> RGB [..., 3]."""
    if pictures.shape[-1] != 4:
        return np.ascontiguousarray(np.broadcast_to(pictures, (*pictures.shape[:-1], 3)))
    alpha = pictures[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(pictures[..., :3])
    return ((pictures[..., :3].astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """The signs (a, b, c, d) of a frame's display matrix: pixel (x, y) is shown at (ax + cy, bx + dy)."""
    from av.sidedata.sidedata import Type

    side_data = None
    with contextlib.suppress(ValueError):  # PyAV 18 raises for side data types of its FFmpeg that it does not know
        side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return None
    values = np.frombuffer(bytes(side_data), "=i4")[[0, 1, 3, 4]]
    a, b, c, d = (int(np.sign(value)) if abs(value) > 1 << 15 else 0 for value in values)
    return (a, b, c, d) if (a and d and not b and not c) or (b and c and not a and not d) else None


def _rotated(picture: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    if matrix is None or matrix == (1, 0, 0, 1):
        return picture
    a, b, c, d = matrix
    if a == 0:
        picture = picture.swapaxes(0, 1)
    step_x, step_y = (a or c), (d or b)
    return np.ascontiguousarray(picture[::step_y, ::step_x])
