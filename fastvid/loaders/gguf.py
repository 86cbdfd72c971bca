"""Reads GGUF files: their headers, with each quantized tensor as one entry, and the vocabularies of T5's tokenizers.

    GGUF, version (u32), how many tensors and keys (u64 each)
    a key:    name, type of the value (u32), value. An array: type of its items (u32), how many (u64), the items
    a tensor: name, how many sizes (u32), sizes with the fastest first (u64 each), type (u32), place (u64)
    the data, from the next multiple of general.alignment on

A text is its length (u64) and UTF-8; all numbers are little-endian. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is read beyond MAX_HEADER bytes, and of the values
only what is needed, so a broken file costs little.

The tensors of umT5 come out under transformers' names (models/common/ggml_names.py).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastvid.errors import CheckpointError
from fastvid.files import open_regular, reason
from fastvid.loaders.entries import Entry, Source, nbytes, quantized_entry
from fastvid.models.common import ggml_names
from fastvid.models.common.sentencepiece import Vocabulary
from fastvid.models.wan import ggml_shapes
from fastvid.models.wan.weight_names import find_parts
from fastvid.ops.formats_gguf import BLOCKS

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
# umT5's header has 6 MB, nearly all of it the words of its tokenizer.
MAX_HEADER, PIECE = 1 << 24, 1 << 18  # bytes, at most and at a time
MAX_TENSORS, MAX_KEYS, MAX_ITEMS = 20_000, 20_000, 1 << 20  # MAX_ITEMS: texts and arrays in arrays
MAX_NAME, MAX_TEXT, MAX_SIZES, MAX_DEPTH = 512, 256, 8, 4
ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 16
LARGEST = 2**63 - 1

U8, I8, U32, I32, F32, BOOL, TEXT, ARRAY = 0, 1, 4, 5, 6, 7, 8, 9  # types of values
NUMBERS = {U8: "B", I8: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
PLAIN = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}  # types of tensors
QUANTIZED = {2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k"}
QUANTIZED |= {14: "q6_k", 20: "iq4_nl", 23: "iq4_xs"}
# Types that are not read, and the nearest that is.
OTHERS = {4: ("Q4_2", "Q4_0"), 5: ("Q4_3", "Q4_1"), 9: ("Q8_1", "Q8_0"), 15: ("Q8_K", "Q8_0"), 39: ("MXFP4", "Q4_0")}
OTHERS |= {16: ("IQ2_XXS", "Q2_K"), 17: ("IQ2_XS", "Q2_K"), 22: ("IQ2_S", "Q2_K"), 18: ("IQ3_XXS", "Q3_K")}
OTHERS |= {21: ("IQ3_S", "Q3_K"), 19: ("IQ1_S", "Q2_K"), 29: ("IQ1_M", "Q2_K"), 34: ("TQ1_0", "Q2_K")}
OTHERS |= {35: ("TQ2_0", "Q2_K"), 31: ("Q4_0_4_4", "Q4_0"), 32: ("Q4_0_4_8", "Q4_0"), 33: ("Q4_0_8_8", "Q4_0")}
OTHERS |= {36: ("IQ4_NL_4_4", "IQ4_NL"), 37: ("IQ4_NL_4_8", "IQ4_NL"), 38: ("IQ4_NL_8_8", "IQ4_NL")}
OTHERS |= {40: ("NVFP4", "Q4_0"), 41: ("Q1_0", "Q2_K")}
# general.architecture: of Wan and of umT5; others are read if their tensors have the names of a part.
ARCHITECTURE, SHAPE = "general.architecture", "comfy.gguf.orig_shape."
T5 = ("t5", "t5encoder")
VOCABULARY = "tokenizer.ggml."


@dataclass(frozen=True)
class Array:
    """An array in the metadata: the type of its items, how many, and where they start."""

    kind: int
    count: int
    start: int


@dataclass(frozen=True)
class _Tensor:
    """shape: slowest first, as in torch. place: from the start of the data."""

    shape: tuple[int, ...]
    kind: int
    place: int


@dataclass(frozen=True)
class _Header:
    """values: numbers, texts of up to MAX_TEXT bytes, arrays. text: the bytes that were read. end: of the header."""

    values: Mapping[str, Any]
    tensors: Mapping[str, _Tensor]
    text: bytearray
    end: int
    size: int


class _Short(ValueError):
    """The file ends before what its header promises."""


class _Unread(ValueError):
    """A file that is sound, but of a kind that is not read."""


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(name -> entry of every tensor, the short texts of the metadata) of a GGUF file, checked against its size.

    A tensor that is no matrix in whole blocks keeps its shape; its source is the matrix of its blocks. Raises
    CheckpointError if the file is broken, of another byte order or version, or holds what is not read.
    """
    header = _parse(path)
    _check_types(path, header.tensors)
    try:
        entries = _entries(path, header)
    except ValueError as error:
        raise _broken(path, error) from None
    texts = {key: value for key, value in header.values.items() if isinstance(value, str)}
    entries = _reshaped(entries, header)
    renamed = ggml_names.to_transformers(entries)
    if renamed is None and (kind := texts.get(ARCHITECTURE, "wan")) != "wan" and not find_parts(entries):
        raise CheckpointError(f"{path} is of the architecture {kind!r:.60}; a Wan transformer or umT5 is needed")
    return (entries if renamed is None else renamed), texts


