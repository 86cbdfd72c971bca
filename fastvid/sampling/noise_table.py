"""Noise tables: which columns (latent frames) a model is called with, and at which levels, row after row.

    whole_clip   every column at once, all at one level
    windows      one stretch of columns after another; the overlap is known to the next one
    rollout      block after block of a causal model; each finished block once more, to fill the KV cache, and for a new
                 prompt the cache's columns once more
    staggered    levels rise from left to right: every few rows one column is finished and one begins
    forced       every column at once, in blocks that begin one after another
    in_two       windows whose first rows are made at half the size

Known columns are at level 0 from the first row on. All levels are float64; sigmas [N] come without the final zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TableRow:
    """The levels [T] (float64) of a window's columns before and after one step.

    start: the window's first column. write_cache: no level changes; the model is called to fill its KV cache. refill:
    the same for columns that were finished before, so that the cache holds them as the next column's prompt has them.
    small: the latents are those of half the size (see `in_two`).
    """

    sigma: Tensor
    sigma_next: Tensor
    start: int = 0
    write_cache: bool = False
    refill: bool = False
    small: bool = False

    @property
    def stop(self) -> int:
        """The column after the window's last."""
        return self.start + len(self.sigma)


def whole_clip(sigmas: np.ndarray, columns: int, known: Tensor | None = None, start: int = 0) -> list[TableRow]:
    """Every free column at the same level, down to zero. known: bool [columns]."""
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    free = torch.ones(columns, dtype=torch.float64) if known is None else (~known).double()
    return [TableRow(s * free, n * free, start) for s, n in zip(levels[:-1], levels[1:], strict=True)]


def window_spans(columns: int, size: int, overlap: int, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(start, stop) of windows of at most `size` columns; each overlaps the one before by `overlap` columns or more.

    cuts: columns at which another prompt begins; no window has free columns on both sides of one.
    """
    assert 0 <= overlap < size, (overlap, size)
    spans: list[tuple[int, int]] = []
    done = 0
    for end in [*(cut for cut in sorted(set(cuts)) if 0 < cut < columns), columns]:
        while done < end:
            begin = max(0, done - overlap)
            stop = min(end, begin + size)
            # The last window before a cut reaches back as far as it can: the more is known, the better it joins.
            begin = max(0, stop - size) if stop == end else begin
            spans.append((begin, stop))
            done = stop
    return spans


def windows(sigmas: np.ndarray, spans: Sequence[tuple[int, int]], known: Tensor) -> Iterator[TableRow]:
    """Windows one after another; what one has made is known to the next. known: bool [columns]."""
    made = 0
    for start, stop in spans:
        settled = known[start:stop] | (torch.arange(start, stop) < made)
        if not bool(settled.all()):
            yield from whole_clip(sigmas, stop - start, settled, start)
        else:  # nothing to make here, but the columns have to come out
            yield _clean(start, stop)
        made = stop


def in_two(table: Iterator[TableRow], first: int) -> Iterator[TableRow]:
    """A table of windows, the first rows of each small. The last small row goes to zero: to what the model makes of the
    video at that level, from which the next row's latents are made at full size."""
    window, number = None, 0
    for row in table:
        number = number + 1 if window == (row.start, row.stop) else 0
        window = row.start, row.stop
        if number >= first or row.write_cache:
            yield row
        else:
            after = torch.zeros_like(row.sigma) if number == first - 1 else row.sigma_next
            yield replace(row, sigma_next=after, small=True)


def block_spans(columns: int, block: int, known: int = 0, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(start, stop) of blocks of at most `block` columns. The first `known` columns have blocks of their own; no block
    has columns on both sides of a cut."""
    edges = sorted({0, known, columns, *(cut for cut in cuts if known < cut < columns)})
    return [(at, min(at + block, end)) for begin, end in pairwise(edges) for at in range(begin, end, block)]


def rollout(
    sigmas: np.ndarray,
    spans: Sequence[tuple[int, int]],
    known: int = 0,
    refill: Callable[[int], int | None] = lambda column: None,
) -> Iterator[TableRow]:
    """Blocks of a causal model: each down to zero, then clean once more for the KV cache.

    spans: of the blocks. known: how many of the first columns are known. A block that is all known only fills the
    cache; in a block that is known in part those columns are at level 0. refill: called with a block's first column
    when its turn comes; the first column to pass through the model again before it, or None.
    """
    for start, stop in spans:
        if (first := refill(start)) is not None:
            yield _clean(first, start, refill=True)
        settled = torch.arange(start, stop) < known
        if not bool(settled.all()):
            yield from whole_clip(sigmas, stop - start, settled, start)
        yield _clean(start, stop)


def _clean(start: int, stop: int, refill: bool = False) -> TableRow:
    """A row of clean columns that changes no level."""
    zero = torch.zeros(stop - start, dtype=torch.float64)
    return TableRow(zero, zero, start, write_cache=True, refill=refill)


def staggered(sigmas: np.ndarray, columns: int, size: int, stride: int, known: int = 0) -> Iterator[TableRow]:
    """Diffusion forcing (arXiv 2407.01392): column i begins `stride` rows after column i - 1, in a window of at most
    `size` columns whose left end is clean.

    known: how many of the first columns are known; the window shows as many as fit. A column waits at the first level
    for its turn. All columns between noise and clean must fit into the window.
    """
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    steps, free = len(sigmas), columns - known
    assert size * stride >= steps, (size, stride, steps)

    def at(row: int) -> Tensor:
        begun = row - stride * (torch.arange(columns) - known)
        level = levels[begun.clamp(0, steps)]
        return torch.where(torch.arange(columns) < known, 0.0, level)

    start = max(0, known + 1 - size)
    for begin in range(0, start, size):  # known columns that fit into no window have to come out too
        yield _clean(begin, min(begin + size, start))
    for row in range(stride * (free - 1) + steps):
        now, after = at(row), at(row + 1)
        clean = int((now == 0).long().cumprod(0).sum())
        # The window ends with the last column that moves here, and keeps as many clean ones on the left as fit.
        stop = min(columns, int((after < levels[0]).nonzero().max()) + 1)
        start = max(start, min(clean, max(0, stop - size)))
        yield TableRow(now[start:stop], after[start:stop], start)


def forced(sigmas: np.ndarray, known: Tensor, block: int, lag: int, causal: bool = False) -> Iterator[TableRow]:
    """Diffusion forcing of a whole clip in blocks of columns, the last of which may be shorter: each begins `lag` rows
    after the one before it, and waits at the first level (SkyReels-V2, arXiv 2504.13074).

    known: bool [columns]. A block that is all known takes no turn. causal: blocks do not see later ones, so rows show
    those alone that have begun; else every row shows all columns.
    """
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    begins, steps = block_begins(known, block, min(lag, len(sigmas))), len(sigmas)
    for row in range(int(begins[~known].max()) + steps) if not bool(known.all()) else ():
        now, after = (levels[(at - begins).clamp(0, steps)].masked_fill(known, 0.0) for at in (row, row + 1))
        stop = int((begins <= row).sum()) if causal else len(known)
        yield TableRow(now[:stop], after[:stop])
    if bool(known.all()):
        yield _clean(0, len(known))


def block_begins(known: Tensor, block: int, lag: int) -> Tensor:
    """The row at which each column's block begins: int64 [columns]. See `forced`."""
    free = torch.tensor([not bool(part.all()) for part in known.split(block)])
    return (lag * (free.long().cumsum(0) - 1).clamp(min=0)).repeat_interleave(block)[: len(known)]
