"""Timelines: a video as a sequence of parts in output order. Kept parts are copied from a clip; segments are generated.
Every verb lays out a timeline; all share one denoising loop.

A segment is one stream of the causal VAE: its first latent frame decodes to one frame, every later one to `temporal`
frames. The model generates whole latent frames, at sizes that it supports, with known frames at the left and right
end as context. The known frames, surplus frames and the padding at the right and bottom edge are cropped from the
output.

    | left: known | output: num_frames, from frame `skip` on | over: surplus | right: known |      frames of the stream
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """What a model can generate. Lengths are in latent frames (columns) unless stated otherwise.

    multiple: sides are multiples of it, in pixels. window: columns per window. overlap: columns shared by neighboring
    windows. context: columns of a neighboring clip or segment that the model sees. block: columns after the known ones
    are generated in multiples of it. picture_in_block: whether a first picture counts as part of a block. carries:
    whether latents are carried from one window to the next; otherwise a new segment starts from the decoded frames.
    pixels: whether known frames reach the model as pixels (channels, control) instead of latents. picture_behind:
    whether a last picture follows the video as one more latent frame, instead of being its last frame. whole: whether
    every segment fills the window, whose surplus frames are dropped. references_lead: whether a reference picture is
    one more column in front.
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
    picture_behind: bool = False
    whole: bool = False
    references_lead: bool = True


@dataclass(frozen=True)
class Edge:
    """The source of known frames next to a segment: a clip, before or from frame `start` on, or another segment's
    output."""

    clip: Any = None
    start: int = 0
    segment: int | None = None


@dataclass(frozen=True)
class Kept:
    """Frames start to stop - 1 of a clip, output unchanged."""

    clip: Any
    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """Frames that the model generates as one stream.

    num_frames, height, width: the output. model_frames, model_height, model_width: the stream before cropping. left,
    right: number of known frames at its ends; before, after: their sources. skip: the stream's first output frame.
    pictures: known frames by output frame number. source: a clip to edit, from its frame source_start on. prompts:
    (output frame, number of the prompt from there on). origin: index of its first column in the noise stream. lead:
    extra columns generated in front and dropped (for reference pictures). tail: the same behind (for a last picture
    that follows the video). half: (height, width) of the stream in the first steps of a progressive request.
    tile: (height, width) of the parts of a frame that the model sees at once; None: all of it.
    """

    num_frames: int
    height: int
    width: int
    model_frames: int
    model_height: int
    model_width: int
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
    tail: int = 0
    half: tuple[int, int] | None = None
    tile: tuple[int, int] | None = None

    @property
    def columns(self) -> int:
        """The number of latent frames, which are the columns of the noise table."""
        return self.lead + (self.model_frames - 1) // self.temporal + 1 + self.tail

    @property
    def over(self) -> int:
        """Surplus frames between the output and the known frames on the right."""
        return self.model_frames - self.right - self.skip - self.num_frames

    @property
    def left_columns(self) -> int:
        """Columns of the known frames on the left."""
        return (self.left - 1) // self.temporal + 1 if self.left else 0

    @property
    def right_columns(self) -> int:
        """Fully known columns on the right."""
        return self.right // self.temporal

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the latents."""
        return channels, self.columns, self.model_height // self.spatial, self.model_width // self.spatial

    def column_of(self, frame: int) -> int:
        """The column that holds a frame of the stream."""
        return self.lead + (frame + self.temporal - 1) // self.temporal

    def picture_column(self, frame: int) -> int:
        """The column of the picture of an output frame."""
        return self.columns - 1 if self.is_behind(frame) else self.column_of(self.skip + frame)

    def is_behind(self, frame: int) -> bool:
        """Whether the picture of an output frame follows the video."""
        return self.tail > 0 and frame == self.num_frames - 1

    def turn_column(self, frame: int) -> int:
        """The column at which a prompt starts that is meant to start at this output frame: the nearest one."""
        nearest = self.column_of(self.skip + frame + self.temporal // 2)
        return min(nearest, self.column_of(self.skip + self.num_frames - 1))

    @property
    def seen(self) -> Segment:
        """What of the segment one call of the model sees: a tile, or all."""
        if self.tile is None:
            return self
        return replace(self, model_height=self.tile[0], model_width=self.tile[1], tile=None)

    @property
    def small(self) -> Segment:
        """The segment at half the size."""
        assert self.half is not None
        height, width = self.half
        return replace(
            self,
            height=round(self.height * height / self.model_height),
            width=round(self.width * width / self.model_width),
            model_height=height,
            model_width=width,
            half=None,
        )

    def crop(self, frames: Tensor) -> Tensor:
        """Frames [n, H, W, 3] of the stream, cropped to the output size."""
        return frames[:, : self.height, : self.width]


Part = Kept | Segment


@dataclass(frozen=True)
class Timeline:
    """The parts of a video in output order, all of one size."""

    parts: tuple[Part, ...]

    @property
    def num_frames(self) -> int:
        return sum(part.num_frames for part in self.parts)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(part for part in self.parts if isinstance(part, Segment))

    def starts(self) -> list[int]:
        """The number of each part's first frame."""
        counts = [part.num_frames for part in self.parts]
        return [sum(counts[:i]) for i in range(len(counts))]

    def order(self) -> list[int]:
        """The parts' numbers in an order in which they can be generated: each after the parts it depends on."""
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


