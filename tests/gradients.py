"""Gradients of a model under the names that checkpoints give its weights."""

from __future__ import annotations

from torch import Tensor, nn


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Name -> gradient; queries, keys and values apart, which are one weight in the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in [name for name in found if "to_qkv" in name]:
        for layer, rows in zip("qkv", found.pop(name).chunk(3), strict=True):
            found[name.replace("to_qkv", f"to_{layer}")] = rows
    return found
