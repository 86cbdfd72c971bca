"""Values that the host computes, such as noise levels and weights of solvers, on their way to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """values on a device, in another dtype if one is given; the host does not wait for the device.

    Through pinned memory, which torch keeps for the next upload once the copy is done: from pageable memory the driver
    first waits for all work of the stream.
    """
    values = values if dtype is None else values.to(dtype)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
