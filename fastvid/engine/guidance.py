"""Which rows of a noise table compute the negative prompt's velocity, and whether in one call with the prompt's.

Levels are the solver's sigmas, 0 to 1, as in `sampling.sigmas`: the share of noise before a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.distributed.mesh import Layout
from fastvid.models.loaded import Model
from fastvid.requests.levers import small_steps
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling.guidance import Difference
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import timesteps

LEVERS = ("guidance_interval", "guidance_every", "guidance_batch")
BATCH_TOKENS = 320
"""The largest window for which both halves in one call pay: see why_apart."""


class Negative(Enum):
    """How a row gets the negative prompt's velocity."""

    NONE = "not needed"
    COMPUTED = "computed"
    REUSED = "by the difference of an earlier row"


@dataclass(frozen=True)
class Interval:
    """Guidance is used at noise levels with low < sigma <= high (arXiv 2404.07724), elsewhere the prompt's velocity is
    used alone."""

    low: float = 0.0
    high: float = 1.0

    def holds(self, sigma: Tensor) -> Tensor:
        """Which columns are guided: bool [T], of their levels [T]."""
        return (sigma > self.low) & (sigma <= self.high)


class GuidanceSteps:
    """Which of a request's rows compute the negative prompt's velocity. sigmas: its noise levels [N].

    With guidance_every=N, of the guided steps of a window the first two are computed, and every N-th after those; the
    others reuse the difference of the velocities. An expert switch and another size of latents begin anew, as a window
    does. The first step is like no other: from pure noise the difference is twice as large, and points elsewhere. A
    reused difference shrinks by the square root of (1 - sigma then) / (1 - sigma now), which is how it was seen to
    change.

    PSNR against all computed, embedded model, 10 prompts, 20 steps, at N = 2, 3 and 4: 42.2, 37.4, 35.3 dB; unchanged
    42.4, 36.8, 33.5; unchanged with the first step alone computed 38.7, 33.5, 30.4; with FasterCache's weights on
    frequencies 35.7, 32.9, -; carried on along its last change 35.2, 20.4, -.
    """

    def __init__(self, model: Model, request: Resolved, sigmas: np.ndarray) -> None:
        self._model, self._request = model, request
        self._sigmas = torch.from_numpy(np.asarray(sigmas, np.float64))
        self.interval = Interval(*(request.guidance_interval or (0.0, 1.0)))
        self._by_column = has_own_levels(model, request)
        self.every = 1 if self._by_column else request.guidance_every or 1
        levels = timesteps(np.asarray(sigmas, np.float64), request.solver)
        self._small = small_steps(request, len(levels))
        self._experts = [model.experts.choose(level, request.boundary_ratio) for level in levels]

    def of_steps(self, scales: Sequence[float]) -> list[Negative]:
        """Of each step of a window. scales: of each expert."""
        made: list[Negative] = []
        since, before = 0, (-1, False)
        for inside, expert in zip(self.interval.holds(self._sigmas).tolist(), self._experts, strict=True):
            stage = expert, len(made) < self._small
            since, before = (since if stage == before else 0), stage
            if scales[expert] == 1 or not inside:
                made.append(Negative.NONE)
            else:
                reused = since > 0 and since % self.every != 1 % self.every
                made.append(Negative.REUSED if reused else Negative.COMPUTED)
                since += 1
        return made

    def of_row(self, row: TableRow, scales: Sequence[float]) -> Negative:
        """Of a row of the noise table. scales: of each expert in it."""
        if row.refill:
            return Negative.NONE
        steps = self.of_steps(scales)
        if row.write_cache:  # keys and values of both prompts, if guidance is used at all
            cached = self._model.preset.rollout is not None and any(step is not Negative.NONE for step in steps)
            return Negative.COMPUTED if cached else Negative.NONE
        if self._by_column:
            moves = row.sigma_next != row.sigma
            guided = scales[0] != 1 and bool((self.interval.holds(row.sigma) & moves).any())
            return Negative.COMPUTED if guided else Negative.NONE
        return steps[self._number(row)]

    def _number(self, row: TableRow) -> int:
        """The step of a row in its window."""
        return int((self._sigmas > row.sigma.max()).sum())

    def share(self, row: TableRow, scales: Sequence[float]) -> float | None:
        """How much of the last difference a row takes; None if it reuses none."""
        if self.of_row(row, scales) is not Negative.REUSED:
            return None
        number = self._number(row)
        then = max(i for i, step in enumerate(self.of_steps(scales)[:number]) if step is Negative.COMPUTED)
        return float(((1 - self._sigmas[then]) / (1 - self._sigmas[number])).sqrt())

    def is_needed_after(self, row: TableRow, scales: Sequence[float]) -> bool:
        """Whether a later row of the window reuses the difference that there is after this one."""
        if row.write_cache or self._by_column:
            return False
        number = self._number(row)
        later = self.of_steps(scales)[number + 1 :]
        guided = (step for step in later if step is not Negative.NONE)
        return next(guided, None) is Negative.REUSED

    def columns(self, row: TableRow) -> Tensor | None:
        """The guided columns of a row whose columns have levels of their own; None: all."""
        return self.interval.holds(row.sigma) if self._by_column and self._request.guidance_interval else None