# ---------------------------------------------------------------- splitting a stretch into segments


@dataclass(frozen=True)
class Stretch:
    """Any number of consecutive frames to generate; `lay` splits them into segments that the model can generate."""

    num_frames: int
    height: int
    width: int
    before: Edge | None = None
    before_frames: int = 0  # how many are available
    after: Edge | None = None
    after_frames: int = 0
    pictures: Mapping[int, Any] = field(default_factory=dict)
    source: Any = None
    prompts: tuple[tuple[int, int], ...] = ((0, 0),)
    lead: int = 0


def lay(stretch: Stretch, rules: Rules, number: int = 0, origin: int = 0) -> list[Segment]:
    """The segments of a stretch in output order. number: the first segment's number among the timeline's parts. origin:
    index of its first column in the noise stream.

    One segment is enough if it fits the model's window, or if the model carries latents from window to window. Latents
    are carried only from left to right, so frames that lead up to a clip are several segments, generated from right to
    left.
    """
    whole, backward = _segment(stretch, rules, origin), stretch.before is None and stretch.after is not None
    least = whole.left_columns + whole.right_columns + 1
    if (rules.carries and not backward) or whole.columns - whole.lead - whole.tail <= max(rules.window, least):
        return [whole]
    cuts = _backward(stretch, rules) if backward else _forward(stretch, rules)
    return _chain(stretch, cuts, rules, number, origin)


def _forward(stretch: Stretch, rules: Rules) -> list[int]:
    """Frame counts of segments from left to right, each as long as fits the window."""
    counts, done, known = [], 0, stretch.before is not None
    while done < stretch.num_frames:
        rest, most = stretch.num_frames - done, _most(rules, known, False)
        if stretch.after is not None:  # the last one joins both sides, so it is as long as possible
            last = _most(rules, known or rest > most, True)
            most = _share(rest - last, most, rules.temporal) if rest > last else rest
        turn = min((frame for frame, _ in stretch.prompts if frame > done), default=stretch.num_frames) - done
        counts.append(min(rest, most, turn))
        done, known = done + counts[-1], True
    return counts


def _share(frames: int, most: int, temporal: int) -> int:
    """The first length when `frames` are split into as few nearly equal parts of at most `most` frames as possible. No
    part is very short, since each is context for the next."""
    each = math.ceil(frames / math.ceil(frames / most))
    return min(frames, most, math.ceil(each / temporal) * temporal)


def _backward(stretch: Stretch, rules: Rules) -> list[int]:
    """Frame counts of segments generated from right to left, for frames before a clip; in output order."""
    counts, rest = [], stretch.num_frames
    while rest > 0:
        counts.append(min(rest, _most(rules, False, True)))
        rest -= counts[-1]
    return counts[::-1]


def _most(rules: Rules, left: bool, right: bool) -> int:
    """The most frames that one segment can output. left, right: whether it has known frames there."""
    columns = rules.window - (rules.context if left else 1) - (rules.context if right else 0)
    return max(1, columns) * rules.temporal + (0 if left else 1)


