"""Tensors in files, known from headers alone.

A quantized weight is one entry too, under the weight's plain name and with the shape of its matrix; its `source` says
which tensors of the files it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastvid.ops.formats import Data
from fastvid.ops.quantized import FORMATS, Spec

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = FLOATS | {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORED |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
STORED |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), torch.uint8)  # as bytes
"""What a tensor is read as."""


@dataclass(frozen=True)
class Source:
    """What a quantized weight is made of.

    format: a key of `FORMATS`. shape: (N, K). tensors: role -> entry, as they stand in the files. make: turns what was
    read into the format's own data (role -> tensor); None: it is that already. layout: role -> dtype and shape after
    `make`; empty: the format's own. exact: see `Spec`.
    """

    format: str
    shape: tuple[int, int]
    tensors: Mapping[str, Entry]
    rotation: int = 0
    eight_bit: bool = False
    make: Callable[[dict[str, Tensor]], Data] | None = field(default=None, compare=False, repr=False)
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    exact: bool = False

    @property
    def spec(self) -> Spec:
        layout = self.layout or FORMATS[self.format].layout(self.shape)
        return Spec(self.format, self.shape, layout, self.rotation, self.eight_bit, self.exact)


@dataclass(frozen=True)
class Entry:
    """One tensor in a header. dtype: safetensors' name ("F32", "BF16", ...), or a quantized format's; offset: of its
    first byte in the file. source: of a quantized weight, whose first tensor stands at `offset`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = field(default=0, compare=False)
    source: Source | None = None


def quantized_entry(source: Source) -> Entry:
    """The entry of a quantized weight."""
    codes = source.tensors["codes"]
    return Entry(source.format, source.shape, codes.file, codes.offset, source)


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor; 0 for a dtype of unknown size."""
    if entry.source is not None:
        return sum(map(nbytes, entry.source.tensors.values()))
    return math.prod(entry.shape) * BITS.get(entry.dtype, 0) // 8
