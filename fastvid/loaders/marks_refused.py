"""Formats of quantized weights that are not read: how they are told, and what to take in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastvid.errors import CheckpointError
from fastvid.loaders.entries import Entry
from fastvid.models.wan.weight_names import some
from fastvid.ops.formats_blocks import tiles

INSTEAD = "take the fp8, int8, GGUF or 16-bit file of this model"
# Ends of names that only files in such a format have.
LEAVES: Mapping[str, str] = {
    "pre_quant_scale": "nvfp4 with a scale of the inputs (AWQ)",
    "weight_scale_inv": "fp8 in blocks of 128 x 128",
    "qzeros": "GPTQ, AWQ or AutoRound",
    "qweight": "GPTQ, AWQ, AutoRound or Nunchaku",
    "wscales": "Nunchaku (SVDQuant)",
    "smooth_factor": "Nunchaku (SVDQuant)",
    "svd_up": "SDNQ",
    "weight_packed": "compressed-tensors",
    "zero_point": "SDNQ, or another with zero points",
    "weight_zero_point": "compressed-tensors, or another with zero points",
}
INSIDE: Mapping[str, str] = {
    "weight._data": "quanto",
    "weight._scale": "quanto",
    "weight_quantizer": "NVIDIA ModelOpt",
    "input_quantizer": "NVIDIA ModelOpt",
}
METHODS: Mapping[str, str] = {
    "quanto": "quanto",
    "modelopt": "NVIDIA ModelOpt",
    "nunchaku": "Nunchaku",
    "sdnq": "SDNQ",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "gptq": "GPTQ",
    "awq": "AWQ",
}
"""`quant_method` in a config.json -> name. Those of bitsandbytes and torchao are read."""


def check(entries: Mapping[str, Entry]) -> None:
    """Raises CheckpointError for tensors of a format that is not read."""
    for name, entry in entries.items():
        kind = LEAVES.get(name.rpartition(".")[2]) or next(
            (kind for part, kind in INSIDE.items() if f".{part}." in f".{name}."), None
        )
        if kind is not None:
            raise CheckpointError(f"{entry.file}: {some([name])}: quantized as {kind}, which is not read; {INSTEAD}")


def format_text(format: str, read: Sequence[str]) -> str:
    """The end of a message for a format in a mark of ComfyUI's."""
    return f"is quantized as {format:.80}, which is not read; read are {', '.join(read)}; {INSTEAD}"


def method_text(method: str) -> str:
    """The same for a method in a config.json."""
    return (
        f"is quantized by {METHODS.get(method, method):.80}, which is not read; {INSTEAD}, or bitsandbytes or torchao's"
    )


def microscaling_text(rows: int, width: int, scales: int) -> str:
    """The same for bytes [rows, width] with so many scales that are not those of mxfp8."""
    narrow = {"mxfp4": 2 * width, "mxfp6": 4 * width // 3}
    kind = next((kind for kind, inputs in narrow.items() if math.prod(tiles(rows, inputs // 32)) == scales), None)
    if kind is not None:
        return f"is quantized as {kind}, which is not read; {INSTEAD}"
    return (
        f"is in mxfp8 [{rows}, {width}] with {scales:,} scales; {math.prod(tiles(rows, width // 32)):,} for blocks of "
        "32 are expected; take another copy"
    )
