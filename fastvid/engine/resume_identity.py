"""What a checkpoint belongs to: the request, as arguments that can be given again, and the model; and how what is given
when it goes on differs from them.

Arguments are kept as JSON. Of pictures, clips and tensors the recipe has the sha256: those that were given as files are
found by their paths, the others have to be given again.
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
from fastvid.requests.request import DATA, SIZE
from fastvid.version import __version__

SAMPLES, SAMPLE_BYTES, MOST_HEADER = 16, 4096, 2**24

# ---------------------------------------------------------------- the model


def fingerprint(model: Model) -> dict[str, Any]:
    """Everything beside the request that decides the bytes of a video, as JSON. Reads some blocks of each weights
    file."""
    return {
        "fastvid": __version__,
        "torch": torch.__version__,
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "vae_dtype": str(model.vae_dtype).removeprefix("torch."),
        "backends": dict(model.ops.bound),
        "parallel": model.settings.get("parallel", "1"),
        "recipe of the model": hashlib.sha256(repr(model.preset).encode()).hexdigest(),
        "weights": dict(_weights(model)),
    }


def _device(device: torch.device) -> str:
    """What decides the order in which sums are added: on a CPU its vectors and threads too."""
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
    """A digest of files' sizes, headers and some of their bytes: enough to tell models apart, and fast."""
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


def check_model(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises InvalidRequest that names all differences, of the model and of how it runs."""
    found = []
    for name in sorted({*saved, *here}):
        then, now = saved.get(name), here.get(name)
        if then == now:
            continue
        if isinstance(then, dict) and isinstance(now, dict):
            other = [part for part in sorted({*then, *now}) if then.get(part) != now.get(part)]
            found.append(f"{name} ({', '.join(other)})")
        else:
            found.append(name if len(str(then)) == 64 else f"{name} ({then} then, {now} now)")
    if found:
        raise InvalidRequest(
            f"this checkpoint was made with other {', '.join(found)}: the frames would not be the same; load the model "
            "as it was then, or start the request anew"
        )


# ---------------------------------------------------------------- the request


def arguments(verb: str, options: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A request's arguments as JSON; filled in: what was drawn (seed) or read from a clip's own recipe."""
    given = dict(options)
    found = {name: _reference(value) if name in DATA else _plain(value) for name, value in given.items()}
    filled = ("seed", *(("prompt",) if "prompt_embeds" not in given and "prompt" in VERBS[verb] else ()))
    if verb == "finalize" and not any(name in given for name in SIZE):
        filled = (*filled, "width", "height")
    return found | {name: recipe[name] for name in filled if name in recipe}


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return f"{value.numerator}:{value.denominator}"
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _reference(value: Any) -> Any:
    """A file's path; of anything else only that it was given."""
    if isinstance(value, str | os.PathLike):
        return {"path": os.path.abspath(value)}
    if isinstance(value, dict):
        return {"at": {str(key): _reference(one) for key, one in value.items()}}
    return [_reference(one) for one in value] if isinstance(value, list | tuple) else {"given": type(value).__name__}


def options(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to go on with: the saved ones, and what is given again.

    Raises InvalidRequest for what has to be given again and is not, and for what was not given then.
    """
    given = {name: value for name, value in given.items() if value is not None}
    found = dict(given)
    for name, value in saved.items():
        if name in given:
            continue
        if name in DATA and _is_missing(value):
            raise InvalidRequest(f"{name} is missing: a checkpoint holds its sha256 alone; give {name}= again")
        found[name] = _load_reference(value) if name in DATA else value
    if added := [name for name in given if name not in saved]:
        raise InvalidRequest(f"{added[0]} was not given when this checkpoint was made; leave it out")
    return found


def _is_missing(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_missing, value))
    return "given" in value or any(map(_is_missing, value.get("at", {}).values()))


def _load_reference(value: Any) -> Any:
    if isinstance(value, list):
        return [_load_reference(one) for one in value]
    return (
        value["path"] if "path" in value else {int(frame): _load_reference(one) for frame, one in value["at"].items()}
    )


def check_request(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises InvalidRequest that names all differences between two recipes."""
    then, now = (json.loads(json.dumps({k: v for k, v in one.items() if k not in recipes.CONTEXT})) for one in
                 (saved, here))  # fmt: skip
    found = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if found:
        shown = ", ".join(f"{name} ({_shown(then.get(name))} then, {_shown(now.get(name))} now)" for name in found)
        raise InvalidRequest(f"this checkpoint is of another request: {shown}; give what was given then")


def _shown(value: Any) -> str:
    return f"sha256 {value['sha256'][:12]}" if isinstance(value, dict) and "sha256" in value else f"{value!r:.60}"
