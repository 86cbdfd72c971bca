"""Reads a request's inputs (pictures, clips, control videos), and derives size and frame rate from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from fastvid import notices
from fastvid.checks import MAX_SIDE, MIN_SIDE, is_array, is_pillow
from fastvid.errors import InvalidRequest, MediaError, OutOfMemory
from fastvid.media.arrays import as_array, in_order, is_signed, layout_of, to_uint8
from fastvid.media.clip import Clip, center_crop, open_clip, open_picture
from fastvid.media.metadata import read_recipe
from fastvid.requests import after
from fastvid.requests.arguments import ARGUMENTS, CLIPS, DRIVING, PROMPT_OF_CLIP
from fastvid.requests.recipe import prints_of, recordable
from fastvid.requests.request import SIZE, Request, Resolved
from fastvid.requests.sizes import check_frames

PICTURES = ("image", "last_image")
STRETCH = 1.25  # how far the aspect ratios of a picture and its video may differ without a warning
WHITE = 128  # of a mask: from here on a pixel is generated
SAME_RATE = 0.01  # by how much of itself a rate may differ from another that counts as the same (30 and 29.97)
FILES = (*PICTURES, "keyframes", "video", "video_2", "mask", "reference_images", *DRIVING)


def read(request: Request) -> Request:
    """The request with its pictures as uint8 arrays [H, W, 3] and its clips opened. Without a size, it gets the aspect
    ratio of its first clip or picture.

    Raises MediaError for a file that cannot be read, InvalidRequest for something that is not a picture or clip.
    """
    try:
        return _read(request)
    except OutOfMemory:
        raise
    except MemoryError as error:  # numpy's, of an array that takes no memory until it is copied
        raise OutOfMemory(f"the request's pictures and clips: {error!s:.100}; give smaller ones, or files") from None


def _read(request: Request) -> Request:
    if request.verb in CLIPS:
        return _with_clips(request)
    values: dict[str, Any] = _read_control(request)
    for name in PICTURES:
        if (value := getattr(request, name)) is not None:
            values[name] = open_picture(value, name)
    if request.keyframes:
        values["keyframes"] = {f: open_picture(p, f"keyframes[{f}]") for f, p in request.keyframes.items()}
    values |= _read_driving(request)
    shapes = [(values["pose_video"].height, values["pose_video"].width)] if "pose_video" in values else []
    shapes += [values[name].shape[-3:-1] for name in ("video", *PICTURES) if name in values]
    shapes += [picture.shape[:2] for picture in values.get("keyframes", {}).values()]
    if shapes and (request.height or request.width or request.aspect or request.budget) is None:
        height, width = shapes[0]
        values["aspect"] = Fraction(width, height)
    return replace(request, **values)


def check_files(arguments: Mapping[str, Any]) -> None:
    """Raises MediaError for a picture or clip among the arguments that is no readable file. Of clips it decodes the
    first frame."""
    for name in FILES:
        value = arguments.get(name)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
        for part in parts:
            if isinstance(part, str | os.PathLike):
                open_clip(part, name=name).close()


def warn_of_shapes(request: Resolved) -> None:
    """Warns of pictures and control videos whose shape is clearly not the video's, which are stretched, and of control
    videos that are longer."""
    named = {} if request.is_animated else {"image": request.image, "last_image": request.last_image}
    named |= {f"keyframes[{frame}]": picture for frame, picture in (request.keyframes or {}).items()}
    if request.verb == "generate" and request.video is not None:
        named["video"] = request.video[0]
        if (count := len(request.video)) > request.num_frames:
            notices.warn(f"video has {count} frames, of which the first {request.num_frames} are used")
    for name, picture in named.items():
        if picture is not None:
            _warn_of_shape(name, picture.shape[:2], (request.height, request.width), "stretched")


def warn_of_control(request: Request, resolved: Resolved) -> None:
    """Warns of a control video of another rate than the result's, and of masks that leave nothing to generate.

    request: as it was given; frames that were read have no rate."""
    for name, clip in (("mask", "video"), ("mask_video", "background_video")):
        mask = getattr(resolved, name)
        if mask is not None and not (mask >= WHITE).any():
            notices.warn(f"{name} is black everywhere: black keeps {clip} as it is, white is generated")
    if resolved.verb != "generate" or resolved.video is None:
        return
    with open_clip(request.video, name="video") as control:
        rate = control.fps
    if rate and abs(rate - resolved.fps) > SAME_RATE * rate:
        notices.warn(
            f"video has {rate:g} frames a second and the result {resolved.fps:g}: its frames are taken one for one, so "
            f"that its motion has {resolved.fps / rate:.2g} times its speed; fps={rate:g} keeps it"
        )


def warn_of_driving(request: Resolved, face_side: int) -> None:
    """Warns of driving clips whose shape is clearly not the video's, or a face's, and of those that are shorter or
    longer than the video."""
    count, video = request.num_frames, (request.height, request.width)
    for name in DRIVING:
        clip = getattr(request, name)
        if clip is None:
            continue
        size = clip.shape[1:] if name == "mask_video" else (clip.height, clip.width)
        to = (face_side, face_side) if name == "face_video" else video
        _warn_of_shape(name, size, to, "stretched", "the face encoder's pictures" if name == "face_video" else None)
        if len(clip) > count:
            notices.warn(f"{name} has {len(clip)} frames, of which the first {count} are used")
        elif 1 < len(clip) < count:
            notices.warn(f"{name} has {len(clip)} frames and the video {count}: from its end on it runs back and forth")


def _warn_of_shape(name: str, size: tuple[int, int], to: tuple[int, int], done: str, other: str | None = None) -> None:
    """Warns if (height, width) is clearly of another shape than what it becomes: the video, or something else."""
    (height, width), (new_height, new_width) = size, to
    if not 1 / STRETCH <= width * new_height / (height * new_width) <= STRETCH:
        what = f"{other} are" if other else "the video"
        notices.warn(f"{name} is {width}x{height} and {what} {new_width}x{new_height}, so that it is {done}")


def check_same(recipe: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raises InvalidRequest for a clip or picture among the arguments that is not the one the recipe was made with, by
    the recipe's fingerprints."""
    recorded = {name: prints for name in FILES if (prints := prints_of(recipe.get(name)))}
    passed = {name: arguments[name] for name in recorded if arguments.get(name) is not None}
    if not passed:
        return
    request = read(Request.from_recipe(recipe, **passed))
    for name in passed:
        wanted, actual = recorded[name], prints_of(recordable(getattr(request, name)))
        if [one["sha256"] for one in wanted] != [one["sha256"] for one in actual]:
            raise InvalidRequest(
                f"{name} is not what this recipe was made with ({_difference(wanted, actual)}); give the same again, "
                "or leave out the recipe"
            )


