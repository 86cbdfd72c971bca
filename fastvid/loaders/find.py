"""From a model's name to the folder or file it is in: shipped, local, or on the hub."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import hub
from fastvid.loaders.assembled import check_parts
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.models.description import Checkpoint

EMBEDDED = "embedded"


def read_checkpoint(
    model: str | Path, parts: Mapping[str, str | Path] | None = None, download: bool = False
) -> Checkpoint:
    """What a model is, from its name, folder or file, without reading weights; see `fastvid.load` for `parts`. Raises
    CheckpointError."""
    given = {name: _find_part(name, path, download) for name, path in check_parts(parts).items()}
    return open_checkpoint(find_folder(model, download), given)


def _find_part(name: str, path: Path, download: bool) -> Path:
    """Where a part that was given is: the package's model, a path, or a hub name."""
    if path.exists() or str(path) == EMBEDDED or hub.is_hub_name(str(path)):
        return find_folder(path if path.exists() else str(path), download)
    raise InvalidRequest(
        f"parts: {name}: {path} does not exist; a file, a folder or a file of a hub repository is needed"
    )


def find_folder(model: str | Path, download: bool = False) -> Path:
    """The folder or file of a model: the folder that ships with the package, a path, or a hub name.

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
        raise CheckpointError(f"model={str(model):.80}: {error}") from None
    if exists or isinstance(model, Path):
        return Path(model)
    if hub.is_hub_name(model):
        return _from_hub(model, download)
    return Path(model) if "/" in model or "\\" in model else _unknown(model)


def _from_hub(model: str, download: bool) -> Path:
    folder = hub.find(model)
    if folder is None and not download:
        raise CheckpointError(
            f"model={model!r} is neither a folder or file nor (all) in the local hub cache; loading it downloads it, "
            f"and so does `hf download {' '.join(hub.split(model)).strip()}`; or give {EMBEDDED!r}, a folder or a file"
        )
    return folder or hub.download(model)


def _unknown(model: str) -> Path:
    near = f" (did you mean {EMBEDDED!r}?)" if difflib.get_close_matches(model.lower(), [EMBEDDED]) else ""
    raise CheckpointError(
        f"model={model!r:.80} is not known{near}; allowed is {EMBEDDED!r}, a folder in diffusers' layout, or a hub id "
        "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )
