"""Finds the parts that belong to a transformer's single file: its other expert, VAE, encoders and tokenizer. They may
be in ComfyUI's neighboring folders, inside the same file, or named by the caller.

    models/diffusion_models/ (or unet/)   the transformer; the high and the low noise expert of Wan 2.2
    models/text_encoders/ (or clip/)      UMT5, the tokenizer inside as the tensor `spiece_model`
    models/vae/  models/clip_vision/      the VAE, the image encoder

Each part comes from the first match of: the caller's `parts=`, the transformer's own file, the caller's `base` folder,
the folders around the file. In those folders a file must fit the transformer: a VAE by its channels, an encoder by its
width. If several fit, the most exact is taken, with a warning; of different files as exact, the caller must choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastvid import notices
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import gguf, layouts, safetensors
from fastvid.loaders.entries import FLOATS
from fastvid.loaders.find import (
    SPIECE_FILE,
    TOKENIZER_FOLDERS,
    FoundModel,
    FoundPart,
    find_part,
    find_tokenizer,
    held_kinds,
    holds_spiece,
    is_tokenizer,
    note_problem,
    read_part,
)
from fastvid.loaders.layouts import TOKENIZER, WEIGHT_FILES
from fastvid.loaders.names import BASE
from fastvid.loaders.weight_files import are_copies, weight_groups
from fastvid.models.common.expert_names import OTHER, expert_of, is_pair
from fastvid.models.wan.detect import CUSTOM, Identity
from fastvid.models.wan.weight_names import some
from fastvid.ops.quantized import FORMATS

Sources = Mapping[str, Path]

TRANSFORMER_FOLDERS = (
    *("diffusion_models", "unet", "transformer", "transformer_2", "checkpoints"),
    *layouts.EXPERT_FOLDERS.values(),
)
# Siblings of the transformers' folders.
PART_FOLDERS = {
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip", "text_encoder"),
    "image_encoder": ("clip_vision", "image_encoder"),
}
DEPTH = 2  # levels of subfolders to search
# Wan 2.2's T2V of 14B is two experts, unless somebody has made one of them.
TWO_EXPERTS = re.compile(r"wan[\W_]?2[\W_]?2|a14b", re.IGNORECASE)
ONE_OF_TWO = re.compile(r"aio|all[\W_]?in[\W_]?one|merged?", re.IGNORECASE)
DOUBTFUL = "doubtful"  # a name that may say which expert a file is, or something else


class Need(NamedTuple):
    """A part that a transformer needs, and the config value (`key`: `value`) that it must have."""

    name: str
    key: str
    value: int


def find_single_file(file: Path, sources: Sources) -> FoundModel:
    """The model whose transformer is in `file`. A missing part states the reason in its `problems`.

    Raises CheckpointError if the file holds no transformer, InvalidRequest if `sources` contradict each other.
    """
    parts = _find_experts(file, sources)
    main = parts["transformer"]
    for need in _needs(main):
        parts[need.name] = _or_missing(need.name, partial(_find_needed, need, main.files[0], sources))
    problems: list[str] = []
    text_files = parts["text_encoder"].files
    tokenizer = note_problem(problems, lambda: _find_tokenizer(text_files, main.files[0], sources))
    configs = {name: part.config for name, part in parts.items() if part.config is not None}
    experts = "transformer_2" in parts
    index = layouts.make_index(main.identity, configs, experts)
    index |= {name: layouts.CLASSES[name] for name in parts if name not in configs}
    scheduler = layouts.make_scheduler(main.identity, experts)
    found = FoundModel(tuple(parts.values()), index, tokenizer or Path(), scheduler, own_scheduler=False)
    return replace(found, problems=tuple(problems))


def _needs(transformer: FoundPart) -> tuple[Need, ...]:
    config = transformer.config or {}
    needs = [Need("vae", "z_dim", config["out_channels"]), Need("text_encoder", "d_model", config["text_dim"])]
    if config.get("image_dim"):
        needs.append(Need("image_encoder", "hidden_size", config["image_dim"]))
    return tuple(needs)


def _or_missing(name: str, find: Callable[[], FoundPart]) -> FoundPart:
    """Call `find`. If it raises CheckpointError, return a part with the message in its `problems`."""
    try:
        return find()
    except CheckpointError as error:
        return FoundPart(name, problems=(str(error),))


# ---------------------------------------------------------------- experts


def _find_experts(file: Path, sources: Sources) -> dict[str, FoundPart]:
    """The transformer, and the low noise one if the model has two."""
    own = find_part("transformer", file)
    if _is_same(sources.get("transformer"), file):  # the caller says that it is a whole model
        return {"transformer": own}
    noise = _noise_of(file, own.identity)
    if noise == "low" and "transformer_2" not in sources:
        high = sources.get("transformer")  # required: the high noise expert describes the model
        first = find_part("transformer", high) if high else read_part("transformer", _find_partner(file, noise))
        return {"transformer": first, "transformer_2": find_part("transformer_2", file)}
    if "transformer" in sources:
        raise InvalidRequest(f"parts: {file} is the transformer already; take `transformer` out")
    other = sources.get("transformer_2")
    if other and noise == "low" and _noise_of(other, own.identity) == "high":
        raise InvalidRequest(f"parts: {file} is for low noise by its name, {other} for high: give them the other way")
    parts = {"transformer": own}
    if other or noise or own.identity.is_expert:
        parts["transformer_2"] = _or_missing("transformer_2", lambda: _find_low_noise(file, other, noise))
    return parts


def _find_low_noise(file: Path, other: Path | None, noise: str) -> FoundPart:
    if other:
        return find_part("transformer_2", other)
    if noise in ("", DOUBTFUL):
        whole = ' If it is a whole model, say so: parts={"transformer": PATH of this file}.' if noise else ""
        raise CheckpointError(
            f"{file} may be one of the two experts of a Wan 2.2 model, and its name does not say which; give the high "
            'noise file as the model and the other as parts={"transformer_2": PATH}, --part transformer_2=PATH.' + whole
        )
    return read_part("transformer_2", _find_partner(file, noise))


def _noise_of(file: Path, identity: Identity) -> str:
    """ "high" or "low" for one of two experts, by its name and its neighbors'; "" for a whole model; DOUBTFUL for
    weights of the size that models with two experts have, with a name that may say either."""
    alone = identity.family == "wan2.1" and identity.task != "vace" and identity.size != CUSTOM
    if alone or identity.task == "df" or (identity.family == "wan2.2" and not identity.is_expert):
        return ""  # published with one transformer alone
    mark = expert_of(file, [one for group in _neighbors(file) for one in group])
    if mark.sure and mark.expert:
        return mark.expert
    doubtful = not mark.sure or (TWO_EXPERTS.search(file.name) and not ONE_OF_TWO.search(file.name))
    return DOUBTFUL if doubtful and (identity.family, identity.size) == ("wan", "14B") else ""


def _is_same(source: Path | None, file: Path) -> bool:
    return source is not None and source.exists() and source.samefile(file)


def _neighbors(file: Path) -> list[tuple[Path, ...]]:
    """The weights that may be a file's other expert: those beside it, and in the folder whose name differs by its
    mark."""
    folder = file.parent
    others = [path for path in sorted(folder.parent.iterdir()) if path.is_dir() and is_pair(folder.name, path.name)]
    groups = [group for each in (folder, *others) for group in weight_groups(each, WEIGHT_FILES)]
    return [group for group in groups if file not in group]


def _find_partner(file: Path, noise: str) -> tuple[Path, ...]:
    """The file of the other expert: the same name but for its mark. Raises CheckpointError."""
    groups = _neighbors(file)
    fitting = [group for group in groups if any(is_pair(file, one) for one in group)]
    if len(fitting) == 1:
        return fitting[0]
    folders = ", ".join(dict.fromkeys(str(one.parent) for one in (file, *(group[0] for group in groups))))
    listed = f"; {', '.join(str(group[0]) for group in fitting)} could be it" if fitting else ""
    raise CheckpointError(
        f"{file} is the {noise} noise expert of a model with two; the {OTHER[noise]} noise one is not in {folders}"
        f'{listed}; give parts={{"transformer_2": PATH}}, --part transformer_2=PATH'
    )


# ---------------------------------------------------------------- VAE and encoders


def _find_needed(need: Need, file: Path, sources: Sources) -> FoundPart:
    if need.name in sources:
        return find_part(need.name, sources[need.name])
    if need.name in held_kinds([file]):
        return read_part(need.name, (file,))
    return find_part(need.name, sources[BASE]) if BASE in sources else _search(need, file)


def _search(need: Need, file: Path) -> FoundPart:
    """Search the folders around a transformer's file for a part that fits. Raises CheckpointError if none fits, or if
    the choice is ambiguous."""
    folders, refused, fitting = _folders_of(need.name, file), list[str](), list[FoundPart]()
    for folder in folders:
        for group in _groups_below(folder, DEPTH if folder.name in PART_FOLDERS[need.name] else 0):
            part = _try_group(need, group, refused)
            fitting += [part] if part else []
    best = min(map(_coarseness, fitting), default=0.0)
    chosen = [part for part in fitting if _coarseness(part) == best]
    if chosen and (len(chosen) == 1 or are_copies([part.files[0] for part in chosen])):
        if others := [part.files[0].name for part in fitting if part is not chosen[0]]:
            notices.warn(f"{need.name}: {chosen[0].files[0]} is read; {some(others)} would fit too and is left out")
        return chosen[0]
    give = f'give parts={{"{need.name}": PATH}}, --part {need.name}=PATH'
    if fitting:
        listed = "; ".join(f"{part.files[0]} ({', '.join(_dtypes(part))})" for part in fitting)
        raise CheckpointError(f"{need.name}: {len(fitting)} files fit, {listed}; {give}")
    names = ", ".join(PART_FOLDERS[need.name])
    looked = ", ".join(map(str, folders)) or f"{file.parent} and folders named {names} beside it"
    mismatches = f"; what is there does not fit: {'; '.join(refused)}" if refused else ""
    raise CheckpointError(
        f"{need.name} ({need.key} {need.value}) is missing: looked in {looked}{mismatches}; {give}, a file or a folder"
    )


def _folders_of(name: str, file: Path) -> list[Path]:
    root = _root_of(file)
    near = [root / inner for inner in PART_FOLDERS[name] if (root / inner).is_dir()]
    return near if root != file.parent else [*near, root]  # a folder with everything side by side


def _root_of(file: Path) -> Path:
    """The folder that contains PART_FOLDERS."""
    home = next((path for path in list(file.parents)[:3] if path.name.lower() in TRANSFORMER_FOLDERS), None)
    return home.parent if home else file.parent


def _groups_below(folder: Path, depth: int) -> Iterator[tuple[Path, ...]]:
    """Weight files in a folder and its subfolders, down to `depth` levels."""
    yield from weight_groups(folder, WEIGHT_FILES)
    for inner in sorted(path for path in folder.iterdir() if depth and path.is_dir()):
        yield from _groups_below(inner, depth - 1)


def _try_group(need: Need, files: tuple[Path, ...], refused: list[str]) -> FoundPart | None:
    """The part in these files if it fits; None otherwise. Adds the reason to `refused` if the files almost fit."""
    name = files[0].name
    if files[0].suffix in safetensors.PICKLES:
        refused.append(f"{name} is a pickle (see `fastvid convert --help`)")
        return None
    try:
        if need.name not in held_kinds(files):
            return None
        part = read_part(need.name, files)
    except CheckpointError as error:
        refused.append(str(error))
        return None
    if unknown := [kind for kind in _dtypes(part) if kind not in (*FLOATS, *FORMATS)]:
        refused.append(f"{name} is {some(unknown)}, without marks of a quantized format")
    elif (value := (part.config or {}).get(need.key)) != need.value:
        refused.append(f"{name} has {need.key} {value}")
    else:
        return part
    return None


def _coarseness(part: FoundPart) -> float:
    """0 for the most exact type of weights. Quantized ones come last, those with most bits first."""
    kind, floats = _dtypes(part)[0], list(FLOATS)
    return floats.index(kind) if kind in floats else len(floats) + 64 - FORMATS[kind].bits


def _dtypes(part: FoundPart) -> tuple[str, ...]:
    return safetensors.dtypes({name: entry for name, entry in part.entries.items() if not holds_spiece([name])})


# ---------------------------------------------------------------- the tokenizer


def _find_tokenizer(text_files: tuple[Path, ...], file: Path, sources: Sources) -> Path:
    if source := sources.get(TOKENIZER, sources.get(BASE)):
        return find_tokenizer(source)
    text = sources.get("text_encoder")
    if text and text.is_dir() and (beside := next(filter(None, map(_try_tokenizer, (text, text.parent))), None)):
        return beside
    return _search_tokenizer(text_files, file)


def _try_tokenizer(folder: Path) -> Path | None:
    try:
        return find_tokenizer(folder)
    except CheckpointError:
        return None


def _search_tokenizer(text_files: tuple[Path, ...], file: Path) -> Path:
    """The tokenizer inside the text encoder's file, or in the folders around it or around the transformer."""
    read = [one for one in (*text_files, file) if one.suffix != gguf.SUFFIX]
    inside = [one for one in read if holds_spiece(safetensors.read_header(one))]
    folders = [place for one in (*text_files[:1], file) for place in (one.parent, _root_of(one), one.parent.parent)]
    folders = list(dict.fromkeys(folders))
    candidates = [place / inner for place in folders for inner in TOKENIZER_FOLDERS]
    candidates += [place / SPIECE_FILE for place in folders]
    vocabularies = [one for one in text_files if one.suffix == gguf.SUFFIX]
    if tokenizer := next(filter(is_tokenizer, (*inside, *candidates, *vocabularies)), None):
        return tokenizer
    raise CheckpointError(
        "tokenizer is missing: the text encoder's file has no tensor spiece_model or vocabulary, and there is no "
        f"folder {' or '.join(TOKENIZER_FOLDERS)} in {', '.join(map(str, folders))}; "
        'give parts={"tokenizer": PATH}, --part tokenizer=PATH'
    )
