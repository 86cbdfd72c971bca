"""Reads safetensors: their headers, and their tensors into a module.

The header at the front of a file is small. It tells what a checkpoint holds and whether it fits a model before any
weight is read. Nothing here unpickles. Format (https://github.com/huggingface/safetensors#format): eight bytes with the
header's length, the header in JSON (name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastvid.device.mapped import MappedFile, map_file
from fastvid.errors import CheckpointError
from fastvid.files import open_regular, reason
from fastvid.layers.fused import FusedLayer
from fastvid.layers.quantized import layer_of, logical_shapes
from fastvid.loaders import gguf, marks, marks_json, quantized
from fastvid.loaders.entries import BITS, FLOATS, STORED, Entry, nbytes
from fastvid.loaders.finite import Weight, check_finite
from fastvid.models.common.config_reader import parse_json
from fastvid.models.registry import target_dtype
from fastvid.models.wan.weight_names import Origin, is_module, some
from fastvid.ops.formats import Data

SUFFIX = ".safetensors"
SUFFIXES = (SUFFIX, ".sft")
READABLE = (*SUFFIXES, gguf.SUFFIX)  # kinds of files that weights are read from
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# A model has 1,095 tensors and a header of 0.2 MB; some LoRAs add a few MB about their training.
MAX_HEADER, MAX_TENSORS, MAX_DIMS = 1 << 24, 20_000, 16
VALUES = 12  # of a tensor in a header, about
LARGEST = 2**63 - 1  # bytes, or values of a tensor
CHUNK = 2**22  # bytes per read, which are in the cache when they are checked


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry of every tensor in a safetensors file, as stored: see `read_stored`."""
    return read_stored(path)[0]


def read_stored(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(name -> entry of every tensor in a safetensors file, its metadata), read from its header and checked against the
    file's size.

    Raises CheckpointError if the file is broken, or if its header is larger than any that is published.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size and length <= MAX_HEADER else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {size} bytes, of which the first eight promise a header of "
            f"{length}; download it again (with git: git lfs pull)"
        )
    if text is None:
        raise CheckpointError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    try:
        entries, metadata, end = _parse_header(text, path)
        if size == end:
            with safe_open(path, "np"):  # dtypes, shapes, gaps and overlaps
                return entries, metadata
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header ({error}); download it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({reason(error)}); download it again") from None
    raise CheckpointError(f"{path} has {size} bytes where its header needs {end}; download it again")


