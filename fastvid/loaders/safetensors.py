"""Safetensors in: which files a folder holds, what their headers say, and their tensors streamed into a module.

A header is small and at the front of a file, so what a checkpoint is, and whether it fits a model, is known before any
weight is read. Nothing here unpickles. Format: https://github.com/huggingface/safetensors#format: eight bytes with the
header's length, the header in JSON (name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.common.config_reader import read_json, unique_names
from fastvid.models.registry import target_dtype
from fastvid.models.wan.weight_names import QUANTIZED, Origin, some

SUFFIX = ".safetensors"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
STANDARD_NAMES = ("diffusion_pytorch_model" + SUFFIX, "model" + SUFFIX)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
MAX_HEADER = 100_000_000  # what the safetensors library itself allows
CHUNK = 2**24  # bytes that are asked of the system at once


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it; dtype as safetensors writes it ("F32", "BF16", ...). Its bytes begin at
    `offset` in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = field(default=0, compare=False)


def find_files(folder: Path, others: Iterable[Path] = ()) -> tuple[Path, ...]:
    """The safetensors files that hold a part's weights: the shards of its index, or its only file; `others` are known
    to hold something else.

    Raises CheckpointError if there is none, if it is not clear which, or if shards are missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; it should hold config.json and {STANDARD_NAMES[0]}")
    rest = frozenset(others)
    present = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX) and path not in rest)
    standard = [folder / name for name in STANDARD_NAMES if folder / name in present]
    choice = sorted(folder.glob(f"*{SUFFIX}.index.json")) or standard or present
    if not choice:
        raise CheckpointError(_why_none(folder))
    if len(choice) > 1:
        names = some([path.name for path in choice])
        raise CheckpointError(f"{folder} holds several weights ({names}); keep one, or the shards with their index")
    return _shards(choice[0]) if choice[0].suffix == ".json" else (choice[0],)


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry of every tensor in a safetensors file, read from its header and checked against the file's size.

    Raises CheckpointError that says how the file is broken, and what to do.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size and length <= MAX_HEADER else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if text is None:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {size} bytes, of which the first eight promise a header of "
            f"{length}; download it again (with git: git lfs pull)"
        )
    start = 8 + length
    try:
        header = json.loads(text, object_pairs_hook=unique_names)
        spans = {name: value["data_offsets"] for name, value in header.items() if name != "__metadata__"}
        end = start + max((int(end) for _, end in spans.values()), default=0)
        if size == end:
            with safe_open(path, "np"):  # dtypes, shapes, gaps and overlaps
                return {
                    name: Entry(header[name]["dtype"], tuple(header[name]["shape"]), path, start + begin)
                    for name, (begin, _) in spans.items()
                }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header ({error}); download it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({error}); download it again") from None
    raise CheckpointError(f"{path} has {size} bytes where its header needs {end}; download it again")


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """read_header of all files together; a tensor that is in two of them is an error."""
    entries: dict[str, Entry] = {}
    for file in files:
        header = read_header(file)
        if twice := sorted(header.keys() & entries.keys()):
            raise CheckpointError(f"{some(twice)} in both {entries[twice[0]].file} and {file}")
        entries |= header
    return entries


def count_parameters(entries: Mapping[str, Entry]) -> int:
    """How many numbers the tensors hold together."""
    return sum(math.prod(entry.shape) for entry in entries.values())


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor; 0 for a dtype of unknown size."""
    return math.prod(entry.shape) * BITS.get(entry.dtype, 0) // 8


def dtypes(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """The dtypes of the tensors, the one with most numbers first."""
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[entry.dtype] += math.prod(entry.shape)
    return tuple(dtype for dtype, _ in counts.most_common())


def in_module_names(module: nn.Module, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries under the names that the module knows; what a file holds twice, once, and what is unused, not."""
    aliases = getattr(module, "ALIASES", {})
    return {aliases.get(name, name): entry for name, entry in entries.items() if not _unused(module, name)}