def _difference(wanted: list[dict[str, Any]], actual: list[dict[str, Any]]) -> str:
    shapes = [" and ".join("x".join(map(str, one.get("shape", ()))) for one in prints) for prints in (wanted, actual)]
    return f"{shapes[0]} against {shapes[1]}" if shapes[0] != shapes[1] else f"{shapes[0]} both, but other pixels"


def _with_clips(request: Request) -> Request:
    clips = {name: open_clip(getattr(request, name), name=name) for name in CLIPS[request.verb]}
    first = clips["video"]
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (first.height, first.width)):
        raise InvalidRequest(
            f"video is {first.width}x{first.height}; {request.verb} takes sides of {MIN_SIDE} to {MAX_SIDE} pixels"
        )
    values: dict[str, Any] = {**clips, **_from_recipe(request)}
    values |= {"fps": first.fps} if request.fps is None and first.fps else {}
    if "video_2" in clips:
        second = clips["video_2"].resized(first.height, first.width)
        _warn_of_shape(
            "video_2", (clips["video_2"].height, clips["video_2"].width), (first.height, first.width), "cropped"
        )
        values["video_2"] = second.resampled(first.fps) if first.fps else second
    values["audio"] = _keeps_sound(request, clips)
    if request.verb == "interpolate":
        return replace(request, **values | after.between(request, first), height=first.height, width=first.width)
    if request.verb == "upscale":
        request = _on_canvas(replace(after.enlarged(request, first), **values, num_frames=first.num_frames), first)
        return replace(request, video=after.on_larger(first, request.video))
    if request.verb in ("edit", "finalize"):
        return _on_canvas(replace(request, **values, num_frames=first.num_frames), first)
    return replace(request, **values, height=first.height, width=first.width)


