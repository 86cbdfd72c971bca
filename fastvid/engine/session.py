"""One request while it runs: its segments one after another, each from noise table to loop to decoder, and its frames in
order. All state of a request is here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.device.precision import ieee_fp32
from fastvid.distributed.mesh import Layout, RankView
from fastvid.engine import decode, windows
from fastvid.engine.conditioning import NEGATIVE, SOURCE, SegmentDenoiser
from fastvid.engine.decode import Decoded, Decoder, KnownFrameBlend, Output
from fastvid.engine.events import Event, Frames, Step
from fastvid.engine.pixels import SegmentEnds
from fastvid.engine.queue import Ticket
from fastvid.engine.resume import Resume
from fastvid.models.loaded import Model
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Kept, Segment, Timeline
from fastvid.sampling.guidance import Denoise
from fastvid.sampling.loop import Row, walk
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import find_solver

KEPT_AT_ONCE = 16  # frames of a clip that are read at a time

log = logging.getLogger("fastvid.engine")


@dataclass(frozen=True)
class Job:
    """A request that was checked and planned, and all that was decided for it. sigmas [N] without the zero.

    decode_chunk: latent frames decoded at a time, in decode_stripes stripes of rows; beside: while the denoiser goes on.
    layout: how ranks share it.
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
        self._lock = threading.Lock()
        self._asked: str | None = None
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


class Prompts:
    """The texts of a request by number: its prompts from 0 on, NEGATIVE and SOURCE, then those that changes brought."""

    def __init__(self, model: Model, request: Resolved, changes: PromptChanges) -> None:
        self._model, self._request, self._changes = model, request, changes
        self._embeds: dict[int, Tensor] = {}
        self._replaced: dict[int, int] = {}  # prompts that others stand for now

    def embeds(self, number: int) -> Tensor:
        """Embeddings [1, L, text_dim] of a prompt, made when first asked for."""
        if number not in self._embeds:
            prompt, embeds = self._text(number)
            if embeds is None:
                self._embeds[number] = self._embed(prompt or "")
            else:
                self._embeds[number] = torch.as_tensor(embeds).to(self._model.device, self._model.dtype)
        return self._embeds[number]

    def of(self, segment: Segment) -> set[int]:
        """The prompts that a segment needs."""
        guided = self._request.guided(len(self._model.experts))
        others = {NEGATIVE: guided, SOURCE: self._request.source_prompt is not None}
        return {prompt for _, prompt in segment.prompts} | {number for number, used in others.items() if used}

    def change(self, number: int, frame: int) -> bool:
        """Replaces a prompt from a frame on if the caller asked for that; whether it did."""
        if (prompt := self._changes.take(frame)) is None:
            return False
        new = len(self._request.prompts) + len(self._changes.taken) - 1
        self._embeds[new] = self._embed(prompt)
        self._replaced[number] = new
        return True

    def current(self, number: int) -> int:
        """The prompt that stands for this one now."""
        return self._replaced.get(number, number)

    def _text(self, number: int) -> tuple[str | None, Any]:
        """A prompt's text, or its embeddings where those were given."""
        request = self._request
        if number == NEGATIVE:
            return request.negative_prompt, request.negative_prompt_embeds
        if number == SOURCE:
            return request.source_prompt, None
        return request.prompts[number], request.prompt_embeds if number == 0 else None

    def _embed(self, prompt: str) -> Tensor:
        with torch.no_grad(), ieee_fp32():
            return self._model.embed(prompt)


