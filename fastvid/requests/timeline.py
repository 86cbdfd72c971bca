"""A video as its frames, in the order in which they come out: those that are kept as they are, and segments, which the
model makes. All verbs are ways to lay out a timeline; none has a loop of its own.

A segment is one stream of the causal VAE: its first latent, the head, is one frame, every later one, the body, is
`temporal` frames. The model makes whole latents at sizes that it can take, with known frames of what stands before and
after; those, and the tail and the edges that were not asked for, are cropped.

    | left: known | skip ... num_frames come out ... | right: known |      in frames of the stream
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """What a model can make, in latent frames (columns) where nothing else is said.

    multiple: of sides, in pixels. window: columns at once. overlap: of one window with the next. context: how many
    columns of a clip it is shown. block: columns are made in multiples of it, past those that are known;
    picture_in_block: a first picture is one of these. carries: what one window has made goes on as latents into the
    next; else it is decoded and encoded again. pixels: what is known reaches the model by frames (channels, control)
    instead of by latents.
    """

    spatial: int = 8
    temporal: int = 4
    multiple: int = 16
    window: int = 21
    overlap: int = 1
    context: int = 1
    block: int = 1
    picture_in_block: bool = False
    carries: bool = False
    pixels: bool = False


@dataclass(frozen=True)
class Edge:
    """Known frames beside a segment: of a clip, from `start` on, or the nearest ones of another segment's output."""

    clip: Any = None
    start: int = 0
    segment: int | None = None


@dataclass(frozen=True)
class Kept:
    """Frames of a clip that come out as they are."""

    clip: Any
    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """Frames that the model makes as one stream. Pixels: num_frames x height x width come out; made: the stream's.

    left, right: known frames at its ends; skip: the stream's frame that comes out first. before, after: where the known
    ones are. pictures: known frames by number among those that come out. source: a clip to start from, its frames from
    source_start on. prompts: (frame that comes out, prompt) from where on which is meant. origin: the absolute index of
    its first column. lead: columns that are made in front of all and dropped.
    """

    num_frames: int
    height: int
    width: int
    made_frames: int
    made_height: int
    made_width: int
    spatial: int = 8
    temporal: int = 4
    left: int = 0
    right: int = 0
    skip: int = 0
    before: Edge | None = None
    after: Edge | None = None
    pictures: Mapping[int, Any] = field(default_factory=dict)
    source: Any = None
    source_start: int = 0
    prompts: tuple[tuple[int, int], ...] = ((0, 0),)
    origin: int = 0
    lead: int = 0

    @property
    def columns(self) -> int:
        """Latent frames: the columns of the noise table."""
        return self.lead + (self.made_frames - 1) // self.temporal + 1

    @property
    def over(self) -> int:
        """Frames that are made past those that come out, before the known ones on the right."""
        return self.made_frames - self.right - self.skip - self.num_frames

    @property
    def left_columns(self) -> int:
        """Columns of the known frames on the left."""
        return (self.left - 1) // self.temporal + 1 if self.left else 0

    @property
    def right_columns(self) -> int:
        """Columns of the known frames on the right that are known whole."""
        return self.right // self.temporal

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the latents."""
        return channels, self.columns, self.made_height // self.spatial, self.made_width // self.spatial

    def column_of(self, frame: int) -> int:
        """The column that holds a frame of the stream."""
        return self.lead + (frame + self.temporal - 1) // self.temporal

    def turn_column(self, frame: int) -> int:
        """The column from which on something is meant that begins with a frame that comes out: the nearest one."""
        nearest = self.column_of(self.skip + frame + self.temporal // 2)
        return min(nearest, self.column_of(self.skip + self.num_frames - 1))

    def crop(self, frames: Tensor) -> Tensor:
        """Frames [n, H, W, 3] of the stream without the edges that do not come out."""
        return frames[:, : self.height, : self.width]


Part = Kept | Segment


@dataclass(frozen=True)
class Timeline:
    """The parts of a video in the order in which they come out, all of one size."""

    parts: tuple[Part, ...]

    @property
    def num_frames(self) -> int:
        return sum(part.num_frames for part in self.parts)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(part for part in self.parts if isinstance(part, Segment))

    def starts(self) -> list[int]:
        """The frame at which each part begins."""
        counts = [part.num_frames for part in self.parts]
        return [sum(counts[:i]) for i in range(len(counts))]

    def order(self) -> list[int]:
        """The parts' numbers in the order in which they can be made: each after those that it is shown."""
        done: list[int] = []
        waiting = list(range(len(self.parts)))
        while waiting:
            ready = next(i for i in waiting if _needs(self.parts[i]) <= set(done))
            waiting.remove(ready)
            done.append(ready)
        return done


