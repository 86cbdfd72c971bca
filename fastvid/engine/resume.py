"""Checkpoints of running requests: a folder from which a request goes on after its process is gone, with the very same
frames. What is not there is a function of the request (noise, text, masks, what clips are encoded to).

    request.json            what was asked, of which model, by which version; written once
    clean-<n>-<segment>-... latents that were handed out, in the groups in which they were; each written once
    state-<rows>-...        the window that is being made: the engine's Position
    cache-<rows>-...        a causal model's keys and values of the frames that it has been through since the last one
    head.json               which of these count; replaced last, so what it names is whole
    rank-<n>-<rows>.json    of a causal model on several ranks: which of rank n's own cache-<rows>-r<n>-... count, at
                            the rows that head.json says; rank 0 writes all else

So a checkpoint's cost does not grow with the video. Frames are not kept: decoding the clean latents again is cheap
against making them. A causal model is saved where a chunk ends, and a chunk that was cut off is made again.

Shapes: latents [1, C, T, h, w]; a cache's keys and values [B, slots, N of a frame, H, D].
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.checks import number
from fastvid.distributed.layout import agree, first, parse
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.engine import resume_files as files
from fastvid.engine import resume_identity as identity
from fastvid.engine.resume_position import flat, unflat
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.kv_cache import KVCache
from fastvid.models.loaded import Model
from fastvid.sampling.loop import Position, Walked

EVERY = 1.0  # seconds: every row where rows take longer
OPTIONS = ("checkpoint", "checkpoint_every", "keep_checkpoint")
"""What the verbs take beside a request's arguments."""

Caches = dict[int, KVCache]
Begin = Callable[[Position | None], Iterator[Walked]]


@dataclass(frozen=True)
class Head:
    """How far a checkpoint is. rows: done in all. segments: begun. clean: files of clean latents that count. state:
    the last segment's file. caches: (file, {text: its slots}). places: where each of its caches stands."""

    rows: int = 0
    segments: int = 0
    clean: int = 0
    state: str = ""
    caches: list[tuple[str, dict[str, list[int]]]] = field(default_factory=list)
    places: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and found whole, or a fresh one, of which nothing is written yet. clean: the names of
    its files of clean latents, in order."""

    folder: Path
    about: dict[str, Any]
    head: Head
    clean: tuple[str, ...] = ()
    fresh: bool = False


# ---------------------------------------------------------------- before running


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is said about checkpoints, the request's arguments). Raises InvalidRequest."""
    said = {name: value for name, value in options.items() if name in OPTIONS and value is not None}
    if said and "checkpoint" not in said:
        raise InvalidRequest(f"{next(iter(said))} says how checkpoints are written; give checkpoint= too")
    return said, {name: value for name, value in options.items() if name not in OPTIONS}


def begin(
    parts: Model,
    verb: str,
    options: Mapping[str, Any],
    recipe: dict[str, Any],
    said: Mapping[str, Any],
    layout: Layout | None = None,
) -> Resume | None:
    """The Resume of a new request, or None if there are to be no checkpoints. Nothing is written yet. layout: how ranks
    share it."""
    if not said:
        return None
    folder = _place(said["checkpoint"], parts.mesh)
    about = {
        "format": files.FORMAT,
        "verb": verb,
        "arguments": identity.arguments(verb, options, recipe),
        "recipe": recipe,
        "model": identity.identity(parts),
        "layout": str(layout or Layout()),
    }
    return _keeper(Saved(folder, about, Head(), fresh=True), parts, said)


def _place(path: Any, mesh: Mesh) -> Path:
    """Where a new checkpoint will be. Rank 0, which makes it, looks whether it can be."""
    refused = None
    if mesh.rank == 0:
        try:
            files.free_place(path)
        except InvalidRequest as error:
            refused = error
    if not agree(mesh, refused is None, first):
        raise refused or InvalidRequest(f"checkpoint: rank 0 cannot make one at {path}")
    return files.folder_of(path)


def go_on(saved: Saved, parts: Model, said: Mapping[str, Any]) -> Resume:
    """The Resume of a request that goes on."""
    return _keeper(saved, parts, said)


def _keeper(saved: Saved, parts: Model, said: Mapping[str, Any]) -> Resume:
    return (Follower if parts.mesh.rank else Resume)(saved, parts.device, **_how(said), mesh=parts.mesh)