@dataclass
class Session:
    """Runs a job. latents: the clean ones of all segments so far, if they are kept. resume: saves how far it is, and knows
    what an earlier process has made."""

    model: Model
    job: Job
    ticket: Ticket
    keep_latents: bool = True
    resume: Resume | None = None
    changes: PromptChanges = field(default_factory=PromptChanges)
    latents: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0, "decode": 0.0})
    refills: int = 0  # rows more than planned, for prompts that the caller changed

    def __post_init__(self) -> None:
        preset = self.model.preset
        self.prompts = Prompts(self.model, self.job.request, self.changes)
        self.ends = SegmentEnds(2 * preset.context * preset.temporal + 1)
        self._output = Output()
        self._step = 0 if self.resume is None else self.resume.rows

    @property
    def total_steps(self) -> int:
        steps, schedule = len(self.job.sigmas), self.job.request.schedule
        return sum(windows.count_rows(self.model, s, steps, schedule) for s in self.job.timeline.segments)

    def run(self) -> Iterator[Event]:
        """Step and Frames events, frames in order. Raises Cancelled."""
        timeline, mark = self.job.timeline, time.perf_counter()
        self._log_start()
        with closing(self._output):
            for number in timeline.order():
                part = timeline.parts[number]
                yield from self._kept(number, part) if isinstance(part, Kept) else self._made(number, part)
                yield from self._output.end(number)
        log.info("request finished: %d frames in %.2f s", timeline.num_frames, time.perf_counter() - mark)

    def _kept(self, number: int, part: Kept) -> Iterator[Frames]:
        for start in range(part.start, part.stop, KEPT_AT_ONCE):
            self.ticket.check()
            yield from self._output.put(number, part.clip.read(start, min(start + KEPT_AT_ONCE, part.stop)))

    def _made(self, number: int, segment: Segment) -> Iterator[Event]:
        total = self.total_steps
        with self.ticket.step():
            mark = time.perf_counter()
            for prompt in self.prompts.of(segment):
                self.prompts.embeds(prompt)
            run = SegmentRun(self, number, segment)
            self.seconds["text"] += time.perf_counter() - mark
        with closing(run):
            for row in run.rows():
                if row.position is not None:  # else an earlier process has made it
                    self._step += 1
                    log.debug("step %d: level %.4f, %.3f s", self._step, row.sigma, row.seconds)
                    yield Step(self._step, total + self.refills, row.sigma, row.seconds)
                yield from self._put(number, run.decode(row))
            # Only now: the next segment may begin with these frames.
            yield from self._put(number, run.finish())

    def _put(self, number: int, made: Iterator[np.ndarray]) -> Iterator[Frames]:
        for frames in made:
            self.ends.add(number, frames)
            yield from self._output.put(number, frames)

    def _log_start(self) -> None:
        job, request = self.job, self.job.request
        size = f"{request.width}x{request.height}, {job.timeline.num_frames} frames"
        log.info("request begins: %s, %s, seed %s", request.verb, size, request.seed)
        made = f"{len(job.timeline.segments)} segments, {self.total_steps} steps in all, {request.solver}"
        how = "beside denoising" if job.beside else "in place"
        log.info("plan: %s; decoding %s, %d latent frames at a time", made, how, job.decode_chunk)


