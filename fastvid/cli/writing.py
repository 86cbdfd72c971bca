"""Writes a video to its file as its events come, so that memory does not grow with the video, and tells of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastvid.cli.output import Output
from fastvid.cli.progress import Progress, Stopwatch, duration
from fastvid.engine.events import Event, Finished, Frames, Started


class VideoFile:
    """The file of one request. A context; left with an error, it leaves no partial file.

    watch: the time since the last event is the model's. result: what --json prints, once the video is finished.
    """

    def __init__(self, output: Output, watch: Stopwatch) -> None:
        self._output, self._watch, self._entered = output, watch, ExitStack()
        self._started: Started | None = None
        self._sink: Any = None
        self._writer: Any = None
        self.result: dict[str, Any] | None = None

    def add(self, event: Event) -> None:
        self._watch.mark("model")
        if isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Frames):
            self._writer.write(event.frames)
        elif isinstance(event, Finished):
            self._end(event)
        self._watch.mark("wait")

    def _begin(self, event: Started) -> None:
        from fastvid.media.writer import BackgroundWriter

        self._started = event
        # Again, now that frame count and rate are known.
        self._output.check_video(event.num_frames, event.width, event.height, event.fps)
        self._sink = self._entered.enter_context(self._output.open(event))
        self._writer = self._entered.enter_context(BackgroundWriter(self._sink))

    def _end(self, event: Finished) -> None:
        self._writer.finish()
        self._watch.mark("wait")
        place = self._sink.close(event.recipe)
        self._watch.mark("close")
        self.result = self._summary(place, event)

    def _summary(self, place: object, finished: Finished) -> dict[str, Any]:
        watch, started = self._watch, self._started
        assert started is not None
        written = self._writer.seconds + watch.seconds["close"]
        load = {"load": watch.seconds["load"]} if "load" in watch.seconds else {}
        seconds = {**load, **finished.seconds, "write": written, "total": watch.total}
        return {
            "output": str(place),
            "seed": finished.seed,
            "width": started.width,
            "height": started.height,
            "num_frames": finished.num_frames,
            "fps": finished.fps,
            "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
            "recipe": finished.recipe,
        }

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


def say_done(progress: Progress, result: dict[str, Any], seconds: float) -> None:
    """Says what was written, in how many seconds."""
    count = f"{result['num_frames']} frames, {result['fps']:g} fps" if result["num_frames"] > 1 else "1 frame"
    size = f"{count}, {result['width']}x{result['height']}, seed {result['seed']}"
    progress.say(f"{result['output']}: {size}, in {duration(seconds)}")
