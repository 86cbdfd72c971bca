"""Whether this torch can be asked for oneDNN's CPU routines by name, as torch.compile does."""

from __future__ import annotations

import functools

import torch

# None of them is in torch's documentation, so that a release may drop or rename them.
NAMES = ("_linear_pointwise", "_convolution_pointwise", "_reorder_convolution_weight")


def available() -> bool:
    """Whether all routines are there, and nobody has turned oneDNN off (torch.backends.mkldnn.flags)."""
    return bool(torch.backends.mkldnn.enabled) and _built_in()


@functools.cache
def _built_in() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in NAMES)
