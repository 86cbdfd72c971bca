"""Finds quantized weights in safetensors files by the marks that programs leave. For a layer X:

    ComfyUI      X.weight in fp8 with X.scale_weight, perhaps X.scale_input; one tensor `scaled_fp8`
                 X.weight_scale (and _2), perhaps X.input_scale, and what it is in JSON: in a tensor X.comfy_quant or in
                 the header's _quantization_metadata
    LightX2V     X.weight with X.weight_scale [N, 1] (blocks: in tiles), X.weight_global_scale, which divides
    plain fp8    weights without scales
    diffusers    marks_diffusers.py

Formats that are not read are refused by name: marks_refused.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.loaders import marks_diffusers, marks_refused
from fastvid.loaders.entries import FLOATS, Entry, Source, quantized_entry
from fastvid.loaders.marks_json import Mark, read_marks
from fastvid.models.wan.weight_names import some
from fastvid.ops.formats import Data, Layout
from fastvid.ops.formats_blocks import MXFP8, NVFP4, NVFP4_LOW, round_up, tiles
from fastvid.ops.formats_rows import E4M3, E5M2, INT8

EIGHT_BITS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "I8": INT8}
ROWS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2, "int8_tensorwise": INT8}
READ = (*ROWS, "mxfp8", "nvfp4")
"""Names of formats in ComfyUI's marks."""
SCALES, INPUT_SCALES = ("weight_scale", "scale_weight"), ("input_scale", "scale_input")
HOLDING = {MXFP8: ("F8_E4M3", "U8"), NVFP4: ("U8",), INT8: ("I8",)}
HOLDING |= {E4M3: ("F8_E4M3", "U8"), E5M2: ("F8_E5M2", "U8")}
"""The dtypes that files keep a marked format's weights in."""
LOW_NIBBLE = ("weight_global_scale", "input_global_scale", "input_absmax", "alpha")  # LightX2V's of nvfp4
BESIDE = (*SCALES, *INPUT_SCALES, *LOW_NIBBLE, "weight_scale_2")
SCALED_FP8, TORCHAO_NVFP4 = "scaled_fp8", "torchao_nvfp4"
LARGEST_NVFP4 = 2688.0  # 6 * 448: the largest value over its global scale
LARGEST_ROTATION = 1024  # published is 256; the matrix takes 4 MiB
KNOWN_KEYS = {"format", "params", "full_precision_matrix_mult", "convrot", "convrot_groupsize", "orig_dtype"}


def logical(entries: dict[str, Entry], metadata: Mapping[str, str]) -> dict[str, Entry]:
    """The entries of files with each quantized weight as one entry. metadata: texts in the files' headers.

    Raises CheckpointError for formats that are not read, and for marks that are broken or contradict the tensors.
    """
    rest = dict(entries)
    made = marks_diffusers.take(rest, metadata)
    marks_refused.check(rest)
    marks = read_marks(rest, metadata)
    for name in [name for name in rest if name.rpartition(".")[2] == SCALED_FP8 and math.prod(rest[name].shape) <= 2]:
        del rest[name]
    for name in sorted(rest, key=lambda name: not name.endswith(".weight")):  # then what does not belong to a weight
        if name in rest and rest[name].source is None:
            layer = _layer(name, rest, marks)
            source = _source(layer)
            if source is not None:
                shape = source.shape if len(layer.weight.shape) == 2 else layer.weight.shape
                made[name] = replace(quantized_entry(source), shape=shape)
                for other in (name, *layer.taken):
                    del rest[other]
    return rest | made


@dataclass
class Layer:
    """A weight and what stands beside it. beside: leaf of a name -> entry; taken: names that explain it."""

    name: str
    weight: Entry
    beside: Mapping[str, Entry] = field(default_factory=dict)
    mark: Mark | None = None
    low: bool = False
    outputs: int | None = None  # by its bias

    @property
    def taken(self) -> list[str]:
        return [f"{self.name}.{leaf}" for leaf in self.beside]

    def one(self, leaves: tuple[str, ...]) -> Entry | None:
        found = [self.beside[leaf] for leaf in leaves if leaf in self.beside]
        if len(found) > 1:
            self.refuse(f"has {' and '.join(leaf for leaf in leaves if leaf in self.beside)}; one of them is expected")
        return found[0] if found else None

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.weight.file}: {self.name:.200} {why}")


