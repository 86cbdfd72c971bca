"""`fastvid download`: a model from the hub into the local cache and, with --quantize, an 8-bit copy of it: in fastvid's
own cache, where `load` finds it, or where -o says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastvid.checks import nearest_name
from fastvid.cli.progress import Progress
from fastvid.errors import InvalidRequest

T = TypeVar("T")


def run(flags: argparse.Namespace) -> None:
    """Prints where the model is: in the cache, or the 8-bit copy."""
    from fastvid.loaders import copies, hub, quantize
    from fastvid.loaders.convert import convert
    from fastvid.loaders.names import find_folder
    from fastvid.models.wan.published import PLACES

    if flags.model.lower() not in PLACES and not hub.is_hub_name(flags.model):
        near = nearest_name(flags.model.lower(), PLACES)
        raise InvalidRequest(
            f"{flags.model!r:.80} is no published model and no hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the "
            f"nearest name is {near} (`fastvid models` lists them)"
        )
    choice = None if flags.quantize is None else quantize.check("quantize", flags.quantize)
    if choice is None and flags.output:
        raise InvalidRequest(
            f"-o {flags.output}: the cache has a place of its own; give --quantize too, or leave it out"
        )
    if choice is not None and not flags.output and not hub.split(flags.model)[1]:
        return _say(flags, _shown(flags.quiet, partial(copies.make, flags.model, choice)))
    target = None if choice is None else Path(flags.output or _name(flags.model, choice))
    if target is not None and target.exists():
        raise InvalidRequest(f"{target} exists already; give a new name by -o, or remove it first")
    path = find_folder(flags.model, download=True)
    if target is not None:
        _shown(flags.quiet, partial(convert, path, target, quantize=choice))
    _say(flags, target or path)


def _say(flags: argparse.Namespace, path: Path) -> None:
    print(json.dumps({"model": flags.model, "path": str(path)}) if flags.json else path)


def _name(model: str, choice: str) -> str:
    """Of a file's copy, in the current folder."""
    return f"{Path(model).stem}-{choice.replace('=', '-').replace(',', '-')}.safetensors"


def _shown(quiet: bool, make: Callable[..., T]) -> T:
    """What `make` makes, with its progress."""
    progress = Progress(quiet=quiet)
    try:
        return make(say=progress.say)
    finally:
        progress.close()
