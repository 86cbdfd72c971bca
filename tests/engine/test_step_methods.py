"""The methods of step caches on small transformers: against diffusers' own caches where those do the same, else against
the formulas of their papers over what the blocks make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from torch import Tensor, nn
from wan_cases import SCALES, diffusers_model, error, inputs, ours, run_theirs

from fastvid.device.offload import HostLane, Prefetcher, streamed_blocks
from fastvid.distributed.mesh import Layout, Mesh, RankView
from fastvid.engine.step_cache import StepCache
from fastvid.engine.step_methods import Branch, EasyCache, FirstBlock, MagCache, Method, TaylorSeer, every, spread
from fastvid.layers.levers import CallLevers
from fastvid.layers.residual import Stream
from fastvid.models.wan.transformer import WanTransformer
from fastvid.sampling.noise_table import TableRow, whole_clip

STEPS = 12
RATIOS = (1.0, 0.98, 1.05, 0.9, 0.99, 1.01, 0.97, 0.95, 1.02, 0.93, 0.9, 0.8)


def rows(columns: int = 3, start: int = 0) -> list[TableRow]:
    return whole_clip(torch.linspace(1, 1 / STEPS, STEPS).double().numpy(), columns, start=start)


def calls(kind: str = "t2v") -> Iterator[tuple[Tensor, ...]]:
    """What a model is given in each step: latents that change now faster, now slower."""
    latents, _, *rest = inputs(kind, batch=1)
    drift = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    for step in range(STEPS):
        latents = latents + drift * (0.02 + 0.15 * (step % 4 == 3))
        yield latents, torch.tensor([500.0 - step / 4]), *rest


def cache_of(method: Method) -> StepCache:
    return StepCache(method, RankView(Mesh(), Layout()))


def run(model: WanTransformer, blocks: Callable[[TableRow], Any], kind: str = "t2v") -> list[Tensor]:
    """The model's velocities of every step. blocks: the step cache's part of a row's call."""
    made = []
    for row, (latents, timestep, text, *more) in zip(rows(), calls(kind), strict=True):
        context = model.prepare_context(text, control=more[0], scales=SCALES) if more else text
        made.append(model(latents, timestep, context, levers=CallLevers(blocks(row))))
    return made


def cached(model: WanTransformer, method: Method, kind: str = "t2v") -> tuple[list[Tensor], StepCache]:
    cache = cache_of(method)
    return run(model, lambda row: cache.of_call(row, 0, 0), kind), cache


# ---------------------------------------------------------------- against diffusers


def theirs(apply: Callable[[nn.Module, Any], None], config: Any) -> tuple[nn.Module, list[Tensor]]:
    model = diffusers_model()
    apply(model, config)
    with torch.no_grad(), model.cache_context("cond"):
        return model, [run_theirs(model, *given) for given in calls()]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.08, 0.15, 0.3])
def test_first_block_is_diffusers(threshold: float) -> None:
    _, wanted = theirs(apply_first_block_cache, FirstBlockCacheConfig(threshold=threshold))
    made, cache = cached(ours(diffusers_model()), FirstBlock(STEPS + 1, longest=STEPS, threshold=threshold))
    assert max(map(error, made, wanted)) < 1e-5
    assert 0 < cache.count.reused < STEPS and cache.count.computed + cache.count.reused == STEPS


@torch.no_grad()
@pytest.mark.parametrize(("threshold", "longest"), [(0.06, 3), (0.2, 1), (0.2, 9)])
def test_magcache_is_diffusers(threshold: float, longest: int) -> None:
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=longest,
        retention_ratio=2 / (STEPS + 1),  # a step more: where its last one ends, all it has kept is dropped
        num_inference_steps=STEPS + 1,
        mag_ratios=[*RATIOS, 1.0],
    )
    _, wanted = theirs(apply_mag_cache, config)
    method = MagCache(STEPS + 1, warmup=2, longest=longest, threshold=threshold, ratios=((*RATIOS, 1.0),) * 2)
    made, cache = cached(ours(diffusers_model()), method)
    assert max(map(error, made, wanted)) < 1e-5
    assert 0 < cache.count.reused < STEPS and method.least() == cache.count.computed + 1


