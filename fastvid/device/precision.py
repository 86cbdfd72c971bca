"""IEEE fp32 arithmetic: turns off TF32 on GPUs and bf16 shortcuts on CPUs, only during fastvid's calls."""

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


class _SharedSetting:
    """torch's precision settings are per process, so concurrent users share one change: the first to enter saves the
    caller's settings, the last to leave restores them."""

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


_SETTING = _SharedSetting()


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Full-precision fp32 matrix products and convolutions inside the block; restores the caller's settings after it.

    Our generators never yield inside the block, so a single-threaded caller never sees the change. With several
    threads, it lasts until the last of them leaves.
    """
    _SETTING.enter()
    try:
        yield
    finally:
        _SETTING.leave()