def _needs(part: Part) -> set[int]:
    if isinstance(part, Kept):
        return set()
    edges = (part.before, part.after)
    return {edge.segment for edge in edges if edge is not None and edge.segment is not None}


# ---------------------------------------------------------------- one stretch of frames to make


@dataclass(frozen=True)
class Stretch:
    """Frames to make, however many; `lay` parts them into segments that the model can make."""

    num_frames: int
    height: int
    width: int
    before: Edge | None = None
    before_frames: int = 0  # how many there are
    after: Edge | None = None
    after_frames: int = 0
    pictures: Mapping[int, Any] = field(default_factory=dict)
    source: Any = None
    prompts: tuple[tuple[int, int], ...] = ((0, 0),)
    lead: int = 0


def lay(stretch: Stretch, rules: Rules, number: int = 0, origin: int = 0) -> list[Segment]:
    """The segments of a stretch, in the order in which they come out; the first will be part `number` of the timeline.

    One is enough where it fits the model's window, or where windows carry latents on: from left to right alone, so what
    leads up to a clip is made from right to left in several. origin: its first column's index.
    """
    whole, backward = _segment(stretch, rules, origin), stretch.before is None and stretch.after is not None
    least = whole.left_columns + whole.right_columns + 1
    if (rules.carries and not backward) or whole.columns - whole.lead <= max(rules.window, least):
        return [whole]
    cuts = _backward(stretch, rules) if backward else _forward(stretch, rules)
    return _chain(stretch, cuts, rules, number, origin)


def _forward(stretch: Stretch, rules: Rules) -> list[int]:
    """Frame counts of segments from left to right, each as long as the window lets it be."""
    counts, done, known = [], 0, stretch.before is not None
    while done < stretch.num_frames:
        rest, most = stretch.num_frames - done, _most(rules, known, False)
        if stretch.after is not None:  # the last one sees both sides, and has as much to bring together as it can
            last = _most(rules, known or rest > most, True)
            most = _share(rest - last, most, rules.temporal) if rest > last else rest
        turn = min((frame for frame, _ in stretch.prompts if frame > done), default=stretch.num_frames) - done
        counts.append(min(rest, most, turn))
        done, known = done + counts[-1], True
    return counts


def _share(frames: int, most: int, temporal: int) -> int:
    """The first of the fewest parts of at most so many frames, about as long as the others: each is shown the one
    before, of which there should be enough."""
    each = math.ceil(frames / math.ceil(frames / most))
    return min(frames, most, math.ceil(each / temporal) * temporal)


def _backward(stretch: Stretch, rules: Rules) -> list[int]:
    """The same from right to left, for frames before a clip; returned in the order in which they come out."""
    counts, rest = [], stretch.num_frames
    while rest > 0:
        counts.append(min(rest, _most(rules, False, True)))
        rest -= counts[-1]
    return counts[::-1]


def _most(rules: Rules, left: bool, right: bool) -> int:
    """Frames that one segment can make."""
    columns = rules.window - (rules.context if left else 1) - (rules.context if right else 0)
    return max(1, columns) * rules.temporal + (0 if left else 1)


def _chain(stretch: Stretch, counts: Sequence[int], rules: Rules, number: int, origin: int) -> list[Segment]:
    """Segments of these lengths, each shown the end of the one before (or, right to left, the start of the next)."""
    backward = stretch.before is None and stretch.after is not None
    segments: list[Segment] = []
    start = 0
    for i, count in enumerate(counts):
        first, last = i == 0, i == len(counts) - 1
        before, had = stretch.before if first else None, stretch.before_frames
        after, have = stretch.after if last else None, stretch.after_frames
        if not first and not backward:
            before, had = Edge(segment=number + i - 1), counts[i - 1]
        if not last and backward:
            after, have = Edge(segment=number + i + 1), counts[i + 1]
        part = replace(
            stretch,
            num_frames=count,
            before=before,
            before_frames=had if before else 0,
            after=after,
            after_frames=have if after else 0,
            pictures={f - start: p for f, p in stretch.pictures.items() if start <= f < start + count},
            prompts=_within(stretch.prompts, start, count),
            lead=stretch.lead,
        )
        made = _segment(part, rules, origin)
        segments.append(replace(made, source_start=start))
        origin += made.columns - made.left_columns - made.lead
        start += count
    return segments


