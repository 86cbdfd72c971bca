"""Checks that a checkpoint's tensors are those of its request: before anything runs by the headers and digests of its
files, and when a segment is opened by a walk over its noise table without values.

That walk is the loop itself on tensors that have a shape and no memory. So what was saved has to have the very
shapes, levels, orders and positions that the request has after so many rows; of latents only that they are finite.

Shapes: latents [1, C, T, h, w]; a cache's keys and values [B, slots, N of a frame, H, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fastvid.engine import resume_files as files
from fastvid.engine.guidance import KeptDifference
from fastvid.engine.resume_contents import Head, Slots
from fastvid.engine.step_cache import StepCache
from fastvid.errors import CheckpointError
from fastvid.layers.kv_cache import CacheState, KVCache
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment
from fastvid.sampling.loop import Position, Row, walk
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.solvers import Solver

MOST_TENSORS = 32  # in a position

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class SegmentPlan:
    """What a segment's rows follow from, without values. shape: (C, h, w). keep, anchor: see `walk`.

    new_cache: makes a causal model's KV cache. cached: the numbers of those that a row uses. cache_like: a layer's keys
    [1, n, N, H, D], without values; None on several ranks, which have a share of them each. steps: its step cache.
    tokens: what one keeps of a call of so many columns at most [1, N, d], without values. small: (C, h, w) of the
    first steps of a progressive request. kept: the difference of guidance that rows reuse.
    """

    table: Iterable[TableRow]
    shape: tuple[int, int, int]
    solver: Solver
    keep: int = 0
    anchor: bool = False
    new_cache: Callable[[], KVCache] | None = None
    cached: Callable[[TableRow], Iterable[int]] = lambda row: ()
    cache_like: Tensor | None = None
    steps: StepCache | None = None
    tokens: Callable[[int], Tensor] | None = None
    small: tuple[int, int, int] | None = None
    kept: KeptDifference | None = None


@dataclass(frozen=True)
class _Shapes:
    """Two stages without values. full, small: (C, h, w)."""

    full: tuple[int, int, int]
    small: tuple[int, int, int]

    def initial(self, start: int, stop: int) -> Tensor:
        return _empty(self.full, stop - start)

    def is_small(self, latents: Tensor) -> bool:
        return latents.shape[3:] == self.small[1:]

    def shrunk(self, row: TableRow, known: Tensor | None) -> Tensor:
        return _empty(self.small, len(row.sigma))

    def grown(self, row: TableRow, clean: Tensor, known: Tensor | None) -> Tensor:
        return _empty(self.full, len(row.sigma))


def _empty(shape: tuple[int, int, int], columns: int) -> Tensor:
    """Latents [1, C, columns, h, w] without values."""
    channels, height, width = shape
    return torch.empty(1, channels, columns, height, width, dtype=torch.float32, device="meta")


class PlannedRows:
    """The rows of a segment up to one of them, or all. caches: a causal model's, empty, as they are then."""

    def __init__(self, folder: Path, plan: SegmentPlan, stop: int | None = None) -> None:
        self._folder, self._plan = folder, plan
        self.caches: dict[int, KVCache] = {}
        self.table: list[TableRow] = []
        source = _Shapes(plan.shape, plan.small) if plan.small else self._columns
        rows = walk(
            plan.table, source, plan.solver, lambda row: self._denoise(row),
            fresh=lambda start, draws: self._columns(start, start + len(draws)), keep=plan.keep, anchor=plan.anchor,
        )  # fmt: skip
        self.rows = list(islice(rows, stop))

    def _columns(self, start: int, stop: int) -> Tensor:
        return _empty(self._plan.shape, stop - start)

    def _denoise(self, row: TableRow) -> Callable[[Tensor, Tensor], Tensor]:
        self.table.append(row)
        if self._plan.new_cache is not None:
            for number in self._plan.cached(row):
                if number not in self.caches:
                    self.caches[number] = self._plan.new_cache()
                self.caches[number].begin(row.start, len(row.sigma))
        return lambda x, sigma: x

    @property
    def clean(self) -> list[Row]:
        """The rows that finish latents."""
        return [row for row in self.rows if row.clean is not None]

    def check_position(self, tensors: Named, parts: Callable[[Position], dict[str, Tensor]]) -> None:
        """Raises CheckpointError unless these are the tensors of the position after the last row. parts: takes a
        position apart."""
        position = self.rows[-1].position
        assert position is not None
        kept = {} if self._plan.kept is None else self._plan.kept.planned(self.table[-1])
        _check_tensors(self._folder, "its state", tensors, parts(position) | kept)
        if self._plan.new_cache is not None and self.rows[-1].sigma > 0:
            raise wrong(self._folder, "its state is inside a block")

    def check_steps(self, saved: Named) -> None:
        """Raises CheckpointError unless this is what the step cache has kept after the last row."""
        cache, rows = self._plan.steps, self.table
        assert cache is not None and self._plan.tokens is not None
        window = next((row for row in reversed(rows) if not row.write_cache), None)
        if window is None:
            place, count = (-1, -1), 0
        else:
            place = window.start, window.stop
            count = len(list(takewhile(lambda row: (row.start, row.stop) == place, _stepped(reversed(rows)))))
        if not cache.fits(saved, count, place, self._plan.tokens(place[1] - place[0])):
            raise wrong(self._folder, "its step cache is not that of the request after these steps")

    def check_clean(self, saved: Named, row: Row) -> None:
        """Raises CheckpointError unless these are the latents that a row finishes."""
        assert row.clean is not None
        numbers = {"row": torch.tensor(row.number), "start": torch.tensor(row.start)}
        _check_tensors(self._folder, "its finished latents", saved, {"ready": row.clean, **numbers})

    def check_places(self, head: Head) -> None:
        """Raises CheckpointError unless a head's caches are at the last row, and all their slots are in its files."""
        planned = {str(number): cache.place for number, cache in self.caches.items()}
        saved = {text: place for text, place in planned.items() if text in head.places}
        if dict(head.places) != saved or (self._plan.cache_like is not None and saved != planned):
            raise wrong(self._folder, "its caches are not where its state is")
        for text in saved:
            there = {slot for _, slots in head.caches for slot in slots.get(text, ())}
            if there != set(range(self.caches[int(text)].filled)):
                raise wrong(self._folder, "its caches lack frames")


