"""Runs one request: its segments one after another, each through noise table, denoising loop and decoder; yields its
frames in order. All state of a running request is here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.device.mapped import check_unchanged
from fastvid.distributed.mesh import Layout, RankView
from fastvid.engine import decode, finite, pixels, progressive, upscaled, windows
from fastvid.engine.between import KnownBetween
from fastvid.engine.conditioning import NEGATIVE, SOURCE, SegmentDenoiser
from fastvid.engine.decode import Decoded, Decoder, KnownFrameBlend, Output
from fastvid.engine.events import Event, Frames, Step
from fastvid.engine.pixels import SegmentEnds
from fastvid.engine.queue import Ticket
from fastvid.engine.resume import Resume
from fastvid.engine.resume_checks import SegmentPlan
from fastvid.models.loaded import DRIVEN, Model, way_of
from fastvid.requests.after import Between, Enlarged
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Kept, Segment, Timeline
from fastvid.sampling.guidance import Denoise
from fastvid.sampling.loop import Row, walk
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import find_solver

READ_FRAMES = 16  # frames of a kept clip that are read at a time

log = logging.getLogger("fastvid.engine")


@dataclass(frozen=True)
class Job:
    """A checked and planned request. sigmas: noise levels [N] without the final zero.

    decode_chunk: latent frames per decoded chunk, decoded in decode_stripes horizontal stripes. beside: whether chunks
    are decoded beside denoising. layout: how ranks share the work.
    """

    request: Resolved
    timeline: Timeline
    sigmas: np.ndarray
    decode_chunk: int
    decode_stripes: int = 1
    beside: bool = False
    layout: Layout = Layout()


class PromptChanges:
    """Prompt changes that a caller requests, from any thread, while the request runs. Each applies from the next
    window, block or segment on. look: called with each new prompt, to warn of it."""

    def __init__(self, look: Callable[[str], None] = lambda prompt: None) -> None:
        self._lock, self._look = threading.Lock(), look
        self._pending: str | None = None
        self.applied: list[tuple[int, str]] = []  # (first frame, prompt), in order

    def request(self, prompt: str) -> None:
        """Requests a change; replaces a pending one."""
        self._look(prompt)
        with self._lock:
            self._pending = prompt

    def take(self, frame: int) -> str | None:
        """The pending prompt, which applies from this frame on; None if there is none."""
        with self._lock:
            prompt, self._pending = self._pending, None
            if prompt is not None:
                self.applied.append((frame, prompt))
            return prompt


class Prompts:
    """A request's prompts and their embeddings, by number: its own from 0 on, NEGATIVE and SOURCE, then changed
    ones."""

    def __init__(self, model: Model, request: Resolved, changes: PromptChanges) -> None:
        self._model, self._request, self._changes = model, request, changes
        self._embeds: dict[int, Tensor] = {}
        self._replaced: dict[int, int] = {}  # changed prompts: planned number -> current number

    def embeds(self, number: int) -> Tensor:
        """A prompt's embeddings [1, L, text_dim], computed on first use."""
        if number not in self._embeds:
            prompt, embeds = self._text(number)
            if embeds is None:
                self._embeds[number] = self._embed(prompt or "")
            else:
                given = torch.as_tensor(embeds).to(self._model.device, self._model.dtype)
                self._embeds[number] = finite.check_text(given, self._model)
        return self._embeds[number]

    def of(self, segment: Segment) -> set[int]:
        """The numbers of the prompts that a segment needs."""
        guided = self._request.guided(len(self._model.experts))
        others = {NEGATIVE: guided, SOURCE: self._request.source_prompt is not None}
        return {prompt for _, prompt in segment.prompts} | {number for number, used in others.items() if used}

    def change(self, number: int, frame: int) -> bool:
        """Replaces a prompt from a frame on if the caller has requested a change; returns whether it has."""
        if (prompt := self._changes.take(frame)) is None:
            return False
        new = len(self._request.prompts) + len(self._changes.applied) - 1
        self._embeds[new] = self._embed(prompt)
        self._replaced[number] = new
        return True

    def current(self, number: int) -> int:
        """The number of the prompt now used in place of this one."""
        return self._replaced.get(number, number)

    def _text(self, number: int) -> tuple[str | None, Any]:
        """A prompt's text, and its embeddings if the request has them."""
        request = self._request
        if number == NEGATIVE:
            return request.negative_prompt, request.negative_prompt_embeds
        if number == SOURCE:
            return request.source_prompt, None
        return request.prompts[number], request.prompt_embeds if number == 0 else None

    def _embed(self, prompt: str) -> Tensor:
        return finite.check_text(self._model.embed(prompt), self._model)