class SegmentRun:
    """One segment from its noise to its frames."""

    def __init__(self, session: Session, number: int, segment: Segment) -> None:
        self._session, self._number, self._segment = session, number, segment
        model, job, known = session.model, session.job, session.ends.known(segment)
        ranks = RankView(model.mesh, job.layout)
        self._denoising = SegmentDenoiser(model, job.request, job.sigmas, segment, known, session.prompts.embeds, ranks)
        # A picture that reaches the model as a latent fills a group of frames, and decoding does not return it exactly.
        pictures = known.pictures if self._denoising.takes_latents else {}
        left = None if known.left is None else known.left[-1]
        self._blend = KnownFrameBlend(segment, decode.frames_to_blend(segment, left, known.after, pictures))
        self._decoder = Decoder(model, segment, session.ticket, job.beside, job.decode_stripes)
        self._window: tuple[int, int] | None = None

    def close(self) -> None:
        """Ends what decodes beside denoising."""
        self._decoder.close()

    # ------------------------------------------------------------ rows

    def rows(self) -> Iterator[Row]:
        """The rows of the segment, each made, and saved, in a turn of this request."""
        session, rows = self._session, self._walk()
        while True:
            with session.ticket.step():
                mark = time.perf_counter()
                row = next(rows, None)
                if row is not None and row.position is not None and session.resume is not None:
                    session.resume.save(row)
                decode.wait_for_gpu(session.model.device)
                seconds = time.perf_counter() - mark
                session.seconds["denoise"] += seconds
            if row is None:
                return
            if row.position is not None:
                self._denoising.first = row.position.first
            yield replace(row, seconds=seconds)

    def _walk(self) -> Iterator[Row]:
        """Rows of which an earlier process has saved what became clean, then the rest."""
        session, position = self._session, None
        if session.resume is not None:
            saved = session.resume.open_segment(self._number, self._denoising.caches)
            yield from saved.rows
            if saved.finished:
                return
            position = saved.position
        self._denoising.first = None if position is None else position.first
        model, request, segment = session.model, session.job.request, self._segment
        columns, schedule = self._denoising.conditions.columns, request.schedule
        solver = find_solver(request.solver)
        if model.ops.bound["solver_step"] != "reference":  # the solvers in eager PyTorch are that reference
            solver = replace(solver, operation=model.ops.solver_step)
        yield from walk(
            windows.table_of(model, segment, session.job.sigmas, columns, schedule, self._change_prompt),
            self._denoising.initial,
            solver,
            self._denoiser,
            fresh=self._denoising.noise.fresh,
            position=position,
            keep=windows.most_refilled(model, segment, any_block=True),
            anchor=model.preset.anchor is not None,
        )

    def _denoiser(self, row: TableRow) -> Denoise:
        # Another prompt may begin with a window. A causal model's blocks ask when their table gets to them.
        entered, self._window = self._window, (row.start, row.stop)
        if self._window != entered and self._session.model.preset.rollout is None:
            self._change_prompt(_first_free(row))
        return self._denoising.denoiser(row, self._prompt_of(row))

    def _prompt_of(self, row: TableRow) -> int:
        """The prompt of a window's first free column, or of the column that a refill is for."""
        column = row.stop if row.refill else _first_free(row)
        return self._session.prompts.current(self._planned_prompt(column))

    def _planned_prompt(self, column: int) -> int:
        starts = windows.prompt_starts(self._session.model, self._segment)
        return [prompt for first, prompt in starts if first <= column][-1]

    def _change_prompt(self, column: int) -> bool:
        """Whether another prompt begins with this column because the caller asked for it."""
        session, segment = self._session, self._segment
        frame = max(0, (column - segment.lead - 1) * segment.temporal + 1 - segment.skip)
        start = session.job.timeline.starts()[self._number]
        changed = session.prompts.change(self._planned_prompt(column), start + frame)
        rollout = session.model.preset.rollout
        session.refills += changed and rollout is not None and rollout.recache and column > 0
        return changed

    # ------------------------------------------------------------ frames

    def decode(self, row: Row) -> Iterator[np.ndarray]:
        """Frames uint8 [n, height, width, 3] that come out now that a row is done."""
        return self._frames(self._decoder.put(self._chunks(row)))

    def finish(self) -> Iterator[np.ndarray]:
        """The frames that are left after the last row."""
        return self._frames(self._decoder.finish())

    def _chunks(self, row: Row) -> tuple[Tensor, ...]:
        """What became clean, in the decoder's chunks: without reference columns, and without what is not shown."""
        if row.clean is None:
            return ()
        session, segment, start = self._session, self._segment, max(row.start, self._segment.lead)
        stop = segment.column_of(self._blend.last) + 1
        clean = row.clean[:, :, start - row.start : max(0, stop - row.start)]
        if clean.shape[2] == 0:
            return ()
        if session.keep_latents:
            end = segment.column_of(segment.skip + segment.num_frames - 1) + 1
            own = clean[:, :, max(0, segment.lead + segment.left_columns - start) : max(0, end - start)]
            session.latents.extend([own] if own.shape[2] else [])
        return clean.split(session.job.decode_chunk, dim=2)

    def _frames(self, decoded: Iterator[Decoded]) -> Iterator[np.ndarray]:
        """The frames that come out of what is decoded, with an edited clip's own pixels where nothing changes."""
        clip = self._denoising.clip
        for chunk, begin, seconds in decoded:
            self._session.seconds["decode"] += seconds
            for frames, start in self._blend.put(chunk, begin):
                if clip is not None and clip.mask is not None:
                    frames = clip.keep(frames, start - self._segment.skip)
                yield frames


def _first_free(row: TableRow) -> int:
    """The first column of a window that is not clean, or its first."""
    return row.start + int((row.sigma > 0).long().argmax())
