"""8-bit copies of published models, in fastvid's folder of the user's cache.

`fastvid download NAME --quantize fp8` makes one; `fastvid.load(NAME, quantize="fp8")` takes it in place of the 16-bit
files, which may then be removed from the hub's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastvid.files import cache_folder
from fastvid.loaders import hub
from fastvid.loaders.convert import convert
from fastvid.loaders.layouts import INDEX
from fastvid.loaders.names import find_folder
from fastvid.models.wan.published import PLACES


def find(model: str | Path, quantize: str | None) -> Path | None:
    """The copy of a model, by its name or hub id, that `make` has made for this `quantize=`; None without one."""
    if not quantize or not isinstance(model, str) or Path(model).exists():
        return None
    folder = _folder(model, quantize)
    return folder if (folder / INDEX).is_file() else None


def make(model: str, quantize: str, say: Callable[[str], None]) -> Path:
    """The copy's folder; made, if it is not there, of files that are downloaded if they are not there.

    quantize: as `loaders.quantize.check` returns it. Raises CheckpointError and InvalidRequest as `convert` does.
    """
    if (found := find(model, quantize)) is not None:
        return found
    folder = _folder(model, quantize)
    source = find_folder(model, download=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(source, folder, quantize=quantize, say=say)
    return folder


def _folder(model: str, quantize: str) -> Path:
    """Its name tells the model, as variants with equal tensors are told by it."""
    place = PLACES.get(model.lower())
    repo, file = hub.split(place.hub if place else model)
    words = [repo.replace("/", "--"), *file.split("/"), quantize.replace("=", "-").replace(",", "-")]
    return cache_folder() / "models" / "-".join(filter(None, words))