def _how(said: Mapping[str, Any]) -> dict[str, Any]:
    every, keep = said.get("checkpoint_every"), said.get("keep_checkpoint", False)
    if not isinstance(keep, bool):
        raise InvalidRequest(f"keep_checkpoint={keep!r:.40}: allowed is True or False")
    every = EVERY if every is None else number(0.0, 86400.0, " seconds")("checkpoint_every", every)
    return {"every": every, "keep": keep}


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
    except FileNotFoundError:  # it ended before its first row did
        return Head()
    except TypeError:
        raise files.damaged(folder / "head.json") from None


def _clean_files(folder: Path, count: int) -> Iterator[str]:
    found = {name[:12]: name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")}
    for index in range(count):
        if (stem := f"clean-{index:06d}") not in found:
            raise CheckpointError(f"{folder}: {stem} is missing from this checkpoint; start the request anew")
        yield found[stem]


def check(saved: Saved, parts: Model) -> None:
    """Raises InvalidRequest if a checkpoint is of another model, version or precision."""
    identity.check_model(saved.about["model"], identity.identity(parts))


def layout_of(saved: Saved, parts: Model) -> Layout | None:
    """How ranks shared the request, which is how they go on with it. Raises CheckpointError where that is not told."""
    said = saved.about.get("layout")
    if said is None and parts.mesh.size > 1 and parts.layout is None:
        raise CheckpointError(
            f"{saved.folder} does not say how ranks shared the request, and goes on in that way alone: "
            "load with the degrees that it had, such as parallel='guidance=2,ulysses=2'"
        )
    try:
        return None if said is None else parse(said).layout
    except InvalidRequest as error:
        raise CheckpointError(f"{saved.folder} is damaged: {error}") from error


def check_request(saved: Saved, recipe: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if it is of another request than that of this recipe."""
    identity.check_request(saved.about["recipe"], recipe)


def options(saved: Saved, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verb, and the arguments to go on with. Raises InvalidRequest if something has to be given again."""
    return saved.about["verb"], identity.options(saved.about["arguments"], given)


# ---------------------------------------------------------------- while it runs


class Resume:
    """Writes one request's checkpoint while it runs, and brings back what an earlier process has saved.

    A context: it holds the folder's lock; left by an exception the checkpoint stays, else it is removed.
    every: the least seconds between two saves. keep: do not remove it. mesh: the ranks that make the request together;
    all call `walk` alike.
    """

    def __init__(
        self, saved: Saved, device: torch.device, every: float = EVERY, keep: bool = False, mesh: Mesh | None = None
    ) -> None:
        self.folder, self._saved, self._device, self._mesh = saved.folder, saved, device, mesh or Mesh()
        self._every, self._keep = every, keep
        self._head = saved.head
        self.rows, self._clean, self._segments = saved.head.rows, saved.head.clean, 0
        self._caches: list[tuple[str, dict[str, list[int]]]] = []
        self._again = iter(saved.clean)
        self._ahead = next(self._again, None)

    def __enter__(self) -> Resume:
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
        self._at = time.monotonic()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._lock.release()
        if kind is None and not self._keep:
            files.remove(self.folder)

    def _claim(self) -> None:
        """Makes it this request's, and removes what was written after the last head: that is made again."""
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

    def walk(self, segment: int, caches: Caches, begin: Begin) -> Iterator[Walked]:
        """The rows of a segment: of those that were saved only what became clean in them, with no position; then
        `begin` from where they end.

        caches: the segment's own, which are put back here.
        """
        self._segments += 1
        position, self._caches = None, []
        if self._segments <= self._saved.head.segments:
            yield from self._handed_out(segment)
            if self._segments < self._saved.head.segments:
                return
            position = self._position()
            caches.update(self._restored())
        for walked in begin(position):
            self._take(segment, walked, caches)
            yield walked

    # ------------------------------------------------------------ writing

    def _take(self, segment: int, walked: Walked, caches: Caches) -> None:
        self.rows += 1
        if walked.ready is not None:
            self._hand_out(segment, walked)
        between = bool(caches) and walked.sigma > 0  # in a causal model's chunk the cache holds what is half made
        if between:
            return
        due = time.monotonic() - self._at >= self._every
        if agree(self._mesh, due, first) if caches else due:  # caches are saved by all ranks, or by none
            self._save(walked.position, caches)
            self._at = time.monotonic()

    def _hand_out(self, segment: int, walked: Walked) -> None:
        notes = {"row": torch.tensor(walked.row), "start": torch.tensor(walked.start)}
        files.put_tensors(self.folder, f"clean-{self._clean:06d}-{segment}", {"ready": walked.ready, **notes})
        self._clean += 1

    def _save(self, position: Position, caches: Caches) -> None:
        before = self._head
        state = files.put_tensors(self.folder, f"state-{self.rows:08d}", flat(position))
        places = self._save_caches(f"cache-{self.rows:08d}", caches)
        if caches:
            agree(self._mesh, 0)  # the others' are on the disk
        self._head = Head(self.rows, self._segments, self._clean, state, self._caches, places)
        files.put_json(self.folder, "head.json", asdict(self._head))
        if caches:
            agree(self._mesh, 0)
        self._forget({before.state, *(name for name, _ in before.caches)} - {state, ""})

    def _save_caches(self, stem: str, caches: Caches) -> dict[str, dict[str, Any]]:
        """Writes what is new in this rank's caches; where they stand."""
        if changed := {str(text): sorted(cache.changed) for text, cache in caches.items() if cache.changed}:
            name = files.put_tensors(self.folder, stem, dict(_cache_tensors(caches, changed)))
            self._caches = [*_without(self._caches, changed), (name, changed)]
        for cache in caches.values():
            cache.changed.clear()
        return {str(text): cache.place for text, cache in caches.items()}

    def _forget(self, names: set[str]) -> None:
        """Removes files of which nothing counts any more."""
        for name in names - {name for name, _ in self._caches}:
            (self.folder / name).unlink(missing_ok=True)

    # ------------------------------------------------------------ going on

    def _handed_out(self, segment: int) -> Iterator[Walked]:
        while self._ahead is not None and self._ahead.split("-")[2] == str(segment):
            there = files.get_tensors(self.folder, self._ahead)
            yield Walked(int(there["row"]), 0.0, there["ready"].to(self._device), int(there["start"]), None)
            self._ahead = next(self._again, None)

    def _position(self) -> Position:
        return unflat(files.get_tensors(self.folder, self._saved.head.state), self._device)

    def _restored(self) -> Caches:
        head = self._saved.head
        made = {int(text): KVCache.restored(place) for text, place in head.places.items()}
        for name, slots in head.caches:
            there = files.get_tensors(self.folder, name)
            for text, written in slots.items():
                for at, layer in enumerate(made[int(text)].layers):
                    k, v = (there[f"{text}.{at}.{kind}"].to(self._device) for kind in ("keys", "values"))
                    layer.put(written, k, v)
        self._caches = list(head.caches)
        return made


class Follower(Resume):
    """That of a rank beside rank 0, which writes its part of a causal model's caches alone, and brings back its part.

    What it reads of rank 0's is there until all have made the next row together.
    """

    def __enter__(self) -> Resume:
        head, self._at = self._saved.head, time.monotonic()
        if head.places:
            own = files.get_json(self.folder, self._note(head.rows))
            self._saved = replace(self._saved, head=replace(head, **own))
            self._head = self._saved.head
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def _note(self, rows: int) -> str:
        return f"rank-{self._mesh.rank}-{rows:08d}.json"

    def _hand_out(self, segment: int, walked: Walked) -> None:
        pass

    def _save(self, position: Position, caches: Caches) -> None:
        if not caches:
            return
        before = self._head
        places = self._save_caches(f"cache-{self.rows:08d}-r{self._mesh.rank}", caches)
        files.put_json(self.folder, self._note(self.rows), {"caches": self._caches, "places": places})
        agree(self._mesh, 0)
        agree(self._mesh, 0)  # rank 0 has said which counts
        self._head = Head(self.rows, caches=self._caches, places=places)
        self._forget({self._note(before.rows), *(name for name, _ in before.caches)})


def _rank_of(name: str) -> int:
    """Which rank writes a file of this name."""
    found = re.match(r"cache-\d+-r(\d+)-", name)
    return int(found[1]) if found else 0


def _cache_tensors(caches: Caches, changed: Mapping[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    for text, slots in changed.items():
        for layer, cache in enumerate(caches[int(text)].layers):
            k, v = cache.get(slots)
            yield f"{text}.{layer}.keys", k
            yield f"{text}.{layer}.values", v


def _without(caches: Any, changed: Mapping[str, list[int]]) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """The files of which something still counts once these slots are written anew. All that is in them is put back,
    older ones first, so they keep their own slots."""
    fresh = {(text, slot) for text, slots in changed.items() for slot in slots}
    kept: list[Any] = []
    for name, held in reversed(caches):
        if own := {(text, slot) for text, slots in held.items() for slot in slots} - fresh:
            kept.append((name, held))
            fresh |= own
    return reversed(kept)