def _stepped(rows: Iterable[TableRow]) -> Iterable[TableRow]:
    """The rows that denoise."""
    return (row for row in rows if not row.write_cache)


def check_cache(
    folder: Path, saved: Named, slots: Slots, places: Mapping[str, CacheState], like: Tensor | None
) -> Tensor | None:
    """Raises CheckpointError unless these are the keys and values of all layers in these slots. like: what they are
    like, if that is known; returned for the next file."""
    layers = {text: range(places[text]["layers"]) for text in slots}
    names = {f"{text}.{layer}.{kind}" for text in slots for layer in layers[text] for kind in ("keys", "values")}
    if set(saved) != names:
        raise wrong(folder, "a cache has other layers")
    for name, tensor in saved.items():
        like = tensor if like is None else like
        count, frame = len(slots[name.split(".")[0]]), like.shape[2:]
        if tensor.dtype != like.dtype or tensor.shape != (1, count, *frame) or not _is_finite(tensor):
            raise wrong(folder, "a cache has other shapes, or holds NaN")
    return like


def _check_tensors(folder: Path, what: str, saved: Named, planned: Named) -> None:
    if saved.keys() != planned.keys():
        names = ", ".join(sorted(saved.keys() ^ planned.keys()))
        raise wrong(folder, f"{what}: {names:.100} is missing, or too much")
    for name, tensor in planned.items():
        found = saved[name]
        if found.dtype != tensor.dtype or found.shape != tensor.shape:
            raise wrong(folder, f"{what}: {name} is {_kind(found)}; the request has {_kind(tensor)}")
        if not tensor.is_meta and not torch.equal(found, tensor):
            raise wrong(folder, f"{what}: {name} is not that of the request after these steps")
        if tensor.is_meta and not _is_finite(found):
            raise wrong(folder, f"{what}: {name} holds NaN or infinity")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _is_finite(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def wrong(folder: Path, why: str) -> CheckpointError:
    """The error for a checkpoint that is whole, but not of its request."""
    return CheckpointError(f"{folder} does not belong to its request: {why}; start the request anew")


# ---------------------------------------------------------------- before anything runs


def check_files(folder: Path, head: Head, clean: Iterable[str], model: Model, segments: Mapping[int, Segment]) -> None:
    """Checks the shapes and digests of a checkpoint's files. segments: by number, in order. Raises CheckpointError.

    No file is read that is larger than the request's own could be.
    """
    if head.segments > len(segments):
        raise wrong(folder, f"it has begun {head.segments} segments of {len(segments)}")
    shapes = {number: one.latent_shape(model.transformer.config.out_channels) for number, one in segments.items()}
    for name in clean:
        if (shape := shapes.get(int(name.split("-")[2]))) is None:
            raise wrong(folder, f"{name} is of no segment of it")
        _check_latents(folder, name, shape)
    if head.state:
        number = list(segments)[head.segments - 1]
        half = segments[number].half
        small = [side // segments[number].spatial for side in half or ()]
        _check_latents(folder, head.state, shapes[number], small)
        if head.steps:
            _check_steps_file(folder, head.steps, model, shapes[number])
        for name, slots in head.caches:
            _check_cache_file(folder, name, max(map(len, slots.values()), default=0), model, shapes[number])
    elif head.caches:
        raise wrong(folder, "it has caches without a state")


def _check_latents(folder: Path, name: str, latents: tuple[int, int, int, int], small: Sequence[int] = ()) -> None:
    """small: (h, w) that they may have too."""
    found = files.shapes(folder, name)
    channels, columns, *sides = latents
    for _, shape in found.values():
        fits = len(shape) < 2 or (len(shape) == 5 and shape[:2] == (1, channels))
        fits = fits and (len(shape) < 2 or list(shape[3:]) in (sides, list(small)))
        if not fits or (shape and shape[0 if len(shape) == 1 else 2] > columns):
            raise wrong(folder, f"{name} holds a tensor of the shape {list(shape)}")
    if len(found) > MOST_TENSORS:
        raise wrong(folder, f"{name} holds {len(found)} tensors")
    files.check_digest(folder, name)


def _check_steps_file(folder: Path, name: str, model: Model, latents: tuple[int, int, int, int]) -> None:
    """No tensor is larger than the tokens of the whole segment, of twice as many columns: some models see more."""
    found, config = files.shapes(folder, name), model.transformer.config
    most = 2 * (latents[1] + 2) * prod(latents[2:]) // prod(config.patch_size) * config.dim
    for _, shape in found.values():
        if prod(shape) > max(3, most):
            raise wrong(folder, f"{name} holds a tensor of the shape {list(shape)}")
    files.check_digest(folder, name)


def _check_cache_file(folder: Path, name: str, slots: int, model: Model, latents: tuple[int, int, int, int]) -> None:
    config = model.transformer.config
    frame = prod(latents[2:]) // prod(config.patch_size) * config.num_attention_heads * config.attention_head_dim
    for _, shape in files.shapes(folder, name).values():
        if len(shape) != 5 or prod(shape) > slots * frame:
            raise wrong(folder, f"{name} holds a tensor of the shape {list(shape)}")
    files.check_digest(folder, name)


def saved_row(saved: Named) -> int:
    """The number of the next row that a state names; 0 for none."""
    row = saved.get("row")
    return max(0, int(row)) if row is not None and row.ndim == 0 and row.dtype == torch.int64 else 0