def _parse(path: Path) -> _Header:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            cursor = _Cursor(file)
            try:
                return _read_all(cursor, size)
            except _Short as error:
                raise CheckpointError(
                    f"{path} is not a whole GGUF file: it has {size} bytes and {error}; download it again (with git: "
                    "git lfs pull)"
                ) from None
            except _Unread as error:
                raise CheckpointError(
                    f"{path} is GGUF {error}; read are versions 2 and 3 in little-endian order"
                ) from None
            except ValueError as error:
                raise _broken(path, error) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def _broken(path: Path, error: ValueError) -> CheckpointError:
    return CheckpointError(f"{path} has a broken GGUF header ({error}); download it again (with git: git lfs pull)")


# ---------------------------------------------------------------- the header's bytes


class _Cursor:
    """Reads a header from the front of a file, no further than it is asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.data, self.at = file, bytearray(), 0

    def take(self, count: int) -> int:
        """Goes past so many bytes, and returns where they start in `data`. Raises ValueError."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            self._read_on()
        return start

    def _read_on(self) -> None:
        if self.at > MAX_HEADER:
            raise ValueError(f"it is longer than {MAX_HEADER:,} bytes, which are read at most")
        missing = self.at - len(self.data)
        self.data += self.file.read(min(max(missing, PIECE), MAX_HEADER - len(self.data)))
        if self.at > len(self.data):
            raise _Short("ends within its header")

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def name(self) -> str:
        """A name: ASCII, and short."""
        length = self.number("Q")
        if length > MAX_NAME:
            raise ValueError(f"a name of {length:,} bytes; at most {MAX_NAME} are read")
        start = self.take(length)
        return self.data[start : start + length].decode("ascii")

    def skip_texts(self, count: int) -> None:
        """Goes past so many texts; the fast way, for there may be 256,384."""
        data, at, unpack = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(data):
                self.at = at
                at = self.take(8)
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.take(0)


def _read_all(cursor: _Cursor, size: int) -> _Header:
    if (magic := cursor.data[(start := cursor.take(4)) : start + 4]) != MAGIC:
        raise ValueError(f"it starts with {bytes(magic)!r} instead of {MAGIC!r}")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _Unread("of a big-endian machine" if version & 0xFFFF == 0 else f"of version {version}")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise ValueError(f"{tensors:,} tensors and {keys:,} keys; at most {MAX_TENSORS:,} and {MAX_KEYS:,} are read")
    values = _unique((cursor.name(), _value(cursor, cursor.number("I"))) for _ in range(keys))
    named = _unique((cursor.name(), _tensor(cursor)) for _ in range(tensors))
    return _Header(values, named, cursor.data, cursor.at, size)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name[:80]!r} is there twice")
        made[name] = value
    return made


