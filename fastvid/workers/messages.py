"""What can be sent to a worker and back: values as JSON and safetensors, errors by the name of their class.

No pickle: a message holds only the kinds of values that are listed here, and nothing in it is executed. In the JSON,
{"$": kind, ...} stands for a value that JSON has no type for.
"""

from __future__ import annotations

import builtins
import dataclasses
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastvid import errors
from fastvid.errors import Error, InvalidRequest
from fastvid.workers.channel import Message

HEARTBEAT = "heartbeat"
ARGUMENTS = ("options",)  # errors name what is in these by its own name

Tensors = dict[str, Any]


def pack(values: Mapping[str, Any]) -> Message:
    """A message of these values. Raises InvalidRequest, which names the value that cannot be sent."""
    tensors: Tensors = {}
    header = {name: _encode(name, value, tensors) for name, value in values.items()}
    return Message(header, _save(tensors) if tensors else b"")


def unpack(message: Message) -> dict[str, Any]:
    """The values that `pack` was given."""
    tensors = _load(message.payload) if message.payload else {}
    return {name: _decode(value, tensors) for name, value in message.header.items()}


def pack_error(error: BaseException) -> dict[str, str]:
    """An error as a value to send."""
    return {"kind": type(error).__name__, "text": str(error)}


def unpack_error(packed: Mapping[str, str]) -> Exception:
    """The error of `pack_error`: of the same class if that is one of fastvid's, Python's or torch's."""
    import torch  # for torch.OutOfMemoryError

    kind, text = packed["kind"], packed["text"]
    for module in (errors, builtins, torch):
        found = getattr(module, kind, None)
        if isinstance(found, type) and issubclass(found, Exception) and found is not errors.WorkerFailed:
            try:
                return found(text)
            except TypeError:
                break
    return Error(f"{kind}: {text}")


def _save(tensors: Tensors) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(tensors)


def _load(payload: bytes) -> Tensors:
    import safetensors.torch

    return safetensors.torch.load(payload)


# ---------------------------------------------------------------- encode


def _encode(name: str, value: Any, tensors: Tensors) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    if isinstance(value, os.PathLike):
        return {"$": "path", "of": os.fspath(value)}
    if isinstance(value, Fraction):
        return {"$": "fraction", "of": [value.numerator, value.denominator]}
    if isinstance(value, list | tuple):
        items = [_encode(f"{name}[{i}]", item, tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"$": "tuple", "of": items}
    if isinstance(value, Mapping):
        return _encode_mapping(name, value, tensors)
    if kind in _dataclasses():
        fields = dataclasses.fields(value)
        return {"$": kind, **{f.name: _encode(f.name, getattr(value, f.name), tensors) for f in fields}}
    for encode in (_encode_picture, _encode_tensor, _encode_clip):
        if (encoded := encode(name, value, tensors)) is not None:
            return encoded
    raise InvalidRequest(
        f"{name} is a {kind}, which cannot be handed to other processes; allowed are numbers, text, paths, arrays, "
        f"tensors, pictures, videos, and lists and dictionaries of them; the nearest is an array"
    )


def _encode_mapping(name: str, value: Mapping[Any, Any], tensors: Tensors) -> Any:
    names = {key: str(key) if name in ARGUMENTS else f"{name}[{key!r}]" for key in value}
    items = [[_encode(names[key], part, tensors) for part in (key, item)] for key, item in value.items()]
    plain = all(isinstance(key, str) for key in value) and "$" not in value
    return dict(items) if plain else {"$": "dict", "of": items}


def _encode_picture(name: str, value: Any, tensors: Tensors) -> Any:
    """A Pillow image arrives as one, upright and over black."""
    if not hasattr(value, "getbands"):
        return None
    from fastvid.media.images import pillow_pixels

    return {"$": "picture", "pixels": _encode_tensor(name, pillow_pixels(value, name), tensors)}


def _encode_tensor(name: str, value: Any, tensors: Tensors) -> Any:
    """Tensors, arrays, and what converts to an array."""
    import numpy as np
    import torch

    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, torch.Tensor) and hasattr(value, "__array__"):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray | torch.Tensor):
        return None
    key, kind = f"{len(tensors)}", "tensor"
    if isinstance(value, np.ndarray):
        kind = "array"
        try:
            value = torch.from_numpy(np.array(value, copy=True))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{name}: an array of {value.dtype} is given; numbers or bool are needed") from error
    else:
        value = value.detach().to("cpu", copy=True)
    tensors[key] = value.contiguous()
    return {"$": kind, "key": key}


def _encode_clip(name: str, value: Any, tensors: Tensors) -> Any:
    """An open clip is sent as its frames, frame rate and sound."""
    if not (hasattr(value, "read") and hasattr(value, "num_frames") and hasattr(value, "fps")):
        return None
    return {
        "$": "clip",
        "frames": _encode_tensor(name, value.read(), tensors),
        "fps": _encode(name, value.fps, tensors),
        "audio": _encode(name, value.audio(), tensors),
    }


# ---------------------------------------------------------------- decode


def _decode(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("$")
    if kind == "tensor":
        return tensors[value["key"]]
    if kind == "array":
        return tensors[value["key"]].numpy()
    fields = {name: _decode(item, tensors) for name, item in value.items() if name != "$"}
    if kind is None:
        return fields
    return DECODERS[kind](**fields) if kind in DECODERS else _dataclasses()[kind](**fields)


def _decode_picture(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _decode_clip(frames: Any, fps: Any, audio: Any) -> Any:
    from fastvid.media.video import Video

    return frames if fps is None else Video(frames, float(fps), 0, audio=audio)


DECODERS: Mapping[str, Callable[..., Any]] = {
    "path": lambda of: Path(of),
    "fraction": lambda of: Fraction(*of),
    "tuple": lambda of: tuple(of),
    "dict": lambda of: dict(of),
    "picture": _decode_picture,
    "clip": _decode_clip,
}


def _dataclasses() -> dict[str, type]:
    """The dataclasses that may be sent, by name."""
    from fastvid.engine.events import Finished, Frames, Plan, Started, Step
    from fastvid.media.sound import Sound, SoundFile, Span, Track
    from fastvid.media.video import Video

    kinds = (Started, Step, Frames, Finished, Plan, Video, Sound, SoundFile, Span, Track)
    return {kind.__name__: kind for kind in kinds}
