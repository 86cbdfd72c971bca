"""Checkpoints of running requests: folders from which another process resumes a request, with bit-identical frames.

    request.json            the request, its model and fastvid's version; written once
    clean-<n>-<segment>-... clean latents, one file per row that finished some; each written once
    state-<rows>-...        the loop's Position in the current window
    steps-<rows>-...        what a step cache has kept of earlier steps; of each rank
    cache-<rows>-...        a causal model's keys and values that changed since the last such file
    head.json               the index of the valid files; replaced last, so all files it names are complete
    rank-<n>-<rows>.json    of rank n, if ranks have cache-* or steps-* files: the index of its own (...-r<n>-...),
                            valid at head.json's rows; rank 0 writes everything else
    output.json             the unfinished file beside the video, see `fastvid.engine.resume_output`
    fastvid-files           the list of these files (of rank n: fastvid-files-r<n>); only what it names is ever removed
    lock                    held by the process that runs the request

Everything else follows from the request: noise, prompt embeddings, masks, encoded clips. Frames are not saved, since
decoding the clean latents again is cheap. The cost of a save does not grow with the video. A causal model is saved
after each block; an interrupted block is generated again.

Shapes: latents [1, C, T, h, w]; a cache's keys and values [B, slots, N of a frame, H, D].
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.checks import number
from fastvid.distributed.layout import agree, first, parse_parallel
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.engine import resume_checks as checks
from fastvid.engine import resume_contents as contents
from fastvid.engine import resume_files as files
from fastvid.engine import resume_identity as identity
from fastvid.engine.guidance import KeptDifference
from fastvid.engine.resume_checks import PlannedRows, SegmentPlan
from fastvid.engine.resume_contents import Head, Slots
from fastvid.engine.resume_position import position_from_tensors, position_to_tensors
from fastvid.engine.step_cache import StepCache
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.kv_cache import CacheState, KVCache
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment, Timeline
from fastvid.sampling.loop import Position, Row

EVERY = 1.0  # least seconds between saves
Caches = dict[int, KVCache]


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose JSON was read and checked, or a fresh one, with nothing written yet.

    about: request.json. clean: its clean-* files, in order.
    """

    folder: Path
    about: dict[str, Any]
    head: Head
    clean: tuple[str, ...] = ()
    fresh: bool = False


@dataclass(frozen=True)
class SavedSegment:
    """A segment's saved progress. rows: the rows that finished clean latents, without positions. position: where to
    continue after them; None at the start. finished: whether the segment is done."""

    rows: Iterable[Row] = ()
    position: Position | None = None
    finished: bool = False


# ---------------------------------------------------------------- before running


def begin(
    model: Model,
    verb: str,
    options: Mapping[str, Any],
    recipe: dict[str, Any],
    settings: Mapping[str, Any],
    layout: Layout | None = None,
) -> Resume | None:
    """The Resume of a new request; None without checkpoints. Writes nothing yet. settings: the checkpoint options.
    layout: how ranks share the request."""
    if not settings:
        return None
    folder = _new_folder(settings["checkpoint"], model.mesh)
    about = {
        "format": files.FORMAT,
        "verb": verb,
        "arguments": identity.arguments(verb, options, recipe),
        "recipe": recipe,
        "model": identity.fingerprint(model),
        "layout": str(layout or Layout()),
    } | ({"loras": identity.loras(model)} if model.asked else {})
    if (size := len(json.dumps(about))) > files.MAX_JSON - 1000:
        raise InvalidRequest(
            f"checkpoint: the texts and file names of this request take {size:,} bytes, and a checkpoint holds at most "
            f"{files.MAX_JSON - 1000:,}; leave checkpoint out"
        )
    return open_saved(Saved(folder, about, Head(), fresh=True), model, settings)


def _new_folder(path: Any, mesh: Mesh) -> Path:
    """The folder of a new checkpoint. Rank 0, which will create it, checks whether it can."""
    problem = None
    if mesh.rank == 0:
        try:
            files.new_folder(path)
        except InvalidRequest as error:
            problem = error
    if not agree(mesh, problem is None, first):
        raise problem or InvalidRequest(f"checkpoint: rank 0 cannot make one at {path}")
    return files.folder_of(path)


