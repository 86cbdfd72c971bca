"""What goes between a program and its workers: messages of JSON and safetensors over pipes or sockets. No pickle: what
a message can hold is what is listed here, and nothing in it is executed.

A message is two lengths (8 bytes each, little-endian), a JSON object, and a safetensors file that may be empty. In the
JSON, {"$": kind, ...} stands for what JSON has no word for.
"""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastvid import errors
from fastvid.errors import Error, InvalidRequest

LENGTHS = struct.Struct("<QQ")
MOST = 1 << 42  # bytes: more is no message
BEAT = "beat"
ARGUMENTS = ("options",)  # what is in these has names of its own


class Message(NamedTuple):
    """An object, and the bytes of a safetensors file that it refers to."""

    header: dict[str, Any]
    payload: bytes = b""


class Closed(Error):
    """The other end is gone."""


def send(stream: BinaryIO, message: Message) -> None:
    """Raises OSError or ValueError where nobody reads any more."""
    head = json.dumps(message.header).encode()
    stream.write(LENGTHS.pack(len(head), len(message.payload)) + head)
    if message.payload:
        stream.write(message.payload)
    stream.flush()


def receive(stream: BinaryIO, most: int = MOST) -> Message:
    """The next one. Raises Closed at the end of the stream, where it breaks off, or for more than `most` bytes."""
    head, payload = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
    if max(head, payload) > most:
        raise Closed(f"what came is no message: its lengths are {head} and {payload}")
    return Message(json.loads(_exactly(stream, head)), _exactly(stream, payload))


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = stream.read(min(count - len(data), 1 << 24))
        if not part:
            raise Closed("the other end is gone")
        data += part
    return bytes(data)


def pack(values: Mapping[str, Any]) -> Message:
    """A message that holds these values. Raises InvalidRequest, with the name of the one, for what none can hold."""
    tensors: dict[str, Any] = {}
    header = {name: _encode(name, value, tensors) for name, value in values.items()}
    return Message(header, _save(tensors) if tensors else b"")


def unpack(message: Message) -> dict[str, Any]:
    """The values that `pack` was given."""
    tensors = _load(message.payload) if message.payload else {}
    return {name: _decode(value, tensors) for name, value in message.header.items()}


def error_of(told: Mapping[str, str]) -> Exception:
    """The error that a worker has raised: of the same class, where it is one of ours or of Python's own."""
    kind, text = told["kind"], told["text"]
    import torch  # its own error for memory that a device has not

    for module in (errors, builtins, torch):
        found = getattr(module, kind, None)
        if isinstance(found, type) and issubclass(found, Exception) and found is not errors.WorkerFailed:
            try:
                return found(text)
            except TypeError:
                break
    return Error(f"{kind}: {text}")


def _save(tensors: dict[str, Any]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(tensors)


def _load(payload: bytes) -> dict[str, Any]:
    import safetensors.torch

    return safetensors.torch.load(payload)


# ---------------------------------------------------------------- values


def _encode(name: str, value: Any, tensors: dict[str, Any]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    if isinstance(value, os.PathLike):
        return {"$": "path", "path": os.fspath(value)}
    if isinstance(value, Fraction):
        return {"$": "fraction", "of": [value.numerator, value.denominator]}
    if isinstance(value, list | tuple):
        inner = [_encode(f"{name}[{i}]", one, tensors) for i, one in enumerate(value)]
        return inner if type(value) is list else {"$": "tuple", "of": inner}
    if isinstance(value, Mapping):
        names = {key: str(key) if name in ARGUMENTS else f"{name}[{key!r}]" for key in value}
        items = [[_encode(name, key, tensors), _encode(names[key], one, tensors)] for key, one in value.items()]
        plain = all(isinstance(key, str) for key in value) and "$" not in value
        return dict(items) if plain else {"$": "dict", "of": items}
    if kind in _dataclasses():
        fields = dataclasses.fields(value)
        return {"$": kind, **{f.name: _encode(f.name, getattr(value, f.name), tensors) for f in fields}}
    for convert in (_picture, _tensor, _clip):
        if (made := convert(name, value, tensors)) is not None:
            return made
    raise InvalidRequest(
        f"{name} is a {kind}, which cannot be handed to other processes; allowed are numbers, text, paths, arrays, "
        f"tensors, pictures, videos, and lists and dictionaries of them; the nearest is an array"
    )


def _picture(name: str, value: Any, tensors: dict[str, Any]) -> Any:
    """Pillow's, which stay such: what is seen through, and how colours are read, is for those who take them to say."""
    if not hasattr(value, "getbands"):
        return None
    import numpy as np

    seen_through = "A" in value.getbands() or "transparency" in value.info
    pixels = np.asarray(value.convert("RGBA" if seen_through else "RGB"))
    return {"$": "picture", "pixels": _tensor(name, pixels, tensors)}


def _tensor(name: str, value: Any, tensors: dict[str, Any]) -> Any:
    """Arrays, what can be seen as one, and tensors."""
    import numpy as np
    import torch

    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, torch.Tensor) and hasattr(value, "__array__"):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray | torch.Tensor):
        return None
    key, array = f"{len(tensors)}", isinstance(value, np.ndarray)
    try:
        made = torch.from_numpy(np.array(value, copy=True)) if array else value.detach().to("cpu", copy=True)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name}: an array of {value.dtype} is given; numbers or bool are needed") from error
    tensors[key] = made.contiguous()
    return {"$": "array" if array else "tensor", "key": key}


def _clip(name: str, value: Any, tensors: dict[str, Any]) -> Any:
    """Clips that were opened: their frames, and how fast they go."""
    if not (hasattr(value, "read") and hasattr(value, "num_frames") and hasattr(value, "fps")):
        return None
    return {"$": "clip", "frames": _tensor(name, value.read(), tensors), "fps": _encode(name, value.fps, tensors)}


def _decode(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_decode(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {name: _decode(one, tensors) for name, one in value.items()}
    kind = value["$"]
    inner = {name: _decode(one, tensors) for name, one in value.items() if name not in ("$", "key")}
    simple: dict[str, Callable[[], Any]] = {
        "path": lambda: Path(inner["path"]),
        "fraction": lambda: Fraction(*inner["of"]),
        "tuple": lambda: tuple(inner["of"]),
        "dict": lambda: {_hashable(key): one for key, one in inner["of"]},
        "tensor": lambda: tensors[value["key"]],
        "array": lambda: tensors[value["key"]].numpy(),
        "picture": lambda: _image(inner["pixels"]),
        "clip": lambda: _moving(**inner),
    }
    return simple[kind]() if kind in simple else _dataclasses()[kind](**inner)


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _image(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _moving(frames: Any, fps: Any) -> Any:
    from fastvid.media.video import Video

    return frames if fps is None else Video(frames, float(fps), 0)


def _dataclasses() -> dict[str, type]:
    """Those that may be sent, by name."""
    from fastvid.engine.events import Finished, Frames, Plan, Started, Step
    from fastvid.media.video import Video

    return {kind.__name__: kind for kind in (Started, Step, Frames, Finished, Plan, Video)}