def _chain(stretch: Stretch, counts: Sequence[int], rules: Rules, number: int, origin: int) -> list[Segment]:
    """Segments of these lengths; each sees the end of the one before (or, right to left, the start of the next)."""
    backward = stretch.before is None and stretch.after is not None
    segments: list[Segment] = []
    start = 0
    for i, count in enumerate(counts):
        first, last = i == 0, i == len(counts) - 1
        before, before_frames = stretch.before if first else None, stretch.before_frames
        after, after_frames = stretch.after if last else None, stretch.after_frames
        if not first and not backward:
            before, before_frames = Edge(segment=number + i - 1), counts[i - 1]
        if not last and backward:
            after, after_frames = Edge(segment=number + i + 1), counts[i + 1]
        part = replace(
            stretch,
            num_frames=count,
            before=before,
            before_frames=before_frames if before else 0,
            after=after,
            after_frames=after_frames if after else 0,
            pictures={f - start: p for f, p in stretch.pictures.items() if start <= f < start + count},
            prompts=_prompts_within(stretch.prompts, start, count),
            lead=stretch.lead,
        )
        segment = _segment(part, rules, origin)
        segments.append(replace(segment, source_start=start))
        origin += segment.columns - segment.left_columns - segment.lead - segment.tail
        start += count
    return segments


def _prompts_within(prompts: Sequence[tuple[int, int]], start: int, count: int) -> tuple[tuple[int, int], ...]:
    """The prompts of frames start to start + count - 1, with frame numbers counted from `start`."""
    current = [prompt for frame, prompt in prompts if frame <= start][-1]
    return ((0, current), *((frame - start, prompt) for frame, prompt in prompts if start < frame < start + count))


def _segment(stretch: Stretch, rules: Rules, origin: int) -> Segment:
    """One segment for a whole stretch: computes how many known frames it sees, and how many frames it generates."""
    t = rules.temporal
    left = _left(stretch.before_frames, rules) if stretch.before else 0
    has_right = stretch.after is not None
    free = math.ceil(stretch.num_frames / t) if left else 1 + math.ceil((stretch.num_frames - 1) / t)
    first = int(not left and 0 in stretch.pictures and not rules.picture_in_block)
    free = first + math.ceil((free - first) / rules.block) * rules.block
    free = max(free, rules.window - math.ceil(left / t)) if rules.whole else free
    made = left + free * t if left else 1 + (free - 1) * t
    surplus = made - left - stretch.num_frames
    right = 0
    after = stretch.after
    if has_right and after is not None:
        # Surplus frames after the bridge take the place of the clip's first frames; known frames start after those.
        over = surplus if left else 0
        right = min(rules.context * t, max(t, (stretch.after_frames - over) // t * t))
        after = replace(after, start=after.start + over)
        made += right
    skip = left if left or not has_right else surplus
    return Segment(
        num_frames=stretch.num_frames,
        height=stretch.height,
        width=stretch.width,
        model_frames=made,
        model_height=math.ceil(stretch.height / rules.multiple) * rules.multiple,
        model_width=math.ceil(stretch.width / rules.multiple) * rules.multiple,
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
        tail=int(rules.picture_behind and 0 < stretch.num_frames - 1 in stretch.pictures),
    )


def _left(available: int, rules: Rules) -> int:
    """The number of known frames on the left: whole latent frames, at most `context`."""
    return 1 + rules.temporal * min(rules.context - 1, (available - 1) // rules.temporal)


# ---------------------------------------------------------------- verbs


def generate(stretch: Stretch, rules: Rules) -> Timeline:
    """All frames are generated; also for edit and finalize, which start from a source clip."""
    return Timeline(tuple(lay(stretch, rules)))


def extend(clip: Any, num_frames: int, direction: str, stretch: Stretch, rules: Rules) -> Timeline:
    """The clip with num_frames new frames after it, before it, or on each side ("both")."""
    parts: list[Part] = []
    if direction in ("before", "both"):
        ahead = replace(stretch, num_frames=num_frames, after=Edge(clip), after_frames=clip.num_frames)
        # Negative noise indices, so that the frames after the clip do not depend on whether any are added before it.
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
    """The clip, then a bridge from its end back to its start."""
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
    """A segment shortened to the columns that the model sees at once; memory is planned for this. What it sees beyond
    the segment stands in front."""
    made = (min(columns, segment.columns) - segment.lead - segment.tail - 1) * segment.temporal + 1
    beyond = max(0, columns - segment.columns)
    return replace(segment, model_frames=made, num_frames=made, lead=segment.lead + beyond)
