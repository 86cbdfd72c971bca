"""Refuses weights that are not finite, or would not be in the type that they are loaded as, while they are read."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.errors import CheckpointError

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Weight(NamedTuple):
    """A tensor in a file: its type there, and what it becomes."""

    file: Path
    name: str
    stored: torch.dtype
    target: torch.dtype


def check_finite(values: Tensor, weight: Weight) -> None:
    """Raises CheckpointError if some of a weight's values, as stored, are not finite as `target`."""
    if not values.numel():
        return
    low, high = (value.item() for value in torch.aminmax(values))
    limit = _first_infinite(weight.stored, weight.target)
    if -limit < low and high < limit:  # not so for NaN
        return
    where = f"{weight.file}: {weight.name}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"{where} holds NaN or infinity: the weights are damaged; download them again, or take another copy"
        )
    kind, most = str(weight.target).removeprefix("torch."), torch.finfo(weight.target).max
    raise CheckpointError(
        f"{where} holds {max(-low, high):.4g}, which overflows in {kind} (at most {most:.4g}); load the model with "
        "dtype='bfloat16' or 'float32'"
    )


@cache
def _first_infinite(stored: torch.dtype, target: torch.dtype) -> float:
    """The smallest positive number of a type that is infinite as `target`. The bits of positive floats, read as whole
    numbers, ascend with their values."""
    bits = _BITS[stored.itemsize]
    infinity = torch.tensor([math.inf], dtype=stored, device="cpu")
    finite, infinite = 0, int(infinity.view(bits).item())
    while infinite - finite > 1:
        middle = (finite + infinite) // 2
        value = torch.tensor([middle], dtype=bits, device="cpu").view(stored).to(target)
        finite, infinite = (middle, infinite) if bool(torch.isfinite(value)) else (finite, middle)
    return float(torch.tensor([infinite], dtype=bits, device="cpu").view(stored).item())
