"""Reads all frames of a file, its frame rate, and its recipe. The first bytes determine a file's kind, not its name."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastvid.errors import MediaError
from fastvid.files import open_regular, read_bytes
from fastvid.media.files import MAX_INPUT_FPS, MIN_INPUT_FPS, kind_of, media_errors, open_container
from fastvid.media.pieces import png_text
from fastvid.media.reader import VideoSource, open_source
from fastvid.media.sources import Source, npy_header

FIRST_PNG = "000000.png"  # of a folder of frames
JPEG_COMMENT = b"fastvid recipe: "  # starts each comment segment of a .jpg that holds a part of it
MAX_SEGMENTS = 1000
MAX_RECIPE, MAX_VALUES = 1 << 22, 1 << 16  # bytes, and lists and objects; fastvid writes no longer ones


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float | None]:
    """All frames, uint8 RGB [T, H, W, 3], and frames per second (None if unknown).

    `fastvid.media.clip.open_clip` lists the supported files. Raises MediaError.
    """
    with media_errors(path):
        source = open_source(path)
        frames = np.stack([source.frame(number) for number in range(source.num_frames)])
    return frames, stated_fps(path, source)


def stated_fps(path: str | os.PathLike[str], source: Source) -> float | None:
    """Frames per second: the file's, or the recipe's if the format stores no exact rate (.gif, pictures, arrays)."""
    if isinstance(source, VideoSource) and source.kind != "gif":
        return source.fps
    with contextlib.suppress(MediaError):
        fps = read_recipe(path).get("fps")
        if isinstance(fps, (int, float)) and MIN_INPUT_FPS <= fps <= MAX_INPUT_FPS:
            return float(fps)
    return source.fps


def is_media(path: str | os.PathLike[str]) -> bool:
    """Whether this is a picture, a video, a recipe or a folder of PNGs, by its first bytes. Raises MediaError for one
    that can't be read."""
    file = Path(path)
    if file.is_dir():
        return (file / FIRST_PNG).is_file()
    with media_errors(path):
        if not file.exists():
            return False
        with open_regular(file) as opened:
            return bool(kind_of(opened))


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a picture or video holds, and the recipe that is written in it: None if there is none. Raises MediaError."""
    with media_errors(path):
        file = Path(path) / FIRST_PNG if Path(path).is_dir() else Path(path)
        with open_regular(file) as opened:
            kind = kind_of(opened)
    facts: dict[str, Any] = {"file": os.fspath(path), "kind": "PNGs" if Path(path).is_dir() else kind}
    if kind != "json":
        with media_errors(path), contextlib.closing(open_source(path)) as source:
            facts |= {"width": source.width, "height": source.height, "num_frames": source.num_frames}
            fps = stated_fps(path, source)
            facts |= {"fps": fps, "seconds": source.num_frames / fps} if fps else {}
    recipe = None
    with contextlib.suppress(MediaError):
        recipe = read_recipe(path)
    return {**facts, "recipe": recipe}


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe in a file or folder that fastvid wrote, or in a .json file that holds only the recipe.

    Raises MediaError if the file can't be read or has no recipe.
    """
    readers = {"png": _from_png, "jpeg": _from_jpeg, "npy": _from_npy, "json": _from_json}
    with media_errors(path):
        file = Path(path)
        file = file / FIRST_PNG if file.is_dir() else file
        with open_regular(file) as opened:
            kind = kind_of(opened)
        text = readers[kind](file) if kind in readers else _from_tags(file, kind)
    if text and len(text) <= MAX_RECIPE and text.count("{") + text.count("[") <= MAX_VALUES:
        with contextlib.suppress(ValueError, RecursionError):
            recipe = json.loads(text)
            if isinstance(recipe, dict):
                return recipe
    raise MediaError(f"{path}: there is no fastvid recipe in it")


def _from_json(path: Path) -> str:
    return read_bytes(path, MAX_RECIPE).decode()


def _from_tags(path: Path, kind: str) -> str | None:
    if kind not in ("mov", "matroska", "gif"):
        return None
    with open_regular(path) as file, open_container(file, kind, str(path)) as container:
        return {name.lower(): value for name, value in container.metadata.items()}.get("comment")


def _from_npy(path: Path) -> str | None:
    with open_regular(path) as file:
        shape, _, dtype, start = npy_header(file, str(path))
        file.seek(start + math.prod(shape) * dtype.itemsize)
        rest = file.read(MAX_RECIPE)
    if not rest.startswith(b"\x93NUMPY"):
        return None
    return rest[10 + int.from_bytes(rest[8:10], "little") :].decode("ascii")


def _from_png(path: Path) -> str | None:
    with open_regular(path) as file:
        return png_text(file, "fastvid", MAX_RECIPE)


def _from_jpeg(path: Path) -> str:
    """The text of fastvid's comment segments. They come before the picture, with few other segments."""
    parts = []
    with open_regular(path) as file:
        file.seek(2)
        for _ in range(MAX_SEGMENTS):
            head = file.read(4)
            size = int.from_bytes(head[2:], "big")
            if head[:1] != b"\xff" or head[1:2] == b"\xda" or size < 2:
                break
            data = file.read(size - 2)
            if head[1:2] == b"\xfe" and data.startswith(JPEG_COMMENT):
                parts.append(data[len(JPEG_COMMENT) :])
    return b"".join(parts).decode("ascii")
