"""fp32 means IEEE fp32: TF32 is off for it, within our calls only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Full-precision fp32 matrix products and convolutions inside; the caller's settings come back after.

    Never held across a yield of ours, so that the caller never sees it.
    """
    if not torch.cuda.is_available():
        yield
        return
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before
