"""Identifies a checkpoint's request and model, and compares them with those that resume it.

Arguments are saved as JSON. Pictures, clips and tensors are not saved; the recipe has their sha256. Those passed as
files are read from the same paths again, all others must be passed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.requests import recipe as recipes
from fastvid.requests.arguments import VERBS
from fastvid.requests.loras import absolute
from fastvid.requests.request import DATA, SIZE
from fastvid.version import __version__

MOST_SHOWN = 8  # differences in a message
SAMPLES, SAMPLE_BYTES, MOST_HEADER = 16, 4096, 2**24

# ---------------------------------------------------------------- the model


def fingerprint(model: Model) -> dict[str, Any]:
    """Everything except the request that determines a video's bytes, as JSON. Reads some blocks of each weights
    file."""
    return {
        "fastvid": __version__,
        "torch": torch.__version__,
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "vae_dtype": str(model.vae_dtype).removeprefix("torch."),
        "backends": dict(model.ops.bound) | _choices(model),
        "parallel": model.settings.get("parallel", "1"),
        "recipe of the model": hashlib.sha256(repr(model.preset).encode()).hexdigest(),
        "weights": dict(_weights(model)),
    } | ({"quantize": model.options.quantize} if model.options.quantize else {})


def _choices(model: Model) -> dict[str, str]:
    """Operation and shape class -> back end, where results decide."""
    return {
        f"{op} {one.dtype} {one.shape_class}": one.backend for op, found in model.ops.choices.items() for one in found
    }


def _device(device: torch.device) -> str:
    """What determines the order of floating point sums: the GPU's name, or the CPU's vector width and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _weights(model: Model) -> Iterator[tuple[str, str]]:
    assert model.checkpoint is not None
    for part in model.checkpoint.parts:
        yield part.name, _digest(part.files)
    if model.checkpoint.tokenizer.is_file():
        yield "tokenizer", _digest([model.checkpoint.tokenizer])
    for path, *how in model.loras:
        yield f"LoRA {Path(path).name} {' '.join(map(str, how))}", _digest([Path(path)])


def _digest(files: Any) -> str:
    """A fast digest of files: their sizes, headers and some sampled blocks."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(size.to_bytes(8, "little") + length)
            digest.update(file.read(min(int.from_bytes(length, "little"), MOST_HEADER)))
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def loras(model: Model) -> list[list[Any]]:
    """The LoRAs of the request itself: file name, scale, perhaps expert, and digest of each."""
    return [[Path(file).name, *how, _digest([Path(file)])] for file, *how in model.asked]


def check_loras(saved: list[list[Any]], here: list[list[Any]]) -> None:
    """Raises InvalidRequest unless the request's LoRAs are those of the checkpoint."""
    if saved == here:
        return
    changed = [str(one[0]) for one in (*saved, *here) if (one in saved) is not (one in here)]
    raise InvalidRequest(
        f"this checkpoint was made with other LoRAs ({', '.join(dict.fromkeys(changed)):.200}): the frames would not "
        "be the same; put their files back as they were, or start the request anew"
    )


def check_model(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, which names all differences, if the model or its settings are not those of the
    checkpoint."""
    differences = []
    for name in sorted({*saved, *here}):
        then, now = saved.get(name), here.get(name)
        if then == now:
            continue
        if isinstance(then, dict) and isinstance(now, dict):
            changed = [part for part in sorted({*then, *now}) if then.get(part) != now.get(part)]
            differences.append(f"{name:.40} ({', '.join(changed):.300})")
        else:
            differences.append(name if len(str(then)) == 64 else f"{name:.40} ({then!s:.60} then, {now!s:.60} now)")
    if differences:
        raise InvalidRequest(
            f"this checkpoint was made with other {', '.join(differences[:MOST_SHOWN])}: the frames would not be the "
            "same; load the model as it was then, or start the request anew"
        )


# ---------------------------------------------------------------- the request


def arguments(verb: str, options: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A request's arguments as JSON, with the drawn seed and what was read from a clip's recipe filled in."""
    saved = {name: _reference(value) if name in DATA else _plain(value) for name, value in options.items()}
    saved |= {"loras": _plain(absolute(options["loras"]))} if "loras" in options else {}
    filled = ("seed", *(("prompt",) if "prompt_embeds" not in options and "prompt" in VERBS[verb] else ()))
    if verb == "finalize" and not any(name in options for name in SIZE):
        filled = (*filled, "width", "height")
    return saved | {name: recipe[name] for name in filled if name in recipe}


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return f"{value.numerator}:{value.denominator}"
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _reference(value: Any) -> Any:
    """A file's path as JSON; for data in memory only its type."""
    if isinstance(value, str | os.PathLike):
        return {"path": os.path.abspath(value)}
    if isinstance(value, dict):
        return {"at": {str(key): _reference(item) for key, item in value.items()}}
    return [_reference(item) for item in value] if isinstance(value, list | tuple) else {"given": type(value).__name__}


def options(saved: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to resume with: the saved ones, and the inputs passed again.

    Raises InvalidRequest for a missing input, and for one that the request did not have.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    arguments = dict(inputs)
    for name, value in saved.items():
        if name in inputs:
            continue
        if name in DATA and _is_missing(value):
            raise InvalidRequest(f"{name} is missing: a checkpoint holds its sha256 alone; give {name}= again")
        arguments[name] = _load_reference(value) if name in DATA else value
    if added := [name for name in inputs if name not in saved]:
        raise InvalidRequest(f"{added[0]} was not given when this checkpoint was made; leave it out")
    return arguments


def _is_missing(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_missing, value))
    return "given" in value or any(map(_is_missing, value.get("at", {}).values()))


def _load_reference(value: Any) -> Any:
    if isinstance(value, list):
        return [_load_reference(item) for item in value]
    if "path" in value:
        return value["path"]
    return {int(frame): _load_reference(item) for frame, item in value["at"].items()}


def check_request(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, which names all differences, if two recipes differ."""
    then, now = _comparable(saved), _comparable(here)
    if different := [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]:
        shown = ", ".join(
            f"{name:.40} ({_shown(then.get(name))} then, {_shown(now.get(name))} now)"
            for name in different[:MOST_SHOWN]
        )
        raise InvalidRequest(f"this checkpoint is of another request: {shown}; give what was given then")


def _comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's arguments as they come back from JSON."""
    left_out = (*recipes.CONTEXT, "loras")  # which `check_loras` compares: files may be named by other paths
    arguments = {name: value for name, value in recipe.items() if name not in left_out}
    return dict(json.loads(json.dumps(arguments)))


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"sha256 {value['sha256']!s:.12}"
    return f"{value!r:.60}"
