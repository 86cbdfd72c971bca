"""What `fastvid convert --dtype` and `--quantize` make of a part's weights: 16-bit of quantized ones, 8-bit of any.

An 8-bit file has ComfyUI's marks: X.weight (e4m3 or int8), X.weight_scale [N, 1], and X.comfy_quant, a JSON that names
the format. Which weights: the rule of quantize.py, or those that a file of that format has already, as they are.
Loading the file gives the bits that `quantize=` gives on load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import quantize
from fastvid.loaders.convert_files import TensorReader, Tensors, origin_bytes
from fastvid.loaders.entries import FLOATS, STORED, Entry, nbytes
from fastvid.loaders.find import FoundPart
from fastvid.loaders.finite import Weight, check_finite
from fastvid.loaders.quantized import as_tensor, read_data
from fastvid.models.registry import EXPERTS, build_empty, kind_of, target_dtype
from fastvid.models.wan import weight_names
from fastvid.models.wan.weight_names import DIFFUSERS, Origin
from fastvid.ops.formats import Data
from fastvid.ops.formats_rows import E4M3, INT8, quantize_weight

MARKS = {E4M3: ("F8_E4M3", "float8_e4m3fn"), INT8: ("I8", "int8_tensorwise")}
"""Format -> safetensors' dtype of its codes, ComfyUI's name of it."""
NAMES = {dtype: name for name, dtype in FLOATS.items()}
DEFAULT = torch.bfloat16  # of what was quantized and no longer is
QUANTIZATION = "quantization_config"  # key of a config.json


@dataclass(frozen=True)
class Change:
    """What becomes of a part's weights. choice: "fp8", "int8" or "none"; dtype: of the others; None: as they are, and
    bfloat16 for those that were quantized."""

    choice: str = quantize.NONE
    dtype: torch.dtype | None = None

    def tensors(self, part: FoundPart, origins: Mapping[str, Origin], reader: TensorReader, file: Path) -> Tensors:
        """What to write. origins: name in the file -> what it is made of."""
        made = _Made(self, part, origins, reader, file)
        return Tensors(made.entries, made.chunks)


def check_source(part: FoundPart) -> None:
    """Raises InvalidRequest for weights that can't be moved bit for bit, because they are quantized."""
    formats = sorted({entry.dtype for entry in part.entries.values() if entry.source is not None})
    if formats:
        raise InvalidRequest(
            f"{part.files[0]} is quantized ({', '.join(formats)}); give dtype='bfloat16' for a 16-bit file, or "
            "quantize='fp8' or 'int8' for an 8-bit one"
        )