def open_saved(saved: Saved, model: Model, settings: Mapping[str, Any]) -> Resume:
    """The Resume of a checkpoint. settings: the checkpoint options. Raises InvalidRequest for bad ones."""
    every, keep = settings.get("checkpoint_every"), settings.get("keep_checkpoint", False)
    if not isinstance(keep, bool):
        raise InvalidRequest(f"keep_checkpoint={keep!r:.40}: allowed is True or False")
    every = EVERY if every is None else number(0.0, 86400.0, " seconds")("checkpoint_every", every)
    return Resume(saved, model.device, every, keep, model.mesh)


def read(path: Any) -> Saved:
    """Reads a checkpoint's JSON. Raises CheckpointError if it is missing, damaged or of another format, or if a file is
    missing."""
    folder = files.folder_of(path)
    about, head = contents.get_about(folder), contents.get_head(folder)
    clean = tuple(contents.clean_files(folder, head.clean))
    for name in filter(None, [head.state, head.steps, *(name for name, _ in head.caches)]):
        if not os.path.lexists(folder / name):
            raise CheckpointError(f"{folder}: {name} is missing from this checkpoint; start the request anew")
    return Saved(folder, about, head, clean)


def check_files(saved: Saved, model: Model, timeline: Timeline) -> None:
    """Raises CheckpointError if a file is damaged, or has not the size that the request's would have."""
    parts = {number: timeline.parts[number] for number in timeline.order()}
    segments = {number: part for number, part in parts.items() if isinstance(part, Segment)}
    checks.check_files(saved.folder, saved.head, saved.clean, model, segments)


def check(saved: Saved, model: Model) -> None:
    """Raises InvalidRequest if the checkpoint is from another model, version or precision."""
    identity.check_model(saved.about["model"], identity.fingerprint(model))


def layout_of(saved: Saved, model: Model) -> Layout | None:
    """The layout with which ranks shared the request, and with which it must resume. Raises CheckpointError if the
    checkpoint does not say."""
    layout = saved.about.get("layout")
    if layout is None and model.mesh.size > 1 and model.layout is None:
        raise CheckpointError(
            f"{saved.folder} does not say how ranks shared the request, and goes on in that way alone: "
            "load with the degrees that it had, such as parallel='guidance=2,ulysses=2'"
        )
    try:
        return None if layout is None else parse_parallel(layout).layout
    except InvalidRequest as error:
        raise CheckpointError(f"{saved.folder} is damaged: {error}") from error


def check_request(saved: Saved, recipe: Mapping[str, Any], model: Model) -> None:
    """Raises InvalidRequest if the checkpoint is of another request than this recipe. model: with its LoRAs."""
    identity.check_request(saved.about["recipe"], recipe)
    identity.check_loras(saved.about.get("loras", []), identity.loras(model))


