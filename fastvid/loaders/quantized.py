"""Quantized weights from their files into layers, and what a module needs to hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastvid.errors import CheckpointError
from fastvid.layers.quantized import Quantized
from fastvid.loaders.entries import Entry
from fastvid.models.wan.weight_names import Origin
from fastvid.ops import formats_rows
from fastvid.ops.formats import Data
from fastvid.ops.quantized import FORMATS, QuantizedTensor, Spec


def specs_of(
    entries: Mapping[str, Entry], origins: Mapping[str, Origin] | None, aliases: Mapping[str, str]
) -> dict[str, Spec]:
    """A module's weights that are quantized in its files, by the module's names. What the module makes of several
    tensors, or of a part of one, is not among them: it is dequantized when it is read."""
    specs = {}
    for name in entries if origins is None else origins:
        if origins is not None and not origins[name].is_copy:
            continue
        entry = entries[name if origins is None else origins[name].names[0]]
        source = entry.source
        if source is not None and entry.shape == source.shape:  # else it is no matrix, or its rows are no whole blocks
            specs[aliases.get(name, name)] = source.spec
    return specs


def read_data(name: str, entry: Entry, read: Callable[[Entry], Tensor]) -> Data:
    """A quantized weight's data, in memory of their own. Raises CheckpointError if they are not finite."""
    source = entry.source
    assert source is not None
    stored = {role: read(one) for role, one in source.tensors.items()}
    given = stored if source.make is None else source.make(stored)
    data = {role: given[role].reshape(shape) for role, (_, shape) in source.spec.data.items()}
    if not FORMATS[source.format].finite(data):
        raise CheckpointError(
            f"{entry.file}: {name} holds NaN or infinity: the weights are damaged; download them again, or take "
            "another copy"
        )
    return data


def as_tensor(entry: Entry, data: Data, dtype: torch.dtype) -> QuantizedTensor:
    """A weight that was read."""
    source = entry.source
    assert source is not None
    return QuantizedTensor(source.format, source.shape, data, dtype, source.rotation)


def fill_plain(layer: Quantized, weight: Tensor, device: torch.device) -> None:
    """Quantizes a plain weight into its layer."""
    if layer.spec.rotation or layer.spec.format not in formats_rows.LARGEST:
        raise ValueError(f"no weights are quantized as {layer.spec.format} here")
    layer.fill(formats_rows.quantize_weight(weight, layer.spec.format), device)