def has_own_levels(model: Model, request: Resolved) -> bool:
    """Whether the free columns of a row are at different noise levels."""
    own = request.schedule == "staggered" or bool(request.ar_step and request.causal_block_size)
    return own and model.preset.rollout is None


def is_paired(model: Model, request: Resolved, window: Segment, layout: Layout) -> bool:
    """Whether both halves of guidance are computed in one call."""
    asked = bool(request.guidance_batch) and request.guided(len(model.experts))
    return asked and not why_apart(model, request, window, layout)


def why_apart(model: Model, request: Resolved, window: Segment, layout: Layout) -> str:
    """Why the two halves of guidance are not computed in one call, in words; empty if they are.

    window: as the model sees it at once. The size decides, not the free memory, so that equal requests give equal
    bytes. One thread of a CPU with AVX512, embedded model, both halves in one call against one after the other: 1.31
    times as fast at 80 tokens, 1.15 at 144, 1.06 at 324, 0.92 at 420, 0.90 at 720.
    """
    if model.preset.rollout is not None:
        return "the prompts of a causal model have a KV cache each"
    if layout.guidance > 1:
        return "ranks compute one each"
    if request.cache is not None or request.attention is not None:
        return "a step cache and sparse attention follow each on its own"
    lengths = [model.tokenizer.text_length if one is None else one.shape[1] for one in _embeds(request)]
    if lengths[0] != lengths[1]:
        return f"their embeddings have {lengths[0]} and {lengths[1]} rows"
    tokens = prod(n // p for n, p in zip(window.latent_shape(1)[1:], model.transformer.config.patch_size, strict=True))
    if tokens > BATCH_TOKENS:
        return f"windows of {tokens:,} tokens are no faster so; those of up to {BATCH_TOKENS} are"
    return ""


def unused(model: Model, request: Resolved, sigmas: np.ndarray, window: Segment, layout: Layout) -> dict[str, str]:
    """Which of a request's levers of guidance change nothing: lever -> why, in words. window, layout: see why_apart."""
    if not request.guided(len(model.experts)):
        why = f"there is no guidance at guidance_scale={request.guidance_scale:g}"
        return {name: why for name in LEVERS if getattr(request, name) is not None}
    found, inside = {}, GuidanceSteps(model, request, sigmas).interval.holds(torch.from_numpy(sigmas))
    if not inside.any():
        levels = f"{sigmas[0]:g} to {sigmas[-1]:g}"
        found["guidance_interval"] = f"it holds none of this request's noise levels, {levels}; nothing is guided"
    if request.guidance_every is not None and has_own_levels(model, request):
        found["guidance_every"] = "frames are at noise levels of their own, which change with every row"
    if request.guidance_batch and (why := why_apart(model, request, window, layout)):
        found["guidance_batch"] = why
    return found


def _embeds(request: Resolved) -> tuple[Any, Any]:
    return request.prompt_embeds, request.negative_prompt_embeds


NAME = "guidance.difference"


class KeptDifference:
    """The difference of the two velocities that later rows reuse, as a checkpoint holds it.

    steps, scales: decide which rows need it; scales: returns the experts' in a row.
    """

    def __init__(
        self, steps: GuidanceSteps, scales: Callable[[TableRow], Sequence[float]], channels: int, segment: Segment
    ) -> None:
        self.difference = Difference()
        self._steps, self._scales, self._channels, self._segment = steps, scales, channels, segment
        self._row: TableRow | None = None

    def begin(self, row: TableRow) -> None:
        """Called before each row."""
        self._row = row

    def tensors(self) -> dict[str, Tensor]:
        """What the rows that follow the last one need. All ranks have the same."""
        if self._row is None or not self._steps.is_needed_after(self._row, self._scales(self._row)):
            return {}
        assert self.difference.value is not None
        return {NAME: self.difference.value}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Goes on from what `tensors` returned."""
        kept = tensors.get(NAME)
        self.difference.value = None if kept is None else kept.to(device)

    def planned(self, row: TableRow) -> dict[str, Tensor]:
        """What `tensors` returns after this row, without values."""
        if not self._steps.is_needed_after(row, self._scales(row)):
            return {}
        segment = self._segment.small if row.small else self._segment
        channels, _, height, width = segment.latent_shape(self._channels)
        shape = 1, channels, len(row.sigma), height, width
        return {NAME: torch.empty(shape, dtype=torch.float32, device="meta")}
