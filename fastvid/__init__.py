"""fastvid: a fast runtime for video diffusion transformers: text, pictures and clips in, video out.

Everything but the errors is imported when it is first used, so that `import fastvid` costs next to nothing: torch is
not loaded, nothing is printed, and no environment variable, grad mode or start method is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvid.errors import (
    BackendUnavailable,
    Cancelled,
    CheckpointError,
    Error,
    InvalidRequest,
    MediaError,
    OutOfMemory,
)

if TYPE_CHECKING:
    from fastvid.pipeline import Finished, Frames, Pipeline, Started, Step, Video, load
    from fastvid.requests import Request

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Cancelled",
    "CheckpointError",
    "Error",
    "Finished",
    "Frames",
    "InvalidRequest",
    "MediaError",
    "OutOfMemory",
    "Pipeline",
    "Request",
    "Started",
    "Step",
    "Video",
    "load",
]

_LAZY = dict.fromkeys(("Finished", "Frames", "Pipeline", "Started", "Step", "Video", "load"), "fastvid.pipeline")
_LAZY["Request"] = "fastvid.requests"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastvid' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
