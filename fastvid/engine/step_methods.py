"""The methods of step caches: when the blocks of a step are left out, and what stands in for what they would make.

Every method keeps something of the last step that ran all blocks, and adds it to the tokens of a later one:

    first_block   runs the first block. If what that adds is near what it added in the last whole step, the other blocks
                  add what they added then (ParaAttention's first-block cache; Cache-DiT's residual_diff_threshold)
    taylorseer    every few steps all blocks run; between those the sum of what they add goes on as a polynomial of the
                  step's number, by its finite differences (arXiv 2503.06923, on the sum over all blocks)
    easycache     the blocks' output changes as much as their input, times a factor that the last two whole steps show;
                  they run once these changes have added up to the threshold (arXiv 2507.02860, on tokens)
    magcache      what the blocks add shrinks or grows from step to step by ratios that were measured before; they run
                  once the products' distances from 1 have added up to the threshold (arXiv 2506.09045)

A threshold of 0 leaves out nothing. Steps count from 0 in each window of a segment; in the last one all blocks run.

Shapes: B batch, N tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

Agree = Callable[[Tensor], list[float]]
"""Sums [k] over this rank's tokens -> those over all tokens, on the host; the same on all ranks that share them."""


@dataclass
class Branch:
    """What is kept of one expert's calls with one prompt. last: the last step in which all blocks ran, -1 for none.
    error: the changes that have added up since then. negative: of the negative prompt."""

    negative: bool = False
    last: int = -1
    error: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def fit(self, x: Tensor) -> None:
        """Forgets what does not fit the tokens x [B, N, d], as after a change of size."""
        if any(one.ndim == x.ndim and (one.shape, one.dtype) != (x.shape, x.dtype) for one in self.tensors.values()):
            self.last, self.error, self.tensors = -1, 0.0, {}

    def ran(self, step: int, **tensors: Tensor) -> None:
        """All blocks ran in a step, of which these tensors are kept."""
        self.last, self.error = step, 0.0
        self.tensors.update(tensors)


@dataclass(frozen=True)
class Method:
    """Settings of a method. steps: of a window. warmup: the steps at the start in which all blocks run. longest: the
    most steps in a row without. NAMES: of the tensors of x's shape that a branch keeps. PEEKS: it decides behind the
    first block."""

    steps: int
    warmup: int = 0
    longest: int = 0
    NAMES: ClassVar[tuple[str, ...]] = ("residual",)
    PEEKS: ClassVar[bool] = False

    def allows(self, branch: Branch, step: int) -> bool:
        """Whether a step may leave out blocks at all."""
        return branch.last >= 0 and self.warmup <= step < self.steps - 1 and step - branch.last <= self.longest

    def predict(self, branch: Branch, step: int, x: Tensor, agree: Agree) -> Tensor | None:
        """What the blocks would make of x [B, N, d]; None if they have to run. Behind the first block, if it peeks: x
        is then what that has made, and what it has added is in the branch."""
        raise NotImplementedError

    def keep(self, branch: Branch, step: int, x: Tensor, out: Tensor) -> None:
        """Keeps what is needed of a step in which all blocks ran: x [B, N, d] before them (or behind the first, if it
        peeks), out [B, N, d] after them."""
        branch.ran(step, residual=out - x)

    def least(self) -> int:
        """The least steps in which all blocks run."""
        free = max(0, self.steps - 1 - max(1, self.warmup))
        return min(self.steps, max(1, self.warmup) + 1) + free // (self.longest + 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of x's shape that a branch keeps."""
        return self.NAMES


@dataclass(frozen=True)
class FirstBlock(Method):
    threshold: float = 0.0
    NAMES = ("head", "residual")
    PEEKS = True

    def predict(self, branch: Branch, step: int, x: Tensor, agree: Agree) -> Tensor | None:
        """branch.tensors["now"]: what the first block has added in this step."""
        now, tensors = branch.tensors["now"], branch.tensors
        if not self.allows(branch, step) or self.threshold == 0:
            return None
        change, size = agree(torch.stack((_size(now - tensors["head"]), _size(tensors["head"]))))
        return x + tensors["residual"] if change < self.threshold * size else None

    def keep(self, branch: Branch, step: int, x: Tensor, out: Tensor) -> None:
        branch.ran(step, head=branch.tensors["now"], residual=out - x)


