"""Which unfinished file lies beside the video of a checkpoint's request.

A command that is killed leaves it there. The one that resumes its request removes it, if it has the name of an
unfinished file of the video that is written now: the checkpoint may be a stranger's.
"""

from __future__ import annotations

import contextlib

from fastvid.engine import resume_files as files
from fastvid.errors import CheckpointError
from fastvid.media.targets import Target

NAME = "output.json"


def replace_partial(path: str, target: Target, partial: str) -> None:
    """Removes what an ended process left beside the target, and notes the name of what is written there now.

    path: the checkpoint, whose lock is held.
    """
    folder = files.folder_of(path)
    if not (folder / "request.json").exists():
        return
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        before = files.get_json(folder, NAME).get("partial")
        if isinstance(before, str):
            target.remove_partial(before)
    files.put_json(folder, NAME, {"partial": partial})
