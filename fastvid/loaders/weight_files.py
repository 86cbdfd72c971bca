"""Finds the files of a folder that hold one set of weights, by their names: whole files, shards with their index, and
variants of both.

    model.safetensors       model-00001-of-00002.safetensors       model.safetensors.index.json
    model.fp16.safetensors  model.fp16-00001-of-00002.safetensors  model.safetensors.index.fp16.json
    model-Q4_K_M.gguf       model-Q4_K_M-00001-of-00002.gguf       (without an index)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.files import open_regular, reason
from fastvid.loaders.safetensors import PICKLES, READABLE, SUFFIX, SUFFIXES
from fastvid.models.common.config_reader import read_json
from fastvid.models.wan.weight_names import some

STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers name weights
STANDARD_NAMES = tuple(stem + SUFFIX for stem in STEMS)
VARIANTS = ("fp32", "fp16", "bf16")  # the most exact first
SHARDED, STANDARD, VARIANT, OTHER = range(4)  # what is taken first
_INDEX = re.compile(r"(?P<stem>.+)\.(safetensors|sft)\.index(\.(?P<variant>[\w-]+))?\.json")
_WHOLE = re.compile(rf"(?P<stem>{'|'.join(STEMS)})(\.(?P<variant>[\w-]+))?\.(safetensors|sft)")
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
SAMPLES, SAMPLE = 64, 4096  # places that are compared of two files, and bytes of each


@dataclass(frozen=True)
class Weights:
    """One set of weights in a folder. name: its index's or its file's; rank: the lowest is taken."""

    name: str
    files: tuple[Path, ...]
    rank: tuple[int, int]


def find_files(folder: Path, others: Iterable[Path] = ()) -> tuple[Path, ...]:
    """The files that hold a part's weights: the shards of an index, or one file. others: files to ignore because they
    hold something else.

    Copies in other precisions, and an index whose shards are gone, are left out with a warning. Raises CheckpointError
    if there is nothing to read, if several files qualify, or if shards are missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; it should hold config.json and {STANDARD_NAMES[0]}")
    rest = frozenset(others)
    present = sorted(path for path in folder.iterdir() if path.name.endswith(READABLE) and path not in rest)
    found, stale = _sharded(folder, present)
    inside = {file for one in found for file in one.files}
    found += [Weights(path.name, (path,), _rank(_WHOLE, path.name)) for path in present if path not in inside]
    if not found:
        raise stale[0] if stale else CheckpointError(_why_none(folder))
    best = min(one.rank for one in found)
    chosen = [one for one in found if one.rank == best]
    if len(chosen) > 1 and not (best[0] == OTHER and are_copies([one.files[0] for one in chosen])):
        names = some([one.name for one in chosen])
        raise CheckpointError(f"{folder} holds several weights ({names}); keep one, or the shards with their index")
    _note(folder, chosen[0], [one.name for one in found if one is not chosen[0]], stale)
    return chosen[0].files


def weight_groups(folder: Path, suffixes: Iterable[str]) -> Iterator[tuple[Path, ...]]:
    """All weight files in a folder; the shards of one index form one group."""
    files = sorted(path for path in folder.glob("*") if path.suffix in frozenset(suffixes) and path.is_file())
    found, _ = _sharded(folder, list(files))
    yield from (one.files for one in found)
    inside = {file for one in found for file in one.files}
    yield from ((file,) for file in files if file not in inside)


def group_of(file: Path, suffixes: Iterable[str]) -> tuple[Path, ...]:
    """The files that belong with one, and itself. Raises CheckpointError if it is one of several GGUF files that are
    not all there."""
    group = next((group for group in weight_groups(file.parent, suffixes) if file in group), (file,))
    if len(group) == 1 and (match := _SPLIT.fullmatch(file.name)) and int(match["count"]) > 1:
        _, stale, _ = _split(file.parent, sorted(file.parent.glob("*.gguf")))
        raise next(error for error in stale if match["stem"] in str(error))
    return group


