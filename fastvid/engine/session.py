"""One request while it runs: its segments one after another, each from noise table to engine to decoder, frames in the
order in which they come out. All state of a request is here, and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.device.precision import ieee_fp32
from fastvid.distributed.mesh import Layout, RankView
from fastvid.engine import conditioning, decode, rollouts
from fastvid.engine.conditioning import Conditions, Region, anchored
from fastvid.engine.events import Event, Frames, Step
from fastvid.engine.pixels import Known
from fastvid.engine.queue import Ticket
from fastvid.engine.resume import Resume
from fastvid.engine.seams import Seams, known_beside
from fastvid.engine.source_clip import SourceClip
from fastvid.engine.spool import Spool
from fastvid.engine.windows import count_rows, rows, turns
from fastvid.layers.kv_cache import KVCache
from fastvid.models.loaded import CACHE, REIMPOSED, TIMESTEPS, Model
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Edge, Kept, Segment, Timeline
from fastvid.sampling import (
    Denoise,
    Denoiser,
    Guided,
    Switched,
    Velocity,
    column_noise,
    find_solver,
    flow_edit,
    known,
    latent_noise,
    loop,
    timesteps,
)
from fastvid.sampling.loop import Row

KEPT_AT_ONCE = 16  # frames of a clip that are handed on at a time
NEGATIVE, SOURCE = -1, -2  # numbers of the prompts that are not the request's own


@dataclass(frozen=True)
class Job:
    """A request that was checked and planned, with everything that belongs to it alone. sigmas [N] without the zero.

    decode_chunk: latent frames that are decoded at a time, in decode_stripes stripes of rows; beside: while the
    denoiser goes on. layout: how ranks share it.
    """

    request: Resolved
    timeline: Timeline
    sigmas: np.ndarray
    decode_chunk: int
    decode_stripes: int = 1
    beside: bool = False
    layout: Layout = Layout()


class PromptChanges:
    """Prompts that the caller changes, from any thread, while a request runs: each from the next window, block or segment
    on."""

    def __init__(self) -> None:
        self._lock, self._asked = threading.Lock(), None
        self.taken: list[tuple[int, str]] = []  # (first frame, prompt), in the order in which they were taken

    def ask(self, prompt: str) -> None:
        """Ask for a prompt; one that was asked for before and not taken yet is dropped."""
        with self._lock:
            self._asked = prompt

    def take(self, frame: int) -> str | None:
        """The prompt from this frame on, once; None if none was asked for."""
        with self._lock:
            asked, self._asked = self._asked, None
            if asked is not None:
                self.taken.append((frame, asked))
            return asked


@dataclass
class Session:
    """Runs a job. `latents` are the clean ones of all segments so far, if they are kept; `resume` saves how far it is,
    and knows what an earlier process has made; `changes` is where prompts come from that are changed while it runs."""

    parts: Model
    job: Job
    ticket: Ticket
    keep_latents: bool = True
    resume: Resume | None = None
    changes: PromptChanges = field(default_factory=PromptChanges)
    latents: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0, "decode": 0.0})
    _ends: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # of segments: first, last frames
    _texts: dict[Any, Tensor] = field(default_factory=dict)
    _prompts_in_use: dict[int, int] = field(default_factory=dict)  # numbers of prompts that others stand for now
    _refilled: int = 0
    _step: int = 0

    @property
    def total_steps(self) -> int:
        steps, schedule = len(self.job.sigmas), self.job.request.schedule
        return sum(count_rows(self.parts, s, steps, schedule) for s in self.job.timeline.segments)

    def run(self) -> Iterator[Event]:
        """Step and Frames events, frames in order. Raises Cancelled."""
        timeline, spool, start, due = self.job.timeline, Spool(), 0, 0
        self._step = 0 if self.resume is None else self.resume.rows
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

    def _kept(self, part: Kept) -> Iterator[np.ndarray]:
        for start in range(part.start, part.stop, KEPT_AT_ONCE):
            self.ticket.check()
            yield part.clip.read(start, min(start + KEPT_AT_ONCE, part.stop))

    def _made(self, number: int, segment: Segment) -> Iterator[Any]:
        """Step events and uint8 frames of a segment."""
        total = self.total_steps
        with self.ticket.step():
            mark = time.perf_counter()
            for prompt in self._prompts(segment):
                self.text(prompt)
            maker = SegmentMaker(self, segment, self._known(segment), number)
            self.seconds["text"] += time.perf_counter() - mark
        for item in maker.run():
            if isinstance(item, np.ndarray):
                self._remember(number, item)
                yield item
            else:
                self._step += 1
                yield Step(self._step, total + self._refilled, *item)

    def _prompts(self, segment: Segment) -> set[int]:
        request = self.job.request
        guided = request.guided(len(self.parts.experts))
        others = {NEGATIVE: guided, SOURCE: request.source_prompt is not None}
        return {prompt for _, prompt in segment.prompts} | {number for number, used in others.items() if used}

    def _remember(self, number: int, frames: np.ndarray) -> None:
        """Keeps the first and last frames of a segment, as far as neighbours are shown them."""
        most = 2 * self.parts.preset.context * self.parts.preset.temporal + 1
        first, last = self._ends.get(number, (frames[:0], frames[:0]))
        first = first if len(first) >= most else np.concatenate((first, frames))[:most]
        self._ends[number] = (first, np.concatenate((last, frames))[-most:])

    def _known(self, segment: Segment) -> Known:
        left = self._edge(segment.before, segment.left, before=True) if segment.left else None
        right = self._edge(segment.after, segment.right, before=False) if segment.right else None
        if right is None or segment.over == 0:
            return Known(left, right, segment.pictures, None if right is None else right[0])
        follows = replace(segment.after, start=segment.after.start - segment.over)
        return Known(left, right, segment.pictures, self._edge(follows, 1, before=False)[0])

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

    def change_prompt(self, number: int, frame: int) -> bool:
        """Has another prompt stand for the one of this number from a frame on, if the caller wants that; whether it
        does."""
        if (wanted := self.changes.take(frame)) is None:
            return False
        new = len(self.job.request.prompts) + len(self.changes.taken) - 1
        with torch.no_grad(), ieee_fp32():
            self._texts[new] = self.parts.embed(wanted)
        self._prompts_in_use[number] = new
        return True

    def in_use(self, number: int) -> int:
        """The prompt that is meant by this number now."""
        return self._prompts_in_use.get(number, number)

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

    def __init__(self, session: Session, segment: Segment, known: Known, number: int = 0) -> None:
        self.session, self.segment, self.parts, self.number = session, segment, session.parts, number
        self.request, self.sigmas = session.job.request, session.job.sigmas
        self.view = RankView(session.parts.mesh, session.job.layout)
        self._noise_kept: tuple[tuple[int, int], Tensor] | None = None
        self._contexts: dict[tuple[int, int], Any] = {}
        self._caches: dict[int, KVCache] = {}
        self._window: tuple[int, int] | None = None
        self._first: Tensor | None = None  # the segment's first column, for models that keep it in view
        self.clip = None if segment.source is None else SourceClip(session.parts, segment, known, self.request.mask)
        with ieee_fp32():
            self.conditions: Conditions = conditioning.prepare(session.parts, self.request, segment, known, self.clip)
        # Pictures that reach a model by latents fill a group of frames, of which decoding gives back one less exactly.
        pictures = known.pictures if self.conditions.way in (TIMESTEPS, REIMPOSED, CACHE) else {}
        left = None if known.left is None else known.left[-1]
        self.seams = Seams(segment, known_beside(segment, left, known.after, pictures))

    # ------------------------------------------------------------ the loop

    def run(self) -> Iterator[Any]:
        """(sigma, seconds) after every row, and uint8 frames [n, height, width, 3] as they are decoded."""
        session, resume = self.session, self.session.resume
        walked = self._walk(None) if resume is None else resume.walk(self.number, self._caches, self._walk)
        decoder = decode.open_decoder(
            self.parts, self.segment, session.ticket, session.job.beside, session.job.decode_stripes
        )
        try:
            while (stepped := self._next(walked)) is not None:
                row, seconds = stepped
                if row.position is not None:  # else it was made by an earlier process
                    self._first = row.position.first
                    yield row.sigma, seconds
                yield from self._frames(decoder.put(self._to_decode(row)))
            # Only now: another segment may begin with these frames.
            yield from self._frames(decoder.finish())
        finally:
            decoder.close()

    def _walk(self, position: loop.Position | None) -> Iterator[loop.Walked]:
        """The rows from a position on, or all."""
        rollout = self.parts.preset.rollout
        self._first = None if position is None else position.first
        if rollout is None:
            table = rows(self.parts, self.segment, self.sigmas, self.conditions.columns, self.request.schedule)
        else:
            table = rollouts.rows(rollout, self.segment, self.sigmas, self._change_prompt)
        return loop.walk(
            table,
            self.source,
            find_solver(self.request.solver),
            self.denoiser,
            fresh=self.fresh,
            position=position,
            keep=0 if rollout is None else rollouts.most_refilled(rollout, self.segment, at_any=True),
            anchor=self.parts.preset.anchor is not None,
            # The solvers in eager PyTorch are what the operation's reference is, and need no weights.
            fused=None if self.parts.ops.bound["solver_step"] == "reference" else self.parts.ops.solver_step,
        )

    def _next(self, walked: Iterator[loop.Walked]) -> tuple[loop.Walked, float] | None:
        """The next row and the seconds it took, in this request's turn; None after the last one."""
        with self.session.ticket.step():
            mark = time.perf_counter()
            row = next(walked, None)
            decode.settle(self.parts.device)
            spent = time.perf_counter() - mark
            self.session.seconds["denoise"] += spent
            return None if row is None else (row, spent)

    def _frames(self, decoded: Iterator[decode.Decoded]) -> Iterator[np.ndarray]:
        """Those that come out of what is decoded, with the clip's own pixels where it stays."""
        for chunk, begin, seconds in decoded:
            self.session.seconds["decode"] += seconds
            for frames, start in self.seams.put(chunk, begin):
                kept = self.clip is not None and self.request.mask is not None
                yield self.clip.keep(frames, start - self.segment.skip) if kept else frames

    def _to_decode(self, row: loop.Walked) -> tuple[Tensor, ...]:
        """What became clean, in the decoder's chunks: without what stands in front, or behind all that comes out."""
        if row.ready is None:
            return ()
        segment, first = self.segment, max(row.start, self.segment.lead)
        ready = row.ready[:, :, first - row.start : max(0, segment.column_of(self.seams.last) + 1 - row.start)]
        if ready.shape[2] == 0:
            return ()
        if self.session.keep_latents:
            end = segment.column_of(segment.skip + segment.num_frames - 1) + 1
            own = ready[:, :, max(0, segment.lead + segment.left_columns - first) : max(0, end - first)]
            self.session.latents.extend([own] if own.shape[2] else [])
        return ready.split(self.session.job.decode_chunk, dim=2)

    # ------------------------------------------------------------ noise

    def source(self, start: int, stop: int) -> Tensor:
        """What a window takes in [1, C, t, h, w]: noise, and clean latents where they are known."""
        latents, at = self.noise(start, stop), self.conditions
        if self.clip is not None:
            level = 0.0 if self.request.source_prompt is not None else float(self.sigmas[0])
            latents = (1 - level) * self.clip.latents(start, stop, forget=False) + level * latents
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
        self._enter(row)
        # What the negative prompt made of the frames stays true when the other one changes.
        some = self.clip is not None or bool((row.sigma == 0).any())
        scales = (1.0,) * len(experts) if row.refill else request.guidance_scales(len(experts), some)
        region = self.region(row)
        velocities = [
            Guided(
                partial(self._velocity, row, region, expert, self.prompt_of(row)),
                partial(self._velocity, row, region, expert, NEGATIVE),
                scale,
                self.view.both,
            )
            for expert, scale in enumerate(scales)
        ]
        chosen = Switched(velocities, lambda sigma: experts.choose(timesteps(sigma.numpy(), request.solver).max()))
        if self.clip is not None and request.source_prompt is not None:
            made = self._flow_edit(row, region, chosen)
        else:
            made = Denoiser(chosen)
        return made if region is None else known(made, region.clean, region.places)

    def _flow_edit(self, row: Row, region: Region | None, target: Velocity) -> Denoise:
        """Along the difference to the velocity for the source's own prompt, with new noise at every level."""
        experts, solver = self.parts.experts, self.request.solver
        sources = [partial(self._velocity, row, region, expert, SOURCE) for expert in range(len(experts))]
        source = Switched(sources, lambda sigma: experts.choose(timesteps(sigma.numpy(), solver).max()))
        draw = 1 + int((self.sigmas > float(row.sigma.max())).sum())
        noise = self.fresh(row.start, torch.full((len(row.sigma),), draw))
        return flow_edit(target, source, self.clip.latents(row.start, row.stop), noise)

    def region(self, row: Row) -> Region | None:
        """The places that are known in the window's frames; a control branch has been shown them."""
        if self.clip is None or self.request.mask is None or self.conditions.way not in (TIMESTEPS, REIMPOSED, CACHE):
            return None
        return Region(self.clip.places(row.start, row.stop), self.clip.latents(row.start, row.stop))

    def _enter(self, row: Row) -> None:
        """Where a window begins another prompt may; a causal model's blocks ask when their table gets to them."""
        window, known = (row.start, row.stop), self._window
        self._window = window
        if window != known and self.parts.preset.rollout is None:
            free = row.start + int((row.sigma > 0).long().argmax())
            self._change_prompt(free)

    def _change_prompt(self, column: int) -> bool:
        """Whether another prompt begins with this column, since the caller wants it."""
        segment = self.segment
        prompt = [number for begin, number in turns(self.parts, segment) if begin <= column][-1]
        frame = max(0, (column - segment.lead - 1) * segment.temporal + 1 - segment.skip)
        changed = self.session.change_prompt(prompt, self.session.job.timeline.starts()[self.number] + frame)
        rollout = self.parts.preset.rollout
        self.session._refilled += changed and rollout is not None and rollout.recache and column > 0
        return changed

    def prompt_of(self, row: Row) -> int:
        """The number of the prompt that a window's first free column belongs to, or the column that a refill is for."""
        free = row.start + int((row.sigma > 0).long().argmax()) if bool((row.sigma > 0).any()) else row.start
        free = row.stop if row.refill else free
        return self.session.in_use([prompt for column, prompt in turns(self.parts, self.segment) if column <= free][-1])

    def _velocity(self, row: Row, region: Region | None, expert: int, text: int, x: Tensor, sigma: Tensor) -> Tensor:
        """One expert's velocity for a text. What it makes of the text is made in its first call, when it has to be on
        the device anyway."""
        parts, key = self.parts, (expert, text)
        embeds = self.session.text(text)
        given, levels = self.conditions.input(x, row, self.noise, region)
        if (anchor := self._anchor(row, text)) is not None:
            given, levels = anchored(given, levels, anchor)
        times = torch.from_numpy(timesteps(levels.numpy(), self.request.solver))
        offset, cache = self._cache(row, text)
        if anchor is not None:
            offset = (-parts.preset.anchor, *range(len(row.sigma)))
        if row.write_cache and cache is not None:
            times = torch.full_like(times, parts.preset.rollout.context_noise, dtype=torch.float64)
        elif parts.preset.whole_timesteps:
            times = times.round()
        with parts.experts.use(expert) as transformer, ieee_fp32():
            if key not in self._contexts:
                self._contexts[key] = self.conditions.context(transformer, embeds)
            behind, context = self.conditions.behind(row), self._contexts[key]
            shown = {"known": behind, "rope_offset": offset, "cache": cache, "view": self.view}
            made = transformer(given, times[None], context, **shown)
        return made if anchor is None else made[:, :, 1:]

    def _anchor(self, row: Row, text: int) -> Tensor | None:
        """The segment's first column, where a model keeps it in view of windows that begin behind it: what a thing
        looks like is lost over many windows otherwise, each of which is shown just the one before."""
        if self.parts.preset.anchor is None or row.start == 0:
            return None
        return self.clip.head if text == SOURCE else self._first

    def _cache(self, row: Row, text: int) -> tuple[int, KVCache | None]:
        """Where the window's positions begin, and what a causal model remembers of the frames before it.

        Windows of other models begin at 0, wherever they are: as they were trained.
        """
        rollout = self.parts.preset.rollout
        if rollout is None:
            return 0, None
        kind = min(text, 0)  # one cache for all of the request's own prompts
        if kind not in self._caches:
            layers = self.parts.transformer.config.num_layers
            self._caches[kind] = rollouts.new_cache(rollout, self.segment, layers)
        self._caches[kind].begin(row.start, len(row.sigma))
        return row.start, self._caches[kind]
