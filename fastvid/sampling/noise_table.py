"""Noise tables: which columns (latent frames) a model is called with, and at which levels, row after row.

    whole_clip   every column at once, all at one level
    windows      one stretch of columns after another, the overlap known to the next one
    rollout      block after block of a causal model, each finished one passed once more to fill the KV cache, and what
                 is in the cache once more for a new prompt
    staggered    levels that rise from left to right, one column finished and one begun every few rows

Known columns stand at level 0 from the first row on. All levels are float64; sigmas [N] come without the final zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastvid.sampling.loop import Row


def whole_clip(sigmas: np.ndarray, columns: int, known: Tensor | None = None, start: int = 0) -> list[Row]:
    """Classic sampling: every free column at the same level, down to zero. known: bool [columns]."""
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    free = torch.ones(columns, dtype=torch.float64) if known is None else (~known).double()
    return [Row(s * free, n * free, start) for s, n in zip(levels[:-1], levels[1:], strict=True)]


def window_spans(columns: int, size: int, overlap: int, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(start, stop) of windows of at most `size` columns over all of them, each beginning `overlap` columns, or more,
    before the end of the one before.

    cuts: columns at which another prompt begins; no window has free columns on both sides of one.
    """
    assert 0 <= overlap < size, (overlap, size)
    spans: list[tuple[int, int]] = []
    done = 0
    for end in [*(cut for cut in sorted(set(cuts)) if 0 < cut < columns), columns]:
        while done < end:
            begin = max(0, done - overlap)
            stop = min(end, begin + size)
            # The last one of a stretch reaches back as far as it can: the more is known, the better it joins.
            begin = max(0, stop - size) if stop == end else begin
            spans.append((begin, stop))
            done = stop
    return spans


def windows(sigmas: np.ndarray, spans: Sequence[tuple[int, int]], known: Tensor) -> Iterator[Row]:
    """Windows run one after another; what one has made is known to the next. known: bool [columns]."""
    made = 0
    for start, stop in spans:
        settled = known[start:stop] | (torch.arange(start, stop) < made)
        if not bool(settled.all()):
            yield from whole_clip(sigmas, stop - start, settled, start)
        else:  # nothing to make here: the columns are handed out all the same
            yield _clean(start, stop)
        made = stop


def block_spans(columns: int, block: int, known: int = 0, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(start, stop) of blocks of at most `block` columns over all of them: the first `known` ones have their own, and
    no block has columns on both sides of a cut."""
    edges = sorted({0, known, columns, *(cut for cut in cuts if known < cut < columns)})
    return [(at, min(at + block, end)) for begin, end in pairwise(edges) for at in range(begin, end, block)]


def rollout(
    sigmas: np.ndarray,
    spans: Sequence[tuple[int, int]],
    known: int = 0,
    refill: Callable[[int], int | None] = lambda column: None,
) -> Iterator[Row]:
    """A causal model, block after block: each down to zero, then once more, clean, for the KV cache.

    spans: of the blocks. known: the first columns: those of a block that is all known only fill the cache, those at the
    start of another one stand at level 0 in it. refill: from the column where a block begins to the first of those that
    are passed once more before it, None if none are; asked when the block's turn comes.
    """
    for start, stop in spans:
        if (first := refill(start)) is not None:
            yield _clean(first, start, refill=True)
        settled = torch.arange(start, stop) < known
        if not bool(settled.all()):
            yield from whole_clip(sigmas, stop - start, settled, start)
        yield _clean(start, stop)


def _clean(start: int, stop: int, refill: bool = False) -> Row:
    """A row that changes no level, for columns that are clean."""
    zero = torch.zeros(stop - start, dtype=torch.float64)
    return Row(zero, zero, start, write_cache=True, refill=refill)


def staggered(sigmas: np.ndarray, columns: int, size: int, stride: int, known: int = 0) -> Iterator[Row]:
    """Diffusion forcing (arXiv 2407.01392): column i begins `stride` rows after column i - 1, in a window of at most
    `size` columns whose left end is clean.

    known: the first columns, of which the window shows as many as fit. A column waits at the first level until it is
    its turn; all that are begun must fit into the window.
    """
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    steps, free = len(sigmas), columns - known
    assert size * stride >= steps, (size, stride, steps)

    def at(row: int) -> Tensor:
        begun = row - stride * (torch.arange(columns) - known)
        level = levels[begun.clamp(0, steps)]
        return torch.where(torch.arange(columns) < known, 0.0, level)

    start = max(0, known + 1 - size)
    for begin in range(0, start, size):  # what no window has room for is handed out all the same
        yield _clean(begin, min(begin + size, start))
    for row in range(stride * (free - 1) + steps):
        now, after = at(row), at(row + 1)
        clean = int((now == 0).long().cumprod(0).sum())
        # The window ends with the last column that moves here, and keeps as many clean ones on the left as fit.
        stop = min(columns, int((after < levels[0]).nonzero().max()) + 1)
        start = max(start, min(clean, max(0, stop - size)))
        yield Row(now[start:stop], after[start:stop], start)
