"""Which columns (latent frames) of a segment the model sees at once, and how often: windows, a causal model's blocks (a
rollout), or staggered columns; and the noise table that follows.

A causal model's prompt begins with a block. One that would begin inside a block waits for the next, as in LongLive
(branch v1.0, `pipeline/interactive_causal_inference.py`): the model was trained on no shorter blocks. Models with
`recache` then pass the cache's columns through the model once more, clean and all at once, with the new prompt. The
sink, once the window has left it behind, stays as the old prompt made it (the same file, with `global_sink` of
`configs/longlive_interactive_inference.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from fastvid.errors import InvalidRequest
from fastvid.layers.kv_cache import KVCache
from fastvid.models.loaded import CHANNELS, CONTROL, Model, way_of
from fastvid.models.preset import Rollout
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling import noise_table
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import timesteps


def table_of(
    model: Model,
    segment: Segment,
    sigmas: np.ndarray,
    known: Tensor,
    schedule: str | None,
    changes: Callable[[int], bool],
) -> Iterator[TableRow]:
    """The noise table of a segment. known: bool [columns], for windows. changes: of a rollout: asked with a block's
    first column, when its turn comes, whether the caller has another prompt begin there."""
    blocks = spans(model, segment)
    if (rollout := model.preset.rollout) is None:
        if schedule == "staggered":
            size, stride = _stagger(model, segment, len(sigmas))
            return noise_table.staggered(sigmas, segment.columns, size, stride, known_columns(segment))
        return noise_table.windows(sigmas, blocks, known)
    cache, planned = new_cache(rollout, segment, 0), _refills(model, segment)

    def refill(column: int) -> int | None:
        changed = changes(column)
        return cache.remade_from(column) if changed and rollout.recache and column > 0 else planned.get(column)

    return noise_table.rollout(sigmas, blocks, known_columns(segment), refill)


def spans(model: Model, segment: Segment) -> list[tuple[int, int]]:
    """(start, stop) of the windows of a segment, or of a causal model's blocks. A model that does not carry latents on
    has one window."""
    preset = model.preset
    cuts = [column for column, _ in prompt_starts(model, segment)[1:]]
    if preset.rollout is not None:
        alone = _own_blocks(preset.rollout, segment)
        return noise_table.block_spans(segment.columns, preset.rollout.frames_per_block, alone, cuts)
    size = preset.window + segment.lead if preset.carries else segment.columns
    overlap = min(preset.overlap, size - 1)
    if segment.right_columns and segment.columns > size:
        # The window that sees both sides is as long as can be, to bring them together.
        cuts.append(segment.columns - size + overlap)
    return noise_table.window_spans(segment.columns, size, overlap, cuts)


def prompt_starts(model: Model, segment: Segment) -> list[tuple[int, int]]:
    """(first column, prompt number) of the segment's prompts.

    Raises InvalidRequest where a causal model has no block for a prompt.
    """
    rollout, first = model.preset.rollout, (0, segment.prompts[0][1])
    if rollout is None:
        return [first, *((segment.turn_column(frame), prompt) for frame, prompt in segment.prompts[1:])]
    block, alone = rollout.frames_per_block, _own_blocks(rollout, segment)
    found = [first]
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


def known_columns(segment: Segment) -> int:
    """How many of the first columns are known: those of a clip on the left, or the one of a first picture."""
    return segment.left_columns or int(0 in segment.pictures)


def new_cache(rollout: Rollout, segment: Segment, layers: int) -> KVCache:
    """An empty KV cache, no larger than the segment needs."""
    capacity = min(rollout.window or segment.columns, segment.columns)
    return KVCache(layers, capacity, min(rollout.sink, capacity - 1))


def most_refilled(model: Model, segment: Segment, any_block: bool = False) -> int:
    """The most columns that one refill passes. any_block: if the prompt may change at any block."""
    rollout = model.preset.rollout
    if any_block and rollout is not None and rollout.recache:
        return new_cache(rollout, segment, 0).capacity
    return max((cut - first for cut, first in _refills(model, segment).items()), default=0)


def _refills(model: Model, segment: Segment) -> dict[int, int]:
    """{column where another prompt begins: the first column that passes once more before it}."""
    rollout = model.preset.rollout
    if rollout is None or not rollout.recache:
        return {}
    cache = new_cache(rollout, segment, 0)
    return {cut: cache.remade_from(cut) for cut, _ in prompt_starts(model, segment)[1:]}


def _own_blocks(rollout: Rollout, segment: Segment) -> int:
    """How many of the known columns have blocks of their own."""
    return 0 if rollout.picture_in_block and not segment.left else known_columns(segment)


def _stagger(model: Model, segment: Segment, steps: int) -> tuple[int, int]:
    """(columns of the window, rows between the starts of two columns) of a staggered table."""
    size = min(model.preset.window, segment.columns)
    return size, -(-steps // max(1, size - model.preset.overlap))


# ---------------------------------------------------------------- counting, for plans


def count_rows(model: Model, segment: Segment, steps: int, schedule: str | None = None) -> int:
    """How many rows the table of a segment has."""
    if schedule == "staggered":
        (size, stride), known = _stagger(model, segment, steps), known_columns(segment)
        return -(-max(0, known + 1 - size) // size) + stride * (segment.columns - known - 1) + steps
    if model.preset.rollout is None:
        return steps * len(spans(model, segment))
    made, passed, refilled = _count_passes(model, segment)
    return made * steps + passed + refilled


def window_columns(model: Model, segment: Segment) -> int:
    """The most columns of a segment that the model sees at once."""
    anchored = model.preset.anchor is not None
    at_once = [stop - start + (anchored and start > 0) for start, stop in spans(model, segment)]
    return max(most_refilled(model, segment), *at_once)


def count_calls(model: Model, segment: Segment, sigmas: np.ndarray, request: Resolved) -> int:
    """How often the model is called for a segment."""
    free, some = (_calls(model, sigmas, request, known) for known in (False, True))
    if request.schedule == "staggered":
        return count_rows(model, segment, len(sigmas), request.schedule) * max(free + some)
    if model.preset.rollout is None:
        return sum(sum(some if _sees_known(model, segment, *span) else free) for span in spans(model, segment))
    made, passed, refilled = _count_passes(model, segment)
    return made * sum(free) + passed * free[-1] + refilled


def _count_passes(model: Model, segment: Segment) -> tuple[int, int, int]:
    """Of a rollout: blocks that are denoised, blocks that pass clean, and refills of the cache."""
    blocks, known = spans(model, segment), known_columns(segment)
    return sum(stop > known for _, stop in blocks), len(blocks), len(_refills(model, segment))


def _calls(model: Model, sigmas: np.ndarray, request: Resolved, known: bool) -> list[int]:
    """Calls in each step of a window with known columns, or without."""
    scales = request.guidance_scales(len(model.experts), known)
    chosen = [scales[model.experts.choose(t)] for t in timesteps(sigmas, request.solver)]
    return [1 + (scale != 1) + (request.source_prompt is not None) for scale in chosen]


def _sees_known(model: Model, segment: Segment, start: int, stop: int) -> bool:
    """Whether a window has columns that the model knows as latents, or starts from a clip."""
    if start > 0 or segment.source is not None:
        return True
    if way_of(model) in (CHANNELS, CONTROL):
        return False
    pictures = any(segment.column_of(segment.skip + frame) < stop for frame in segment.pictures)
    return bool(segment.left) or pictures or stop > segment.columns - segment.right_columns
