"""The denoising loop: walks a noise table row by row.

Columns are latent frames, counted along the whole stream. A table row takes a window of them from one noise level each
to the next; the table decides everything else (see `fastvid.sampling.noise_table`). The loop yields after every row, so
progress, cancelling and streaming need no hooks, and latent frames come out as soon as their level is zero. Columns
left of the window are dropped: memory does not grow with the table.

Shapes: C channels, T columns of the window, h/w latent height and width; latents [1, C, T, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastvid.sampling.guidance import Denoise, Denoiser
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.solvers import Solver, SolverState

Source = Callable[[int, int], Tensor]
"""(start, stop) -> the columns that enter the window, at the level at which the table starts them."""

Fresh = Callable[[int, Tensor], Tensor]
"""(start, draws [T]) -> new noise for the columns from `start` on, for solvers that draw some."""


@runtime_checkable
class Stages(Protocol):
    """Latents at two sizes, of a table with small rows. known: the clean columns [1, C, n, h, w] of full size with
    which the row's window begins; None: there are none."""

    def initial(self, start: int, stop: int) -> Tensor:
        """The columns that enter a window at full size."""
        ...

    def is_small(self, latents: Tensor) -> bool: ...

    def shrunk(self, row: TableRow, known: Tensor | None) -> Tensor:
        """The small latents that a window starts from."""
        ...

    def grown(self, row: TableRow, clean: Tensor, known: Tensor | None) -> Tensor:
        """A window's latents at full size and the row's level, from small clean ones."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a walk stands between two rows: all that it needs to go on.

    row: number of the next row. start: the window's first column. latents: the window's. done: the columns before this
    one were yielded. kept: the last of those, for rows that come back to them. first: the first column of all.
    """

    row: int
    start: int
    latents: Tensor
    state: SolverState
    done: int
    kept: Tensor | None = None
    first: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """A finished row. number: in the table. sigma: its highest level. clean: the latents [1, C, n, h, w] that reached
    zero in it, from column `start` on. position: after it; None if the row is read from a checkpoint, which keeps
    only what became clean. seconds: that it took, where that was measured."""

    number: int
    sigma: float
    clean: Tensor | None
    start: int
    position: Position | None
    seconds: float = 0.0


def walk(
    table: Iterable[TableRow],
    source: Source | Tensor | Stages,
    solver: Solver,
    denoise: Callable[[TableRow], Denoise],
    *,
    fresh: Fresh | None = None,
    position: Position | None = None,
    keep: int = 0,
    anchor: bool = False,
) -> Iterator[Row]:
    """Denoise columns along a table; yields once a row.

    Windows move to the right over clean columns. Columns must become clean from the left; each is yielded once.

    Args:
        source: the columns that enter the window, or a tensor of all of them; for a table with small rows both sizes.
        denoise: the denoiser for a table row.
        position: to go on from; the table is the same, from its first row on.
        keep: the most columns that a row of the table comes back to, or that windows of two sizes have in common.
        anchor: whether positions keep the first column.
    """
    take, stages = _taken_from(source)
    at = position
    for number, row in enumerate(table):
        if at is not None and number < at.row:
            continue
        at = _move(at, row, take, solver, stages)
        state = replace(at.state, fresh=fresh and (lambda draws, row=row: fresh(row.start, draws)))
        latents, state = _step(row, at.latents, solver, denoise(row), state)
        done = row.start + (0 if row.small else int((row.sigma_next == 0).long().cumprod(0).sum()))
        clean = latents[:, :, at.done - row.start : done - row.start] if done > at.done else None
        kept, first = _keep(at.kept, clean, keep), at.first
        if anchor and first is None and clean is not None:
            first = clean[:, :, :1].clone()  # a view would keep the whole window
        start, at = at.done, Position(number + 1, row.start, latents, state, max(at.done, done), kept, first)
        yield Row(number, float(row.sigma.max()), clean, start, at)


def _taken_from(source: Source | Tensor | Stages) -> tuple[Source, Stages | None]:
    """The columns that enter a window, and both sizes if there are two."""
    if isinstance(source, Stages):
        return source.initial, source
    return source if callable(source) else lambda start, stop: source[:, :, start:stop], None


def _keep(kept: Tensor | None, clean: Tensor | None, keep: int) -> Tensor | None:
    """The last `keep` clean columns."""
    if keep == 0 or clean is None:
        return kept
    both = clean if kept is None else torch.cat((kept, clean), dim=2)
    return both[:, :, -keep:]


def _move(at: Position | None, row: TableRow, take: Source, solver: Solver, stages: Stages | None) -> Position:
    """The position with the row's window: columns on its left dropped, new ones on its right taken in."""
    if stages is not None and row.small != (at is not None and stages.is_small(at.latents)):
        return _resized(at, row, solver, stages)
    if at is None:
        return Position(0, row.start, take(row.start, row.stop), solver.init(), row.start)
    if row.refill:
        count = row.stop - row.start
        assert at.kept is not None and row.stop == at.done and count <= at.kept.shape[2], (row.start, row.stop, at.done)
        return replace(at, start=row.start, latents=at.kept[:, :, -count:], state=solver.init())
    stop = at.start + at.latents.shape[2]
    drop, add = row.start - at.start, row.stop - stop
    if drop == 0 and add == 0:
        return at
    assert drop >= 0 and add >= 0 and row.start <= at.done, (at.start, stop, at.done, row.start, row.stop)
    if row.start >= stop:  # nothing in common, as with the blocks of a causal model
        return replace(at, start=row.start, latents=take(row.start, row.stop), state=solver.init())
    rest = at.latents[:, :, drop:]
    latents = torch.cat((rest, take(stop, row.stop).to(rest)), dim=2) if add else rest
    return replace(at, start=row.start, latents=latents, state=at.state.moved(drop, add))


def _resized(at: Position | None, row: TableRow, solver: Solver, stages: Stages) -> Position:
    """The position with the row's window at the other size."""
    count = 0 if at is None else at.done - row.start
    assert at is None or count == 0 or (at.kept is not None and count <= at.kept.shape[2]), (count, row.start)
    known = None if at is None or at.kept is None or count == 0 else at.kept[:, :, -count:]
    if row.small:
        latents = stages.shrunk(row, known)
    else:
        assert at is not None
        latents = stages.grown(row, at.latents, known)
    state = solver.init()
    if at is None:
        return Position(0, row.start, latents, state, row.start)
    return replace(at, start=row.start, latents=latents, state=state)


def _step(
    row: TableRow, latents: Tensor, solver: Solver, denoise: Denoise, state: SolverState
) -> tuple[Tensor, SolverState]:
    if solver.fuses and isinstance(denoise, Denoiser) and not row.write_cache:
        velocities = denoise.velocities(latents, row.sigma)
        return solver.fused_step(latents, velocities, row.sigma, row.sigma_next, state)
    x0 = denoise(latents, row.sigma)
    if row.write_cache:
        return latents, state
    return solver.step(latents, x0, row.sigma, row.sigma_next, state)
