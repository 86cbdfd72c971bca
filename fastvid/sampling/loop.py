"""Walks a noise table: the one denoising loop.

Columns are latent frames, counted along the whole stream; a row takes a window of them from one noise level each to the
next. All columns equal is whole-clip sampling; the rows of a table decide everything else (see
`fastvid.sampling.noise_table`). The loop yields after every row, so that progress, cancelling and streaming need no
hook, and hands out latent frames as soon as their level is zero. Columns that a window has left behind are gone: memory
does not grow with the table.

Shapes: C channels, T columns of the window, h/w latent height and width; latents [1, C, T, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvid.sampling import Denoise, Denoiser, Operation, Solver, SolverState

Source = Callable[[int, int], Tensor]
"""(start, stop) -> the columns that a window takes in, at the level at which the table meets them first."""

Fresh = Callable[[int, Tensor], Tensor]
"""(start, draws [T]) -> new noise for the columns from `start` on, for solvers that draw some."""


@dataclass(frozen=True)
class Row:
    """One step of a table: the levels [T] (float64) of a window's columns before and after it.

    start: the window's first column. A row that changes no level is a call of the model for what it keeps, such as a
    KV cache (write_cache); for columns that were handed out before, so that it keeps them as the next column's prompt
    makes them (refill).
    """

    sigma: Tensor
    sigma_next: Tensor
    start: int = 0
    write_cache: bool = False
    refill: bool = False

    @property
    def stop(self) -> int:
        """The column after the window's last."""
        return self.start + len(self.sigma)


@dataclass(frozen=True)
class Position:
    """Where a walk stands between two rows: all that it needs to go on.

    row: the next one's number. start: the window's first column. latents: the window's. done: the columns before this
    one have been handed out. kept: the latest of those, for rows that come back to them. first: the very first, where
    it is wanted.
    """

    row: int
    start: int
    latents: Tensor
    state: SolverState
    done: int
    kept: Tensor | None = None
    first: Tensor | None = None


@dataclass(frozen=True)
class Walked:
    """One row is done. `ready` are the latents [1, C, n, h, w] that became clean in it, from column `start` on.

    position: after it; None for one of an earlier process, of which only what became clean was saved.
    """

    row: int
    sigma: float
    ready: Tensor | None
    start: int
    position: Position | None


def walk(
    table: Iterable[Row],
    source: Source | Tensor,
    solver: Solver,
    denoise: Callable[[Row], Denoise],
    *,
    fresh: Fresh | None = None,
    position: Position | None = None,
    keep: int = 0,
    anchor: bool = False,
    fused: Operation | None = None,
) -> Iterator[Walked]:
    """Denoise columns along a table.

    source: where columns come from that a window takes in; a tensor of all of them will do. denoise: the denoiser for a
    row. position: to go on from; the table is the same, from its first row on. keep: the most columns that a row of the
    table comes back to. anchor: whether positions hold the first column too. fused: `ops.solver_step`, for guidance,
    clean latents and the solver's step in one pass where nothing else is done to the clean latents (a region that is
    known within columns, an edit along a difference) and the solver is made for it; else all is eager.

    Yields once a row. Windows move to the right, over columns that are clean, and columns must become clean from the
    left; each is handed out once, in order.
    """
    take = source if callable(source) else lambda start, stop: source[:, :, start:stop]
    at = position
    for number, row in enumerate(table):
        if at is not None and number < at.row:
            continue
        at = _moved(at, row, take, solver)
        state = replace(at.state, fresh=fresh and (lambda draws, row=row: fresh(row.start, draws)))
        latents, state = _step(row, at.latents, solver, denoise(row), state, fused)
        clean = row.start + int((row.sigma_next == 0).long().cumprod(0).sum())
        ready = latents[:, :, at.done - row.start : clean - row.start] if clean > at.done else None
        kept, first = _kept(at.kept, ready, keep), at.first
        if anchor and first is None and ready is not None:
            first = ready[:, :, :1].clone()  # not the window that it came from
        done, at = at.done, Position(number + 1, row.start, latents, state, max(at.done, clean), kept, first)
        yield Walked(number, float(row.sigma.max()), ready, done, at)


def _kept(kept: Tensor | None, ready: Tensor | None, keep: int) -> Tensor | None:
    """The latest `keep` columns that were handed out, once `ready` are too."""
    if keep == 0 or ready is None:
        return kept
    both = ready if kept is None else torch.cat((kept, ready), dim=2)
    return both[:, :, -keep:]


def _moved(at: Position | None, row: Row, take: Source, solver: Solver) -> Position:
    """The position with the row's window: what it has left dropped, what is new in it taken in."""
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
    if row.start >= stop:  # nothing in common, as blocks of a causal model have
        return replace(at, start=row.start, latents=take(row.start, row.stop), state=solver.init())
    rest = at.latents[:, :, drop:]
    latents = torch.cat((rest, take(stop, row.stop).to(rest)), dim=2) if add else rest
    return replace(at, start=row.start, latents=latents, state=at.state.moved(drop, add))


# The grad mode is set inside the call and never across a yield, where it would leak into the caller's code.
@torch.no_grad()
def _step(
    row: Row, latents: Tensor, solver: Solver, denoise: Denoise, state: SolverState, fused: Operation | None
) -> tuple[Tensor, SolverState]:
    if fused is not None and solver.fused is not None and isinstance(denoise, Denoiser) and not row.write_cache:
        velocities = denoise.velocities(latents, row.sigma)
        return solver.fused(fused, latents, velocities, row.sigma, row.sigma_next, state)
    x0 = denoise(latents, row.sigma)
    if row.write_cache:
        return latents, state
    return solver.step(latents, x0, row.sigma, row.sigma_next, state)
