"""Checks whether torch exposes oneDNN's CPU routines, which torch.compile also calls."""

from __future__ import annotations

import functools

import torch

# Undocumented, so a release of torch may drop or rename them.
NAMES = ("_linear_pointwise", "_convolution_pointwise", "_reorder_convolution_weight")


def available() -> bool:
    """Whether all routines exist and oneDNN is not disabled (torch.backends.mkldnn.flags)."""
    return bool(torch.backends.mkldnn.enabled) and _built_in()


@functools.cache
def _built_in() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in NAMES)