def _within(prompts: Sequence[tuple[int, int]], start: int, count: int) -> tuple[tuple[int, int], ...]:
    current = [prompt for frame, prompt in prompts if frame <= start][-1]
    return ((0, current), *((frame - start, prompt) for frame, prompt in prompts if start < frame < start + count))


def _segment(stretch: Stretch, rules: Rules, origin: int) -> Segment:
    """One segment for all of a stretch: how many known frames it is shown, and how many it makes."""
    t = rules.temporal
    left = _left(stretch.before_frames, rules) if stretch.before else 0
    has_right = stretch.after is not None
    free = math.ceil(stretch.num_frames / t) if left else 1 + math.ceil((stretch.num_frames - 1) / t)
    first = int(not left and 0 in stretch.pictures and not rules.picture_in_block)
    free = first + math.ceil((free - first) / rules.block) * rules.block
    made = left + free * t if left else 1 + (free - 1) * t
    surplus = made - left - stretch.num_frames
    right = 0
    after = stretch.after
    if has_right and after is not None:
        # What is made beyond the bridge stands for the clip's first frames: only those behind it are shown.
        over = surplus if left else 0
        shown = min(rules.context * t, max(t, (stretch.after_frames - over) // t * t))
        right, after = shown, replace(after, start=after.start + over)
        made += shown
    skip = left if left or not has_right else surplus
    return Segment(
        num_frames=stretch.num_frames,
        height=stretch.height,
        width=stretch.width,
        made_frames=made,
        made_height=math.ceil(stretch.height / rules.multiple) * rules.multiple,
        made_width=math.ceil(stretch.width / rules.multiple) * rules.multiple,
        spatial=rules.spatial,
        temporal=t,
        left=left,
        right=right,
        skip=skip,
        before=stretch.before,
        after=after,
        pictures=stretch.pictures,
        source=stretch.source,
        prompts=stretch.prompts,
        origin=origin - (math.ceil(left / t) if left else 0) - stretch.lead,
        lead=stretch.lead,
    )


def _left(available: int, rules: Rules) -> int:
    """Known frames on the left: a head and whole bodies, as many as the model is shown."""
    return 1 + rules.temporal * min(rules.context - 1, (available - 1) // rules.temporal)


# ---------------------------------------------------------------- verbs


def generate(stretch: Stretch, rules: Rules) -> Timeline:
    """All frames free, but for pictures; also edit and finalize, where they start from a source."""
    return Timeline(tuple(lay(stretch, rules)))


def extend(clip: Any, num_frames: int, direction: str, stretch: Stretch, rules: Rules) -> Timeline:
    """The clip, and so many new frames after it, before it, or on both sides."""
    parts: list[Part] = []
    if direction in ("before", "both"):
        ahead = replace(stretch, num_frames=num_frames, after=Edge(clip), after_frames=clip.num_frames)
        # Indices below zero: what is made after the clip does not depend on whether something is made before it.
        columns = sum(s.columns - s.left_columns - s.lead for s in lay(ahead, rules))
        parts += lay(ahead, rules, 0, -columns)
    parts.append(Kept(clip, 0, clip.num_frames))
    if direction in ("after", "both"):
        behind = replace(
            stretch, num_frames=num_frames, before=Edge(clip, clip.num_frames), before_frames=clip.num_frames
        )
        parts += lay(behind, rules, len(parts))
    return Timeline(tuple(parts))


def loop(clip: Any, num_frames: int, stretch: Stretch, rules: Rules) -> Timeline:
    """The clip, and a bridge from its end back to its start."""
    return Timeline((Kept(clip, 0, clip.num_frames), *_bridge(clip, clip, num_frames, stretch, rules)))


def blend(a: Any, b: Any, num_frames: int, stretch: Stretch, rules: Rules) -> Timeline:
    """One clip, a bridge, and the other clip."""
    bridge = _bridge(a, b, num_frames, stretch, rules)
    return Timeline((Kept(a, 0, a.num_frames), *bridge, Kept(b, 0, b.num_frames)))


def _bridge(a: Any, b: Any, num_frames: int, stretch: Stretch, rules: Rules) -> list[Segment]:
    between = replace(
        stretch,
        num_frames=num_frames,
        before=Edge(a, a.num_frames),
        before_frames=a.num_frames,
        after=Edge(b),
        after_frames=b.num_frames,
    )
    return lay(between, rules, 1)


def window_of(segment: Segment, columns: int) -> Segment:
    """A segment as long as what is with the model at once, of its length: what memory is taken for."""
    made = (min(columns, segment.columns) - segment.lead - 1) * segment.temporal + 1
    return replace(segment, made_frames=made, num_frames=made)
