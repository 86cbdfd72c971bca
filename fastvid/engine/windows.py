"""Splits a segment's columns (latent frames) into windows, a causal model's blocks (a rollout) or staggered columns,
builds the noise table, and counts its rows and model calls.

A causal model's prompt starts at a block boundary. A prompt that would start inside a block waits for the next one,
as in LongLive (branch v1.0, `pipeline/interactive_causal_inference.py`), which was trained on whole blocks. Models
with `recache` then run the cached columns through the model again, clean and all at once, with the new prompt (a
refill). Once the attention window has moved past the sink, the sink keeps the old prompt's keys and values (same
file, with `global_sink` of `configs/longlive_interactive_inference.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastvid.engine.guidance import GuidanceSteps, Negative, has_own_levels
from fastvid.errors import InvalidRequest
from fastvid.layers.kv_cache import KVCache
from fastvid.models.loaded import CHANNELS, CONTROL, DRIVEN, Model, way_of
from fastvid.models.preset import Rollout
from fastvid.requests.levers import small_steps
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling import noise_table
from fastvid.sampling.noise_table import TableRow


def table_of(
    model: Model,
    segment: Segment,
    sigmas: np.ndarray,
    known: Tensor,
    request: Resolved,
    changes: Callable[[int], bool],
) -> Iterator[TableRow]:
    """The noise table of a segment. known: bool [columns], for windows. changes: for a rollout: called with the first
    column of each block just before it is generated; whether the caller changes the prompt there."""
    blocks = spans(model, segment)
    if (rollout := model.preset.rollout) is None:
        if request.schedule == "staggered":
            size, stride = _stagger(model, segment, len(sigmas))
            return noise_table.staggered(sigmas, segment.columns, size, stride, known_columns(segment))
        if request.ar_step and request.causal_block_size:
            block, causal = request.causal_block_size, bool(request.causal_attention)
            return noise_table.forced(sigmas, known, block, request.ar_step, causal)
        table = noise_table.windows(sigmas, blocks, known)
        return table if segment.half is None else noise_table.in_two(table, small_steps(request, len(sigmas)))
    cache, planned = new_cache(rollout, segment, 0), _refills(model, segment)

    def refill(column: int) -> int | None:
        changed = changes(column)
        return cache.remade_from(column) if changed and rollout.recache and column > 0 else planned.get(column)

    return noise_table.rollout(sigmas, blocks, known_columns(segment), refill)


def spans(model: Model, segment: Segment) -> list[tuple[int, int]]:
    """(start, stop) of a segment's windows, or of a causal model's blocks. A model that does not carry latents from one
    window to the next has one window."""
    preset = model.preset
    cuts = [column for column, _ in prompt_starts(model, segment)[1:]]
    if preset.rollout is not None:
        single = _single_blocks(preset.rollout, segment)
        return noise_table.block_spans(segment.columns, preset.rollout.frames_per_block, single, cuts)
    size = preset.window + segment.lead if preset.carries else segment.columns
    overlap = min(preset.overlap, size - 1)
    if segment.right_columns and segment.columns > size:
        # The window that sees known frames on both sides is as long as possible, to join them smoothly.
        cuts.append(segment.columns - size + overlap)
    return noise_table.window_spans(segment.columns, size, overlap, cuts)


def prompt_starts(model: Model, segment: Segment) -> list[tuple[int, int]]:
    """(first column, prompt number) of the segment's prompts.

    Raises InvalidRequest if a causal model has no block for a prompt.
    """
    rollout, first = model.preset.rollout, (0, segment.prompts[0][1])
    if rollout is None:
        return [first, *((segment.turn_column(frame), prompt) for frame, prompt in segment.prompts[1:])]
    block, single = rollout.frames_per_block, _single_blocks(rollout, segment)
    starts = [first]
    for frame, prompt in segment.prompts[1:]:
        column = segment.column_of(segment.skip + frame)
        starts.append((single + math.ceil((column - single) / block) * block, prompt))
    columns = [column for column, _ in starts]
    if len(set(columns)) < len(columns) or columns[-1] >= segment.columns:
        frames = block * segment.temporal
        raise InvalidRequest(
            f"shots: this model makes {frames} frames at once, and one of these shots has none of its own; the nearest "
            f"that is sure to work is {frames} frames for each"
        )
    return starts


def known_columns(segment: Segment) -> int:
    """The number of known columns at the start: a clip's on the left, or one for a first picture."""
    return segment.left_columns or int(0 in segment.pictures)


def _known(segment: Segment) -> Tensor:
    """bool [columns]: which are known as a whole where known frames reach the model as latents."""
    known = torch.zeros(segment.columns, dtype=torch.bool)
    known[: known_columns(segment)] = True
    known[segment.columns - segment.right_columns :] = True
    known[[segment.picture_column(frame) for frame in segment.pictures]] = True
    return known


def new_cache(rollout: Rollout, segment: Segment, layers: int) -> KVCache:
    """An empty KV cache, no larger than the segment needs."""
    capacity = min(rollout.window or segment.columns, segment.columns)
    return KVCache(layers, capacity, min(rollout.sink, capacity - 1))


def most_refilled(model: Model, segment: Segment, any_block: bool = False) -> int:
    """The most columns that one refill processes. any_block: assume that the prompt may change at any block."""
    rollout = model.preset.rollout
    if any_block and rollout is not None and rollout.recache:
        return new_cache(rollout, segment, 0).capacity
    return max((cut - first for cut, first in _refills(model, segment).items()), default=0)