@dataclass(frozen=True)
class TaylorSeer(Method):
    """computed: whether all blocks run, for each step. near: a forecast goes no farther than the last two of those are
    apart, which beyond the paper keeps the steps behind the warmup from running away: differences over one step say
    little of four steps on."""

    order: int = 1
    computed: tuple[bool, ...] = ()
    near: bool = False

    def allows(self, branch: Branch, step: int) -> bool:
        due = any(self.computed[branch.last + 1 : step + 1]) or step >= self.steps - 1
        return branch.last >= 0 and not due

    def predict(self, branch: Branch, step: int, x: Tensor, agree: Agree) -> Tensor | None:
        if not self.allows(branch, step):
            return None
        differences = [branch.tensors[name] for name in self.names if name in branch.tensors]
        out, ahead = x + differences[0], step - branch.last
        if self.near:
            ahead = min(ahead, 1 + self.computed[: branch.last][::-1].index(True) if branch.last else 1)
        for order, difference in enumerate(differences[1:], 1):
            out.add_(difference, alpha=ahead**order / math.factorial(order))
        return out

    def keep(self, branch: Branch, step: int, x: Tensor, out: Tensor) -> None:
        factors, passed = [out - x], step - branch.last
        for name in self.names[: self.order]:
            if name in branch.tensors:
                factors.append((factors[-1] - branch.tensors[name]) / passed)
        branch.ran(step, **dict(zip(self.names, factors, strict=False)))

    def least(self) -> int:
        return sum(self.computed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"difference_{order}" for order in range(self.order + 1))


@dataclass(frozen=True)
class EasyCache(Method):
    threshold: float = 0.0
    NAMES = ("input", "base", "residual")

    def predict(self, branch: Branch, step: int, x: Tensor, agree: Agree) -> Tensor | None:
        tensors = branch.tensors
        if branch.last < 0 or self.threshold == 0:
            return None
        before, tensors["input"] = tensors["input"], x
        if "sums" not in tensors or not self.allows(branch, step):
            return None
        moved = _size(x - before)
        output_change, input_change, size, change = agree(torch.cat((tensors["sums"], moved[None])))
        divisor = input_change * size
        branch.error += output_change * change / divisor if divisor > 0 else math.inf
        return x + tensors["residual"] if branch.error < self.threshold else None

    def keep(self, branch: Branch, step: int, x: Tensor, out: Tensor) -> None:
        old, residual = branch.tensors, out - x
        if branch.last >= 0:
            changes = out - (old["base"] + old["residual"]), x - old["base"], out
            old["sums"] = torch.stack([_size(one) for one in changes])
        branch.ran(step, input=x, base=x, residual=residual)


@dataclass(frozen=True)
class MagCache(Method):
    """ratios: of each step, the size of what the blocks add by that in the step before, for the prompt and for the
    negative prompt."""

    threshold: float = 0.0
    ratios: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def predict(self, branch: Branch, step: int, x: Tensor, agree: Agree) -> Tensor | None:
        if not self.allows(branch, step) or not self.error(branch.last, step, branch.negative) < self.threshold:
            return None
        return x + branch.tensors["residual"]

    def error(self, last: int, step: int, negative: bool = False) -> float:
        """The error of leaving out the blocks in all steps behind `last`, up to this one."""
        product, error = 1.0, 0.0
        for ratio in self.ratios[negative][last + 1 : step + 1]:
            product *= ratio
            error += abs(1 - product)
        return error

    def least(self) -> int:
        """In how many they do: it depends on nothing but the ratios."""
        branch, count = Branch(), 0
        for step in range(self.steps):
            if not self.allows(branch, step) or self.error(branch.last, step) >= self.threshold:
                branch.last, count = step, count + 1
        return count


def _size(x: Tensor) -> Tensor:
    """The sum of magnitudes, in fp32."""
    return torch.linalg.vector_norm(x, 1, dtype=torch.float32)


def every(steps: int, warmup: int, distance: int) -> tuple[bool, ...]:
    """Which steps are computed: the first `warmup`, every `distance`-th from the last of those on, and the last."""
    first = max(1, warmup) - 1
    return tuple(step < warmup or (step - first) % distance == 0 or step == steps - 1 for step in range(steps))


def spread(steps: int, count: int, warmup: int) -> tuple[bool, ...]:
    """Which steps are computed if `count` of them are: the first `warmup`, the last, and the others at distances that
    are as equal as possible, the longer ones first: differences over equal distances forecast best, and the last steps
    change the most."""
    if count >= steps:
        return (True,) * steps
    warmup, count = max(1, min(warmup, count - 1)), max(2, count)
    distance, longer = divmod(steps - warmup, count - warmup)
    gaps = [distance + 1] * longer + [distance] * (count - warmup - longer)
    chosen = {*range(warmup), *(warmup - 1 + gone for gone in accumulate(gaps))}
    return tuple(step in chosen for step in range(steps))
