"""fastvid: a fast runtime for video diffusion transformers: text, pictures and clips in, video out.

All but the errors are imported when they are first used: `import fastvid` does not load torch, prints nothing, and
changes no environment variable, grad mode or start method. The logger "fastvid" is silent until somebody listens.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fastvid.errors import BackendUnavailable, Cancelled, CheckpointError, Error, FastvidWarning, InvalidRequest

from fastvid.errors import MediaError, OutOfMemory, PoolFull, PromptError, WorkerFailed  # isort: skip
from fastvid.version import __version__ as __version__

if TYPE_CHECKING:
    from fastvid.api import blueprint, load
    from fastvid.engine.events import Finished, Frames, Plan, Started, Step
    from fastvid.media.clip import open_clip
    from fastvid.media.video import Video
    from fastvid.pipeline.pipeline import Pipeline
    from fastvid.pipeline.stream import Stream
    from fastvid.requests.request import Request
    from fastvid.serve.pool import Pool
    from fastvid.tuning.run import tune

__all__ = ["BackendUnavailable", "Cancelled", "CheckpointError", "Error", "InvalidRequest", "MediaError", "OutOfMemory"]
__all__ += ["Finished", "Frames", "Pipeline", "Pool", "PoolFull", "PromptError", "Request", "Started", "Step", "Video"]
__all__ += ["FastvidWarning", "Plan", "Stream", "WorkerFailed", "blueprint", "load", "open_clip", "tune"]

_LAZY = dict.fromkeys(("blueprint", "load"), "fastvid.api") | {"tune": "fastvid.tuning.run"}
_LAZY |= dict.fromkeys(("Finished", "Frames", "Plan", "Started", "Step"), "fastvid.engine.events")
_LAZY |= {"Pipeline": "fastvid.pipeline.pipeline", "Request": "fastvid.requests.request", "Pool": "fastvid.serve.pool"}
_LAZY |= {"Stream": "fastvid.pipeline.stream", "Video": "fastvid.media.video", "open_clip": "fastvid.media.clip"}
logging.getLogger("fastvid").addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # checkers take the names from the imports above

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'fastvid' has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