def _value(cursor: _Cursor, kind: int) -> Any:
    """A value of the metadata; None for a text that is long."""
    if kind == TEXT:
        length = cursor.number("Q")
        start = cursor.take(length)
        return cursor.data[start : start + length].decode(errors="replace") if length <= MAX_TEXT else None
    if kind == ARRAY:
        return _array(cursor, MAX_DEPTH)
    if kind not in NUMBERS:
        raise ValueError(f"a value of the unknown type {kind}")
    return cursor.number(NUMBERS[kind])


def _array(cursor: _Cursor, depth: int) -> Array:
    kind, count = cursor.number("I"), cursor.number("Q")
    start = cursor.at
    if kind in NUMBERS:
        cursor.take(count * struct.calcsize("<" + NUMBERS[kind]))
    elif count > MAX_ITEMS:
        raise ValueError(f"an array of {count:,}; at most {MAX_ITEMS:,} are read")
    elif kind == TEXT:
        cursor.skip_texts(count)
    elif kind == ARRAY and depth:
        for _ in range(count):
            _array(cursor, depth - 1)
    else:
        raise ValueError(f"an array of the unknown type {kind}, or too many in one another")
    return Array(kind, count, start)


def _tensor(cursor: _Cursor) -> _Tensor:
    if (sizes := cursor.number("I")) > MAX_SIZES:
        raise ValueError(f"a tensor of {sizes} dimensions; at most {MAX_SIZES} are read")
    shape = tuple(cursor.number("Q") for _ in range(sizes))[::-1]
    if math.prod(shape) > LARGEST:
        raise ValueError(f"a tensor of shape {list(shape)!s:.80}, more than any file can hold")
    return _Tensor(shape, cursor.number("I"), cursor.number("Q"))


# ---------------------------------------------------------------- entries


def _check_types(path: Path, tensors: Mapping[str, _Tensor]) -> None:
    others = {one.kind: name for name, one in tensors.items() if one.kind not in PLAIN and one.kind not in QUANTIZED}
    if not others:
        return
    kind = min(others)
    name, nearest = OTHERS.get(kind, (f"type {kind}", ""))
    read = ", ".join(format.upper() for format in QUANTIZED.values())
    raise CheckpointError(
        f"{path} holds {name} weights ({others[kind][:80]}), which are not read; read are F32, F16, BF16, {read}; "
        + (f"take the {nearest} file" if nearest else "take one of those")
    )


