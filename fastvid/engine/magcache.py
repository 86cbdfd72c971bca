"""The calibration of MagCache (arXiv 2506.09045): how the size of what the blocks add changes from step to step. It is
measured once for a model by `fastvid calibrate --cache`, and kept in a JSON file.

A file belongs to a model, a solver and a shift. It holds ratios at the noise levels it was made at; those of other
levels, as of another number of steps, are interpolated: the logarithm of the size is a line between two levels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastvid import files
from fastvid.checks import shown
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.requests.request import Resolved

FORMAT, MOST_BYTES, MOST_LEVELS = "fastvid magcache 1", 1 << 20, 1000
TEXTS = ("prompt", "negative")


def key_of(model: Model, request: Resolved) -> dict[str, Any]:
    """What a file has to agree with."""
    config = model.transformer.config
    return {
        "model": model.preset.name,
        "layers": config.num_layers,
        "dim": config.dim,
        "solver": request.solver,
        "flow_shift": float(request.flow_shift) if request.sigmas is None else None,
    }


def default_path(model: Model, request: Resolved) -> Path:
    """Where a model's file is, unless the request names one: in fastvid's folder of the user's cache."""
    key = key_of(model, request)
    shift = "own" if key["flow_shift"] is None else f"{key['flow_shift']:g}"
    return files.cache_folder() / "magcache" / f"{key['model']}-{key['dim']}-{key['solver']}-{shift}.json"


def write(path: Path, key: Mapping[str, Any], levels: np.ndarray, ratios: Mapping[str, list[float]]) -> None:
    """Writes a file. levels: noise levels [N], descending. ratios: for each of TEXTS, [N]. Raises OSError."""
    content = {"format": FORMAT, **key, "levels": [float(one) for one in levels], "ratios": dict(ratios)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def digest_of(path: Path | str) -> str:
    """The first digits of a file's sha256. Raises InvalidRequest if it cannot be read."""
    return f"sha256-{hashlib.sha256(_read(Path(path))).hexdigest()[:16]}"


def check(model: Model, request: Resolved, path: Path | str) -> dict[str, Any]:
    """What a file holds. Raises InvalidRequest unless it belongs to the request."""
    if not Path(path).exists():
        raise InvalidRequest(
            f"cache=magcache: {model.preset.name} has not been calibrated for solver={request.solver} and "
            f"flow_shift={request.flow_shift:g}: there is no {path}; run: {command(request)}"
        )
    content, here = _parsed(Path(path)), key_of(model, request)
    if different := [name for name, value in here.items() if content[name] != value]:
        name = different[0]
        raise InvalidRequest(
            f"cache: {path} was calibrated with {name}={shown(content[name])}, and this request has "
            f"{name}={shown(here[name])}; run: {command(request)}"
        )
    return content


def ratios_of(
    model: Model, request: Resolved, levels: np.ndarray, file: str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ratios at these levels [N], for the prompt and the negative prompt. file: None for the model's. Raises
    InvalidRequest as `check` does."""
    content = check(model, request, default_path(model, request) if file is None else file)
    at = np.array(content["levels"])
    prompt, negative = (_at(levels, at, np.array(content["ratios"][name])) for name in TEXTS)
    return prompt, negative


def command(request: Resolved) -> str:
    """How to make the file of a request."""
    shift = "" if request.sigmas is not None else f" --flow-shift {request.flow_shift:g}"
    return f"fastvid calibrate --cache --model MODEL --solver {request.solver}{shift}"


def _at(levels: np.ndarray, known: np.ndarray, ratios: np.ndarray) -> tuple[float, ...]:
    """Ratios at other levels, from the running sum of their logarithms."""
    sizes = np.interp(levels[::-1], known[::-1], np.cumsum(np.log(ratios))[::-1])[::-1]
    return (1.0, *(float(one) for one in np.exp(np.diff(sizes))))


def _read(path: Path) -> bytes:
    try:
        return files.read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise InvalidRequest(f"cache: {path} cannot be read: {files.reason(error)}") from error


def _parsed(path: Path) -> dict[str, Any]:
    """A file's content, checked."""
    try:
        content = json.loads(_read(path))
        levels, ratios = content["levels"], content["ratios"]
        right = content["format"] == FORMAT and {"model", "layers", "dim", "solver", "flow_shift"} <= content.keys()
        right = right and 0 < len(levels) <= MOST_LEVELS and all(0 < one <= 1 for one in levels)
        right = right and all(a > b for a, b in zip(levels, levels[1:], strict=False))
        for name in TEXTS:
            right = right and len(ratios[name]) == len(levels)
            right = right and all(0 < float(one) < math.inf for one in ratios[name])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise InvalidRequest(f"cache: {path} is no calibration of step caches; make one with fastvid calibrate --cache")
    return dict(content)