def _parse_header(text: bytes, path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The entries of a header, its metadata, and how long the file has to be. Raises ValueError, TypeError, KeyError or
    AttributeError."""
    header = parse_json(text, MAX_TENSORS * VALUES)
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    entries, start, last = {}, 8 + len(text), 0
    for name, value in header.items():
        shape, (begin, end) = value["shape"], value["data_offsets"]
        if not _are_sizes(shape) or not _are_sizes([begin, end]) or len(shape) > MAX_DIMS:
            raise ValueError(f"{name[:80]!r} has shape {shape!r:.80} at {begin!r:.40} to {end!r:.40}")
        if math.prod(shape) > LARGEST:
            raise ValueError(f"{name[:80]!r} has shape {shape!r:.80}, more than any file can hold")
        entries[name] = Entry(value["dtype"], tuple(shape), path, start + begin)
        last = max(last, end)
    return entries, {key: value for key, value in metadata.items() if isinstance(value, str)}, start + last


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST for value in values)


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """The merged headers of several files, a quantized weight as one entry. A VACE module in a file of its own has its
    own marks. Raises CheckpointError if two files have a tensor of the same name, or for quantized weights that cannot
    be read."""
    groups: dict[bool, tuple[dict[str, Entry], dict[str, str]]] = {False: ({}, {}), True: ({}, {})}
    for file in files:
        header, texts = (gguf.read_header if file.suffix == gguf.SUFFIX else read_stored)(file)
        apart = is_module(header)
        entries, metadata = groups[apart]
        _check_apart(header, entries, file)
        groups[apart] = {**entries, **header}, marks_json.joined(metadata, texts, file)
    own, module = (marks.logical(*group) for group in groups.values())
    _check_apart(module, own, next((entry.file for entry in module.values()), Path()))
    return own | module


def _check_apart(new: Mapping[str, Entry], entries: Mapping[str, Entry], file: Path) -> None:
    if twice := sorted(new.keys() & entries.keys()):
        raise CheckpointError(f"{some(twice)} in both {entries[twice[0]].file} and {file}; remove one of the two")


def count_parameters(entries: Mapping[str, Entry]) -> int:
    """The total number of elements."""
    return sum(math.prod(entry.shape) for entry in entries.values())


def known_bytes(entry: Entry) -> int:
    """Bytes of a tensor. Raises CheckpointError for a dtype of unknown size."""
    if entry.dtype not in BITS:
        raise CheckpointError(f"{entry.file} holds {entry.dtype} weights; known are {', '.join(BITS)}")
    return nbytes(entry)


def dtypes(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """The dtypes of the tensors, the one with the most elements first."""
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[entry.dtype] += math.prod(entry.shape)
    return tuple(dtype for dtype, _ in counts.most_common())


def in_module_names(module: nn.Module, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries under the module's own names: aliases are resolved (so duplicates merge), unused tensors dropped."""
    aliases = getattr(module, "ALIASES", {})
    return {aliases.get(name, name): entry for name, entry in entries.items() if not _unused(module, name)}


def mismatches(module: nn.Module, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """Why these tensors do not fit a module, one sentence per kind of problem; empty if they fit."""
    expected = logical_shapes(module)
    entries_by_name = in_module_names(module, entries)
    missing = sorted(expected.keys() - entries_by_name.keys())
    unknown = sorted(name for name in entries_by_name if name not in expected)
    shapes = [
        f"{name} {list(entries_by_name[name].shape)} for {list(shape)}"
        for name, shape in expected.items()
        if name in entries_by_name and entries_by_name[name].shape != shape
    ]
    others = {
        entry.dtype: name
        for name, entry in entries_by_name.items()
        if name in expected and entry.dtype not in FLOATS and entry.source is None
    }
    kinds = sorted(f"{dtype} ({name})" for dtype, name in others.items())
    sentences = (
        (missing, "missing weights: "),
        (unknown, "weights that the model does not have: "),
        (shapes, "wrong shapes: "),
        (kinds, f"a dtype other than {', '.join(FLOATS)}, without marks of a quantized format: "),
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
    mapped: Container[Path] = (),
) -> None:
    """Fill a module, built on the meta device, from safetensors files, one tensor at a time.

    Weights are converted to `dtype`, except those whose names contain a part in `module.FP32_PARTS`, which become fp32.
    `module.ALIASES` maps file names of tensors to the module's; names with a part in `module.UNUSED` are skipped. All
    three attributes are optional. The module ends in eval mode, without gradients.

    origins: how to build each weight if the files use another layout. merge: called with every weight's name and stored
    tensor; returns the tensor to use. only: the weights to load into a module that already has the others. mapped: the
    files whose weights stay where they lie if they are wanted on the CPU as they are (see `fastvid.device.mapped`).

    Host memory beyond the module: one tensor as stored and as converted. With device "meta" everything is read, checked
    and dropped, to measure loading time.
    Raises CheckpointError if the files are broken or do not fit, before any weight is read, and if a weight is not
    finite, or would not be as `dtype`.
    """
    files = tuple(files)
    entries = read_matching_headers(module, files, origins)
    aliases, device = getattr(module, "ALIASES", {}), torch.device(device)
    with ExitStack() as stack:
        reader = _Reader(entries, _open(stack, files), mapped)
        for stored in _in_file_order(entries, origins):
            name = aliases.get(stored, stored)
            if _unused(module, stored) or (only is not None and name not in only):
                continue
            names = (stored,) if origins is None else origins[stored].names
            layer, first = layer_of(module, name), entries[names[0]]
            if layer is not None and first.source is not None:
                layer.fill(reader.data(names[0], reuse=layer.copies(device)), device)
                continue
            target = target_dtype(module, name, dtype)
            # Those that are copied, also into a fused layer, are read into memory shared with the next ones.
            copied = device.type != "cpu" or layer is not None or FLOATS.get(first.dtype) != target
            copied = copied or _is_row(module, name)
            read = partial(reader.tensor, target=target, copied=copied, reuse=copied and len(names) == 1)
            tensor = read(stored) if origins is None else origins[stored].make(read)
            tensor = tensor if merge is None else merge(name, tensor)
            if layer is not None:
                quantized.fill_plain(layer, tensor, device)
                continue
            tensor = tensor.to(device=device, dtype=target).contiguous()
            _assign(module, name, tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone())
    module.eval().requires_grad_(False)


def _in_file_order(entries: Mapping[str, Entry], origins: Mapping[str, Origin] | None) -> list[str]:
    """Weights in the order of their (first) tensors in the files, so that files are read sequentially."""
    files = {file: number for number, file in enumerate(dict.fromkeys(entry.file for entry in entries.values()))}

    def place(name: str) -> tuple[int, int]:
        entry = entries[name if origins is None else origins[name].names[0]]
        return files[entry.file], entry.offset

    return sorted(entries if origins is None else origins, key=place)


def read_matching_headers(
    module: nn.Module, files: Iterable[Path], origins: Mapping[str, Origin] | None = None
) -> dict[str, Entry]:
    """The headers of files that hold a module's weights. Raises CheckpointError if they are broken or do not fit."""
    files = tuple(files)
    entries = read_headers(files)
    if wrong := mismatches(module, entries if origins is None else origin_entries(origins, entries)):
        raise CheckpointError(f"{_where(files)} does not fit {type(module).__name__}: " + "; ".join(wrong))
    return entries


def origin_entries(origins: Mapping[str, Origin], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of weights that are built from other tensors."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    first = {name: entries[origin.names[0]] for name, origin in origins.items()}
    return {name: _built(first[name], origin, shapes) for name, origin in origins.items()}


def _built(first: Entry, origin: Origin, shapes: Mapping[str, tuple[int, ...]]) -> Entry:
    return first if origin.is_copy else Entry(first.dtype, origin.shape(shapes), first.file, source=first.source)


class ReusedMemory:
    """Memory reused for one tensor at a time. Touching new pages for each takes as long as reading it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Memory, uint8 [size]. Overwrites what was taken before."""
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[:size]


class _Reader:
    """Reads tensors from open files."""

    def __init__(self, entries: Mapping[str, Entry], opened: Mapping[Path, Any], mapped: Container[Path]) -> None:
        self.entries, self.opened, self.scratch = entries, opened, ReusedMemory()
        self.maps = {path: _map(path, file) for path, file in opened.items() if path in mapped}

    def data(self, stored: str, reuse: bool) -> Data:
        """A quantized weight's data. reuse: the codes in memory shared with the next ones."""
        source = self.entries[stored].source
        codes = source.tensors.get("codes") if reuse and source is not None else None

        def read(one: Entry) -> Tensor:
            return _read(self.opened[one.file], one, self.scratch if one is codes else None)

        return quantized.read_data(stored, self.entries[stored], read)

    def tensor(self, stored: str, target: torch.dtype, copied: bool, reuse: bool) -> Tensor:
        """A weight that will be `target`, as stored, or dequantized. copied: the caller copies it. reuse: in memory
        shared with the next one."""
        entry = self.entries[stored]
        if entry.source is not None:
            data = self.data(stored, reuse=True)
            made = quantized.as_tensor(entry, data, torch.float32).dequantize().reshape(entry.shape)
            check_finite(made, Weight(entry.file, stored, torch.float32, target))
            return made
        weight = Weight(entry.file, stored, FLOATS[entry.dtype], target)
        if (
            not copied
            and (mapped := self.maps.get(entry.file))
            and (found := mapped.tensor(weight.stored, entry.shape, entry.offset)) is not None
        ):
            _check_mapped(found, mapped, entry.offset, weight)
            return found
        return _read(self.opened[entry.file], entry, self.scratch if reuse else None, weight)


def _open(stack: ExitStack, files: Iterable[Path]) -> dict[Path, Any]:
    """Open files for sequential reading until the stack closes."""
    opened = {}
    for file in files:
        try:
            opened[file] = stack.enter_context(open_regular(file, buffering=0))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {reason(error)}") from None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened[file].fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the readahead
    return opened


def _read(file: Any, entry: Entry, scratch: ReusedMemory | None = None, weight: Weight | None = None) -> Tensor:
    """Read a tensor from its open file, into `scratch` or into new memory. All of a weight has to be finite."""
    dtype = STORED[entry.dtype]
    size, done, seen = math.prod(entry.shape) * dtype.itemsize, 0, 0
    memory = torch.empty(size, dtype=torch.uint8, device="cpu") if scratch is None else scratch.take(size)
    data = memory.numpy().data if size else memoryview(b"")
    try:
        file.seek(entry.offset)
        while done < size:
            count = file.readinto(data[done : done + CHUNK])
            if not count:
                raise CheckpointError(f"{entry.file} ended while it was read; download it again")
            done += count
            whole = done - done % dtype.itemsize
            if weight is not None:
                check_finite(memory[seen:whole].view(dtype), weight)
            seen = whole
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {reason(error)}") from None
    return memory.view(dtype).view(entry.shape)


def _map(path: Path, file: Any) -> MappedFile:
    try:
        return map_file(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be mapped: {reason(error)}; load with mmap=False") from None


def _check_mapped(tensor: Tensor, mapped: MappedFile, offset: int, weight: Weight) -> None:
    """All of a weight has to be finite. Looks at pieces that stay in the cache, while the next ones are fetched."""
    values, step = tensor.view(-1), CHUNK // tensor.element_size()
    for start in range(0, len(values), step):
        mapped.fetch(offset + start * tensor.element_size(), CHUNK)
        check_finite(values[start : start + step], weight)


def _unused(module: nn.Module, name: str) -> bool:
    """Whether the module does not need a tensor."""
    return not frozenset(getattr(module, "UNUSED", ())).isdisjoint(name.split("."))


def _is_row(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), FusedLayer)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    if leaf in parent._parameters:
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
    else:  # a buffer, or rows of a fused layer
        parent.load_state_dict({leaf: tensor}, strict=False, assign=True)


def _where(files: tuple[Path, ...]) -> str:
    return str(files[0] if len(files) == 1 else files[0].parent) if files else "no file"