def _keeps_sound(request: Request, clips: Mapping[str, Clip]) -> bool | None:
    """Whether the video has the clips' sound; None if they have none."""
    if request.audio is False or any(clip.has_sound for clip in clips.values()):
        return request.audio is not False
    if request.audio:
        notices.warn(f"audio=True: {' and '.join(clips)} have no sound that can be read, and neither will the result")
    return None


def _from_recipe(request: Request) -> dict[str, Any]:
    """Missing values from the clip's recipe: the prompt; for a draft also seed and full size."""
    recipe = _recipe_of(request.video)
    values: dict[str, Any] = {}
    if request.verb in PROMPT_OF_CLIP and request.prompt is None and request.prompt_embeds is None:
        values["prompt"] = _recorded("prompt", recipe.get("prompt")) or ""
    if request.verb != "finalize":
        return values
    _warn_of_lost_inputs(recipe)
    if request.seed is None:
        values["seed"] = _recorded("seed", recipe.get("seed"))
    if not _is_sized(request):
        full = recipe.get("full_size")
        if not isinstance(full, list | tuple) or len(full) != 2:
            raise InvalidRequest("finalize: the video is no draft that says its full size; give width and height")
        values["width"], values["height"] = _recorded("width", full[0]), _recorded("height", full[1])
    return values


def _warn_of_lost_inputs(recipe: Mapping[str, Any]) -> None:
    """Warns of pictures and clips that a draft was made with, and that its final video is made without."""
    if lost := [name for name in FILES if prints_of(recipe.get(name))]:
        names = ", ".join(f"{name}=" for name in lost)
        notices.warn(f"finalize: the draft was made with {names}; the final video follows the draft's frames alone")


def _recorded(name: str, value: Any) -> Any:
    """A value in a clip's recipe, which anybody may have written; None if there is none. Raises InvalidRequest."""
    return None if value is None else ARGUMENTS[name].check(f"{name} in the recipe of video", value)


def _recipe_of(video: Any) -> dict[str, Any]:
    """The recipe of a Video or a file; empty if there is none."""
    if isinstance(video, str | os.PathLike):
        try:
            return read_recipe(video)
        except MediaError:
            return {}
    recipe = getattr(video, "recipe", None)
    return recipe if isinstance(recipe, dict) else {}


def _is_sized(request: Request) -> bool:
    return any(getattr(request, name) is not None for name in SIZE)


def _on_canvas(request: Request, clip: Clip) -> Request:
    """The request with its clip at the requested size. An unmasked edit with a larger frame centers the clip and
    generates the area around it (outpainting), with a default strength of 1; all others scale the clip."""
    values: dict[str, Any] = {"mask": read_mask("mask", request.mask)} if request.mask is not None else {}
    if not _is_sized(request):
        values |= {"height": clip.height, "width": clip.width}
    request = replace(request, **values)
    width, height = request.width or clip.width, request.height or clip.height
    if request.aspect is not None or request.budget is not None:
        ratio = request.aspect or Fraction(clip.width, clip.height)
        width, height = around(clip.width, clip.height, ratio)
        request = replace(request, aspect=None, budget=None)
    request = replace(request, width=width, height=height)
    if (width, height) == (clip.width, clip.height):
        return _with_mask(request, clip)
    if request.verb == "edit" and request.mask is None and width >= clip.width and height >= clip.height:
        canvas, strength = Canvas(clip, height, width), 1.0 if request.strength is None else request.strength
        return replace(request, video=canvas, mask=canvas.mask(), strength=strength)
    _warn_of_shape("video", (clip.height, clip.width), (height, width), "cropped")
    return _with_mask(replace(request, video=clip.resized(height, width)), clip)


