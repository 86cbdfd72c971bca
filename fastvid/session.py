"""One request while it runs: its segments one after another, each from noise table to engine to decoder, frames in the
order in which they come out. All state of a request is here, and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid import conditions, engine, rollouts, tables
from fastvid.conditions import CACHE, REIMPOSED, TIMESTEPS, Conditions, Region
from fastvid.engine import Row
from fastvid.errors import Cancelled
from fastvid.events import Event, Frames, Step
from fastvid.given import Known
from fastvid.layers.kv_cache import KVCache
from fastvid.loading import Parts
from fastvid.precision import ieee_fp32
from fastvid.requests import Resolved
from fastvid.sampling import (
    Denoise,
    Velocity,
    column_noise,
    denoiser,
    find_solver,
    flow_edit,
    guided,
    known,
    latent_noise,
    switched,
    timesteps,
)
from fastvid.source import SourceClip
from fastvid.spool import Spool
from fastvid.timeline import Edge, Kept, Segment, Timeline

KEPT_AT_ONCE = 16  # frames of a clip that are handed on at a time
NEGATIVE, SOURCE = -1, -2  # numbers of the prompts that are not the request's own


@dataclass(frozen=True)
class Job:
    """A request that was checked and planned, with everything that belongs to it alone. sigmas [N] without the zero.
    decode_chunk: latent frames that are decoded at a time, in decode_stripes stripes of rows."""

    request: Resolved
    timeline: Timeline
    sigmas: np.ndarray
    decode_chunk: int
    decode_stripes: int = 1


def rows(
    parts: Parts, segment: Segment, sigmas: np.ndarray, known_columns: Tensor, schedule: str | None = None
) -> Iterator[Row]:
    """The noise table of a segment."""
    if parts.recipe.rollout is not None:
        return rollouts.rows(parts.recipe.rollout, segment, sigmas)
    if schedule == "staggered":
        size, stride = stagger(parts, segment, len(sigmas))
        return tables.staggered(sigmas, segment.columns, size, stride, rollouts.known_columns(segment))
    return tables.windows(sigmas, spans(parts, segment), known_columns)


def spans(parts: Parts, segment: Segment) -> list[tuple[int, int]]:
    """The windows of a segment: all of it, but where the model carries latents on from one to the next; a causal
    model's blocks."""
    recipe = parts.recipe
    if recipe.rollout is not None:
        return rollouts.spans(recipe.rollout, segment)
    size = recipe.window + segment.lead if recipe.carries else segment.columns
    overlap = min(recipe.overlap, size - 1)
    cuts = [column for column, _ in turns(parts, segment)[1:]]
    if (
        segment.right_columns and segment.columns > size
    ):  # the window that sees both sides has as much as it can to bring them together
        cuts.append(segment.columns - size + overlap)
    return tables.window_spans(segment.columns, size, overlap, cuts)


