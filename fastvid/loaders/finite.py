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
    low, high = _extremes(values)
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


def _extremes(values: Tensor) -> tuple[float, float]:
    """(the lowest negative value or 0, the highest positive one or 0), NaN counting as beyond infinity on its side.

    The bits of floats, read as whole numbers, ascend with positive values, and unsigned with negative ones going down.
    By numpy, which starts no threads: torch's are slower than one for pieces that are in the cache.
    """
    bits = values.detach().view(_BITS[values.itemsize]).numpy()
    low, high = int(bits.view(f"u{values.itemsize}").max()), int(bits.max())
    sign = 1 << (8 * values.itemsize - 1)
    ends = torch.tensor(
        [low - 2 * sign if low >= sign else 0, max(high, 0)], dtype=_BITS[values.itemsize], device="cpu"
    )
    low_value, high_value = ends.view(values.dtype).tolist()
    return low_value, high_value


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
