"""Finds quantized weights as diffusers writes them with bitsandbytes and torchao, without those packages.

bitsandbytes, 4 bits   X.weight (two codes in a byte), X.weight.absmax, X.weight.quant_map,
                       X.weight.quant_state.bitsandbytes__nf4 (JSON); scales that are quantized themselves:
                       X.weight.nested_absmax, X.weight.nested_quant_map
bitsandbytes, 8 bits   X.weight int8, X.SCB [N], X.weight_format
torchao                X._weight_qdata, X._weight_scale, and in the header what X.weight is, in JSON
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvid.errors import CheckpointError
from fastvid.loaders.entries import FLOATS, Entry, Source, quantized_entry
from fastvid.loaders.marks_json import parse_object, read_texts
from fastvid.loaders.marks_refused import INSTEAD
from fastvid.ops.formats import Data, Layout, Shape
from fastvid.ops.formats_blocks import NESTED, bitsandbytes_layout
from fastvid.ops.formats_rows import E4M3, E5M2, INT8

STATE = ".quant_state.bitsandbytes__"
FOUR_BITS = ("nf4", "fp4")
FOUR_BIT_LEAVES = {"map": "quant_map", "scale": "absmax"}
FOUR_BIT_LEAVES |= {"nested_map": "nested_quant_map", "nested_scale": "nested_absmax"}
PACKED = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Types that codes are stored in, and their bytes."""
SCB, WEIGHT_FORMAT = ".SCB", ".weight_format"
ROW_MAJOR = 0  # of weight_format
LARGEST = 3e38  # number in fp32, about
SCB_SCALE = 7.874015718698502e-3  # 1 / 127, as bitsandbytes multiplies by it
QDATA, TORCHAO = "._weight_qdata", {"I8": ("Int8Tensor", INT8), "F8_E4M3": ("Float8Tensor", E4M3)}
TORCHAO |= {"F8_E5M2": ("Float8Tensor", E5M2)}


def take(entries: dict[str, Entry], metadata: Mapping[str, str]) -> dict[str, Entry]:
    """The quantized weights, each as one entry; their tensors are taken out of `entries`. Raises CheckpointError."""
    made = {}
    states = {name: entries.pop(name) for name in [name for name in entries if STATE in name]}
    for name, text in read_texts(states).items():
        weight, _, kind = name.partition(STATE)
        made[weight] = _four_bits(weight, kind, text, states[name], entries)
    formats = {name: entries.pop(name) for name in [name for name in entries if name.endswith(WEIGHT_FORMAT)]}
    for name, text in read_texts(formats, 8).items():
        if any(text):
            raise CheckpointError(
                f"{formats[name].file}: {name:.200} is not {ROW_MAJOR}: weights in the order of a GPU's tiles are not "
                f"read; save them again with a newer bitsandbytes, or {INSTEAD}"
            )
    for name in [name for name in entries if name.endswith(SCB)]:
        weight = name.removesuffix(SCB) + ".weight"
        made[weight] = _eight_bits(weight, entries.pop(name), entries)
    for name in [name for name in entries if name.endswith(QDATA)]:
        weight = name.removesuffix(QDATA) + ".weight"
        made[weight] = _torchao(weight, name, entries, metadata)
    return made


def _pop(entries: dict[str, Entry], name: str, of: Entry) -> Entry:
    if name not in entries:
        raise CheckpointError(f"{of.file}: {name:.200} is missing, without which a quantized weight cannot be read")
    return entries.pop(name)


def _fits(name: str, entry: Entry, dtypes: Any, size: int) -> Entry:
    if entry.dtype not in dtypes or math.prod(entry.shape) != size:
        raise CheckpointError(
            f"{entry.file}: {name:.200} is {entry.dtype} {list(entry.shape)}; {size:,} values in {' or '.join(dtypes)} "
            "are expected"
        )
    return entry


# ---------------------------------------------------------------- bitsandbytes


