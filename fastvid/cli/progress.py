"""Shows the progress of a request: a bar on a terminal, a few lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from fastvid.engine.events import Event, Frames, Started, Step

LINE_SECONDS = 5.0
BAR = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"


class Stopwatch:
    """Seconds per stage: each `mark` adds the time since the previous mark to a stage."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._last = clock()
        self.seconds: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        now = self._clock()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._clock() - self._start


class Progress:
    """Shows a request's events on `stream` (default: standard error). tty: whether it is a terminal; default: ask
    it."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        tty: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._clock = quiet, clock
        self._tty = self._stream.isatty() if tty is None else tty
        self._bar: Any = None
        self._num_frames = self._frames_done = 0
        self._started = self._line_at = clock()
        self._line_share = 0.0

    def say(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            with contextlib.suppress(OSError):  # a closed stream must not stop the work
                print(text, file=self._stream, flush=True)

    def event(self, event: Event) -> None:
        if self._quiet:
            return
        if isinstance(event, Started):
            self._show_start(event)
        elif isinstance(event, Step):
            self._show_step(event)
        elif isinstance(event, Frames):
            self._show_frames(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_start(self, event: Started) -> None:
        self.say(
            f"{event.num_frames} frames of {event.width}x{event.height} at {event.fps:g} fps, {_steps(event)}, "
            f"seed {event.seed}"
        )
        self._num_frames = event.num_frames
        self._started = self._line_at = self._clock()
        if self._tty:
            from tqdm import tqdm

            self._bar = tqdm(
                total=event.total_steps,
                desc="denoising",
                file=self._stream,
                leave=False,
                bar_format=BAR,
                mininterval=0.1,
            )

    def _show_step(self, event: Step) -> None:
        done = event.step
        if self._bar is not None:
            self._bar.set_description("decoding" if done == event.total else "denoising", refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._is_time(done / event.total):
            elapsed = self._clock() - self._started
            left = f", {duration(elapsed / done * (event.total - done))} left" if done < event.total else ""
            self.say(f"denoising: step {done} of {event.total}{left}")

    def _is_time(self, share: float) -> bool:
        """Whether to print a line: 10 % more is done, or LINE_SECONDS and a tenth of the elapsed time have passed since
        the last one."""
        now = self._clock()
        pause = max(LINE_SECONDS, (now - self._started) / 10)
        if share < min(1.0, self._line_share + 0.1) - 1e-9 and now - self._line_at < pause:
            return False
        self._line_at, self._line_share = now, share
        return True

    def _show_frames(self, event: Frames) -> None:
        self._frames_done = max(self._frames_done, event.start + len(event.frames))
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._frames_done}/{self._num_frames} frames")
        elif self._frames_done == self._num_frames or self._clock() - self._line_at >= LINE_SECONDS:
            self._line_at = self._clock()
            self.say(f"decoding: {self._frames_done} of {self._num_frames} frames")


def _steps(event: Started) -> str:
    """The steps that progress counts: those of all windows of a long video."""
    windows, steps = (event.plan.windows, event.plan.steps) if event.plan else (1, event.total_steps)
    if windows == 1:
        return f"{event.total_steps} step{'s' * (event.total_steps != 1)}"
    each = f": {steps} in each" if windows * steps == event.total_steps else ""
    return f"{event.total_steps} steps in {windows} windows of frames{each}"


def duration(seconds: float) -> str:
    """Formats seconds: 1.4 s, 12 s, 3:05 min, 1:02:03 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
