"""fp32 means IEEE fp32: TF32 on GPUs and bf16 shortcuts on CPUs are off for it, within our calls only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Full-precision fp32 matrix products and convolutions inside; the caller's settings come back after.

    Never held across a yield of ours, so that the caller never sees it.
    """
    kinds = (
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
    )
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