@torch.no_grad()
@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylorseer_forecasts_as_diffusers(order: int) -> None:
    """diffusers' expansion of what all blocks add, in place of the blocks' own."""
    computed, tapped = every(STEPS, 3, 3), Tapped()
    state = TaylorSeerState(torch.float32, order)

    def blocks(step: int, x: Tensor, whole: Callable[[], Tensor]) -> Tensor:
        state.current_step = step
        if not computed[step]:
            return x + state.predict()[0]
        out = whole()
        state.update((out - x,))
        return out

    model = ours(diffusers_model())
    tapped.blocks = blocks
    wanted = run(model, lambda row: tapped)
    made, cache = cached(model, TaylorSeer(STEPS, order=order, computed=computed))
    assert max(map(error, made, wanted)) < 1e-5
    assert cache.count.computed == sum(computed) == 6


@torch.no_grad()
def test_a_near_forecast_goes_as_far_as_its_differences() -> None:
    """Of steps 0, 1 and 4: step 2 goes on by one step, and so does step 3; steps behind 4 by up to three."""
    computed = tuple(step in (0, 1, 4, 11) for step in range(STEPS))
    method, branch, x = TaylorSeer(STEPS, computed=computed, near=True), Branch(), torch.zeros(1, 2, 3)
    for step, value in ((0, 1.0), (1, 3.0)):
        method.keep(branch, step, x, x + value)
    assert [float(method.predict(branch, step, x, list)[0, 0, 0]) for step in (2, 3)] == [5.0, 5.0]
    method.keep(branch, 4, x, x + 9.0)
    assert [float(method.predict(branch, step, x, list)[0, 0, 0]) for step in (5, 6, 7, 8)] == [11.0, 13.0, 15.0, 15.0]


# ---------------------------------------------------------------- against formulas


class Tapped:
    """Blocks in whose place a function stands: (step, tokens, all blocks on them) -> tokens."""

    def __init__(self) -> None:
        self.step, self.blocks = -1, lambda step, x, whole: whole()

    def run(self, start: Stream, blocks: Callable[[Stream], Stream], whole: Callable[[Stream], Tensor]) -> Tensor:
        self.step += 1
        return self.blocks(self.step, whole(start), lambda: whole(blocks(start)))

    def is_enough(self, stream: Stream) -> bool:
        return False


class Easy:
    """EasyCache as its paper has it, in float64: k is the last rate of change, the errors k |dx| / |out| add up."""

    def __init__(self, threshold: float, warmup: int) -> None:
        self.threshold, self.warmup, self.error = threshold, warmup, 0.0
        self.whole: list[tuple[Tensor, Tensor]] = []  # input and output of the last two steps of all blocks
        self.before: Tensor | None = None
        self.skipped: list[int] = []

    def __call__(self, step: int, x: Tensor, whole: Callable[[], Tensor]) -> Tensor:
        before, self.before, at = self.before, x.double(), x.double()
        if self.warmup <= step < STEPS - 1 and len(self.whole) == 2:
            (old_in, old_out), (base, out) = self.whole
            k = (out - old_out).abs().mean() / (base - old_in).abs().mean()
            self.error += float(k * (at - before).abs().mean() / out.abs().mean())
            if self.error < self.threshold:
                self.skipped.append(step)
                return (at + out - base).to(x)
        self.error, made = 0.0, whole()
        self.whole = [*self.whole[-1:], (at, made.double())]
        return made


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t2v", "vace"])
@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_easycache_is_its_formula(kind: str, threshold: float) -> None:
    model, tapped, easy = ours(diffusers_model(kind)), Tapped(), Easy(threshold, 3)
    tapped.blocks = easy
    wanted = run(model, lambda row: tapped, kind)
    made, cache = cached(model, EasyCache(STEPS, warmup=3, longest=STEPS, threshold=threshold), kind)
    assert max(map(error, made, wanted)) < 1e-5
    assert 0 < len(easy.skipped) == cache.count.reused