def most_kept(model: Model, segment: Segment) -> int:
    """The most clean columns that a row comes back to: of any refill, or that windows in two stages have in common."""
    if segment.half is None:
        return most_refilled(model, segment, any_block=True)
    found = spans(model, segment)
    return max((before[1] - after[0] for before, after in pairwise(found)), default=0)


def _refills(model: Model, segment: Segment) -> dict[int, int]:
    """{column where a new prompt starts: first column of the refill before it}."""
    rollout = model.preset.rollout
    if rollout is None or not rollout.recache:
        return {}
    cache = new_cache(rollout, segment, 0)
    return {cut: cache.remade_from(cut) for cut, _ in prompt_starts(model, segment)[1:]}


def _single_blocks(rollout: Rollout, segment: Segment) -> int:
    """The number of known columns that each form a block of one column."""
    return 0 if rollout.picture_in_block and not segment.left else known_columns(segment)


def _stagger(model: Model, segment: Segment, steps: int) -> tuple[int, int]:
    """(window size in columns, rows between the starts of neighboring columns) of a staggered table."""
    size = min(model.preset.window, segment.columns)
    return size, -(-steps // max(1, size - model.preset.overlap))


# ---------------------------------------------------------------- counts for plans


def count_rows(model: Model, segment: Segment, steps: int, request: Resolved) -> int:
    """The number of rows in a segment's noise table."""
    if request.ar_step and request.causal_block_size:
        lag = min(request.ar_step, steps)
        return int(noise_table.block_begins(_known(segment), request.causal_block_size, lag).max()) + steps
    if request.schedule == "staggered":
        (size, stride), known = _stagger(model, segment, steps), known_columns(segment)
        return -(-max(0, known + 1 - size) // size) + stride * (segment.columns - known - 1) + steps
    if model.preset.rollout is None:
        return steps * len(spans(model, segment))
    denoised, cached, refilled = _count_passes(model, segment)
    return denoised * steps + cached + refilled


def levels_of(model: Model, segment: Segment, sigmas: np.ndarray, request: Resolved) -> np.ndarray:
    """The highest noise level of each row of a window, rows that fill a cache left out: those of the table, of which
    the first is repeated where blocks begin one after another."""
    if not (request.ar_step and request.causal_block_size):
        return sigmas
    return np.pad(sigmas, (count_rows(model, segment, len(sigmas), request) - len(sigmas), 0), mode="edge")


def window_columns(model: Model, segment: Segment) -> int:
    """The most columns that one model call sees."""
    anchored = model.preset.anchor is not None
    at_once = [stop - start + (anchored and start > 0) for start, stop in spans(model, segment)]
    return max(most_refilled(model, segment), *at_once) + model.takes_reference


def count_calls(model: Model, segment: Segment, sigmas: np.ndarray, request: Resolved) -> int:
    """The number of model calls for a segment."""
    guidance = GuidanceSteps(model, request, sigmas)
    all_free, some_known = (_calls(model, guidance, request, known) for known in (False, True))
    if has_own_levels(model, request) and request.guidance_interval is not None:
        return _count_by_row(model, segment, sigmas, request, guidance)
    if request.schedule == "staggered" or request.ar_step:
        return count_rows(model, segment, len(sigmas), request) * max(all_free + some_known)
    if model.preset.rollout is None:
        windows = spans(model, segment)
        return sum(sum(some_known if _sees_known(model, segment, *span) else all_free) for span in windows)
    denoised, cached, refilled = _count_passes(model, segment)
    return denoised * sum(all_free) + cached * max(all_free) + refilled


def _count_passes(model: Model, segment: Segment) -> tuple[int, int, int]:
    """For a rollout: denoised blocks, clean blocks written to the cache, and cache refills."""
    blocks, known = spans(model, segment), known_columns(segment)
    return sum(stop > known for _, stop in blocks), len(blocks), len(_refills(model, segment))


def _calls(model: Model, guidance: GuidanceSteps, request: Resolved, known: bool) -> list[int]:
    """Model calls in each step of a window. known: whether some of its columns are known."""
    steps = guidance.of_steps(request.guidance_scales(len(model.experts), known))
    return [1 + (step is Negative.COMPUTED) + (request.source_prompt is not None) for step in steps]


def _count_by_row(
    model: Model, segment: Segment, sigmas: np.ndarray, request: Resolved, guidance: GuidanceSteps
) -> int:
    """Model calls for a segment whose columns have levels of their own."""
    calls, experts = 0, len(model.experts)
    for row in table_of(model, segment, sigmas, _known(segment), request, lambda column: False):
        known = segment.source is not None or bool((row.sigma == 0).any())
        computed = guidance.of_row(row, request.guidance_scales(experts, known)) is Negative.COMPUTED
        calls += 1 + computed + (request.source_prompt is not None)
    return calls


def _sees_known(model: Model, segment: Segment, start: int, stop: int) -> bool:
    """Whether a window has known columns that reach the model as latents, or starts from a clip."""
    if start > 0 or segment.source is not None:
        return True
    way = way_of(model)
    if way in (CONTROL, DRIVEN) or (way == CHANNELS and not model.preset.per_token_timesteps):
        return False
    pictures = any(segment.picture_column(frame) < stop for frame in segment.pictures)
    return bool(segment.left) or pictures or stop > segment.columns - segment.right_columns