def around(width: int, height: int, ratio: Fraction) -> tuple[int, int]:
    """The smallest (width, height) of an aspect ratio that contains these sides."""
    return max(width, round(height * ratio)), max(height, round(width / ratio))


def _with_mask(request: Request, clip: Clip) -> Request:
    if request.mask is None:
        return request
    frames, height, width = request.mask.shape
    if frames not in (1, clip.num_frames):
        raise InvalidRequest(f"mask has {frames} frames; allowed is 1, or {clip.num_frames} as video has")
    size = request.height or clip.height, request.width or clip.width
    if (height, width) == size:
        return request
    mask = request.mask
    if (height, width) != (clip.height, clip.width):
        notices.warn(_other_size(width, height, clip.width, clip.height))
        mask = _nearest(mask, clip.height, clip.width)
    # Cropped and resized like the clip, so that it stays aligned.
    inside = center_crop(mask.shape[1], mask.shape[2], *size)
    return replace(request, mask=_nearest(mask[(slice(None), *inside)], *size))


def _other_size(width: int, height: int, video_width: int, video_height: int) -> str:
    return f"mask is {width}x{height} and video {video_width}x{video_height}; the mask is stretched to the video's size"


def _nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask [F, H, W] stretched to [F, height, width] without new values."""
    rows, columns = (np.arange(n) * o // n for n, o in zip((height, width), mask.shape[1:], strict=True))
    return np.ascontiguousarray(mask[:, rows][:, :, columns])


@dataclass(frozen=True, eq=False)
class Canvas:
    """A clip centered on larger frames, which repeat its edge pixels around it."""

    clip: Clip
    height: int
    width: int

    @property
    def num_frames(self) -> int:
        return self.clip.num_frames

    @property
    def fps(self) -> float | None:
        return self.clip.fps

    @property
    def _offset(self) -> tuple[int, int]:
        return (self.height - self.clip.height) // 2, (self.width - self.clip.width) // 2

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames start to stop - 1, uint8 [n, height, width, 3]."""
        top, left = self._offset
        bottom, right = self.height - self.clip.height - top, self.width - self.clip.width - left
        return np.pad(self.clip.read(start, stop), ((0, 0), (top, bottom), (left, right), (0, 0)), "edge")

    def mask(self) -> np.ndarray:
        """The mask of the area to generate: uint8 [1, height, width], 255 around the clip, 0 on it."""
        mask, (top, left) = np.full((1, self.height, self.width), 255, np.uint8), self._offset
        mask[:, top : top + self.clip.height, left : left + self.clip.width] = 0
        return mask


def read_clip(name: str, value: Any) -> np.ndarray:
    """Reads a clip, uint8 RGB [F, H, W, 3], from a file, an array, a tensor, a `Video`, or pictures of one size. Raises
    as `open_clip` does."""
    if len(getattr(value, "shape", (0, 0, 0, 0))) not in (4, 5):
        raise InvalidRequest(f"{name} is {value.dtype} {list(value.shape)}; it must be uint8 RGB [F, H, W, 3]")
    with open_clip(value, name=name) as clip:
        return clip.read()