@dataclass
class Session:
    """Runs a job. latents: the clean latents of all segments so far, if kept. resume: saves progress, and restores what
    an earlier process has saved."""

    model: Model
    job: Job
    ticket: Ticket
    keep_latents: bool = True
    resume: Resume | None = None
    changes: PromptChanges = field(default_factory=PromptChanges)
    latents: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0, "decode": 0.0})
    refills: int = 0  # rows beyond the plan, for prompts that the caller changed

    def __post_init__(self) -> None:
        preset, segments = self.model.preset, self.job.timeline.segments
        context = max([preset.context, *(1 + max(s.left, s.right) // s.temporal for s in segments)])
        self.prompts = Prompts(self.model, self.job.request, self.changes)
        self.ends = SegmentEnds(2 * context * preset.temporal + 1)
        self.output = Output()
        self.steps_done = 0 if self.resume is None else self.resume.rows

    @property
    def total_steps(self) -> int:
        steps, request = len(self.job.sigmas), self.job.request
        return sum(windows.count_rows(self.model, s, steps, request) for s in self.job.timeline.segments)

    def run(self) -> Generator[Event, None, None]:
        """Yields Step and Frames events, frames in order. Raises Cancelled, and CheckpointError if a file that weights
        are used in was written into."""
        check_unchanged(self.model.placement.mapped)
        timeline, began = self.job.timeline, time.perf_counter()
        self._log_start()
        with closing(self.output):
            for number in timeline.order():
                part = timeline.parts[number]
                yield from self.copy(number, part) if isinstance(part, Kept) else self._generate(number, part)
                yield from self.output.end(number)
        log.info("request finished: %d frames in %.2f s", timeline.num_frames, time.perf_counter() - began)

    def copy(self, number: int, part: Kept) -> Iterator[Frames]:
        for start in range(part.start, part.stop, READ_FRAMES):
            self.ticket.check()
            yield from self.output.put(number, part.clip.read(start, min(start + READ_FRAMES, part.stop)))

    def _generate(self, number: int, segment: Segment) -> Iterator[Event]:
        total = self.total_steps
        with self.ticket.step():
            run = self.begin(number, segment)
        with closing(run):
            for row in run.rows():
                if row.position is not None:  # None: restored from a checkpoint
                    self.steps_done += 1
                    log.debug("step %d: level %.4f, %.3f s", self.steps_done, row.sigma, row.seconds)
                    yield Step(self.steps_done, total + self.refills, row.sigma, row.seconds)
                yield from self.put(number, run.decode(row))
            run.log_levers()
            # The next segment may start from these frames.
            yield from self.put(number, run.finish())

    def begin(self, number: int, segment: Segment) -> SegmentRun:
        """A segment's run, with the embeddings of its prompts."""
        began = time.perf_counter()
        for prompt in self.prompts.of(segment):
            self.prompts.embeds(prompt)
        run = SegmentRun(self, number, segment)
        self.seconds["text"] += time.perf_counter() - began
        return run

    def finishing(self, row: Row) -> Callable[[], None]:
        """A function that waits for a step just made, checks its latents, and saves them."""
        assert row.position is not None
        check, number = finite.Check(row.position.latents), self.steps_done + 1

        def finish() -> None:
            if not check.wait():
                step = f"step {number} of {self.total_steps + self.refills} (noise level {row.sigma:.3f})"
                raise finite.not_finite(self.model, f"{step}: the latents")
            if self.resume is not None:
                self.resume.save(row)

        return finish

    def put(self, number: int, chunks: Iterator[np.ndarray]) -> Iterator[Frames]:
        for frames in chunks:
            self.ends.add(number, frames)
            yield from self.output.put(number, frames)

    def _log_start(self) -> None:
        job, request = self.job, self.job.request
        size = f"{request.width}x{request.height}, {job.timeline.num_frames} frames"
        log.info("request begins: %s, %s, seed %s", request.verb, size, request.seed)
        work = f"{len(job.timeline.segments)} segments, {self.total_steps} steps in total, {request.solver}"
        where = "beside denoising" if job.beside else "in place"
        log.info("plan: %s; decoding %s, %d latent frames at a time", work, where, job.decode_chunk)


class SegmentRun:
    """Generates one segment, from noise to frames."""

    def __init__(self, session: Session, number: int, segment: Segment) -> None:
        self._session, self._number, self._segment = session, number, segment
        model, job, known = session.model, session.job, session.ends.known(segment)
        ranks = RankView(model.mesh, job.layout)
        self._denoising = SegmentDenoiser(model, job.request, job.sigmas, segment, known, session.prompts.embeds, ranks)
        self._stages = None
        if segment.half is not None:
            small, texts = segment.small, session.prompts.embeds
            scaled = progressive.scaled(known, small)
            draft = SegmentDenoiser(model, job.request, job.sigmas, small, scaled, texts, ranks)
            self._stages = progressive.TwoStages(self._denoising, draft)
        # A picture passed as a latent spans a group of frames, and decoding does not reproduce it exactly.
        pictures = pixels.stretched(known.pictures, segment) if self._denoising.takes_latents else {}
        # A driven segment starts from the pixels of the one before as its model makes them again, as published.
        left = None if known.left is None or way_of(model) == DRIVEN else known.left[-1]
        self._blend: KnownFrameBlend | KnownBetween
        if self._denoising.clip is not None and isinstance(segment.source, Between):
            self._blend = KnownBetween(self._denoising.clip)
        else:
            self._blend = KnownFrameBlend(segment, decode.frames_to_blend(segment, left, known.after, pictures))
        self._decoder = Decoder(model, segment, session.ticket, job.beside, job.decode_stripes)
        self._window: tuple[int, int] | None = None
        self._finish: Callable[[], None] | None = None  # of a step that a GPU may still be at

    def join(self, others: Sequence[SegmentRun]) -> None:
        """From now on `rows` are those of the others, too: their latents stand behind this one's, [B, C, t, h, w]."""
        self._denoising.others = [run._denoising for run in others]

    def close(self) -> None:
        """Ends the decoder's thread."""
        self._decoder.close()

    def log_levers(self) -> None:
        """Logs what the segment's levers have left out."""
        if (cache := self._denoising.levers.cache) is not None:
            computed, reused = cache.count.computed, cache.count.reused
            log.info("cache: %d of %d calls ran all blocks, %d reused them", computed, computed + reused, reused)

    # ------------------------------------------------------------ rows

    def rows(self) -> Iterator[Row]:
        """Yields the segment's rows; each is computed, and saved, in one turn of this request."""
        session, rows = self._session, self._walk()
        while True:
            with session.ticket.step():
                began = time.perf_counter()
                row = next(rows, None)
                self._finish_steps(row)
                seconds = time.perf_counter() - began
                session.seconds["denoise"] += seconds
            if row is None:
                return
            if row.position is not None:
                self._denoising.keep_first(row.position.first)
            yield replace(row, seconds=seconds)

    def _finish_steps(self, row: Row | None) -> None:
        """Waits for the step before `row`, which was just made (None: there was none left). So a GPU always has a step
        to go on with. Also waits for `row` itself where its latents are needed now: they leave, or are saved."""
        session, before = self._session, self._finish
        made = row is not None and row.position is not None
        self._finish = session.finishing(row) if row is not None and made else None
        if before is not None:
            before()
        at_once = session.model.device.type == "cpu" or session.resume is not None
        if self._finish is not None and row is not None and (at_once or row.clean is not None):
            self._finish()
            self._finish = None

    def _walk(self) -> Iterator[Row]:
        """Yields the rows restored from a checkpoint, then the remaining ones."""
        session, position = self._session, None
        if session.resume is not None:
            saved = session.resume.open_segment(self._number, self._denoising.caches, self._plan())
            yield from saved.rows
            if saved.finished:
                return
            position = saved.position
        self._denoising.first = None if position is None else position.first
        model, segment = session.model, self._segment
        solver = find_solver(session.job.request.solver)
        if model.ops.bound["solver_step"] != "reference":  # the reference is the solver itself, in eager PyTorch
            solver = replace(solver, operation=model.ops.solver_step)
        yield from walk(
            self._table(self._change_prompt),
            self._denoising.initial if self._stages is None else self._stages,
            solver,
            self._denoiser,
            fresh=self._denoising.fresh,
            position=position,
            keep=windows.most_kept(model, segment),
            anchor=model.preset.anchor is not None,
        )

    def _table(self, changes: Callable[[int], bool]) -> Iterator[TableRow]:
        model, job, columns = self._session.model, self._session.job, self._denoising.conditions.columns
        return windows.table_of(model, self._segment, job.sigmas, columns, job.request, changes)

    def _plan(self) -> SegmentPlan:
        """What the segment's checkpoint has to agree with. A request with one keeps its prompts."""
        model, denoising = self._session.model, self._denoising
        return SegmentPlan(
            self._table(lambda column: False),
            denoising.noise.shape,
            find_solver(self._session.job.request.solver),
            windows.most_kept(model, self._segment),
            model.preset.anchor is not None,
            None if model.preset.rollout is None else denoising.new_cache,
            denoising.caches_of,
            denoising.keys_like() if model.mesh.size == 1 else None,
            denoising.levers.cache,
            denoising.tokens_like,
            None if self._stages is None else self._stages.small_shape,
            denoising.kept,
        )

    def _denoiser(self, row: TableRow) -> Denoise:
        # A changed prompt starts with a window; for a causal model the noise table asks before each block.
        previous, self._window = self._window, (row.start, row.stop)
        if self._window != previous and self._session.model.preset.rollout is None:
            self._change_prompt(_first_free(row))
        stages = self._denoising if self._stages is None else self._stages
        return stages.denoiser(row, self._prompt_of(row))

    def _prompt_of(self, row: TableRow) -> int:
        """The prompt of a window's first free column, or of the column after a refill."""
        column = row.stop if row.refill else _first_free(row)
        return self._session.prompts.current(self._planned_prompt(column))

    def _planned_prompt(self, column: int) -> int:
        starts = windows.prompt_starts(self._session.model, self._segment)
        return [prompt for first, prompt in starts if first <= column][-1]

    def _change_prompt(self, column: int) -> bool:
        """Applies a prompt change that the caller has requested, from this column on; returns whether there is one."""
        session, segment = self._session, self._segment
        frame = max(0, (column - segment.lead - 1) * segment.temporal + 1 - segment.skip)
        start = session.job.timeline.starts()[self._number]
        changed = session.prompts.change(self._planned_prompt(column), start + frame)
        rollout = session.model.preset.rollout
        session.refills += changed and rollout is not None and rollout.recache and column > 0
        return changed

    # ------------------------------------------------------------ frames

    def decode(self, row: Row) -> Iterator[np.ndarray]:
        """The output frames uint8 [n, height, width, 3] that are ready after a row."""
        return self._frames(self._decoder.put(self._chunks(row)))

    def finish(self) -> Iterator[np.ndarray]:
        """The remaining output frames, after the last row."""
        return self._frames(self._decoder.finish())

    def _chunks(self, row: Row) -> tuple[Tensor, ...]:
        """The columns that became clean, split into decoder chunks, without reference columns and those not needed for
        the output."""
        if row.clean is None:
            return ()
        session, segment, start = self._session, self._segment, max(row.start, self._segment.lead)
        stop = segment.column_of(self._blend.last) + 1
        clean = row.clean[:, :, start - row.start : max(0, stop - row.start)]
        if clean.shape[2] == 0:
            return ()
        if session.keep_latents:
            end = segment.column_of(segment.skip + segment.num_frames - 1) + 1
            generated = clean[:, :, max(0, segment.lead + segment.left_columns - start) : max(0, end - start)]
            session.latents.extend([generated] if generated.shape[2] else [])
        return clean.split(session.job.decode_chunk, dim=2)

    def _frames(self, decoded: Iterator[Decoded]) -> Iterator[np.ndarray]:
        """The output frames of decoded chunks: seams blended, and an edited clip's unmasked pixels restored."""
        clip, segment = self._denoising.clip, self._segment
        for chunk, begin, seconds in decoded:
            self._session.seconds["decode"] += seconds
            for frames, start in self._blend.put(chunk, begin):
                if clip is not None and clip.mask is not None:
                    frames = clip.keep(frames, start - segment.skip)
                if isinstance(self._segment.source, Enlarged):
                    frames = upscaled.held(
                        frames, self._segment.source, start - self._segment.skip + self._segment.source_start
                    )
                yield frames


def _first_free(row: TableRow) -> int:
    """A window's first column that is not clean; its first if all are."""
    return row.start + int((row.sigma > 0).long().argmax())
