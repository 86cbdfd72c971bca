"""A causal model's way through a segment: its blocks, where another prompt begins, what its KV cache holds.

Everything is counted in columns of the segment. A prompt begins with a block: one that would begin inside of it waits
for the next, as in LongLive (branch v1.0, `pipeline/interactive_causal_inference.py`), since a model of so many frames
a block was trained on no shorter ones. Models that say so then pass what is in the cache once more, clean and all at
once, with the new prompt; the sink, once the window has left it behind, stays as the old prompt made it (the same file,
with `global_sink` of `configs/longlive_interactive_inference.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from fastvid.errors import InvalidRequest
from fastvid.layers.kv_cache import KVCache
from fastvid.models.preset import Rollout
from fastvid.requests.timeline import Segment
from fastvid.sampling import noise_table
from fastvid.sampling.loop import Row


def known_columns(segment: Segment) -> int:
    """The first columns, which are known: those of a clip on the left, or the one of a first picture."""
    return segment.left_columns or int(0 in segment.pictures)


def turns(rollout: Rollout, segment: Segment) -> list[tuple[int, int]]:
    """(column, prompt) from where on which is meant; every column is the start of a block.

    Raises InvalidRequest where a prompt would have no block of its own.
    """
    block, alone = rollout.frames_per_block, _alone(rollout, segment)
    found = [(0, segment.prompts[0][1])]
    for frame, prompt in segment.prompts[1:]:
        column = segment.column_of(segment.skip + frame)
        found.append((alone + math.ceil((column - alone) / block) * block, prompt))
    starts = [column for column, _ in found]
    if len(set(starts)) < len(starts) or starts[-1] >= segment.columns:
        frames = block * segment.temporal
        raise InvalidRequest(
            f"shots: this model makes {frames} frames at once, and one of these shots has none of its own; the nearest "
            f"that is sure to work is {frames} frames for each"
        )
    return found


def spans(rollout: Rollout, segment: Segment) -> list[tuple[int, int]]:
    """(start, stop) of the blocks."""
    return noise_table.block_spans(
        segment.columns, rollout.frames_per_block, _alone(rollout, segment), _cuts(rollout, segment)
    )


def rows(
    rollout: Rollout, segment: Segment, sigmas: np.ndarray, changes: Callable[[int], bool] = lambda column: False
) -> Iterator[Row]:
    """The noise table. changes: asked, when it gets to a block, whether another prompt begins there after all."""
    cache, planned = new_cache(rollout, segment, 0), refills(rollout, segment)

    def refill(column: int) -> int | None:
        """The first of the columns that are passed once more before this one."""
        changed = changes(column)
        return cache.remade_from(column) if changed and rollout.recache and column > 0 else planned.get(column)

    return noise_table.rollout(sigmas, spans(rollout, segment), known_columns(segment), refill)


def count_passes(rollout: Rollout, segment: Segment) -> tuple[int, int, int]:
    """How many blocks are made, how many are passed clean, and how often the cache is filled again."""
    all_spans, known = spans(rollout, segment), known_columns(segment)
    return sum(stop > known for _, stop in all_spans), len(all_spans), len(refills(rollout, segment))


def refills(rollout: Rollout, segment: Segment) -> dict[int, int]:
    """{column where another prompt begins: the first of those that are passed once more before it}."""
    if not rollout.recache:
        return {}
    cache = new_cache(rollout, segment, 0)
    return {cut: cache.remade_from(cut) for cut in _cuts(rollout, segment)}


def most_refilled(rollout: Rollout, segment: Segment, at_any: bool = False) -> int:
    """The most columns that are passed once more; at_any: if another prompt may begin with any block."""
    if at_any and rollout.recache:
        return new_cache(rollout, segment, 0).capacity
    return max((cut - first for cut, first in refills(rollout, segment).items()), default=0)


def new_cache(rollout: Rollout, segment: Segment, layers: int) -> KVCache:
    """An empty KV cache, no larger than the segment needs."""
    capacity = min(rollout.window or segment.columns, segment.columns)
    return KVCache(layers, capacity, min(rollout.sink, capacity - 1))


def _alone(rollout: Rollout, segment: Segment) -> int:
    """The known columns that have blocks of their own."""
    return 0 if rollout.picture_in_block and not segment.left else known_columns(segment)


def _cuts(rollout: Rollout, segment: Segment) -> list[int]:
    return [column for column, _ in turns(rollout, segment)[1:]]