def stagger(parts: Parts, segment: Segment, steps: int) -> tuple[int, int]:
    """(columns of the window, rows between the beginnings of two columns) of a staggered table."""
    size = min(parts.recipe.window, segment.columns)
    return size, -(-steps // max(1, size - parts.recipe.overlap))


def turns(parts: Parts, segment: Segment) -> list[tuple[int, int]]:
    """(column, prompt) from where on which is meant."""
    if parts.recipe.rollout is not None:
        return rollouts.turns(parts.recipe.rollout, segment)
    later = [(segment.turn_column(frame), prompt) for frame, prompt in segment.prompts[1:]]
    return [(0, segment.prompts[0][1]), *later]


def count_rows(parts: Parts, segment: Segment, steps: int, schedule: str | None = None) -> int:
    """How many rows the table of a segment has."""
    if schedule == "staggered":
        (size, stride), known = stagger(parts, segment, steps), rollouts.known_columns(segment)
        return -(-max(0, known + 1 - size) // size) + stride * (segment.columns - known - 1) + steps
    if (rollout := parts.recipe.rollout) is None:
        return steps * len(spans(parts, segment))
    made, passed, refilled = rollouts.count_passes(rollout, segment)
    return made * steps + passed + refilled


def window_columns(parts: Parts, segment: Segment) -> int:
    """The most columns of a segment that are with the model at once."""
    refilled = 0 if parts.recipe.rollout is None else rollouts.most_refilled(parts.recipe.rollout, segment)
    return max(refilled, *(stop - start for start, stop in spans(parts, segment)))


def count_calls(parts: Parts, segment: Segment, sigmas: np.ndarray, request: Resolved) -> int:
    """How often the model is called for a segment."""
    scales, times = request.guidance_scales(len(parts.experts)), timesteps(sigmas, request.solver)
    each = [1 if scales[parts.experts.choose(t)] == 1 else 2 for t in times]
    each = [calls + (request.source_prompt is not None) for calls in each]
    if request.schedule == "staggered":
        return count_rows(parts, segment, len(sigmas), request.schedule) * max(each)
    if parts.recipe.rollout is None:
        return sum(each) * len(spans(parts, segment))
    made, passed, refilled = rollouts.count_passes(parts.recipe.rollout, segment)
    return made * sum(each) + passed * each[-1] + refilled


@dataclass
class Session:
    """Runs a job. `latents` are the clean ones of all segments so far, if they are kept."""

    parts: Parts
    job: Job
    cancelled: threading.Event
    keep_latents: bool = True
    latents: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0, "decode": 0.0})
    _ends: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # of segments: first, last frames
    _texts: dict[Any, Tensor] = field(default_factory=dict)
    _step: int = 0

    @property
    def total_steps(self) -> int:
        steps, schedule = len(self.job.sigmas), self.job.request.schedule
        return sum(count_rows(self.parts, s, steps, schedule) for s in self.job.timeline.segments)

    def run(self) -> Iterator[Event]:
        """Step and Frames events, frames in order. Raises Cancelled."""
        timeline, spool, start, due = self.job.timeline, Spool(), 0, 0
        try:
            for number in timeline.order():
                part = timeline.parts[number]
                for event in self._kept(part) if isinstance(part, Kept) else self._made(number, part):
                    if not isinstance(event, np.ndarray):
                        yield event
                    elif number == due:
                        yield Frames(start, event)
                        start += len(event)
                    else:
                        spool.put(number, event)
                due += number == due
                while due in spool:
                    for frames in spool.take(due):
                        yield Frames(start, frames)
                        start += len(frames)
                    due += 1
        finally:
            spool.close()

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled("the request was cancelled")

    def _kept(self, part: Kept) -> Iterator[np.ndarray]:
        for start in range(part.start, part.stop, KEPT_AT_ONCE):
            self._check()
            yield part.clip.read(start, min(start + KEPT_AT_ONCE, part.stop))

    def _made(self, number: int, segment: Segment) -> Iterator[Any]:
        """Step events and uint8 frames of a segment."""
        self._check()
        mark, total = time.perf_counter(), self.total_steps
        for prompt in self._prompts(segment):
            self.text(prompt)
        maker = SegmentMaker(self, segment, self._known(segment))
        self.seconds["text"] += time.perf_counter() - mark
        for item in maker.run():
            if isinstance(item, np.ndarray):
                self._remember(number, item)
                yield item
            else:
                self._step += 1
                yield Step(self._step, total, *item)

    def _prompts(self, segment: Segment) -> set[int]:
        guided = any(scale != 1 for scale in self.job.request.guidance_scales(len(self.parts.experts)))
        others = {NEGATIVE: guided, SOURCE: self.job.request.source_prompt is not None}
        return {prompt for _, prompt in segment.prompts} | {number for number, used in others.items() if used}

    def _remember(self, number: int, frames: np.ndarray) -> None:
        """Keeps the first and last frames of a segment, as far as neighbours are shown them."""
        most = 2 * self.parts.recipe.context * self.parts.recipe.temporal + 1
        first, last = self._ends.get(number, (frames[:0], frames[:0]))
        first = first if len(first) >= most else np.concatenate((first, frames))[:most]
        self._ends[number] = (first, np.concatenate((last, frames))[-most:])

    def _known(self, segment: Segment) -> Known:
        left = self._edge(segment.before, segment.left, before=True) if segment.left else None
        right = self._edge(segment.after, segment.right, before=False) if segment.right else None
        return Known(left, right, segment.pictures)

    def _edge(self, edge: Edge, count: int, before: bool) -> np.ndarray:
        """So many frames before or after an edge; where a clip ends, its last one is held."""
        if edge.segment is not None:
            first, last = self._ends[edge.segment]
            frames = last[-count:] if before else first[edge.start : edge.start + count]
        elif before:
            frames = edge.clip.read(edge.start - count, edge.start)
        else:
            frames = edge.clip.read(
                min(edge.start, edge.clip.num_frames - 1), min(edge.start + count, edge.clip.num_frames)
            )
        held = [frames[-1:]] * (count - len(frames))
        return np.concatenate((frames, *held)) if held else frames

    def text(self, number: int) -> Tensor:
        """Embeddings [1, L, text_dim] of a prompt by number, made when first asked for."""
        if number not in self._texts:
            request = self.job.request
            prompt, embeds = {
                NEGATIVE: (request.negative_prompt, request.negative_prompt_embeds),
                SOURCE: (request.source_prompt, None),
                0: (request.prompts[0], request.prompt_embeds),
            }.get(number) or (request.prompts[number], None)
            if embeds is not None:
                self._texts[number] = torch.as_tensor(embeds).to(self.parts.device, self.parts.dtype)
            else:
                with torch.no_grad(), ieee_fp32():
                    self._texts[number] = self.parts.embed(prompt or "")
        return self._texts[number]