def mismatches(module: nn.Module, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """What is wrong with these tensors as the weights of a module, one sentence a kind; empty if they fit."""
    wanted = module.state_dict()
    found = in_module_names(module, entries)
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(name for name in found if name not in wanted)
    shapes = [
        f"{name} {list(found[name].shape)} for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tuple(tensor.shape)
    ]
    kinds = sorted({entry.dtype for name, entry in found.items() if name in wanted and entry.dtype not in FLOATS})
    sentences = (
        (missing, "missing weights: "),
        (unknown, "weights that the model does not have: "),
        (shapes, "wrong shapes: "),
        (kinds, f"a dtype other than {', '.join(FLOATS)} ({QUANTIZED} yet): "),
    )
    return tuple(text + some(names) for names, text in sentences if names)


def load_into(
    module: nn.Module,
    files: Iterable[Path],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    origins: Mapping[str, Origin] | None = None,
    merge: Callable[[str, Tensor], Tensor] | None = None,
    only: Container[str] | None = None,
) -> None:
    """Fill a module, built on the meta device, from safetensors files, one tensor at a time.

    Weights become dtype on device, but those with a part of their name in `module.FP32_PARTS` (if it has that) become
    fp32. Names in `module.ALIASES` stand for others, those with a part in `module.UNUSED` are left out. The module
    ends in eval mode, without gradients.
    origins: what each weight is made of, where the files name them otherwise. merge: called with every weight's name
    and the tensor as stored; what it returns is taken instead. only: these weights, of a module that has its others.
    Host memory beyond the module itself: one tensor as stored and as it becomes. On the meta device everything is read,
    checked and let go: what a load costs beside its memory.
    Raises CheckpointError, before anything is read, if the files are broken or do not fit.
    """
    files = tuple(files)
    entries = read_matching_headers(module, files, origins)
    aliases, scratch, device = getattr(module, "ALIASES", {}), ReusedMemory(), torch.device(device)
    with ExitStack() as stack:
        opened = _open(stack, files)
        for stored in _in_file_order(entries, origins):
            name = aliases.get(stored, stored)
            if _unused(module, stored) or (only is not None and name not in only):
                continue
            names = (stored,) if origins is None else origins[stored].names
            target = target_dtype(module, name, dtype)
            # What is copied to another device or dtype anyway goes through memory that the next tensor uses again.
            copied = device.type != "cpu" or FLOATS[entries[names[0]].dtype] != target
            reused = scratch if copied and len(names) == 1 else None

            def read(one: str, reused: ReusedMemory | None = reused) -> Tensor:
                return _read(opened[entries[one].file], entries[one], reused)

            tensor = read(stored) if origins is None else origins[stored].make(read)
            tensor = tensor if merge is None else merge(name, tensor)
            tensor = tensor.to(device=device, dtype=target).contiguous()
            _assign(module, name, tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone())
    module.eval().requires_grad_(False)


def _in_file_order(entries: Mapping[str, Entry], origins: Mapping[str, Origin] | None) -> list[str]:
    """Weights in the order in which files hold (the first tensor of) them, so that they are read from front to back."""
    files = {file: number for number, file in enumerate(dict.fromkeys(entry.file for entry in entries.values()))}

    def place(name: str) -> tuple[int, int]:
        entry = entries[name if origins is None else origins[name].names[0]]
        return files[entry.file], entry.offset

    return sorted(entries if origins is None else origins, key=place)


def read_matching_headers(
    module: nn.Module, files: Iterable[Path], origins: Mapping[str, Origin] | None = None
) -> dict[str, Entry]:
    """The headers of files that hold a module's weights; CheckpointError if they are broken or do not fit it."""
    files = tuple(files)
    entries = read_headers(files)
    if wrong := mismatches(module, entries if origins is None else origin_entries(origins, entries)):
        raise CheckpointError(f"{_where(files)} does not fit {type(module).__name__}: " + "; ".join(wrong))
    return entries


def origin_entries(origins: Mapping[str, Origin], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of weights that are made of others."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    first = {name: entries[origin.names[0]] for name, origin in origins.items()}
    return {name: Entry(first[name].dtype, origin.shape(shapes), first[name].file) for name, origin in origins.items()}


class ReusedMemory:
    """Memory for one tensor at a time: touching new pages for each takes as long as reading it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """uint8 [size]; what was taken before is overwritten."""
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[:size]


def _open(stack: ExitStack, files: Iterable[Path]) -> dict[Path, Any]:
    """The files, as long as the stack is open, for reading from front to back.

    By the system's read in large pieces: pages of a map come in smaller ones, and count as this process's memory.
    """
    opened = {}
    for file in files:
        try:
            opened[file] = stack.enter_context(file.open("rb", buffering=0))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened[file].fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the readahead
    return opened


def _read(file: Any, entry: Entry, scratch: ReusedMemory | None) -> Tensor:
    """The tensor of an entry from its open file, in new memory or in the scratch."""
    dtype = FLOATS[entry.dtype]
    size = math.prod(entry.shape) * dtype.itemsize
    memory = torch.empty(size, dtype=torch.uint8, device="cpu") if scratch is None else scratch.take(size)
    rest = memory.numpy().data if size else memoryview(b"")
    try:
        file.seek(entry.offset)
        while rest:
            count = file.readinto(rest[:CHUNK])
            if not count:
                raise CheckpointError(f"{entry.file} ended while it was read; download it again")
            rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error.strerror or error}") from None
    return memory.view(dtype).view(entry.shape)


def _unused(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a file is none that the module computes with."""
    return not frozenset(getattr(module, "UNUSED", ())).isdisjoint(name.split("."))


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent).load_state_dict({leaf: tensor}, strict=False, assign=True)


def _shards(index: Path) -> tuple[Path, ...]:
    """The files named by an index, all of which must be there, inside its folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f'{index} has no "weight_map" of tensor names to file names')
    names = sorted(set(table.values()))
    if outside := [name for name in names if not _is_inside(name)]:
        raise CheckpointError(f"{index} points outside its folder: {some(outside)}")
    if others := [name for name in names if not name.endswith(SUFFIX)]:
        raise CheckpointError(f"{index} names files that are not safetensors: {some(others)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {some(missing)}, of {len(names)} files that {index.name} names; download them again"
        )
    return tuple(index.parent / name for name in names)


def _is_inside(name: str) -> bool:
    """Whether a file name of an index stays in the folder, read as either system would."""
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


def _where(files: tuple[Path, ...]) -> str:
    return str(files[0] if len(files) == 1 else files[0].parent) if files else "no file"
