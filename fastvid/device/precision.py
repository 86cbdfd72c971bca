"""fp32 means IEEE fp32: TF32 on GPUs and bf16 shortcuts on CPUs are off for it, within our calls only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# At run time these modules are objects with more attributes than torch's types know.
_MKLDNN: Any = torch.backends.mkldnn
_CUDNN: Any = torch.backends.cudnn
KINDS = (_MKLDNN.matmul, _MKLDNN.conv, torch.backends.cuda.matmul, _CUDNN.conv)


class _Setting:
    """torch's settings belong to the process, so those who compute at once share one change of them: the first in saves
    the caller's, the last out puts them back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [kind.fp32_precision for kind in KINDS]
                for kind in KINDS:
                    kind.fp32_precision = "ieee"
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for kind, precision in zip(KINDS, self._before, strict=True):
                    kind.fp32_precision = precision


_SETTING = _Setting()


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Full-precision fp32 matrix products and convolutions inside; the caller's settings come back after.

    Never held across a yield of ours, so that a caller with one thread never sees it. With several, it lasts until the
    last one of them that computes is done.
    """
    _SETTING.enter()
    try:
        yield
    finally:
        _SETTING.leave()
