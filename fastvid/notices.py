"""Tells the caller what is not done as asked: unknown words, a cut prompt, ignored files, dropped sound.

Warnings go through Python's `warnings`: shown once for each text and line of the caller, caught by
`warnings.catch_warnings`, turned into errors by `-W error`. The command line writes them to stderr as
"fastvid: warning: ...".
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastvid.errors import FastvidWarning, tidy

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


_COLLECTED: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collects the warnings of the block, of this thread, for a caller in another process to give (see `warn_all`)."""
    texts: list[str] = []
    token = _COLLECTED.set(texts)
    try:
        yield texts
    finally:
        _COLLECTED.reset(token)


def warn_all(messages: Iterable[str]) -> None:
    """Give the warnings that another process has collected."""
    for message in messages:
        warn(message)


def warn(message: str) -> None:
    """Warn the caller with a `FastvidWarning` that points at the first line outside of fastvid."""
    message = tidy(message)
    if (texts := _COLLECTED.get()) is not None:
        texts.extend([message] if message not in texts else [])
        return
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, FastvidWarning, stacklevel=depth)
