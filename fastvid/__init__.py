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
    PoolFull,
    PromptError,
    WorkerFailed,
)
from fastvid.version import __version__ as __version__

if TYPE_CHECKING:
    from fastvid.api import blueprint, load
    from fastvid.engine.events import Finished, Frames, Started, Step
    from fastvid.media.clip import open_clip
    from fastvid.media.video import Video
    from fastvid.pipeline.pipeline import Pipeline
    from fastvid.requests.request import Request
    from fastvid.serve.pool import Pool

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
    "Pool",
    "PoolFull",
    "PromptError",
    "Request",
    "Started",
    "Step",
    "Video",
    "WorkerFailed",
    "blueprint",
    "load",
    "open_clip",
]

_LAZY = {
    "Finished": "fastvid.engine.events",
    "Frames": "fastvid.engine.events",
    "Pipeline": "fastvid.pipeline.pipeline",
    "Pool": "fastvid.serve.pool",
    "Request": "fastvid.requests.request",
    "Started": "fastvid.engine.events",
    "Step": "fastvid.engine.events",
    "Video": "fastvid.media.video",
    "blueprint": "fastvid.api",
    "load": "fastvid.api",
    "open_clip": "fastvid.media.clip",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastvid' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
