"""Reads and writes the tensors of `fastvid convert`: chunk by chunk, in safetensors and pickles, whole or in shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from fastvid.errors import CheckpointError
from fastvid.files import open_regular, reason
from fastvid.loaders import safetensors
from fastvid.loaders.entries import BITS, Entry
from fastvid.loaders.pickles import PickleReader, read_exactly
from fastvid.models.wan.weight_names import Origin, some


@dataclass(frozen=True)
class Tensors:
    """What a file is made of. entries: name -> entry in it; chunks: the bytes of one of them, piece by piece."""

    entries: Mapping[str, Entry]
    chunks: Callable[[str], Iterable[bytes]]


# ---------------------------------------------------------------- reading


class TensorReader:
    """Reads the bytes of tensors. Use it as a context manager: it owns the child processes that hold pickles open.

    keys: pickle -> the key of the state dict to read."""

    def __init__(self, keys: Mapping[Path, str] | None = None) -> None:
        self._keys = keys or {}
        self._stack = ExitStack()
        self._pickles: dict[Path, PickleReader] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def entries(self, files: Iterable[Path]) -> dict[str, Entry]:
        """All tensors in the files, name -> entry. Raises CheckpointError."""
        files = tuple(files)
        entries = safetensors.read_headers(file for file in files if file.suffix not in safetensors.PICKLES)
        for file in (file for file in files if file.suffix in safetensors.PICKLES):
            if file not in self._pickles:
                self._pickles[file] = self._stack.enter_context(PickleReader(file, self._keys.get(file, "")))
            # No offset: the child process sends the bytes.
            header = {name: Entry(kind, shape, file) for name, (kind, shape, _) in self._pickles[file].tensors.items()}
            if twice := entries.keys() & header.keys():
                raise CheckpointError(f"{some(twice)} in {file} and in another file beside it")
            entries |= header
        return entries

    def chunks(self, name: str, entry: Entry, begin: int, end: int) -> Iterator[bytes]:
        """Yield bytes [begin, end) of a tensor in chunks. Raises CheckpointError if they can't be read."""
        if entry.file in self._pickles:
            yield from self._pickles[entry.file].chunks(name, begin, end)
            return
        if entry.file.suffix in safetensors.PICKLES:
            raise ValueError(f"{entry.file} is a pickle that was not opened")  # entry.offset is meaningless
        try:
            with open_regular(entry.file) as file:
                file.seek(entry.offset + begin)
                yield from read_exactly(file, end - begin, f"{entry.file} ended within {name}")
        except OSError as error:
            raise CheckpointError(f"{entry.file} cannot be read: {reason(error)}") from None


def describe(origins: Mapping[str, Origin], entries: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    """Entries of the output tensors. Raises CheckpointError if one would be joined from tensors of different dtypes."""
    for origin in origins.values():
        dtypes = {entries[name].dtype for name in origin.names}
        if len(dtypes) > 1:
            raise CheckpointError(f"{', '.join(origin.names)} have to be of one dtype; they are {', '.join(dtypes)}")
    return {name: replace(entry, file=file) for name, entry in safetensors.origin_entries(origins, entries).items()}


def moved(origins: Mapping[str, Origin], reader: TensorReader, entries: Mapping[str, Entry], file: Path) -> Tensors:
    """The tensors of another layout, bit for bit."""
    return Tensors(describe(origins, entries, file), lambda name: origin_bytes(origins[name], reader, entries))


def origin_bytes(origin: Origin, reader: TensorReader, entries: Mapping[str, Entry]) -> Iterator[bytes]:
    """The bytes of an output tensor. Rows are contiguous, so splitting and joining them, or adding leading dimensions
    of 1, only selects which bytes to read. Only a transpose needs the whole tensor in memory.
    """
    for name in origin.names:
        entry, size = entries[name], safetensors.known_bytes(entries[name]) // origin.parts
        chunks = reader.chunks(name, entry, origin.part * size, (origin.part + 1) * size)
        if origin.transpose:
            item = np.dtype(f"V{BITS[entry.dtype] // 8}")
            yield np.frombuffer(b"".join(chunks), item).reshape(entry.shape).T.tobytes()
        else:
            yield from chunks


# ---------------------------------------------------------------- writing


def write_weights(target: Path, tensors: Tensors, shard_bytes: int) -> list[Path]:
    """Write tensors to `target` (*.safetensors), or to shards and an index above shard_bytes. Returns the files."""
    described = tensors.entries
    shards = split_state_dict_into_shards_factory(
        {name: described[name] for name in sorted(described)},
        get_storage_size=safetensors.known_bytes,
        filename_pattern=target.name.removesuffix(safetensors.SUFFIX) + "{suffix}" + safetensors.SUFFIX,
        max_shard_size=shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        _write_file(target.with_name(file), {name: described[name] for name in names}, tensors.chunks)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        write_json(target.with_name(target.name + ".index.json"), index)
    return [target.with_name(file) for file in shards.filename_to_tensors]


def write_json(path: Path, value: Any) -> None:
    """Write JSON with the same formatting as diffusers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_file(path: Path, shard: Mapping[str, Entry], chunks: Callable[[str], Iterable[bytes]]) -> None:
    # Widest dtypes first, like the safetensors library, so that every tensor is aligned.
    order = sorted(shard, key=lambda name: (-BITS[shard[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry, end = shard[name], offset + safetensors.known_bytes(shard[name])
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shard):  # a quantized weight's tensors one after the other: they are made together
            begin, end = header[name]["data_offsets"]
            file.seek(8 + len(text) + begin)
            written = sum(map(file.write, chunks(name)))
            if written != end - begin:
                raise CheckpointError(f"{name} came out with {written} bytes instead of {end - begin}")
        file.flush()
        os.fsync(file.fileno())
