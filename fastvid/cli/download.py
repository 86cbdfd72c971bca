"""`fastvid download`: a model from the hub into the local cache and, with --quantize, an 8-bit copy beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastvid.checks import nearest_name
from fastvid.cli.progress import Progress
from fastvid.errors import InvalidRequest


def run(flags: argparse.Namespace) -> None:
    """Prints where the model is: in the cache, or the 8-bit copy."""
    from fastvid.loaders import hub, quantize
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
    target = None if choice is None else Path(flags.output or _name(flags.model, choice))
    if target is not None and target.exists():
        raise InvalidRequest(f"{target} exists already; give a new name by -o, or remove it first")
    path = find_folder(flags.model, download=True)
    if target is not None:
        _convert(path, target, choice, flags.quiet)
    made = str(target or path)
    print(json.dumps({"model": flags.model, "path": made}) if flags.json else made)


def _name(model: str, choice: str) -> str:
    """Such as wan2.1-t2v-1.3b-fp8, in the current folder; of a file, a file."""
    last, ending = Path(model).name, choice.replace("=", "-").replace(",", "-")
    suffix = Path(last).suffix if Path(last).suffix in (".safetensors", ".sft", ".gguf") else ""
    return f"{last.removesuffix(suffix)}-{ending}{'.safetensors' if suffix else ''}"


def _convert(source: Path, target: Path, choice: str | None, quiet: bool) -> None:
    from fastvid.loaders.convert import convert

    progress = Progress(quiet=quiet)
    try:
        convert(source, target, quantize=choice, say=progress.say)
    finally:
        progress.close()