def read_mask(name: str, value: Any) -> np.ndarray:
    """Reads a mask, uint8 [F, H, W], 255 is white; F is 1 for a picture.

    value: a file, an array or tensor (bool, uint8 from 0 to 255, or floating point from 0 to 1) [F, H, W] or [H, W],
    optionally with channels, a Pillow image, a clip, or a list of pictures. Only the first channel counts, as in
    diffusers. Arrays are copied. Raises as `open_clip` does.
    """
    if isinstance(value, list | tuple):
        return _stack_masks(name, [read_mask(f"{name}[{i}]", one)[0] for i, one in enumerate(value)])
    if is_pillow(value):
        array = open_picture(value, name)
    else:
        array = as_array(value, name) if is_array(value) else read_clip(name, value)
    frames = _mask_frames(name, array)
    if is_signed(frames, name):
        raise InvalidRequest(f"{name} has values below 0; a mask of floating point numbers is in 0 to 1")
    return np.array([to_uint8(frame, signed=False) for frame in frames])


def _mask_frames(name: str, array: np.ndarray) -> np.ndarray:
    """The first channel [F, H, W] of a mask. [3, H, W] is one mask if its three planes are equal."""
    refused = f"{name} is {array.dtype} {list(array.shape)}; it must be bool, or uint8 0 and 255, [F, H, W] or [H, W]"
    if array.ndim not in (2, 3, 4) or 0 in array.shape or array.dtype.kind not in "fb" and array.dtype != np.uint8:
        raise InvalidRequest(refused)
    if array.ndim == 4:
        frames = in_order(array, layout_of(array.shape, name))
        if frames.shape[-1] == 4:
            raise InvalidRequest(refused)
        return frames[..., 0]
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        return array[None, ..., 0]
    if array.ndim == 3 and array.shape[-1] <= 4:  # gray or RGB with alpha, whose white may be either
        raise InvalidRequest(refused)
    planes = array.reshape(-1, *array.shape[-2:])
    return planes[:1] if len(planes) == 3 and bool((planes == planes[:1]).all()) else planes


def _stack_masks(name: str, pictures: list[np.ndarray]) -> np.ndarray:
    sizes = {one.shape[:2] for one in pictures}
    if len(sizes) != 1:
        raise InvalidRequest(f"{name} has pictures of {sorted(sizes)} (H, W); one or more of one size are needed")
    return np.stack(pictures)


def _read_control(request: Request) -> dict[str, Any]:
    """The control branch's inputs of `generate` as arrays: video uint8 [F, H, W, 3], mask uint8 [F or 1, H, W],
    reference_images; and the video's num_frames if the request has no length. Raises as `read_clip` does."""
    values: dict[str, Any] = {}
    if request.video is not None:
        values["video"] = read_clip("video", request.video)
        if request.num_frames is None and request.seconds is None:
            check_frames(len(values["video"]), "video")
            values["num_frames"] = len(values["video"])
    if request.mask is not None:
        values["mask"] = read_mask("mask", request.mask)
        sizes = values["video"].shape[1:3], (request.height, request.width)
        if values["mask"].shape[1:] not in sizes:
            notices.warn(_other_size(*values["mask"].shape[:0:-1], *sizes[0][::-1]))
    if request.reference_images is not None:
        pictures = enumerate(request.reference_images)
        values["reference_images"] = tuple(open_picture(value, f"reference_images[{i}]") for i, value in pictures)
    return values


def _read_driving(request: Request) -> dict[str, Any]:
    """The clips that drive a character, opened: only what a segment needs of them is read; its mask uint8 [F or 1, H,
    W]. The pose video also gives length and rate, if the request says nothing of them. Raises as `open_clip` does."""
    given = {name: value for name in DRIVING if (value := getattr(request, name)) is not None}
    values: dict[str, Any] = {name: open_clip(one, name=name) for name, one in given.items() if name != "mask_video"}
    values |= {"mask_video": read_mask("mask_video", given["mask_video"])} if "mask_video" in given else {}
    pose = values.get("pose_video")
    if pose is None:
        return values
    if request.num_frames is None and request.seconds is None:
        check_frames(len(pose), "pose_video")
        values["num_frames"] = len(pose)
    return values | ({"fps": pose.fps} if request.fps is None and pose.fps else {})
