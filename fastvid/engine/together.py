"""Runs several requests together: one call of the transformer a step denoises the latents of all.

They differ in prompts and seed alone, so they have the same timeline and noise table. Each keeps its own session: its
prompts, noise, known frames, decoder and output. One turn of the scheduler makes a step of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from fastvid.engine.events import Event, Step
from fastvid.engine.session import Session
from fastvid.requests.timeline import Kept, Segment
from fastvid.sampling.loop import Row

Numbered = Iterator[tuple[int, Event]]


def run_together(sessions: Sequence[Session]) -> Numbered:
    """Yields the Step and Frames events of all sessions, each with its session's number; the frames of each in order.
    All have one ticket, and no checkpoint. Raises Cancelled."""
    timeline = sessions[0].job.timeline
    with ExitStack() as entered:
        for session in sessions:
            entered.enter_context(closing(session.output))
        for place in timeline.order():
            part = timeline.parts[place]
            if isinstance(part, Kept):
                for number, session in enumerate(sessions):
                    yield from _of(number, session.copy(place, part))
            else:
                yield from _generate(sessions, place, part)
            for number, session in enumerate(sessions):
                yield from _of(number, session.output.end(place))
    for session in sessions:
        session.seconds["denoise"] = sessions[0].seconds["denoise"] / len(sessions)


def _generate(sessions: Sequence[Session], place: int, segment: Segment) -> Numbered:
    with ExitStack() as entered:
        with sessions[0].ticket.step():
            runs = [entered.enter_context(closing(session.begin(place, segment))) for session in sessions]
            runs[0].join(runs[1:])
        for row in runs[0].rows():
            for number, (session, run) in enumerate(zip(sessions, runs, strict=True)):
                yield number, _step(session, row)
                yield from _of(number, session.put(place, run.decode(_own(row, number))))
        for number, (session, run) in enumerate(zip(sessions, runs, strict=True)):
            yield from _of(number, session.put(place, run.finish()))


def _step(session: Session, row: Row) -> Step:
    session.steps_done += 1
    return Step(session.steps_done, session.total_steps, row.sigma, row.seconds)


def _own(row: Row, number: int) -> Row:
    """One session's part of a row."""
    clean = None if row.clean is None else row.clean[number : number + 1]
    return replace(row, clean=clean, position=None)


def _of(number: int, events: Iterable[Event]) -> Numbered:
    return ((number, event) for event in events)
