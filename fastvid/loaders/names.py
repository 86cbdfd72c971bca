"""Finds the folder or file of a model or part by what the caller names: a path, a published model, a hub name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvid.checks import nearest_name
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import hub
from fastvid.loaders.layouts import TOKENIZER
from fastvid.models.common.expert_names import are_exchanged
from fastvid.models.wan.published import PLACES, Published

EMBEDDED = "embedded"
BASE = "base"  # the model that supplies all other parts of a single-file transformer
VACE = ("vace", "vace_2")  # VACE modules of both transformers
PART_NAMES = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder", TOKENIZER, BASE, *VACE)


def find_folder(model: str | Path, download: bool = False) -> Path:
    """The folder or file of a model: the folder that ships with the package, a path, the name of a published model, or
    a hub name.

    What is on the hub is taken from the local cache; with `download`, what is missing there is fetched.
    """
    if not isinstance(model, str | Path) or not str(model) or "\0" in str(model):
        raise InvalidRequest(
            f"model={model!r:.80}: allowed is {EMBEDDED!r}, a folder, a file, or a hub id such as org/name"
        )
    if str(model) == EMBEDDED:
        return Path(__file__).parents[1] / EMBEDDED
    try:
        exists = Path(model).expanduser().exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"model={str(model):.80} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if exists or isinstance(model, Path):
        return Path(model)
    if place := PLACES.get(model.lower()):
        return _published(model, place, download)
    if hub.is_hub_name(model):
        return _from_hub(model, download)
    return Path(model) if "/" in model or "\\" in model else _refuse_unknown(model)


def _published(name: str, place: Published, download: bool) -> Path:
    if place.converted:
        what = "a training checkpoint, a pickle" if place.checkpoint else "a folder with pickles in it"
        raise CheckpointError(
            f"model={name!r} is published as {what}, which fastvid does not open; convert it: {place.how}"
        )
    return _from_hub(place.hub, download)


def _from_hub(model: str, download: bool) -> Path:
    folder = hub.find(model, repair=download)
    if folder is None and not download:
        raise CheckpointError(
            f"model={model!r} is neither a folder or file nor (all) in the local hub cache; loading it downloads it, "
            f"and so does `hf download {' '.join(hub.split(model)).strip()}`; or give {EMBEDDED!r}, a folder or a file"
        )
    return folder or hub.download(model)


def _refuse_unknown(model: str) -> Path:
    found = difflib.get_close_matches(model.lower(), [EMBEDDED, *PLACES], n=1)
    near = f" (did you mean {found[0]!r}?)" if found else ""
    raise CheckpointError(
        f"model={model!r:.80} is not known{near}; allowed is {EMBEDDED!r}, a name that `fastvid models` lists, a "
        "folder in diffusers' layout, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def find_sources(parts: Any, download: bool = False) -> dict[str, Path]:
    """Validate `parts=` of `fastvid.load`: part name -> folder or file. Raises InvalidRequest."""
    if parts is None:
        return {}
    if not isinstance(parts, Mapping):
        raise InvalidRequest(
            f'parts={parts!r:.60}: names and paths are expected, such as {{"vae": "wan_2.1_vae.safetensors"}}'
        )
    for name, path in parts.items():
        if name not in PART_NAMES:
            near = nearest_name(str(name), PART_NAMES)
            allowed = ", ".join(PART_NAMES)
            raise InvalidRequest(f"parts: {name!r:.40} is not known; allowed is {allowed}; nearest: {near}")
        if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
            raise InvalidRequest(f"parts: {name} is {path!r:.60}; a file or a folder is expected")
    _check_order(parts)
    return {name: _find_source(name, Path(path).expanduser(), download) for name, path in parts.items()}


def _check_order(parts: Mapping[str, str | Path]) -> None:
    """Raises InvalidRequest if the files of two experts are exchanged, by their names."""
    for first, second in (PART_NAMES[:2], VACE):
        if first in parts and second in parts and are_exchanged(parts[first], parts[second]):
            raise InvalidRequest(
                f"parts: {first} is the high noise expert's, but its file is named low ({parts[first]}) and that of "
                f"{second} high; exchange the two, or rename the files"
            )


def _find_source(name: str, path: Path, download: bool) -> Path:
    known = str(path) == EMBEDDED or str(path).lower() in PLACES or hub.is_hub_name(str(path))
    if path.exists() or known:
        return find_folder(path if path.exists() else str(path), download)
    raise InvalidRequest(
        f"parts: {name}: {path} does not exist; a file, a folder or a file of a hub repository is needed"
    )
