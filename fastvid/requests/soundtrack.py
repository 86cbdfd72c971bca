"""The sound of a request's video: that of its clips where their frames stay or are edited, silence where frames are
new."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastvid.media.sound import Span, Track
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Kept, Timeline


def soundtrack(request: Resolved, timeline: Timeline) -> Track | None:
    """The sound along the timeline's parts; None without sound, or if the request leaves it out."""
    if not request.audio:
        return None
    spans: list[Span] = []
    for span in _spans(request, timeline):
        last = spans[-1] if spans else None
        if last is not None and _continues(last, span):
            spans[-1] = replace(last, seconds=last.seconds + span.seconds)
        else:
            spans.append(span)
    return Track(tuple(spans), timeline.num_frames / request.fps) if spans else None


def _spans(request: Resolved, timeline: Timeline) -> Iterator[Span]:
    for part, start in zip(timeline.parts, timeline.starts(), strict=True):
        clip, first = (part.clip, part.start) if isinstance(part, Kept) else (part.source, part.source_start)
        if clip is None:
            continue
        clip = getattr(clip, "clip", clip)  # on a larger canvas
        if (span := clip.sound(first, first + part.num_frames, request.fps)) is not None:
            yield replace(span, at=start / request.fps)


def _continues(last: Span, span: Span) -> bool:
    """Whether a span goes on where the last one ends, in the video and in the source."""
    gaps = span.at - last.at - last.seconds, span.begin - last.begin - last.seconds
    return last.source == span.source and all(abs(gap) < 1e-3 for gap in gaps)
