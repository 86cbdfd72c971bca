"""Tensors as bytes, from files to files: read in pieces out of safetensors files, or through a child process out of
pickles, and written as safetensors shards with an index. In memory is one piece, or one tensor that is transposed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors
from fastvid.loaders.safetensors import BITS, Entry
from fastvid.models.wan.weight_names import Origin, some

PIECE = 2**24  # bytes read at once
SHARD_BYTES = 5 * 10**9


class Tensors:
    """Reads the bytes of tensors. A context manager: it owns the child processes that hold pickles open. keys:
    of pickles that hold several state dicts, which to take."""

    def __init__(self, keys: Mapping[Path, str] | None = None) -> None:
        self._keys = keys or {}
        self._stack = ExitStack()
        self._pickles: dict[Path, PickleReader] = {}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def entries(self, files: Iterable[Path]) -> dict[str, Entry]:
        """Name -> entry of all tensors in the files. Raises CheckpointError."""
        files = tuple(files)
        found = safetensors.read_headers(file for file in files if file.suffix not in safetensors.PICKLES)
        for file in (file for file in files if file.suffix in safetensors.PICKLES):
            if file not in self._pickles:
                self._pickles[file] = self._stack.enter_context(PickleReader(file, self._keys.get(file, "")))
            if twice := found.keys() & self._pickles[file].entries.keys():
                raise CheckpointError(f"{some(twice)} in {file} and in another file beside it")
            found |= self._pickles[file].entries
        return found

    def chunks(self, name: str, entry: Entry, begin: int, end: int) -> Iterator[bytes]:
        """Bytes [begin, end) of a tensor, in pieces. Raises CheckpointError if they can't be had."""
        if entry.file in self._pickles:
            yield from self._pickles[entry.file].chunks(name, begin, end)
            return
        if entry.file.suffix in safetensors.PICKLES:
            raise ValueError(f"{entry.file} is a pickle that was not opened")  # its bytes are not where it begins
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.offset + begin)
                yield from _exactly(file, end - begin, f"{entry.file} ended within {name}")
        except OSError as error:
            raise CheckpointError(f"{entry.file} cannot be read: {error.strerror or error}") from None


class PickleReader:
    """A child process that has a pickle open, and hands out its tensors. Nothing is unpickled in this process."""

    def __init__(self, path: Path, key: str = "") -> None:
        self.path = path
        # The child finds what this process finds, and starts where no file of the user's can stand for a module.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._child = subprocess.Popen(
            [sys.executable, "-m", "fastvid.loaders.pickles", str(path.resolve()), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=Path(__file__).parents[2],
            env=environment,
        )

    def __enter__(self) -> PickleReader:
        try:
            told = json.loads(self._child.stdout.readline() or "null")
            if not isinstance(told, dict) or "tensors" not in told:
                raise CheckpointError(f"{self.path} {told['error'] if told else self._last_words()}")
        except BaseException:
            self.__exit__()
            raise
        # No offset: bytes come from the child.
        self.entries = {name: Entry(kind, tuple(shape), self.path) for name, (kind, shape) in told["tensors"].items()}
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a child that is gone
            self._child.stdin.close()
        self._child.terminate()
        self._child.wait()
        self._child.stdout.close()
        self._errors.close()

    def chunks(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """Bytes [begin, end) of a tensor, in pieces; all of it goes through the pipe."""
        try:
            self._child.stdin.write(json.dumps(name).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            raise CheckpointError(f"{self.path} {self._last_words()}") from None
        at, problem = 0, f"{self.path} ended within {name}"
        for piece in _exactly(self._child.stdout, nbytes(self.entries[name]), problem):
            yield piece[max(0, begin - at) : max(0, end - at)]
            at += len(piece)

    def _last_words(self) -> str:
        self._child.wait()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip().splitlines()
        return (
            f"cannot be read: its process ended with {self._child.returncode} ({text[-1][:200] if text else 'silent'})"
        )


def _exactly(file: IO[bytes], size: int, problem: str) -> Iterator[bytes]:
    while size > 0:
        piece = file.read(min(PIECE, size))
        if not piece:
            raise CheckpointError(problem)
        size -= len(piece)
        yield piece


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor. Raises CheckpointError for a dtype of unknown size."""
    if entry.dtype not in BITS:
        raise CheckpointError(f"{entry.file} holds {entry.dtype} weights; known are {', '.join(BITS)}")
    return math.prod(entry.shape) * BITS[entry.dtype] // 8


def describe(made: Mapping[str, Origin], entries: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    """The entries of the tensors that are made. Raises CheckpointError where parts of one have several dtypes."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    described = {}
    for target, origin in made.items():
        kinds = {entries[name].dtype for name in origin.names}
        if len(kinds) > 1:
            raise CheckpointError(f"{', '.join(origin.names)} have to be of one dtype; they are {', '.join(kinds)}")
        described[target] = Entry(kinds.pop(), origin.shape(shapes), file)
    return described


def origin_bytes(origin: Origin, tensors: Tensors, entries: Mapping[str, Entry]) -> Iterator[bytes]:
    """The bytes of a tensor, from what it is made of: rows lie one after the other, so joining and splitting them, like
    leading ones, is no more than which bytes are read.
    """
    for name in origin.names:
        entry, size = entries[name], nbytes(entries[name]) // origin.parts
        chunks = tensors.chunks(name, entry, origin.part * size, (origin.part + 1) * size)
        if origin.transpose:
            item = np.dtype(f"V{BITS[entry.dtype] // 8}")
            yield np.frombuffer(b"".join(chunks), item).reshape(entry.shape).T.tobytes()
        else:
            yield from chunks


def write_weights(
    target: Path,
    made: Mapping[str, Origin],
    tensors: Tensors,
    entries: Mapping[str, Entry],
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write tensors as `target` (*.safetensors), or as its shards and their index if they are more than shard_bytes."""
    wanted = describe(made, entries, target)
    shards = _split(wanted, shard_bytes)
    if len(shards) == 1:
        _write_file(target, shards[0], made, tensors, entries)
        return [target]
    stem, count = target.name.removesuffix(safetensors.SUFFIX), len(shards)
    names = [f"{stem}-{i + 1:05}-of-{count:05}{safetensors.SUFFIX}" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(target.with_name(name), shard, made, tensors, entries)
    table = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(nbytes(entry) for entry in wanted.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    write_json(target.with_name(target.name + ".index.json"), index)
    return [target.with_name(name) for name in names]


def write_json(path: Path, value: Any) -> None:
    """As diffusers writes its files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(entries: Mapping[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    """Shards of at most so many bytes (one tensor may be more), in the order of the names."""
    shards: list[dict[str, Entry]] = [{}]
    held = 0
    for name in sorted(entries):
        size = nbytes(entries[name])
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = entries[name]
        held += size
    return shards


def _write_file(
    path: Path, shard: Mapping[str, Entry], made: Mapping[str, Origin], tensors: Tensors, entries: Mapping[str, Entry]
) -> None:
    # Wide types first, as the library writes them, so that every tensor is aligned.
    order = sorted(shard, key=lambda name: (-BITS[shard[name].dtype], name))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        entry, end = shard[name], at + nbytes(shard[name])
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in origin_bytes(made[name], tensors, entries):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != 8 + len(text) + at:
        raise CheckpointError(f"{path.name} came out with {path.stat().st_size} bytes instead of {8 + len(text) + at}")