class _Made:
    """The tensors of one part's file."""

    def __init__(
        self, change: Change, part: FoundPart, origins: Mapping[str, Origin], reader: TensorReader, file: Path
    ) -> None:
        self.change, self.part, self.origins, self.reader, self.file = change, part, origins, reader, file
        self.quantized, self.fp32 = _choose(change.choice, part)
        self.entries: dict[str, Entry] = {}
        self.weights: dict[str, str] = {}  # name in the file -> the stored weight that is quantized in it
        self.last: tuple[str, Data] = ("", {})  # the tensors of one weight are asked for one after the other
        for name, origin in origins.items():
            if origin.is_copy and origin.names[0] in self.quantized:
                self._add_quantized(name, origin.names[0])
            else:
                shape = origin.shape({one: part.entries[one].shape for one in origin.names})
                self.entries[name] = Entry(self._dtype(origin), shape, file)

    def chunks(self, name: str) -> Iterable[bytes]:
        """The bytes of a tensor."""
        if name in self.weights:
            return [self._quantized(name)]
        origin, stored = self.origins[name], self.part.entries
        if all(stored[one].dtype == self.entries[name].dtype for one in origin.names):
            return origin_bytes(origin, self.reader, stored)
        target = FLOATS[self.entries[name].dtype]
        return [_bytes(origin.make(partial(self._plain, target=target)))]

    def _dtype(self, origin: Origin) -> str:
        """Of a tensor that is not quantized. What is computed in fp32 and stored so stays."""
        stored = [self.part.entries[one] for one in origin.names]
        keeps = not self.fp32.isdisjoint(origin.names)
        if any(one.source is not None for one in stored):
            return "F32" if keeps else NAMES[self.change.dtype or DEFAULT]
        if self.change.dtype is None or keeps or any(one.dtype not in FLOATS for one in stored):
            return stored[0].dtype
        return NAMES[self.change.dtype]

    def _plain(self, name: str, target: torch.dtype) -> Tensor:
        """A stored tensor, dequantized or converted."""
        entry = self.part.entries[name]
        if entry.source is not None:
            tensor = as_tensor(entry, self._read(name), torch.float32).dequantize().reshape(entry.shape)
        else:
            tensor = self._tensor(name, entry)
        check_finite(tensor.flatten(), Weight(entry.file, name, tensor.dtype, target))
        return tensor.to(target)

    def _tensor(self, name: str, entry: Entry) -> Tensor:
        memory, done = torch.empty(nbytes(entry), dtype=torch.uint8, device="cpu"), 0
        for chunk in self.reader.chunks(name, entry, 0, len(memory)):
            memory[done : done + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
            done += len(chunk)
        return memory.view(STORED[entry.dtype]).view(entry.shape)

    def _read(self, name: str) -> Data:
        return read_data(name, self.part.entries[name], lambda entry: self._tensor(name, entry))

    # ------------------------------------------------------------ quantized weights

    def _add_quantized(self, name: str, stored: str) -> None:
        format, source = self.quantized[stored], self.part.entries[stored].source
        n, k = self.part.entries[stored].shape
        layer = name.removesuffix(".weight")
        whole = source is not None and source.format == format and source.spec.data["scale"][1] == (1,)
        self.entries[name] = Entry(MARKS[format][0], (n, k), self.file)
        self.entries[f"{layer}.weight_scale"] = Entry("F32", () if whole else (n, 1), self.file)
        self.entries[f"{layer}.comfy_quant"] = Entry("U8", (len(self._mark(stored)),), self.file)
        self.weights |= dict.fromkeys((name, f"{layer}.weight_scale", f"{layer}.comfy_quant"), stored)

    def _quantized(self, name: str) -> bytes:
        stored = self.weights[name]
        entry, format = self.part.entries[stored], self.quantized[stored]
        if name.endswith(".comfy_quant"):
            return self._mark(stored)
        if self.last[0] != stored:
            kept = entry.source is not None and entry.source.format == format
            plain = torch.float32
            self.last = stored, self._read(stored) if kept else quantize_weight(self._plain(stored, plain), format)
        data = self.last[1]
        return _bytes(data["scale" if name.endswith("_scale") else "codes"])

    def _mark(self, stored: str) -> bytes:
        """ComfyUI's description of a layer."""
        format, source = self.quantized[stored], self.part.entries[stored].source
        mark: dict[str, object] = {"format": MARKS[format][1]}
        kept = source if source is not None and source.format == format else None
        if self.part.identity.part not in EXPERTS or (kept and kept.exact):
            mark["full_precision_matrix_mult"] = True  # products of dequantized weights
        if kept and kept.rotation:
            mark |= {"convrot": True, "convrot_groupsize": kept.rotation}
        return json.dumps(mark).encode()


def _choose(choice: str, part: FoundPart) -> tuple[dict[str, str], frozenset[str]]:
    """(stored weight -> format of those that are quantized in the file, stored weights that are computed in fp32)."""
    found = weight_names.Found(part.identity.part, part.identity.layout, part.identity.prefix)
    origins = weight_names.origins(part.entries, DIFFUSERS, found)
    config = kind_of(part.identity.part).read_config(dict(part.config or {}))
    module = build_empty(part.identity.part, config)
    half = torch.float16
    fp32 = (one.names for name, one in origins.items() if target_dtype(module, name, half) is torch.float32)
    kept = frozenset(name for names in fp32 for name in names)
    if choice == quantize.NONE:
        return {}, kept
    format = quantize.FORMATS[choice]
    held = {name: entry.source.format for name, entry in part.entries.items() if entry.source is not None}
    linear = (origins[name].names[0] for name in quantize.linear_weights(module) if origins[name].is_copy)
    if format in held.values():
        return {name: held[name] for name in linear if held.get(name) in MARKS}, kept
    rule = [origins[name] for name in quantize.weights_of(module)]
    if others := [one.names[0] for one in rule if not one.is_copy]:
        raise CheckpointError(f"{part.files[0]}: {weight_names.some(others)} cannot be quantized in this layout")
    return {origin.names[0]: format for origin in rule}, kept


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().data) if len(flat) else b""
