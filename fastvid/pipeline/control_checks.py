"""Checks of control videos, masks and reference pictures against the model, before anything is made."""

from __future__ import annotations

from fastvid.errors import InvalidRequest
from fastvid.models.loaded import CHANNELS, Model, way_of
from fastvid.models.wan.siblings import Channels
from fastvid.requests.request import Resolved

CONTROL_OPTIONS = ("video", "mask", "reference_images", "conditioning_scale")


def check_control(model: Model, request: Resolved) -> None:
    """Raises InvalidRequest for control options that do not fit the model, or if it has no control branch."""
    # In other verbs, video and mask are not control options.
    names = CONTROL_OPTIONS if request.verb == "generate" else CONTROL_OPTIONS[2:]
    options = [name for name in names if getattr(request, name) is not None]
    if way_of(model) == CHANNELS and model.preset.pictures_optional:
        return _check_channels(model, request, options)
    if not model.control_layers:
        if options:
            raise InvalidRequest(
                f"{model.preset.name} has no control branch; leave {options[0]} out ({_takers(options[0])} take it)"
            )
        return
    _check_video(request)
    scale = request.conditioning_scale
    if isinstance(scale, tuple) and len(scale) != model.control_layers:
        raise InvalidRequest(
            f"conditioning_scale has {len(scale)} values; give one number, or {model.control_layers}, one for each "
            "control layer"
        )
    for i, picture in enumerate(request.reference_images or ()):
        _check_reference(i, picture.shape, request, model.vae.config.spatial_scale)


def _takers(option: str) -> str:
    """The models that take a control option."""
    return "VACE models" if option in ("mask", "conditioning_scale") else "VACE and Fun-Control models"


def _check_channels(model: Model, request: Resolved, options: list[str]) -> None:
    """The same for models that see a control, known frames or a reference picture in more channels."""
    config, name = model.transformer.config, model.preset.name
    has_control = Channels(config.in_channels, config.out_channels, bool(config.image_dim)).is_control
    if "conditioning_scale" in options:
        raise InvalidRequest(
            f"conditioning_scale: {name} has no control branch, whose weight that is; leave it out (VACE has one)"
        )
    if has_control and "mask" in options:
        raise InvalidRequest(f"mask: {name} takes video as a control, all of it; leave mask out (VACE models take it)")
    if not has_control and "video" in options and "mask" not in options:
        raise InvalidRequest(f"video: {name} keeps the frames of a video where mask is black; give mask too")
    pictures = request.reference_images or ()
    if pictures and not model.takes_reference:
        raise InvalidRequest(
            f"reference_images: {name} takes none; leave them out (Fun-Control from V1.1 on and VACE models take them)"
        )
    if has_control and config.image_dim and request.image is not None and request.model_frames == 1:
        raise InvalidRequest(f"image: {name} makes what follows a first picture; ask for more than one frame")
    if len(pictures) > 1:
        raise InvalidRequest(f"reference_images has {len(pictures)} pictures; {name} takes one")
    _check_video(request)


def _check_video(request: Resolved) -> None:
    if request.video is None or request.verb != "generate":
        return
    count = len(request.video)
    if count < request.num_frames:
        raise InvalidRequest(f"num_frames={request.num_frames}: video has {count} frames; the nearest is {count}")
    if request.mask is not None and len(request.mask) not in (1, count):
        raise InvalidRequest(f"mask has {len(request.mask)} frames; allowed is 1, or {count} as video has")


def _check_reference(number: int, shape: tuple[int, ...], request: Resolved, spatial: int) -> None:
    """Raises InvalidRequest if a side becomes zero when rounded down to a multiple of `spatial`, or scaled to a
    frame."""
    what = f"reference_images[{number}] is {shape[1]}x{shape[0]}"
    height, width = (side // spatial * spatial for side in shape[:2])
    if not height or not width:
        raise InvalidRequest(f"{what}; at least {spatial}x{spatial} is needed")
    scale = min(request.model_height / height, request.model_width / width)
    if min(int(height * scale), int(width * scale)) < 1:
        raise InvalidRequest(
            f"{what}, too narrow to be seen on a frame of {request.model_width}x{request.model_height}; crop it"
        )
