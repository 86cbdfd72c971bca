"""Converts still pictures and decoded video frames to uint8 RGB [H, W, 3], and resizes them.

Applies a file's color matrix, color range and rotation. Alpha is composited over black, like in video players.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from fastvid.errors import MediaError
from fastvid.media import pieces
from fastvid.media.color import conversion_of
from fastvid.media.files import check_picture_size

MAX_FILE = 1 << 28  # bytes of a picture's file
MAX_EXTRA = 1 << 25  # bytes of a WebP beside its pixels, such as profiles
ORIENTATION = 0x0112  # of EXIF
BAND = 1 << 20  # pixels that are converted at a time
FILTERS = ("bicubic", "bilinear", "lanczos")
# ITU-T H.273 matrix code -> swscale's code
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
BT709, BT601 = 1, 5
DERIVED = 12  # H.273's matrix that follows from the primaries, whose codes are those of the matrices


# ---------------------------------------------------------------- files


def read_picture(file: BinaryIO, kind: str, name: str) -> np.ndarray:
    """Read a still picture as uint8 RGB [H, W, 3]. Checks size and pieces before decoding. Raises MediaError."""
    size = pieces.size_of(file)
    if size > MAX_FILE:
        raise MediaError(f"{name} has more than {MAX_FILE >> 20} MiB, which is the most that is read of a picture")
    try:
        image = _open(file, kind, size, name)
        image.load()
        vars(image).pop("_decoder", None)  # of a WebP: it keeps two more copies of the pixels
    except MediaError:
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise MediaError(f"{name} is damaged or cut off: {error}") from error
    return pillow_pixels(image, name)


def _open(file: BinaryIO, kind: str, size: int, name: str) -> Any:
    """Open a Pillow image of allowed size; reads only its header. Avoids `Image.open`, which applies a process-wide
    pixel limit and warns."""
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    readers: dict[str, Any] = {
        "bmp": BmpImagePlugin.BmpImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "png": PngImagePlugin.PngImageFile,
        "tiff": TiffImagePlugin.TiffImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }
    if kind == "png":
        file = pieces.strip_png(file, name)
    elif kind == "jpeg":
        pieces.check_jpeg(file, name)
    elif kind == "webp":  # Pillow allocates memory for all pixels, and reads the whole file, when it opens a WebP
        width, height = pieces.check_webp(file, name)
        check_picture_size(name, width, height)
        _check_bytes(name, size, width * height)
    else:
        {"bmp": pieces.check_bmp, "tiff": pieces.check_tiff}[kind](file, name)
    file.seek(0)
    image = readers[kind](file)
    check_picture_size(name, *image.size)
    if kind == "jpeg":
        pieces.check_scans(file, name, image.width * image.height)
        file.seek(0)
        image = readers[kind](file)
    return image


def _check_bytes(name: str, size: int, pixels: int) -> None:
    if size > MAX_EXTRA + 8 * pixels:
        raise MediaError(f"{name} has {size:,} bytes, which are too many for its {pixels:,} pixels")


def pillow_pixels(image: Any, name: str) -> np.ndarray:
    """The pixels of a Pillow image, uint8 RGB [H, W, 3], upright as its EXIF says. Raises MediaError for more than 16
    bits a channel, and for a file that cannot be read any more."""
    try:
        image.load()
    except Exception as error:  # opened, but not read yet: Pillow raises many types for a damaged file
        raise MediaError(f"{name} cannot be read: {error}") from error
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":  # Pillow 10 opens 16-bit PNGs as I
        raise MediaError(f"{name} has more than 16 bits a channel, which is not read; save it with 8")
    if image.mode.startswith("I"):
        return _upright(_in_bands(image, lambda band: _rounded(np.asarray(band))), image)
    alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return _upright(_in_bands(image, lambda band: np.asarray(band.convert("RGBA" if alpha else "RGB"))), image)


def _upright(picture: np.ndarray, image: Any) -> np.ndarray:
    """A picture [H, W, 3], turned as the EXIF of its Pillow image says."""
    orientation = 1
    with contextlib.suppress(Exception):  # ignore damaged EXIF
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(picture[::rows, ::columns])


def _in_bands(image: Any, convert: Callable[[Any], np.ndarray]) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a Pillow image, some rows at a time: conversions take several times the memory."""
    rows = max(1, BAND // image.width)
    if rows >= image.height:
        return over_black(convert(image))
    made = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        made[top:bottom] = over_black(convert(image.crop((0, top, image.width, bottom))))
    return made


def _rounded(values: np.ndarray) -> np.ndarray:
    """16 bits a channel to 8: [H, W] to uint8 [H, W, 1]."""
    return np.minimum((values.astype(np.int64) + 128) >> 8, 255).astype(np.uint8)[..., None]


# ---------------------------------------------------------------- resizing


def resize(pictures: np.ndarray, height: int, width: int, method: str = "lanczos") -> np.ndarray:
    """Pictures uint8 [..., H, W, C] -> uint8 [..., height, width, C] with Pillow, C 1 or 3; method: "lanczos",
    "bicubic", "bilinear".

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


def to_rgb(frame: Any, size: tuple[int, int], alpha: np.ndarray | None = None) -> np.ndarray:
    """Convert a PyAV frame to uint8 RGB [H, W, 3]: scale it to `size` (width, height before rotation), convert its
    colors to SDR BT.709, then apply its rotation. alpha: uint8 [H, W], where the frame does not hold it."""
    from av.video.reformatter import ColorRange, Interpolation

    has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    conversion = conversion_of(frame)
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    converted = frame.reformat(
        *size,
        _RGB[has_alpha, conversion is not None],
        src_colorspace=_matrix(frame),
        src_color_range=_range(frame),
        dst_color_range=ColorRange.JPEG,
        interpolation=int(flags),
        threads=1,
    )
    pixels = converted.to_ndarray()
    if conversion is not None:
        levels = (pixels[..., 3:] >> 8).astype(np.uint8)
        pixels = np.concatenate((conversion.to_sdr(pixels[..., :3]), levels), axis=2)
    if alpha is not None:
        pixels = np.dstack((pixels, resize(alpha[..., None], size[1], size[0])))
    return _rotated(over_black(pixels), _display_matrix(frame))


_RGB = {(False, False): "rgb24", (True, False): "rgba", (False, True): "rgb48le", (True, True): "rgba64le"}
"""The pixel format that a frame is converted to, by whether it has alpha, and whether its colors are converted."""


def _is_yuv(frame: Any) -> bool:
    return not frame.format.is_rgb and not frame.format.has_palette and len(frame.format.components) > 2


def _matrix(frame: Any) -> int | None:
    """swscale's code of the color matrix. If the file states none: BT.709 from 720p up, else BT.601, like players."""
    if not _is_yuv(frame):
        return None
    if int(frame.colorspace) == DERIVED:
        return MATRICES.get(int(frame.color_primaries), BT709)
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