class SegmentMaker:
    """One segment from its noise to its frames."""

    def __init__(self, session: Session, segment: Segment, known: Known) -> None:
        self.session, self.segment, self.parts = session, segment, session.parts
        self.request, self.sigmas = session.job.request, session.job.sigmas
        self._noise_kept: tuple[tuple[int, int], Tensor] | None = None
        self._contexts: dict[tuple[int, int], Any] = {}
        self._caches: dict[int, KVCache] = {}
        self.clip = None if segment.source is None else SourceClip(session.parts, segment, known, self.request.mask)
        with ieee_fp32():
            self.conditions: Conditions = conditions.prepare(session.parts, self.request, segment, known)

    # ------------------------------------------------------------ the loop

    def run(self) -> Iterator[Any]:
        """(sigma, seconds) after every row, and uint8 frames [n, height, width, 3] as they are decoded."""
        session, schedule = self.session, self.request.schedule
        table = rows(self.parts, self.segment, self.sigmas, self.conditions.columns, schedule)
        rollout = self.parts.recipe.rollout
        keep = 0 if rollout is None else rollouts.most_refilled(rollout, self.segment)
        solver = find_solver(self.request.solver)
        walked = engine.walk(table, self.source, solver, self.denoiser, fresh=self.fresh, keep=keep)
        cache, start, mark = None, 0, time.perf_counter()
        while True:
            session._check()
            if (row := next(walked, None)) is None:
                return
            spent = time.perf_counter() - mark
            session.seconds["denoise"] += spent
            yield row.sigma, spent
            for chunk in self._to_decode(row):
                session._check()
                mark = time.perf_counter()
                frames, cache, start = self._decode(chunk, cache, start)
                session.seconds["decode"] += time.perf_counter() - mark
                if len(frames):
                    yield frames
            mark = time.perf_counter()

    def _to_decode(self, row: engine.Walked) -> Iterator[Tensor]:
        """What became clean, in the decoder's chunks: without what stands in front, or behind all that comes out."""
        if row.ready is None:
            return
        segment, last = self.segment, self.segment.column_of(self.segment.skip + self.segment.num_frames - 1)
        ready = row.ready[:, :, max(0, segment.lead - row.start) : last + 1 - row.start]
        if ready.shape[2] == 0:
            return
        if self.session.keep_latents:
            known = segment.lead + segment.left_columns - max(row.start, segment.lead)
            self.session.latents.append(ready[:, :, max(0, known) :])
        yield from ready.split(self.session.job.decode_chunk, dim=2)

    @torch.no_grad()
    def _decode(self, latents: Tensor, cache: Any, start: int) -> tuple[np.ndarray, Any, int]:
        """The next latents to cropped uint8 frames, the decoder's new cache, and the stream's next frame."""
        parts = self.parts
        with ieee_fp32():
            stripes = self.session.job.decode_stripes
            # The cache is this segment's own, so its memory may be used again.
            frames, cache = parts.vae.decode(latents.to(parts.vae_dtype), cache, stripes, cache is not None)
        rgb = parts.ops.to_rgb(frames[0])
        cropped = self.segment.crop(rgb, start).contiguous().cpu().numpy()
        if self.clip is not None and self.request.mask is not None and len(cropped):
            cropped = self.clip.keep(cropped, max(0, start - self.segment.skip))
        return cropped, cache, start + len(rgb)

    # ------------------------------------------------------------ noise

    def source(self, start: int, stop: int) -> Tensor:
        """What a window takes in [1, C, t, h, w]: noise, and clean latents where they are known."""
        latents, at = self.noise(start, stop), self.conditions
        if self.clip is not None:
            level = 0.0 if self.request.source_prompt is not None else float(self.sigmas[0])
            latents = (1 - level) * self.clip.latents(start, stop) + level * latents
        if at.clean is None:
            return latents
        return torch.where(
            at.columns[start:stop].view(1, 1, -1, 1, 1).to(latents.device), at.clean[:, :, start:stop], latents
        )

    def noise(self, start: int, stop: int) -> Tensor:
        """The noise [1, C, t, h, w] that sampling starts from, fp32 on the device; the last one asked for is kept."""
        if self._noise_kept is None or self._noise_kept[0] != (start, stop):
            self._noise_kept = (start, stop), self._draw(start, stop)
        return self._noise_kept[1].clone()

    def _draw(self, start: int, stop: int) -> Tensor:
        device, given = self.parts.device, self.request.latents
        if given is not None:
            return torch.as_tensor(given)[:, :, start:stop].to(device, torch.float32, copy=True)
        channels, _, h, w = self.segment.latent_shape(self.parts.transformer.config.out_channels)
        shape = (channels, stop - start, h, w)
        return latent_noise(self.request.seed, shape, start=self.segment.origin + start).to(device)

    def fresh(self, start: int, draws: Tensor) -> Tensor:
        """New noise of these draws for the columns from `start` on."""
        channels, _, h, w = self.segment.latent_shape(self.parts.transformer.config.out_channels)
        made = column_noise(self.request.seed, (channels, h, w), self.segment.origin + start, draws)
        return made.to(self.parts.device)

    # ------------------------------------------------------------ the denoiser of a row

    def denoiser(self, row: Row) -> Denoise:
        """Guidance over the velocity for the row's prompt and for the negative one, of the expert that its level is
        for, with what is known of the video in its place."""
        experts, request = self.parts.experts, self.request
        # What the negative prompt made of the frames stays true when the other one changes.
        scales = (1.0,) * len(experts) if row.refill else request.guidance_scales(len(experts))
        region = self.region(row)
        velocities = [
            guided(
                partial(self._velocity, row, region, expert, self.prompt_of(row)),
                partial(self._velocity, row, region, expert, NEGATIVE),
                scale,
            )
            for expert, scale in enumerate(scales)
        ]
        chosen = switched(velocities, lambda sigma: experts.choose(timesteps(sigma.numpy(), request.solver).max()))
        if self.clip is not None and request.source_prompt is not None:
            made = self._flow_edit(row, region, chosen)
        else:
            made = denoiser(chosen)
        return made if region is None else known(made, region.clean, region.places)

    def _flow_edit(self, row: Row, region: Region | None, target: Velocity) -> Denoise:
        """Along the difference to the velocity for the source's own prompt, with new noise at every level."""
        experts, solver = self.parts.experts, self.request.solver
        sources = [partial(self._velocity, row, region, expert, SOURCE) for expert in range(len(experts))]
        source = switched(sources, lambda sigma: experts.choose(timesteps(sigma.numpy(), solver).max()))
        draw = 1 + int((self.sigmas > float(row.sigma.max())).sum())
        noise = self.fresh(row.start, torch.full((len(row.sigma),), draw))
        return flow_edit(target, source, self.clip.latents(row.start, row.stop), noise)

    def region(self, row: Row) -> Region | None:
        """The places that are known in the window's frames."""
        if self.clip is None or self.request.mask is None or self.conditions.way not in (TIMESTEPS, REIMPOSED, CACHE):
            return None
        return Region(self.clip.places(row.start, row.stop), self.clip.latents(row.start, row.stop))

    def prompt_of(self, row: Row) -> int:
        """The number of the prompt that a window's first free column belongs to, or the column that a refill is for."""
        free = row.start + int((row.sigma > 0).long().argmax()) if bool((row.sigma > 0).any()) else row.start
        free = row.stop if row.refill else free
        return [prompt for column, prompt in turns(self.parts, self.segment) if column <= free][-1]

    def _velocity(self, row: Row, region: Region | None, expert: int, text: int, x: Tensor, sigma: Tensor) -> Tensor:
        """One expert's velocity for a text. What it makes of the text is made in its first call, when it has to be on
        the device anyway."""
        parts, key = self.parts, (expert, text)
        embeds = self.session.text(text)
        given, levels = self.conditions.input(x, row, self.noise, region)
        times = torch.from_numpy(timesteps(levels.numpy(), self.request.solver)).to(x.device)
        offset, cache = self._cache(row, text)
        if row.write_cache and cache is not None:
            times = torch.full_like(times, parts.recipe.rollout.context_noise, dtype=torch.float64)
        elif parts.recipe.whole_timesteps:
            times = times.round()
        with parts.experts.use(expert) as transformer, ieee_fp32():
            if key not in self._contexts:
                self._contexts[key] = self.conditions.context(transformer, embeds)
            return transformer(given, times[None], self._contexts[key], rope_offset=offset, cache=cache)

    def _cache(self, row: Row, text: int) -> tuple[int, KVCache | None]:
        """Where the window's positions begin, and what a causal model remembers of the frames before it.

        Windows of other models begin at 0, wherever they are: as they were trained.
        """
        rollout = self.parts.recipe.rollout
        if rollout is None:
            return 0, None
        kind = min(text, 0)  # one cache for all of the request's own prompts
        if kind not in self._caches:
            layers = self.parts.transformer.config.num_layers
            self._caches[kind] = rollouts.new_cache(rollout, self.segment, layers)
        self._caches[kind].begin(row.start, len(row.sigma))
        return row.start, self._caches[kind]
