"""Checkpoints of running requests: a folder from which a request goes on after its process is gone, with the very same
frames. What is not there follows from the request: noise, texts, masks, encoded clips.

    request.json            what was asked, of which model, by which version; written once
    clean-<n>-<segment>-... clean latents, one file for each row that made some; each written once
    state-<rows>-...        the window that is being made: the loop's Position
    cache-<rows>-...        a causal model's keys and values that are new since the last such file
    head.json               which of these count; replaced last, so all that it names is complete
    rank-<n>-<rows>.json    of a causal model on several ranks: which of rank n's own cache-<rows>-r<n>-... count, at
                            the rows that head.json says; rank 0 writes everything else

So a checkpoint's cost does not grow with the video. Frames are not kept: decoding the clean latents again is cheap. A
causal model is saved after each block; a block that was cut off is made again.

Shapes: latents [1, C, T, h, w]; a cache's keys and values [B, slots, N of a frame, H, D].
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.checks import number
from fastvid.distributed.layout import agree, first, parse_parallel
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.engine import resume_files as files
from fastvid.engine import resume_identity as identity
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.kv_cache import CacheState, KVCache
from fastvid.models.loaded import Model
from fastvid.sampling.loop import Position, Row
from fastvid.sampling.solvers import SolverState

EVERY = 1.0  # seconds between two saves; slower rows are saved each
Caches = dict[int, KVCache]


@dataclass(frozen=True)
class Head:
    """How far a checkpoint is. rows: done in all. segments: begun. clean: files of clean latents that count. state: the
    last segment's file. caches: (file, {text: its slots}). places: the position of each cache."""

    rows: int = 0
    segments: int = 0
    clean: int = 0
    state: str = ""
    caches: list[tuple[str, dict[str, list[int]]]] = field(default_factory=list)
    places: dict[str, CacheState] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and found complete, or a fresh one, of which nothing is written yet. clean: the names
    of its files of clean latents, in order."""

    folder: Path
    about: dict[str, Any]
    head: Head
    clean: tuple[str, ...] = ()
    fresh: bool = False


@dataclass(frozen=True)
class SavedSegment:
    """What an earlier process has saved of a segment. rows: those that made clean latents, without positions. position:
    where to go on after them, None at the start. finished: nothing is left to do."""

    rows: Iterable[Row] = ()
    position: Position | None = None
    finished: bool = False


# ---------------------------------------------------------------- before running


def begin(
    model: Model,
    verb: str,
    options: Mapping[str, Any],
    recipe: dict[str, Any],
    said: Mapping[str, Any],
    layout: Layout | None = None,
) -> Resume | None:
    """The Resume of a new request, or None if no checkpoints are asked for. Nothing is written yet. layout: how ranks
    share it."""
    if not said:
        return None
    folder = _new_folder(said["checkpoint"], model.mesh)
    about = {
        "format": files.FORMAT,
        "verb": verb,
        "arguments": identity.arguments(verb, options, recipe),
        "recipe": recipe,
        "model": identity.fingerprint(model),
        "layout": str(layout or Layout()),
    }
    return go_on(Saved(folder, about, Head(), fresh=True), model, said)


def _new_folder(path: Any, mesh: Mesh) -> Path:
    """The folder of a new checkpoint. Rank 0, which makes it, checks whether it can."""
    refused = None
    if mesh.rank == 0:
        try:
            files.new_folder(path)
        except InvalidRequest as error:
            refused = error
    if not agree(mesh, refused is None, first):
        raise refused or InvalidRequest(f"checkpoint: rank 0 cannot make one at {path}")
    return files.folder_of(path)


def go_on(saved: Saved, model: Model, said: Mapping[str, Any]) -> Resume:
    """The Resume of a request that goes on. said: options about checkpoints. Raises InvalidRequest for bad ones."""
    every, keep = said.get("checkpoint_every"), said.get("keep_checkpoint", False)
    if not isinstance(keep, bool):
        raise InvalidRequest(f"keep_checkpoint={keep!r:.40}: allowed is True or False")
    every = EVERY if every is None else number(0.0, 86400.0, " seconds")("checkpoint_every", every)
    return Resume(saved, model.device, every, keep, model.mesh)


def read(path: Any) -> Saved:
    """A checkpoint, all of its files checked. Raises CheckpointError if it is missing, damaged or of a later format."""
    folder = files.folder_of(path)
    about = files.get_about(folder)
    head = _head(folder)
    clean = tuple(_clean_files(folder, head.clean))
    for name in (*clean, *filter(None, [head.state]), *(name for name, _ in head.caches)):
        files.get_tensors(folder, name)
    return Saved(folder, about, head, clean)


def _head(folder: Path) -> Head:
    try:
        return Head(**files.get_json(folder, "head.json"))
    except FileNotFoundError:  # the process ended before its first row
        return Head()
    except TypeError:
        raise files.damaged(folder / "head.json") from None


def _clean_files(folder: Path, count: int) -> Iterator[str]:
    found = {name[:12]: name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")}
    for index in range(count):
        if (stem := f"clean-{index:06d}") not in found:
            raise CheckpointError(f"{folder}: {stem} is missing from this checkpoint; start the request anew")
        yield found[stem]


def check(saved: Saved, model: Model) -> None:
    """Raises InvalidRequest if a checkpoint is of another model, version or precision."""
    identity.check_model(saved.about["model"], identity.fingerprint(model))


def layout_of(saved: Saved, model: Model) -> Layout | None:
    """How ranks shared the request and will go on with it. Raises CheckpointError if the checkpoint does not say."""
    said = saved.about.get("layout")
    if said is None and model.mesh.size > 1 and model.layout is None:
        raise CheckpointError(
            f"{saved.folder} does not say how ranks shared the request, and goes on in that way alone: "
            "load with the degrees that it had, such as parallel='guidance=2,ulysses=2'"
        )
    try:
        return None if said is None else parse_parallel(said).layout
    except InvalidRequest as error:
        raise CheckpointError(f"{saved.folder} is damaged: {error}") from error


def check_request(saved: Saved, recipe: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if a checkpoint is of another request than this recipe's."""
    identity.check_request(saved.about["recipe"], recipe)


