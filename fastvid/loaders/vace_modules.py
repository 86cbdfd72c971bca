"""VACE modules in files of their own: the control branch alone, loaded onto a text-to-video transformer. Prefixes and
formats are decided for each file by itself, before they are one set of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import layouts, safetensors, weight_files
from fastvid.loaders.entries import Entry
from fastvid.loaders.find import FoundModel, FoundPart, identify_part
from fastvid.loaders.names import VACE
from fastvid.models.common.expert_names import are_exchanged, is_pair
from fastvid.models.registry import CONTROLLED, EXPERTS
from fastvid.models.wan import weight_names

PIPELINE = "WanVACEPipeline"


def split(sources: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """(the modules, all other parts) of what the caller names."""
    modules = {name: path for name, path in sources.items() if name in VACE}
    return modules, {name: path for name, path in sources.items() if name not in VACE}


def add(found: FoundModel, modules: Mapping[str, Path]) -> FoundModel:
    """The model with a module on each of its transformers. Raises InvalidRequest where one is missing or too many,
    CheckpointError for files that are none, or do not fit."""
    if not modules:
        return found
    experts = [part for part in found.parts if part.name in EXPERTS]
    paths = _paths(modules, len(experts))
    joined = {part.name: join(part, path) for part, path in zip(experts, paths, strict=True)}
    parts = tuple(joined.get(part.name, part) for part in found.parts)
    index = {**found.index, "_class_name": PIPELINE} | {name: ["diffusers", CONTROLLED] for name in joined}
    if found.own_scheduler or any(part.problems for part in joined.values()):
        return replace(found, parts=parts, index=index)
    scheduler = layouts.make_scheduler(joined[EXPERTS[0]].identity, len(experts) > 1)
    return replace(found, parts=parts, index=index, scheduler=scheduler)


def _paths(modules: Mapping[str, Path], experts: int) -> list[Path]:
    """The module of each transformer. Of two, one is found by the other's name if it is not given."""
    first, second = (modules.get(name) for name in VACE)
    if first is None:
        raise InvalidRequest(f"parts: {VACE[1]} is given without {VACE[0]}, the module of the first transformer")
    if experts == 1:
        if second is not None:
            raise InvalidRequest(f"parts: {VACE[1]} is for models with two transformers; leave it out")
        return [first]
    if second is None and first.is_file():
        pairs = [file for file in sorted(first.parent.iterdir()) if file.is_file() and is_pair(first, file)]
        second = pairs[0] if len(pairs) == 1 else None
        if second and are_exchanged(first, second):
            first, second = second, first
    if second is None:
        raise InvalidRequest(
            f"parts: the model has two transformers, and the second one's VACE module is not known; give "
            f"{VACE[1]}=PATH too (the same file twice for one module in both)"
        )
    return [first, second]


def join(base: FoundPart, path: Path) -> FoundPart:
    """A text-to-video transformer with a module's control branch."""
    files = (path,) if path.is_file() else weight_files.find_files(path)
    entries = safetensors.read_headers(files)
    if not weight_names.is_module(entries):
        raise CheckpointError(f"{path} holds no VACE module: tensors of vace_blocks and vace_patch_embedding alone")
    if base.problems or base.config is None:
        return base
    _check_fits(base, entries, path)
    config = {key: value for key, value in base.config.items() if key != "_class_name"}
    return identify_part(base.name, (*base.files, *files), {**base.entries, **entries}, config)


def _check_fits(base: FoundPart, entries: Mapping[str, Entry], path: Path) -> None:
    config = base.config or {}
    if (
        config.get("vace_layers")
        or config.get("in_channels") != config.get("out_channels")
        or config.get("image_dim")
        or config.get("inject_sample_info")
    ):
        raise CheckpointError(
            f"{path} is a VACE module, which belongs on a text-to-video transformer; {base.files[0]} is "
            f"{base.identity.name or 'another one'}"
        )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    shape = next(entry.shape for name, entry in entries.items() if name.endswith("vace_patch_embedding.weight"))
    if shape[0] != width:
        raise CheckpointError(
            f"{path} is a VACE module for transformers of width {shape[0]}; {base.files[0]} has {width} (1536: 1.3B, "
            "5120: 14B)"
        )