def _layer(name: str, entries: dict[str, Entry], marks: Mapping[str, Mark]) -> Layer:
    stem, dot, leaf = name.rpartition(".")
    if not dot or leaf != "weight":
        return Layer(name, entries[name])
    beside = {leaf: entries[f"{stem}.{leaf}"] for leaf in BESIDE if f"{stem}.{leaf}" in entries}
    bias = entries.get(f"{stem}.bias")
    outputs = bias.shape[0] if bias is not None and len(bias.shape) == 1 else None
    low = f"{stem}.{TORCHAO_NVFP4}"
    if low in entries:
        beside[TORCHAO_NVFP4] = entries[low]
    return Layer(stem, entries[name], beside, marks.get(stem), low in entries, outputs)


# ---------------------------------------------------------------- which format


def _source(layer: Layer) -> Source | None:
    """What a weight is made of; None for one that is not quantized."""
    kind = _kind(layer)
    if kind is None:
        return None
    if layer.mark is not None:
        _check_mark(layer, layer.mark)
    if kind in (MXFP8, NVFP4):
        return _mx(layer) if kind == MXFP8 else _nv(layer)
    return _rows(layer, kind)


def _kind(layer: Layer) -> str | None:
    """The format of a weight, by its mark, else by its dtype and those of its scales."""
    stored, scale = layer.weight.dtype, layer.one(SCALES)
    if layer.mark is not None:
        return _marked(layer, str(layer.mark["format"]))
    if stored in FLOATS:
        if any(leaf in layer.beside for leaf in SCALES):
            layer.refuse(f"has a scale beside weights in {stored}, which are not quantized; take another copy")
        return None
    if scale is None or scale.dtype in FLOATS:
        known = EIGHT_BITS.get(stored)
        return None if scale is None and known == INT8 else known
    if stored in ("U8", "F8_E4M3") and scale.dtype in ("F8_E4M3", "F8_E8M0", "U8"):
        return _of_blocks(layer, scale)
    return None


def _of_blocks(layer: Layer, scale: Entry) -> str:
    """The format of blocks without a mark: LightX2V's, or nvfp4 of torchao's. Others have the same tensors in another
    order, such as ModelOpt's, and would be read as noise."""
    if layer.weight.dtype == "U8" and scale.dtype != "F8_E4M3":
        return MXFP8
    if layer.weight.dtype == "F8_E4M3" or not (layer.low or "weight_global_scale" in layer.beside):
        layer.refuse(
            "has scales for blocks and no mark, so their order is not known (NVIDIA ModelOpt's is none that is read); "
            "take ComfyUI's file, whose layers have comfy_quant or are listed in its header"
        )
    return NVFP4


def _marked(layer: Layer, format: str) -> str:
    if format not in READ:
        layer.refuse(marks_refused.format_text(format, READ))
    kind, stored = ROWS.get(format, format), layer.weight.dtype
    if stored not in HOLDING[kind]:
        layer.refuse(f"is marked as {format}, but its weights are {stored}; take another copy")
    return kind


def _check_mark(layer: Layer, mark: Mark) -> None:
    if others := sorted(str(key) for key, value in mark.items() if key not in KNOWN_KEYS and value):
        notices.warn(f"{layer.weight.file}: marks of quantized weights have {some(others)}, which is not read")


# ---------------------------------------------------------------- a scale for the matrix or for each row


def _rows(layer: Layer, format: str) -> Source:
    shape = _matrix(layer.weight.shape)
    tensors = {"codes": layer.weight}
    layout: Layout = {"codes": (torch.int8 if format == INT8 else torch.uint8, shape)}
    scale, inputs = layer.one(SCALES), layer.one(INPUT_SCALES)
    count = 1 if scale is None else math.prod(scale.shape)
    if scale is not None:
        rows = bool(scale.shape) and scale.shape[0] == count == shape[0]
        if scale.dtype not in FLOATS or not (count == 1 or rows):
            layer.refuse(
                f"has a scale {scale.dtype} {list(scale.shape)} for weights {list(layer.weight.shape)}; one number, or "
                "one for each row, is read; take an fp8 or int8 file with such scales, or a 16-bit one"
            )
        tensors["scale"] = scale
    elif layer.mark is not None:
        layer.refuse(f"is marked as {layer.mark['format']}, but has no weight_scale; take another copy")
    layout["scale"] = (torch.float32, (count,))
    if inputs is not None:
        _check_one(layer, inputs, "input scale")
        tensors["input_scale"], layout["input_scale"] = inputs, (torch.float32, (1,))
    rotation = _rotation(layer, shape[1])
    exact = bool((layer.mark or {}).get("full_precision_matrix_mult"))
    return Source(format, shape, tensors, rotation, make=_make_rows, layout=layout, exact=exact)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's matrix: of a convolution all inputs of an output are a row."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _rotation(layer: Layer, inputs: int) -> int:
    mark = layer.mark or {}
    if not mark.get("convrot"):
        return 0
    group = mark.get("convrot_groupsize", 256)
    power = (
        type(group) is int and 4 <= group <= LARGEST_ROTATION and group & (group - 1) == 0 and group.bit_length() % 2
    )
    if mark["format"] != "int8_tensorwise" or not power or inputs % group:
        layer.refuse(
            f"is marked as {mark['format']} with ConvRot in groups of {group!r:.40} for {inputs} inputs; int8 with "
            "groups of a power of 4 up to 1024 that divide the inputs is read"
        )
    return int(group)


