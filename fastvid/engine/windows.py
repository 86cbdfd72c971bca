"""Which columns of a segment are with the model at once, and how often: windows, a causal model's blocks, staggered
columns; and the noise table that follows from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fastvid.engine import rollouts
from fastvid.models.loaded import CHANNELS, CONTROL, Model, way_of
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling import noise_table, timesteps
from fastvid.sampling.loop import Row


def rows(
    parts: Model, segment: Segment, sigmas: np.ndarray, known_columns: Tensor, schedule: str | None = None
) -> Iterator[Row]:
    """The noise table of a segment."""
    if parts.preset.rollout is not None:
        return rollouts.rows(parts.preset.rollout, segment, sigmas)
    if schedule == "staggered":
        size, stride = stagger(parts, segment, len(sigmas))
        return noise_table.staggered(sigmas, segment.columns, size, stride, rollouts.known_columns(segment))
    return noise_table.windows(sigmas, spans(parts, segment), known_columns)


def spans(parts: Model, segment: Segment) -> list[tuple[int, int]]:
    """The windows of a segment: all of it, but where the model carries latents on from one to the next; a causal
    model's blocks."""
    recipe = parts.preset
    if recipe.rollout is not None:
        return rollouts.spans(recipe.rollout, segment)
    size = recipe.window + segment.lead if recipe.carries else segment.columns
    overlap = min(recipe.overlap, size - 1)
    cuts = [column for column, _ in turns(parts, segment)[1:]]
    if (
        segment.right_columns and segment.columns > size
    ):  # the window that sees both sides has as much as it can to bring them together
        cuts.append(segment.columns - size + overlap)
    return noise_table.window_spans(segment.columns, size, overlap, cuts)


def stagger(parts: Model, segment: Segment, steps: int) -> tuple[int, int]:
    """(columns of the window, rows between the beginnings of two columns) of a staggered table."""
    size = min(parts.preset.window, segment.columns)
    return size, -(-steps // max(1, size - parts.preset.overlap))


def turns(parts: Model, segment: Segment) -> list[tuple[int, int]]:
    """(column, prompt) from where on which is meant."""
    if parts.preset.rollout is not None:
        return rollouts.turns(parts.preset.rollout, segment)
    later = [(segment.turn_column(frame), prompt) for frame, prompt in segment.prompts[1:]]
    return [(0, segment.prompts[0][1]), *later]


def count_rows(parts: Model, segment: Segment, steps: int, schedule: str | None = None) -> int:
    """How many rows the table of a segment has."""
    if schedule == "staggered":
        (size, stride), known = stagger(parts, segment, steps), rollouts.known_columns(segment)
        return -(-max(0, known + 1 - size) // size) + stride * (segment.columns - known - 1) + steps
    if (rollout := parts.preset.rollout) is None:
        return steps * len(spans(parts, segment))
    made, passed, refilled = rollouts.count_passes(rollout, segment)
    return made * steps + passed + refilled


def window_columns(parts: Model, segment: Segment) -> int:
    """The most columns of a segment that are with the model at once."""
    refilled = 0 if parts.preset.rollout is None else rollouts.most_refilled(parts.preset.rollout, segment)
    at_once = [stop - start + (parts.preset.anchor is not None and start > 0) for start, stop in spans(parts, segment)]
    return max(refilled, *at_once)


def count_calls(parts: Model, segment: Segment, sigmas: np.ndarray, request: Resolved) -> int:
    """How often the model is called for a segment."""
    free, some = (_calls(parts, sigmas, request, known) for known in (False, True))
    if request.schedule == "staggered":
        return count_rows(parts, segment, len(sigmas), request.schedule) * max(free + some)
    if parts.preset.rollout is None:
        return sum(sum(some if _shown(parts, segment, *span) else free) for span in spans(parts, segment))
    made, passed, refilled = rollouts.count_passes(parts.preset.rollout, segment)
    return made * sum(free) + passed * free[-1] + refilled


def _calls(parts: Model, sigmas: np.ndarray, request: Resolved, known: bool) -> list[int]:
    """Calls in each step of a window in which some columns are known, or none."""
    scales = request.guidance_scales(len(parts.experts), known)
    chosen = [scales[parts.experts.choose(t)] for t in timesteps(sigmas, request.solver)]
    return [1 + (scale != 1) + (request.source_prompt is not None) for scale in chosen]


def _shown(parts: Model, segment: Segment, start: int, stop: int) -> bool:
    """Whether columns of a window are known (to the model as latents, that is), or a clip is what it starts from."""
    if start > 0 or segment.source is not None:
        return True
    if way_of(parts) in (CHANNELS, CONTROL):
        return False
    pictures = any(segment.column_of(segment.skip + frame) < stop for frame in segment.pictures)
    return bool(segment.left) or pictures or stop > segment.columns - segment.right_columns