@torch.no_grad()
def test_first_block_of_a_control_branch_is_that_with_its_hint() -> None:
    """VACE: the first block's hint is part of what it adds, and the other blocks' hints of what is reused."""
    model, method = ours(diffusers_model("vace")), FirstBlock(STEPS, warmup=1, longest=1, threshold=99.0)
    exact, (made, cache) = run(model, lambda row: None, "vace"), cached(model, method, "vace")
    assert cache.count.reused == 5 and [torch.equal(a, b) for a, b in zip(made, exact, strict=True)] == [
        step % 2 == 0 or step == STEPS - 1 for step in range(STEPS)
    ]


# ---------------------------------------------------------------- what nothing is reused in


METHODS = [
    FirstBlock(STEPS, longest=STEPS),
    EasyCache(STEPS, longest=STEPS),
    MagCache(STEPS, longest=STEPS, ratios=(RATIOS, RATIOS)),
    TaylorSeer(STEPS, computed=(True,) * STEPS),
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_a_threshold_of_zero_changes_no_byte(method: Method, dtype: torch.dtype) -> None:
    model = ours(diffusers_model()).to(dtype)
    made, cache = cached(model, method)
    assert all(map(torch.equal, made, run(model, lambda row: None))) and cache.count.reused == 0
    assert all(one.dtype == dtype for one in cache.branches[0, 0].tensors.values() if one.ndim == 3)


@torch.no_grad()
def test_branches_are_apart_and_forgotten() -> None:
    model, (latents, timestep, text) = ours(diffusers_model()), next(calls())
    cache = cache_of(TaylorSeer(STEPS, order=0, computed=(True, *(False,) * (STEPS - 1))))
    many, later = rows(), rows(start=2)

    def call(row: TableRow, expert: int = 0, prompt: int = 0, x: Tensor = latents) -> int:
        before = cache.count.reused
        model(x, timestep, text, levers=CallLevers(cache.of_call(row, expert, prompt)))
        return cache.count.reused - before

    assert [call(many[0]), call(many[0], prompt=-1), call(many[1]), call(many[1], prompt=-1)] == [0, 0, 1, 1]
    assert set(cache.branches) == {(0, 0), (0, -1)} and cache.step == 1
    assert [call(many[2], expert=1), call(many[3], expert=1)] == [0, 1] and set(cache.branches) == {(1, 0)}
    assert call(many[4], expert=1, x=latents[..., :2]) == 0  # another size
    assert [call(later[0]), call(later[1])] == [0, 1] and cache.step == 1  # another window
    zero = torch.zeros(3, dtype=torch.float64)
    assert cache.of_call(TableRow(zero, zero, 2, write_cache=True), 0, 0) is None and cache.step == 1


def test_which_steps_are_computed() -> None:
    assert [step for step, one in enumerate(every(20, 4, 3)) if one] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 19]
    assert every(5, 0, 2) == (True, False, True, False, True) and every(1, 4, 3) == (True,)
    assert [step for step, one in enumerate(spread(20, 13, 4)) if one] == [0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 18, 19]
    for steps in range(1, 60):
        for count in range(1, steps + 1):
            made = spread(steps, count, 4)
            assert len(made) == steps and sum(made) == max(count, min(steps, 2)) and made[0] and made[-1]


# ---------------------------------------------------------------- weights that are streamed


@torch.no_grad()
def test_streamed_blocks_are_left_out() -> None:
    model, method = ours(diffusers_model()), FirstBlock(STEPS, longest=2, threshold=0.4)
    wanted, _ = cached(model, method)
    homes = {parameter: parameter.data for block in model.blocks for parameter in block.parameters()}
    lane = SimpleNamespace(count=0)

    class Counting(HostLane):
        def copy(self, pairs: Any, after: Any) -> None:
            lane.count += 1
            super().copy(pairs, after)

    walk = Prefetcher(torch.device("cpu"), Counting())
    walk.take(homes, streamed_blocks(model))
    model.walk = walk
    made, cache = cached(model, method)
    assert all(map(torch.equal, made, wanted)) and cache.count.reused > 0
    # Of a step that is left behind the first block, one more is copied ahead; contexts are walked in every step.
    assert lane.count == 3 * STEPS + 3 * cache.count.computed + 2 * cache.count.reused
    assert all(parameter.data_ptr() == home.data_ptr() for parameter, home in homes.items())
