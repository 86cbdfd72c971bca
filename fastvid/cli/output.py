"""Where a command writes its video: a file, a folder of pictures, or standard output."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvid.cli.command_parser import UsageError
from fastvid.engine.events import Started
from fastvid.errors import MediaError

STDOUT = "-"


@dataclass
class Output:
    """path: a file, FOLDER/ or -. inputs: what names files that the request reads. checkpoint: its folder, if any. new:
    whether that is made by this command."""

    path: str
    overwrite: bool = False
    inputs: tuple[Any, ...] = ()
    checkpoint: str | None = None
    new: bool = False
    _stdout: int = -1

    def check(self, num_frames: Any = None, width: Any = None, height: Any = None, fps: Any = None) -> None:
        """Raises InvalidRequest or MediaError if the video, as far as it is known, can't be written here."""
        from fastvid.engine import resume_files

        self.check_video(num_frames, width, height, fps)
        if self.checkpoint is not None:
            place = None if self.path == STDOUT else self.path
            if self.new:
                resume_files.new_folder(self.checkpoint, place)
            else:
                resume_files.check_outside(resume_files.folder_of(self.checkpoint), place)

    def check_video(self, num_frames: Any, width: Any, height: Any, fps: Any) -> None:
        """`check`, without the checkpoint."""
        from fastvid.media.pipe import check_pipe
        from fastvid.media.targets import check_writable

        if self.path == STDOUT:
            check_pipe(width, height)
            return
        shape = {"num_frames": num_frames, "width": width, "height": height, "fps": fps}
        check_writable(self.path, **shape, overwrite=self.overwrite, inputs=self.inputs)

    def open(self, event: Started) -> Any:
        """The sink for a video's frames."""
        from fastvid.engine.resume_output import replace_partial
        from fastvid.media.pipe import PipeSink
        from fastvid.media.writer import FrameSink

        video: dict[str, Any] = {name: getattr(event, name) for name in ("width", "height", "fps", "recipe", "sound")}
        if self.path == STDOUT:
            return PipeSink(os.dup(self._stdout), **video)
        sink = FrameSink(self.path, **video, overwrite=self.overwrite, inputs=self.inputs)
        if self.checkpoint is not None:
            replace_partial(self.checkpoint, sink.target, sink.stage.name)
        return sink

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps standard output for the video: whatever else is written to it meanwhile goes to standard error."""
        if self.path != STDOUT:
            yield
            return
        try:
            sys.stdout.flush()
            self._stdout, other = os.dup(1), os.dup(2)
        except (OSError, AttributeError) as error:  # None if the shell has closed it
            raise MediaError(f"-o {STDOUT}: standard output is closed; give a file such as out.mp4") from error
        try:
            os.dup2(other, 1)
            yield
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(other)
            os.close(self._stdout)


def output_of(flags: argparse.Namespace, inputs: Any = (), checkpoint: str | None = None, new: bool = False) -> Output:
    """The output that the flags name. Raises UsageError for a name that says neither file nor folder."""
    path = flags.output
    if flags.frames_dir is not None:
        path = os.path.join(flags.frames_dir, "")
    elif path == STDOUT:
        _check_stdout(flags)
    elif path and not Path(path).suffix and not path.endswith(("/", os.sep)) and not os.path.isdir(path):
        raise UsageError(
            f"-o {path} says no kind of file; give {path}.mp4 for a video, or {path}/ for a folder of pictures"
        )
    return Output(path, flags.overwrite, tuple(inputs), checkpoint, new)


def _check_stdout(flags: argparse.Namespace) -> None:
    if flags.json:
        raise UsageError(f"--json: standard output is the video's with -o {STDOUT}; leave it out, or give -o out.mp4")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.isatty(sys.stdout.fileno()):
            raise UsageError(f"-o {STDOUT}: standard output is a terminal; give -o out.mp4, or pipe it to a player")
