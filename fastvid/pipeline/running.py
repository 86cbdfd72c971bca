"""The events of a request, and of several that run together, from Started to Finished; and videos of events."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from fastvid.device.precision import Computed
from fastvid.engine.events import Event, Finished, Frames, Started, Step
from fastvid.engine.queue import Ticket
from fastvid.engine.resume import Resume
from fastvid.engine.session import Session
from fastvid.engine.together import run_together
from fastvid.media.sound import Track
from fastvid.media.video import Video
from fastvid.models.loaded import Model
from fastvid.pipeline.prepare import Prepared, prepare
from fastvid.pipeline.request_warnings import warn_of_prompts
from fastvid.requests.request import Request

log = logging.getLogger(__name__)


def events(prepared: Prepared, session: Session, saving: Resume | None) -> Generator[Event, None, None]:
    """The events of one request. saving: saves its progress."""
    with saving or contextlib.nullcontext():
        yield _started(prepared, session)
        with session.ticket.admitted():
            for event in session.run():
                if isinstance(event, Step):
                    log.debug("step %d of %d, sigma %.4f, %.3f s", event.step, event.total, event.sigma, event.seconds)
                yield event
        yield _finished(prepared, session)


def events_together(
    prepared: Sequence[Prepared], sessions: Sequence[Session]
) -> Generator[tuple[int, Event], None, None]:
    """The events of requests that share one ticket, each with its request's number."""
    pairs = list(zip(prepared, sessions, strict=True))
    for number, pair in enumerate(pairs):
        yield number, _started(*pair)
    with sessions[0].ticket.admitted():
        yield from run_together(sessions)
    for number, pair in enumerate(pairs):
        yield number, _finished(*pair)


def _started(prepared: Prepared, session: Session) -> Started:
    request = prepared.job.request
    return Started(
        plan=prepared.plan,
        seed=request.seed,
        num_frames=prepared.job.timeline.num_frames,
        height=prepared.plan.height,
        width=prepared.plan.width,
        fps=request.fps,
        total_steps=session.total_steps,
        recipe=prepared.recipe,
        sound=prepared.sound,
    )


def _finished(prepared: Prepared, session: Session) -> Finished:
    request, count = prepared.job.request, prepared.job.timeline.num_frames
    log.info(
        "made %d frames (%s)", count, ", ".join(f"{stage} {spent:.2f} s" for stage, spent in session.seconds.items())
    )
    clean = torch.cat(session.latents, dim=2) if session.keep_latents else None
    applied = [list(pair) for pair in session.changes.applied]
    recipe = prepared.recipe | ({"changed_prompts": applied} if applied else {})
    return Finished(request.seed, count, request.fps, clean, recipe, session.seconds)


class Collected:
    """Collects the events of one request into its video. inputs: the files that it is made from."""

    def __init__(self, inputs: tuple[str, ...]) -> None:
        self._inputs, self._frames = inputs, list[np.ndarray]()
        self._sound: Track | None = None
        self._finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Frames):
            self._frames.append(event.frames)
        elif isinstance(event, Started):
            self._sound = event.sound
        elif isinstance(event, Finished):
            self._finished = event

    def video(self) -> Video:
        """The video, once it is finished."""
        end, audio = self._finished, None if self._sound is None else self._sound.read()
        assert end is not None, "everything else raises"
        frames = np.concatenate(self._frames)
        return Video(frames, end.fps, end.seed, end.latents, end.recipe, audio, self._inputs)


def collect(stream: Any, inputs: tuple[str, ...]) -> Video:
    """The video of a stream, which is closed: an exception's traceback could keep it alive, and with it its turn."""
    made = Collected(inputs)
    with contextlib.closing(stream):
        for event in stream:
            made.add(event)
    return made.video()


def together(model: Model, requests: Sequence[Request], ticket: Ticket, keep_frames: bool, keep_latents: bool) -> Any:
    """The numbered events of requests that differ in prompts and seed alone."""
    prepared = [prepare(model, request, keep_frames) for request in requests]
    for request, one in zip(requests, prepared, strict=True):
        warn_of_prompts(model, request, one.job.request)
    sessions = [Session(one.model, one.job, ticket, keep_latents) for one in prepared]
    return Computed(events_together(prepared, sessions), model.device)