def _check_one(layer: Layer, entry: Entry, what: str) -> None:
    if entry.dtype not in FLOATS or math.prod(entry.shape) != 1:
        layer.refuse(f"has an {what} {entry.dtype} {list(entry.shape)}; one number is expected")


def _make_rows(stored: dict[str, Tensor]) -> Data:
    made = {role: tensor.float().flatten() for role, tensor in stored.items() if role != "codes"}
    return {"codes": stored["codes"], "scale": torch.ones(1, dtype=torch.float32), **made}


# ---------------------------------------------------------------- scales in tiles


def _mx(layer: Layer) -> Source:
    scale = layer.one(SCALES)
    if len(layer.weight.shape) != 2 or scale is None:
        layer.refuse("is in mxfp8 without the scales, or is no matrix; take another copy")
    (N, K), size = layer.weight.shape, math.prod(scale.shape)
    if K % 32 or size != math.prod(tiles(N, K // 32)):
        layer.refuse(marks_refused.microscaling_text(N, K, size))
    shape = (_outputs(layer, N, 32), K)
    layout: Layout = {"codes": (torch.uint8, (N, K)), "scale": (torch.uint8, tiles(N, K // 32))}
    return Source(MXFP8, shape, {"codes": layer.weight, "scale": scale}, make=_make_tiles, layout=layout)


def _nv(layer: Layer) -> Source:
    scale, low = layer.one(SCALES), layer.low or "weight_global_scale" in layer.beside
    over = layer.one(("weight_scale_2", "weight_global_scale"))
    if len(layer.weight.shape) != 2 or scale is None or over is None:
        layer.refuse("is in nvfp4 without its two kinds of scales, or is no matrix; take another copy")
    N, K = layer.weight.shape[0], 2 * layer.weight.shape[1]
    if K % 16 or math.prod(scale.shape) != math.prod(tiles(N, K // 16)) or scale.dtype not in ("F8_E4M3", "U8"):
        layer.refuse(
            f"is in nvfp4 [{N}, {K}] with scales {scale.dtype} {list(scale.shape)}; {list(tiles(N, K // 16))} in fp8 "
            "are expected; take another copy"
        )
    _check_one(layer, over, "outer scale")
    tensors = {"codes": layer.weight, "scale": scale, "scale_2": over}
    layout: Layout = {
        "codes": (torch.uint8, (N, K // 2)),
        "scale": (torch.uint8, tiles(N, K // 16)),
        "scale_2": (torch.float32, (1,)),
    }
    inputs = layer.one((*INPUT_SCALES, "input_absmax", "input_global_scale"))
    if inputs is not None:
        _check_one(layer, inputs, "input scale")
        tensors["input_scale"], layout["input_scale"] = inputs, (torch.float32, (1,))
    make = partial(
        _make_tiles,
        divides="weight_global_scale" in layer.beside,
        input_divides="input_global_scale" in layer.beside,
        largest=LARGEST_NVFP4 if "input_absmax" in layer.beside else 1.0,
    )
    shape = (_outputs(layer, N, 16), K)
    return Source(NVFP4_LOW if low else NVFP4, shape, tensors, make=make, layout=layout)


def _outputs(layer: Layer, rows: int, multiple: int) -> int:
    """The rows without those that fill up the last block: as many as the bias has, if that explains them."""
    outputs = layer.outputs
    return outputs if outputs and round_up(outputs, multiple) == rows else rows


def _make_tiles(
    stored: dict[str, Tensor], divides: bool = False, input_divides: bool = False, largest: float = 1.0
) -> Data:
    made = dict(stored)
    if "scale_2" in made:
        over = made["scale_2"].float().flatten()
        made["scale_2"] = 1 / over if divides else over
    if "input_scale" in made:
        given = made["input_scale"].float().flatten()
        made["input_scale"] = 1 / given if input_divides else given / largest
    return made