def options(saved: Saved, inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verb and arguments to resume with. inputs: pictures, clips and tensors passed again. Raises InvalidRequest if
    one is missing."""
    return saved.about["verb"], identity.options(saved.about["arguments"], inputs)


# ---------------------------------------------------------------- while it runs


class Resume:
    """The checkpoint of a running request: restores what an earlier process has saved, and saves progress.

    A context manager: rank 0 holds the folder's lock. The checkpoint is removed when the block ends, and stays if it
    ends by an exception or with `keep`. every: least seconds between saves. mesh: the ranks that run the request
    together; all make the same calls. Ranks other than 0 write and read only their shard of a causal model's caches;
    rank 0's files that they read stay in place until all ranks have done the next row together.
    """

    def __init__(
        self, saved: Saved, device: torch.device, every: float = EVERY, keep: bool = False, mesh: Mesh | None = None
    ) -> None:
        self.folder, self._saved, self._device, self._mesh = saved.folder, saved, device, mesh or Mesh()
        self._every, self._keep, self._rank = every, keep, self._mesh.rank
        self._head, self.rows, self._clean, self._segments = saved.head, saved.head.rows, saved.head.clean, 0
        self._segment = 0  # the open segment's number
        self._caches: Caches = {}  # the open segment's
        self._steps: StepCache | None = None  # the open segment's
        self._kept: KeptDifference | None = None  # the open segment's
        self._cache_files: list[tuple[str, Slots]] = []
        self._saved_clean = iter(saved.clean)
        self._planned_rows = self._planned_clean = 0  # of the segments opened so far

    def __enter__(self) -> Resume:
        if self._rank:
            self._read_rank_index()
        else:
            self._lock_folder()
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._rank:
            return
        self._lock.release()
        if kind is None and not self._keep:
            files.remove(self.folder, self._live)

    @property
    def _live(self) -> set[str]:
        """The files that the head names."""
        return {self._head.state, self._head.steps, *self._saved.clean, *(name for name, _ in self._head.caches)} - {""}

    def _lock_folder(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: no checkpoint can be made: {error.strerror}") from error
        if self._saved.fresh:
            files.start_list(self.folder)
        self._lock = files.Lock(self.folder)
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise

    def _claim(self) -> None:
        """Claims the folder for this request, and removes files written after the last head.json: their rows are
        computed again."""
        exists = (self.folder / "request.json").exists()
        if exists if self._saved.fresh else not exists or contents.get_head(self.folder) != self._saved.head:
            raise CheckpointError(f"{self.folder}: another request has been here since this one was asked for")
        if self._saved.fresh:
            files.put_json(self.folder, "request.json", self._saved.about)
        for name in files.owned(self.folder, self._live) - self._live:
            if name.endswith((".safetensors", files.PARTIAL)) and files.rank_of(name) == 0:
                files.discard(self.folder, name)

    # ------------------------------------------------------------ saving

    def save(self, row: Row) -> None:
        """Saves a finished row of the open segment: the latents that became clean and, if a save is due, the loop's
        position."""
        assert row.position is not None
        self.rows += 1
        if row.clean is not None and self._rank == 0:
            numbers = {"row": torch.tensor(row.number), "start": torch.tensor(row.start)}
            stem = f"clean-{self._clean:06d}-{self._segment}"
            files.put_tensors(self.folder, stem, {"ready": row.clean, **numbers})
            self._clean += 1
        if self._caches and row.sigma > 0:  # inside a causal model's block the cache is inconsistent
            return
        due = time.monotonic() - self._saved_at >= self._every
        if agree(self._mesh, due, first) if self._parts else due:  # all ranks save their parts, or none does
            self._save_position(row.position)
            self._saved_at = time.monotonic()

    @property
    def _parts(self) -> bool:
        """Whether each rank saves a part of its own."""
        return bool(self._caches) or self._steps is not None

    def _save_position(self, position: Position) -> None:
        if self._rank and not self._parts:
            return
        old, state, steps = self._head, "", ""
        if self._rank == 0:
            kept = {} if self._kept is None else self._kept.tensors()
            state = files.put_tensors(self.folder, f"state-{self.rows:08d}", position_to_tensors(position) | kept)
        if self._steps is not None:
            steps = files.put_tensors(self.folder, self._own("steps"), self._steps.saved())
        places = self._save_caches()
        self._head = Head(self.rows, self._segments, self._clean, state, steps, self._cache_files, places)
        barrier = partial(agree, self._mesh, 0) if self._parts else int
        if self._rank:
            parts = {"steps": steps, "caches": self._cache_files, "places": places}
            files.put_json(self.folder, self._rank_index(self.rows), parts)
        barrier()  # all ranks' files are on disk
        if self._rank == 0:
            files.put_json(self.folder, "head.json", asdict(self._head))
        barrier()  # head.json names them
        index = self._rank_index(old.rows) if self._rank else old.state
        self._remove({index, old.steps, *(name for name, _ in old.caches)})

    def _own(self, kind: str) -> str:
        """The stem of a file of this rank's, now."""
        return f"{kind}-{self.rows:08d}" + (f"-r{self._rank}" if self._rank else "")

    def _save_caches(self) -> dict[str, CacheState]:
        """Writes the changed slots of this rank's caches; returns the caches' positions."""
        if changed := {str(text): sorted(cache.changed) for text, cache in self._caches.items() if cache.changed}:
            name = files.put_tensors(self.folder, self._own("cache"), dict(_cache_tensors(self._caches, changed)))
            self._cache_files = [*_without(self._cache_files, changed), (name, changed)]
        for cache in self._caches.values():
            cache.changed.clear()
        return {str(text): cache.place for text, cache in self._caches.items()}

    def _remove(self, names: set[str]) -> None:
        """Removes those of these files that the index no longer names."""
        for name in names - {"", self._head.state, self._head.steps, *(name for name, _ in self._cache_files)}:
            files.discard(self.folder, name)

    # ------------------------------------------------------------ resuming

    def open_segment(self, segment: int, caches: Caches, plan: SegmentPlan) -> SavedSegment:
        """Begins a segment and returns its saved progress. caches: the segment's caches; restored here, and saved from
        now on. So are plan.steps and plan.kept. Raises CheckpointError if what was saved is not what the plan says."""
        self._segments += 1
        self._segment, self._caches, self._cache_files = segment, caches, []
        self._steps, self._kept = plan.steps, plan.kept
        begun = self._saved.head.segments
        if self._segments > begun:
            return SavedSegment()
        if self._segments < begun:
            return SavedSegment(self._saved_rows(segment, self._planned(plan, None)), finished=True)
        tensors = files.get_tensors(self.folder, self._saved.head.state)
        planned = self._planned(plan, checks.saved_row(tensors))
        self._check_counts(planned)
        planned.check_position(tensors, position_to_tensors)
        planned.check_places(self._saved.head)
        caches.update(self._restored_caches(plan.cache_like))
        self._restore_steps(planned)
        if self._kept is not None:
            self._kept.restore(tensors, self._device)
        return SavedSegment(self._saved_rows(segment, planned), position_from_tensors(tensors, self._device))

    def _planned(self, plan: SegmentPlan, stop: int | None) -> PlannedRows:
        planned = PlannedRows(self.folder, plan, stop)
        self._planned_rows += len(planned.rows)
        self._planned_clean += len(planned.clean)
        return planned

    def _check_counts(self, planned: PlannedRows) -> None:
        head, made = self._saved.head, (self._planned_rows, self._planned_clean)
        if not planned.rows or (head.rows, head.clean) != made:
            raise checks.wrong(
                self.folder, f"it has {head.rows} rows and {head.clean} files of finished latents, its state has {made}"
            )

    def _saved_rows(self, segment: int, planned: PlannedRows) -> Iterator[Row]:
        for row in planned.clean:
            name = next(self._saved_clean, "")
            if not name or name.split("-")[2] != str(segment):
                raise checks.wrong(self.folder, f"its segment {segment} lacks finished latents")
            saved = files.get_tensors(self.folder, name)
            planned.check_clean(saved, row)
            yield Row(row.number, 0.0, saved["ready"].to(self._device), row.start, None)

    def _restored_caches(self, like: Tensor | None) -> Caches:
        head = self._saved.head
        restored = {int(text): KVCache.restored(place) for text, place in head.places.items()}
        for name, slots in head.caches:
            saved = files.get_tensors(self.folder, name)
            like = checks.check_cache(self.folder, saved, slots, head.places, like)
            for text, written in slots.items():
                for index, layer in enumerate(restored[int(text)].layers):
                    k, v = (saved[f"{text}.{index}.{kind}"].to(self._device) for kind in ("keys", "values"))
                    layer.put(written, k, v)
        self._cache_files = list(head.caches)
        return restored

    def _restore_steps(self, planned: PlannedRows) -> None:
        if (self._steps is not None) != (self._saved.head.steps != ""):
            raise checks.wrong(self.folder, "it has a step cache, or lacks one")
        if self._steps is not None:
            saved = files.get_tensors(self.folder, self._saved.head.steps)
            planned.check_steps(saved)
            self._steps.restore(saved, self._device)

    def _read_rank_index(self) -> None:
        if self._saved.head.places or self._saved.head.steps:
            name = self._rank_index(self._saved.head.rows)
            try:
                index = files.get_json(self.folder, name)
            except (FileNotFoundError, NotADirectoryError):
                raise CheckpointError(f"{self.folder}: {name} is missing; start the request anew") from None
            self._head = contents.as_head(self.folder, name, index, self._saved.head)
            self._saved = replace(self._saved, head=self._head)

    def _rank_index(self, rows: int) -> str:
        """The name of the file in which a rank other than 0 lists its own valid files."""
        return f"rank-{self._rank}-{rows:08d}.json"


def _cache_tensors(caches: Caches, changed: Mapping[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    for text, slots in changed.items():
        for layer, cache in enumerate(caches[int(text)].layers):
            k, v = cache.get(slots)
            yield f"{text}.{layer}.keys", k
            yield f"{text}.{layer}.values", v


def _without(caches: Any, changed: Mapping[str, list[int]]) -> Iterator[tuple[str, Slots]]:
    """The cache files still needed after these slots are rewritten. Whole files are restored, oldest first, so each
    slot gets its newest values."""
    rewritten = {(text, slot) for text, slots in changed.items() for slot in slots}
    needed: list[Any] = []
    for name, slots_of in reversed(caches):
        if newest := {(text, slot) for text, slots in slots_of.items() for slot in slots} - rewritten:
            needed.append((name, slots_of))
            rewritten |= newest
    return reversed(needed)