def _four_bits(weight: str, kind: str, text: bytes, mark: Entry, entries: dict[str, Entry]) -> Entry:
    shape, block, offset = _state(weight, kind, text, mark)
    layout = bitsandbytes_layout(shape, offset is not None, block)
    codes = _pop(entries, weight, mark)
    half = layout["codes"][1][0]
    _fits(weight, codes, PACKED, half // PACKED.get(codes.dtype, 1))
    tensors = {"codes": codes}
    for role, leaf in FOUR_BIT_LEAVES.items():
        if role in layout:
            name, (dtype, (size,)) = f"{weight}.{leaf}", layout[role]
            tensors[role] = _fits(name, _pop(entries, name, mark), ("U8",) if dtype == torch.uint8 else FLOATS, size)
    make, name = partial(_make_four_bits, offset=offset), kind if offset is None else f"{kind}_double"
    return quantized_entry(Source(name, shape, tensors, make=make, layout=layout))


def _state(weight: str, kind: str, text: bytes, mark: Entry) -> tuple[Shape, int, float | None]:
    """The shape, the weights that share a scale, and what is added to scales that are quantized themselves."""
    state = parse_object(text, mark.file, f"{weight:.200}{STATE}{kind:.40}")
    told: Any = [state.get(key) for key in ("shape", "blocksize", "nested_offset")]
    shape, block, offset = told
    power = type(block) is int and 2 <= block <= 2**16 and block & (block - 1) == 0
    if kind not in FOUR_BITS or not _is_matrix(shape) or not power:
        raise CheckpointError(
            f"{mark.file}: {weight:.200} is quantized by bitsandbytes as {kind:.40}, shape {shape!r:.60}, blocks of "
            f"{block!r:.40}; matrices in {' or '.join(FOUR_BITS)} with blocks of a power of 2 are read; {INSTEAD}"
        )
    double = "nested_offset" in state or "nested_blocksize" in state
    # A whole number in JSON may have any number of digits; NaN is no number up to LARGEST either.
    number = type(offset) in (int, float) and abs(offset) <= LARGEST
    if double and (state.get("nested_blocksize") != NESTED or not number):
        raise CheckpointError(f"{mark.file}: {weight:.200}: scales for {NESTED} scales and an offset are expected")
    return (shape[0], shape[1]), block, float(offset) if double else None


def _is_matrix(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)


def _make_four_bits(stored: dict[str, Tensor], offset: float | None) -> Data:
    made = {role: tensor.float() if tensor.is_floating_point() else tensor for role, tensor in stored.items()}
    made["codes"] = stored["codes"].flatten().view(torch.uint8)
    if offset is not None:
        made["nested_offset"] = torch.tensor([offset], dtype=torch.float32)
    return made


def _eight_bits(weight: str, scale: Entry, entries: dict[str, Entry]) -> Entry:
    codes = _pop(entries, weight, scale)
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise CheckpointError(
            f"{codes.file}: {weight:.200} is {codes.dtype} {list(codes.shape)}; int8 [N, K] is expected"
        )
    N, K = codes.shape
    _fits(f"{weight} (SCB)", scale, FLOATS, N)
    return quantized_entry(Source(INT8, (N, K), {"codes": codes, "scale": scale}, make=_make_eight_bits))


def _make_eight_bits(stored: dict[str, Tensor]) -> Data:
    return {"codes": stored["codes"], "scale": stored["scale"].float().flatten() * SCB_SCALE}


# ---------------------------------------------------------------- torchao


def _torchao(weight: str, name: str, entries: dict[str, Entry], metadata: Mapping[str, str]) -> Entry:
    codes, stem = entries.pop(name), name.removesuffix("qdata")
    told = parse_object(metadata.get(weight, "{}"), codes.file, f"the header's text for {weight:.200}")
    settings = told.get("_data")
    block = settings.get("block_size") if isinstance(settings, dict) else None
    expected, format = TORCHAO.get(codes.dtype, ("", ""))
    roles = {leaf: entries.pop(stem + leaf) for leaf in ("scale", "zero_point") if stem + leaf in entries}
    others = [other for other in entries if other.startswith(stem)]
    if told.get("_type") != expected or others or len(codes.shape) != 2 or "scale" not in roles:
        beside = f" with {others[0]:.200}" if others else ""
        found = f"{told.get('_type', 'no type')!s:.60} of {codes.dtype} {list(codes.shape)}{beside}"
        raise CheckpointError(
            f"{codes.file}: {weight:.200} is quantized by torchao as {found}; "
            f"Int8Tensor and Float8Tensor matrices with their scales are read; {INSTEAD}"
        )
    (N, K), where = codes.shape, f"{codes.file}: {weight:.200}"
    count = math.prod(roles["scale"].shape)
    if block not in ([1, K], [N, K]) or count != (N if block == [1, K] else 1) or roles["scale"].dtype not in FLOATS:
        raise CheckpointError(
            f"{where} is quantized by torchao in blocks of {block!r:.60} with {count:,} scales; one "
            f"for each row, or one for the matrix, is read; {INSTEAD}"
        )
    layout: Layout = {"codes": (torch.int8 if format == INT8 else torch.uint8, (N, K))}
    layout["scale"] = (torch.float32, (count,))
    make = partial(_make_torchao, where=where)
    return quantized_entry(Source(format, (N, K), {"codes": codes} | roles, make=make, layout=layout))


def _make_torchao(stored: dict[str, Tensor], where: str) -> Data:
    if "zero_point" in stored and bool((stored["zero_point"] != 0).any()):
        raise CheckpointError(f"{where} is quantized by torchao with zero points, which are not read; {INSTEAD}")
    return {"codes": stored["codes"], "scale": stored["scale"].float().flatten()}