def options(saved: Saved, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verb, and the arguments to go on with. Raises InvalidRequest if something has to be given again."""
    return saved.about["verb"], identity.options(saved.about["arguments"], given)


# ---------------------------------------------------------------- while it runs


class Resume:
    """One request's checkpoint while it runs: what an earlier process has saved, and what is saved now.

    A context: rank 0 holds the folder's lock in it. Left by an exception the checkpoint stays, else it is removed.
    every: the least seconds between two saves. keep: do not remove it. mesh: the ranks that make the request together;
    all make the same calls. Ranks beside rank 0 write and read only their part of a causal model's caches; what they
    read of rank 0's files stays until all have made the next row together.
    """

    def __init__(
        self, saved: Saved, device: torch.device, every: float = EVERY, keep: bool = False, mesh: Mesh | None = None
    ) -> None:
        self.folder, self._saved, self._device, self._mesh = saved.folder, saved, device, mesh or Mesh()
        self._every, self._keep, self._rank = every, keep, self._mesh.rank
        self._head = saved.head
        self.rows, self._clean, self._segments = saved.head.rows, saved.head.clean, 0
        self._segment = 0  # the number of the open one
        self._caches: Caches = {}  # its own
        self._cache_files: list[tuple[str, dict[str, list[int]]]] = []
        self._saved_clean = iter(saved.clean)
        self._next_clean = next(self._saved_clean, None)

    def __enter__(self) -> Resume:
        if self._rank:
            self._read_note()
        else:
            self._lock_folder()
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._rank:
            return
        self._lock.release()
        if kind is None and not self._keep:
            files.remove(self.folder)

    def _lock_folder(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: no checkpoint can be made: {error.strerror}") from error
        self._lock = files.Lock(self.folder)
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise

    def _claim(self) -> None:
        """Makes the folder this request's, and removes what was written after the last head: it is made again."""
        taken = (self.folder / "request.json").exists()
        if taken if self._saved.fresh else not taken or _head(self.folder) != self._saved.head:
            raise CheckpointError(f"{self.folder}: another request has been here since this one was asked for")
        if self._saved.fresh:
            files.put_json(self.folder, "request.json", self._saved.about)
        head = self._head
        live = {"request.json", "head.json", "lock", head.state, *self._saved.clean, *(name for name, _ in head.caches)}
        for path in self.folder.iterdir():
            if path.name not in live and path.suffix in (".safetensors", files.PARTIAL) and _rank_of(path.name) == 0:
                path.unlink()

    # ------------------------------------------------------------ saving

    def save(self, row: Row) -> None:
        """A row of the open segment is done: writes what became clean and, if it is time, where the loop stands."""
        assert row.position is not None
        self.rows += 1
        if row.clean is not None and self._rank == 0:
            numbers = {"row": torch.tensor(row.number), "start": torch.tensor(row.start)}
            stem = f"clean-{self._clean:06d}-{self._segment}"
            files.put_tensors(self.folder, stem, {"ready": row.clean, **numbers})
            self._clean += 1
        if self._caches and row.sigma > 0:  # within a causal model's block the cache holds what is half made
            return
        due = time.monotonic() - self._saved_at >= self._every
        if agree(self._mesh, due, first) if self._caches else due:  # caches are saved by all ranks or by none
            self._save_position(row.position)
            self._saved_at = time.monotonic()

    def _save_position(self, position: Position) -> None:
        if self._rank and not self._caches:
            return
        old, state = self._head, ""
        if self._rank == 0:
            state = files.put_tensors(self.folder, f"state-{self.rows:08d}", position_to_tensors(position))
        places = self._save_caches()
        self._head = Head(self.rows, self._segments, self._clean, state, self._cache_files, places)
        if self._rank:
            files.put_json(self.folder, self._note(self.rows), {"caches": self._cache_files, "places": places})
        if self._caches:
            agree(self._mesh, 0)  # all ranks' files are on the disk
        if self._rank == 0:
            files.put_json(self.folder, "head.json", asdict(self._head))
        if self._caches:
            agree(self._mesh, 0)  # rank 0 has said that they count
        self._remove({self._note(old.rows) if self._rank else old.state, *(name for name, _ in old.caches)})

    def _save_caches(self) -> dict[str, CacheState]:
        """Writes what is new in this rank's caches; returns their positions."""
        if changed := {str(text): sorted(cache.changed) for text, cache in self._caches.items() if cache.changed}:
            stem = f"cache-{self.rows:08d}" + (f"-r{self._rank}" if self._rank else "")
            name = files.put_tensors(self.folder, stem, dict(_cache_tensors(self._caches, changed)))
            self._cache_files = [*_without(self._cache_files, changed), (name, changed)]
        for cache in self._caches.values():
            cache.changed.clear()
        return {str(text): cache.place for text, cache in self._caches.items()}

    def _remove(self, names: set[str]) -> None:
        """Removes those of these files that do not count any more."""
        for name in names - {"", self._head.state, *(name for name, _ in self._cache_files)}:
            (self.folder / name).unlink(missing_ok=True)

    # ------------------------------------------------------------ going on

    def open_segment(self, segment: int, caches: Caches) -> SavedSegment:
        """Begins a segment: what was saved of it. caches: its own, restored here and saved from now on."""
        self._segments += 1
        self._segment, self._caches, self._cache_files = segment, caches, []
        begun = self._saved.head.segments
        if self._segments > begun:
            return SavedSegment()
        if self._segments < begun:
            return SavedSegment(self._saved_rows(segment), finished=True)
        tensors = files.get_tensors(self.folder, self._saved.head.state)
        caches.update(self._restored_caches())
        return SavedSegment(self._saved_rows(segment), position_from_tensors(tensors, self._device))

    def _saved_rows(self, segment: int) -> Iterator[Row]:
        while self._next_clean is not None and self._next_clean.split("-")[2] == str(segment):
            saved = files.get_tensors(self.folder, self._next_clean)
            yield Row(int(saved["row"]), 0.0, saved["ready"].to(self._device), int(saved["start"]), None)
            self._next_clean = next(self._saved_clean, None)

    def _restored_caches(self) -> Caches:
        head = self._saved.head
        restored = {int(text): KVCache.restored(place) for text, place in head.places.items()}
        for name, slots in head.caches:
            saved = files.get_tensors(self.folder, name)
            for text, written in slots.items():
                for index, layer in enumerate(restored[int(text)].layers):
                    k, v = (saved[f"{text}.{index}.{kind}"].to(self._device) for kind in ("keys", "values"))
                    layer.put(written, k, v)
        self._cache_files = list(head.caches)
        return restored

    def _read_note(self) -> None:
        head = self._saved.head
        if head.places:
            own = files.get_json(self.folder, self._note(head.rows))
            self._head = replace(head, **own)
            self._saved = replace(self._saved, head=self._head)

    def _note(self, rows: int) -> str:
        """The file in which a rank beside rank 0 says which of its cache files count."""
        return f"rank-{self._rank}-{rows:08d}.json"


def _rank_of(name: str) -> int:
    """The rank that writes a file of this name."""
    found = re.match(r"cache-\d+-r(\d+)-", name)
    return int(found[1]) if found else 0


def _cache_tensors(caches: Caches, changed: Mapping[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    for text, slots in changed.items():
        for layer, cache in enumerate(caches[int(text)].layers):
            k, v = cache.get(slots)
            yield f"{text}.{layer}.keys", k
            yield f"{text}.{layer}.values", v


def _without(caches: Any, changed: Mapping[str, list[int]]) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """The files that still count once these slots are written again. Files are restored as a whole, older ones first,
    so each slot gets its newest values."""
    fresh = {(text, slot) for text, slots in changed.items() for slot in slots}
    kept: list[Any] = []
    for name, held in reversed(caches):
        if own := {(text, slot) for text, slots in held.items() for slot in slots} - fresh:
            kept.append((name, held))
            fresh |= own
    return reversed(kept)


# ---------------------------------------------------------------- a position as tensors


def position_to_tensors(position: Position) -> dict[str, Tensor]:
    """A position as named tensors, without the source of new noise, which the loop has."""
    return dict(_named_tensors("", position))


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, int):
        yield name, torch.tensor(value)
    elif isinstance(value, tuple):
        for i, one in enumerate(value):
            yield from _named_tensors(f"{name}.{i}", one)
    elif isinstance(value, Position | SolverState):
        for each in fields(value):
            yield from _named_tensors(f"{name}.{each.name}".strip("."), getattr(value, each.name))
    else:
        assert value is None or name == "state.fresh", name


def position_from_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> Position:
    """The position of these tensors, latents on the device; levels and orders stay on the CPU, where solvers take
    them."""
    moved = {name: one.to(device) if one.ndim == 5 else one for name, one in tensors.items()}
    lists = {n: tuple(moved[k] for k in sorted(moved) if k.startswith(f"state.{n}.")) for n in ("sigmas", "x0s")}
    state = SolverState(moved.get("state.order"), lists["sigmas"], lists["x0s"], moved.get("state.x"))
    own: dict[str, Any] = {name: int(one) if one.ndim == 0 else one for name, one in moved.items() if "." not in name}
    return Position(state=state, **own)