def _sharded(folder: Path, present: list[Path]) -> tuple[list[Weights], list[CheckpointError]]:
    """The sets of shards that are all there, and what is missing of the others, whose files are taken out of
    `present`. Raises CheckpointError for an index that is broken."""
    found, stale, partial = list[Weights](), list[CheckpointError](), set[Path]()
    for index in sorted(path for path in folder.iterdir() if _INDEX.fullmatch(path.name)):
        names = _names_in(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            found.append(Weights(index.name, tuple(folder / name for name in names), _rank(_INDEX, index.name)))
            continue
        partial |= {folder / name for name in names}
        lacks = f"{folder} lacks {some(missing)}, of {len(names)} files that {index.name} names; download them again"
        stale.append(CheckpointError(lacks))
    partial -= {file for one in found for file in one.files}
    split, unsplit, pieces = _split(folder, present)
    present[:] = [path for path in present if path not in partial | pieces]
    return found + split, stale + unsplit


def _split(folder: Path, present: list[Path]) -> tuple[list[Weights], list[CheckpointError], set[Path]]:
    """The same of GGUF files, which are split without an index: what is whole, what is missing, the files of the
    latter."""
    found, stale, partial = list[Weights](), list[CheckpointError](), set[Path]()
    matches = {path: match for path in present if (match := _SPLIT.fullmatch(path.name))}
    for stem, count in sorted({(match["stem"], match["count"]) for match in matches.values()}):
        files = [path for path, match in matches.items() if (match["stem"], match["count"]) == (stem, count)]
        if len(files) == int(count):
            found.append(Weights(files[0].name, tuple(files), (OTHER, 0)))
            continue
        partial.update(files)
        lacks = f"{folder} has {len(files)} of the {int(count)} files {stem}-*.gguf; download the others too"
        stale.append(CheckpointError(lacks))
    return found, stale, partial


def _names_in(index: Path) -> list[str]:
    """The files that an index names. Raises CheckpointError for one outside the index's folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f'{index} has no "weight_map" of tensor names to file names')
    names = sorted(set(table.values()))
    if outside := [name for name in names if not _is_inside(name)]:
        raise CheckpointError(f"{index} points outside its folder: {some(outside)}")
    if others := [name for name in names if not name.endswith(SUFFIXES)]:
        raise CheckpointError(f"{index} names files that are not safetensors: {some(others)}")
    return names


def _rank(pattern: re.Pattern[str], name: str) -> tuple[int, int]:
    match = pattern.fullmatch(name)
    if match is None:
        return OTHER, 0
    variant = match["variant"]
    if variant is None:
        return (SHARDED if pattern is _INDEX else STANDARD), 0
    return VARIANT, VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)


def are_copies(files: Sequence[Path]) -> bool:
    """Whether files are the same: in size, and at their start and at places throughout."""
    sizes = {file.stat().st_size for file in files}
    if len(sizes) > 1 or sizes == {0}:
        return False
    size = sizes.pop()
    places = sorted({size * i // SAMPLES // SAMPLE * SAMPLE for i in range(SAMPLES)})
    return len({_samples(file, places) for file in files}) == 1


def _samples(file: Path, places: list[int]) -> bytes:
    try:
        with open_regular(file) as opened:
            return b"".join(opened.read(SAMPLE) for place in places if opened.seek(place) == place)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}") from None


def _note(folder: Path, chosen: Weights, others: list[str], stale: list[CheckpointError]) -> None:
    if stale:
        notices.warn(f"{chosen.name} is read; an index beside it is left over: {stale[0]}")
    if others:
        notices.warn(f"{folder}: {chosen.name} is read; left out: {some(others)}")


def _is_inside(name: str) -> bool:
    """Whether a file name in an index stays inside the folder, on POSIX and on Windows."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def _why_none(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds its weights as pickles only ({some(pickles)}), which fastvid does not open; "
            "turn them into safetensors with `fastvid convert`"
        )
    return f"{folder} holds no {SUFFIX} file; {STANDARD_NAMES[0]} or {STANDARD_NAMES[1]} is expected"
