"""Damaged marks and headers of quantized files: each is read, or refused with an error of ours, soon and in little
memory. What is read can be dequantized."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from mutations import damaged, damaged_json, fuzz, peak, refuses, seeds, untouched
from torch import Tensor

from fastvid.loaders import quantized, safetensors
from fastvid.loaders.entries import BITS, STORED, Entry

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8}
Stored = dict[str, list[Any]]
"""Name -> dtype, shape, bytes (None: zeros)."""


def text(value: Any, padding: int = 0) -> list[Any]:
    data = json.dumps(value).encode() + bytes(padding)
    return ["U8", [len(data)], data]


def layer(name: str, *tensors: tuple[str, str, list[int]], mark: Any = None) -> Stored:
    made: Stored = {f"{name}.{leaf}": [dtype, shape, None] for leaf, dtype, shape in tensors}
    return made | ({f"{name}.comfy_quant": text(mark, 3)} if mark else {})


def whole() -> tuple[Stored, dict[str, str]]:
    """A file with a layer of each kind, and its metadata."""
    n, k = 32, 64
    tiled = [128, 4]
    state = {"shape": [n, k], "blocksize": 64, "dtype": "bfloat16"}
    quant_map = ("weight.quant_map", "F32", [16])
    double = state | {"nested_blocksize": 256, "nested_offset": 0.5}
    layers = (
        layer("old", ("weight", "F8_E4M3", [n, k]), ("scale_weight", "F32", []), ("scale_input", "F32", [])),
        layer("new", ("weight", "F8_E5M2", [n, k]), ("weight_scale", "F32", []), mark={"format": "float8_e5m2"}),
        layer(
            *("turned", ("weight", "I8", [n, k]), ("weight_scale", "F32", [n, 1])),
            mark={"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}},
        ),
        layer("mx", ("weight", "F8_E4M3", [n, k]), ("weight_scale", "F8_E8M0", tiled), mark={"format": "mxfp8"}),
        layer(
            *("nv", ("weight", "U8", [n, k // 2]), ("weight_scale", "F8_E4M3", tiled), ("weight_scale_2", "F32", [])),
            mark={"format": "nvfp4"},
        ),
        layer(
            *("low", ("weight", "U8", [n, k // 2]), ("weight_scale", "F8_E4M3", tiled)),
            *(("weight_global_scale", "F32", []), ("input_absmax", "F32", [1])),
        ),
        {"low.weight_global_scale": ["F32", [], struct.pack("<f", 2.0)]},
        layer("rows", ("weight", "I8", [n, k]), ("weight_scale", "BF16", [n, 1]), ("bias", "F32", [n])),
        layer("header", ("weight", "F8_E4M3", [n, k]), ("weight_scale", "F32", [1])),
        layer("plain", ("weight", "F8_E4M3", [n])),
        layer("bnb", ("weight", "U8", [n * k // 2, 1]), ("weight.absmax", "F32", [32]), quant_map),
        {"bnb.weight.quant_state.bitsandbytes__nf4": text(state)},
        layer("two", ("weight", "U8", [n * k // 2, 1]), ("weight.absmax", "U8", [32]), quant_map),
        {"two.weight.nested_absmax": ["F32", [1], None], "two.weight.nested_quant_map": ["F32", [256], None]},
        {"two.weight.quant_state.bitsandbytes__nf4": text(double)},
        layer("scb", ("weight", "I8", [n, k]), ("SCB", "F32", [n]), ("weight_format", "U8", [])),
        layer("ao", ("_weight_qdata", "I8", [n, k]), ("_weight_scale", "F32", [n, 1])),
        {"scaled_fp8": ["F8_E4M3", [2], None], "spiece_model": ["U8", [40], None], "norm.weight": ["F32", [n], None]},
    )
    metadata = {
        "_quantization_metadata": json.dumps({"layers": {"net.header": {"format": "float8_e4m3fn"}}}),
        "ao.weight": json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, k]}}),
    }
    return {name: list(value) for one in layers for name, value in one.items()}, metadata


TENSORS, METADATA = whole()


def write(path: Path, tensors: Stored, metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end, data = 0, []
    for name, (dtype, shape, given) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        data.append((given or b"").ljust(size, b"\0")[:size])
        end += size
    written = json.dumps(header).encode(errors="surrogatepass")
    path.write_bytes(len(written).to_bytes(8, "little") + written + b"".join(data))


def change(tensors: Stored, metadata: dict[str, str], random: Random) -> None:
    """Damages one thing."""
    name = random.choice(list(tensors))
    dtype, shape, given = tensors[name]
    kind = random.choice(
        ("drop", "dtype", "shape", "shape", "name", "leaf", "mark", "mark", "metadata", "add", "layer")
    )
    if kind == "drop":
        del tensors[name]
    elif kind == "dtype":
        tensors[name] = [random.choice(list(SIZES)), shape, given]
    elif kind == "shape":
        sizes = [random.choice((0, 1, 2, 31, 32, 33, 64, 128)) for _ in range(random.randint(0, 4))]
        sizes = sizes if math.prod(sizes) < 2**18 else sizes[:2]
        tensors[name] = [dtype, random.choice((sizes, [*shape, 1], shape[:-1], shape[::-1], [2, *shape[1:]])), given]
    elif kind == "name":
        tensors[random.choice(("", ".", "a" * 20_000, "é.weight", name + ".weight", "x." + name))] = tensors.pop(name)
    elif kind == "leaf":
        leaf = random.choice([other.partition(".")[2] for other in tensors] or ["weight"])
        tensors[f"{name.partition('.')[0]}.{leaf}"] = tensors.pop(name)
    elif kind == "mark":
        name = random.choice([name for name, value in TENSORS.items() if value[0] == "U8" and value[2]])
        old = TENSORS[name][2]
        data = damaged_json(json.loads(old.rstrip(b"\0")), random) if random.random() < 0.7 else damaged(old, random)
        tensors[name] = ["U8", [len(data)], data]
    elif kind == "metadata":
        key = random.choice(list(METADATA))
        metadata[key] = damaged_json(json.loads(METADATA[key]), random).decode(errors="replace")
    elif kind == "add":
        leaf = random.choice(("weight_scale", "scale_weight", "qweight", "pre_quant_scale", "torchao_nvfp4", "bias"))
        tensors[f"{name.partition('.')[0]}.{leaf}"] = [random.choice(list(SIZES)), [random.choice((1, 32))], None]
    else:
        stem = name.partition(".")[0]
        for other in [other for other in tensors if other.startswith(f"{stem}.")]:
            tensors[other.replace(stem, "model." + stem)] = tensors.pop(other)


def use(path: Path) -> int:
    """Reads a file and dequantizes all of it; returns how many weights are quantized."""
    entries, count = safetensors.read_headers([path]), 0
    data = path.read_bytes()

    def read(entry: Entry) -> Tensor:
        size = math.prod(entry.shape) * BITS[entry.dtype] // 8
        part = bytearray(data[entry.offset : entry.offset + size])
        made = torch.frombuffer(part, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        return made.view(STORED[entry.dtype]).view(entry.shape)

    for name, entry in entries.items():
        if entry.source is not None:
            made = quantized.as_tensor(entry, quantized.read_data(name, entry, read), torch.float32)
            assert made.dequantize().numel() == math.prod(entry.shape)
            layout = entry.source.spec.data
            assert {role: one.numel() for role, one in made.data.items()} == {
                role: math.prod(shape) for role, (_, shape) in layout.items()
            }
            count += 1
    return count


@pytest.mark.filterwarnings("ignore")  # which pytest would keep
@fuzz(10_000)
def test_marks_and_headers(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.safetensors"
    write(path, *whole())
    assert use(path) == 13
    refused = 0
    with peak(64), untouched(tmp_path, path):
        for random in seeds("marks", count):
            tensors, metadata = whole()
            for _ in range(random.choice((1, 1, 2, 3))):
                change(tensors, metadata, random)
            write(path, tensors, metadata)
            refused += refuses(lambda: use(path))
    assert 0.3 * count < refused < 0.95 * count


def test_many_marks_are_read_soon(tmp_path: Path) -> None:
    """As many as any file can have."""
    path, tensors = tmp_path / "x.safetensors", {}
    for number in range(2500):
        mark = {"format": "float8_e4m3fn"}
        tensors |= layer(f"b.{number}", ("weight", "F8_E4M3", [2, 2]), ("weight_scale", "F32", []), mark=mark)
    write(path, tensors, {})
    with peak(64):
        assert not refuses(lambda: safetensors.read_headers([path]))
    names = {f"net.b.{number}": {"format": "float8_e4m3fn"} for number in range(2500)}
    bare = {name: value for name, value in tensors.items() if not name.endswith("comfy_quant")}
    write(path, bare, {"_quantization_metadata": json.dumps({"layers": names})})
    with peak(64):
        assert not refuses(lambda: safetensors.read_headers([path]))
    assert len(safetensors.read_headers([path])) == 2500