def _entries(path: Path, header: _Header) -> dict[str, Entry]:
    """Raises ValueError for tensors that overlap, or are not where or what they should be."""
    alignment = header.values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment!r:.40}; a power of two is needed")
    start = -(-header.end // alignment) * alignment
    entries, last = {}, 0
    for name, one in header.tensors.items():
        if one.place % alignment:
            raise ValueError(f"{name[:80]} starts at {one.place}, which is no multiple of {alignment}")
        entries[name] = _entry(path, name, one, start, header)
    for name in sorted(entries, key=lambda name: header.tensors[name].place):
        if (place := header.tensors[name].place) < last:
            raise ValueError(f"{name[:80]} overlaps with the tensor before it")
        last = place + nbytes(entries[name])
    if start + last > header.size:
        raise CheckpointError(
            f"{path} has {header.size} bytes where its header needs {start + last}; download it again"
        )
    return entries


def _entry(path: Path, name: str, tensor: _Tensor, start: int, header: _Header) -> Entry:
    shape = _true_shape(name, tensor.shape, header)
    if tensor.kind in PLAIN:
        return Entry(PLAIN[tensor.kind], shape, path, start + tensor.place)
    format = QUANTIZED[tensor.kind]
    block, last = BLOCKS[format], tensor.shape[-1] if tensor.shape else 1
    if last % block.weights:
        raise ValueError(f"{name[:80]} has rows of {last}, which are no blocks of {block.weights}")
    matrix = (math.prod(tensor.shape[:-1]), last)
    if len(shape) == 2 and shape[1] % block.weights == 0:
        matrix = (shape[0], shape[1])
    codes = Entry("U8", (matrix[0], matrix[1] // block.weights * block.bytes), path, start + tensor.place)
    return replace(quantized_entry(Source(format, matrix, {"codes": codes})), shape=shape)


def _true_shape(name: str, shape: tuple[int, ...], header: _Header) -> tuple[int, ...]:
    """What a tensor was before it was reshaped to rows of whole blocks."""
    stated = header.values.get(SHAPE + name)
    if stated is None:
        return shape
    if not isinstance(stated, Array) or stated.kind not in (U32, I32) or stated.count > MAX_SIZES:
        raise ValueError(f"{SHAPE + name!r:.120} is no shape")
    true = tuple(_items(header, stated).tolist())
    if any(size < 0 for size in true) or math.prod(true) != math.prod(shape):
        raise ValueError(f"{name[:80]} has shape {list(shape)!s:.80}, which should be {list(true)!s:.80}")
    return true


def _reshaped(entries: dict[str, Entry], header: _Header) -> dict[str, Entry]:
    """With the shapes that ggml cannot keep, if the file does not say them."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    return {
        name: entry if SHAPE + name in header.values else replace(entry, shape=ggml_shapes.true_shape(name, shapes))
        for name, entry in entries.items()
    }


def _items(header: _Header, array: Array) -> np.ndarray:
    """The numbers in an array."""
    return np.frombuffer(header.text, "<" + NUMBERS[array.kind], array.count, array.start)


# ---------------------------------------------------------------- the tokenizer


def holds_vocabulary(path: Path) -> bool:
    """Whether a GGUF file has the words of a tokenizer of T5's kind. Raises CheckpointError if it is broken."""
    values = _parse(path).values
    return values.get(VOCABULARY + "model") == "t5" and VOCABULARY + "tokens" in values


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata. Raises CheckpointError if there is none that can be used."""
    header = _parse(path)
    try:
        texts = _texts(header, _array_of(header, "tokens", TEXT))
        scores = _items(header, _array_of(header, "scores", F32)).tolist()
        types = _items(header, _array_of(header, "token_type", I32, U32)).tolist()
        if not len(texts) == len(scores) == len(types):
            raise ValueError(f"{len(texts)} tokens, {len(scores)} scores and {len(types)} types")
        table = header.values.get(VOCABULARY + "precompiled_charsmap")
        raw = b"" if table is None else _items(header, _array_of(header, "precompiled_charsmap", U8, I8)).tobytes()
    except ValueError as error:
        raise CheckpointError(f"{path} holds no tokenizer that can be used: {error}") from None
    unknown = header.values.get(VOCABULARY + "unknown_token_id", 2)
    if type(unknown) is not int:
        raise CheckpointError(f"{path} holds no tokenizer that can be used: its <unk> is {unknown!r:.40}")
    return Vocabulary(list(zip(texts, scores, types, strict=True)), unknown, raw)


def _array_of(header: _Header, key: str, *kinds: int) -> Array:
    array = header.values.get(VOCABULARY + key)
    if not isinstance(array, Array) or array.kind not in kinds:
        raise ValueError(f"{VOCABULARY + key} is missing, or of another type")
    return array


def _texts(header: _Header, array: Array) -> list[str]:
    made, at, unpack = [], array.start, struct.Struct("<Q").unpack_from
    for _ in range(array.count):
        end = at + 8 + unpack(header.text, at)[0]
        made.append(header.text[at + 8 : end].decode())
        at = end
    return made
