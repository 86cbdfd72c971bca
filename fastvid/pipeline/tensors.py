"""Tensors and arrays that the caller gives: initial noise, embeddings, frames and latents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastvid import checks
from fastvid.errors import InvalidRequest


@checks.guarded("a tensor, or an array that torch can hold")
def as_tensor(name: str, value: object) -> Tensor:
    """A tensor of what an array of any library holds. Raises InvalidRequest."""
    checked = checks.tensor(name, value)
    if isinstance(checked, Tensor):
        return checked
    array = np.asarray(checked)
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable or not array.dtype.isnative:
        array = np.array(array, array.dtype.newbyteorder("="), order="C")  # torch takes none of these
    return torch.from_numpy(array)


def finite(name: str, value: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of floating point numbers that are finite, in a dtype that will be computed in too."""
    tensor = as_tensor(name, value)
    if not tensor.is_floating_point():
        raise InvalidRequest(f"{name} is {tensor.dtype}; it must be floating point, such as float32")
    if not bool(torch.isfinite(tensor.to(dtype)).all()):
        what = "NaN or infinity" if not bool(torch.isfinite(tensor).all()) else f"numbers beyond the range of {dtype}"
        raise InvalidRequest(f"{name} holds {what}; all values must be finite")
    return tensor
