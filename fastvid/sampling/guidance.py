"""Guidance: denoisers made from a model's velocity. Each function wraps another and knows no model.

Legend: x, v, x0 [B, C, T, h, w]; sigma float64 [T], one noise level a latent frame.
Velocity: (x, sigma) -> v = noise - x0.   Denoise: (x, sigma) -> x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.ops.upload import upload

Velocity = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


def combine(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def velocity_to_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that velocity v predicts from x at noise level sigma, in x's dtype: x - sigma * v."""
    return x - upload(sigma, x.device, x.dtype).view(1, 1, -1, 1, 1) * v.to(x.dtype)


class Velocities(NamedTuple):
    """The velocities that guidance combines; uncond is None at scale 1."""

    cond: Tensor
    uncond: Tensor | None
    scale: float


Make = Callable[[], Tensor]


def in_sequence(cond: Make, uncond: Make | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both velocities, one after the other."""
    return cond(), None if uncond is None else uncond()


@dataclass
class Difference:
    """cond - uncond of the last call that computed both, [B, C, T, h, w]."""

    value: Tensor | None = None


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance over two velocities; `uncond` is never called at scale 1.

    both: computes them, from a function for each (None: not needed) and a tensor of their shape and dtype. Ranks may
    compute one each. pair: computes both in one call of the model, in place of it.
    columns: bool [T], those that are guided; None: all. last: keeps the difference of the two for later calls. reuse:
    this call takes so much of that difference, and does not call `uncond` (as the guidance cache of FasterCache, arXiv
    2410.19355, without its weights on frequencies).
    """

    cond: Velocity
    uncond: Velocity
    scale: float
    both: Callable[[Make, Make | None, Tensor], tuple[Tensor, Tensor | None]] = in_sequence
    columns: Tensor | None = None
    last: Difference | None = None
    reuse: float | None = None
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def velocities(self, x: Tensor, sigma: Tensor) -> Velocities:
        """Both, not combined yet; from a reused difference, the guided velocity alone."""
        v, other = self._both(x, sigma)
        if self.reuse is not None:
            assert self.last is not None and self.last.value is not None
            return Velocities(v.add(self.last.value, alpha=(self.scale - 1) * self.reuse), None, 1.0)
        if other is not None and self.columns is not None:
            other = torch.where(upload(self.columns, v.device).view(1, 1, -1, 1, 1), other, v)
        if other is not None and self.last is not None:
            self.last.value = v - other
        return Velocities(v, other, self.scale)

    def _both(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        cond, uncond = (partial(velocity, x, sigma) for velocity in (self.cond, self.uncond))
        if self.scale == 1 or self.reuse is not None:
            return self.both(cond, None, x)
        return self.both(cond, uncond, x) if self.pair is None else self.pair(x, sigma)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        cond, uncond, scale = self.velocities(x, sigma)
        return cond if uncond is None else combine(cond, uncond, scale)


@dataclass(frozen=True)
class Switched:
    """One of several velocities in each call: `choose` gives its number for a noise level."""

    of: Sequence[Velocity]
    choose: Callable[[Tensor], int]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.of[self.choose(sigma)](x, sigma)


@dataclass(frozen=True)
class Denoiser:
    """The denoiser of a velocity."""

    velocity: Velocity

    def velocities(self, x: Tensor, sigma: Tensor) -> Velocities:
        """What x0 is computed from, for a fused step, which computes x0 itself (`ops.solver_step`)."""
        made = self.velocity
        if isinstance(made, Switched):
            made = made.of[made.choose(sigma)]
        return made.velocities(x, sigma) if isinstance(made, Guided) else Velocities(made(x, sigma), None, 1.0)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return velocity_to_x0(x, self.velocity(x, sigma), sigma)


def keep_known(denoise: Denoise, latents: Tensor, mask: Tensor) -> Denoise:
    """`denoise`, except that where mask is true x0 is the known latents.

    latents: [B, C, T, h, w]; mask: bool, [T] for whole latent frames, or any shape that broadcasts to the latents.
    """
    where = mask.view(1, 1, -1, 1, 1) if mask.ndim == 1 else mask

    def denoise_unknown(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(upload(where, x.device), latents.to(x.device, x.dtype), denoise(x, sigma))

    return denoise_unknown


def flow_edit(target: Velocity, source: Velocity, clean: Tensor, noise: Tensor) -> Denoise:
    """FlowEdit (arXiv 2412.08629): follows the difference of two velocities, starting from the clean source.

    x goes from the source to the edit without being noised; both velocities are taken with the same noise added.
    clean, noise: [B, C, T, h, w]. Columns at level 0 are known, and stay. For Euler's method.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = upload(sigma, x.device, x.dtype).view(1, 1, -1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        difference = target(x + noisy - clean, sigma) - source(noisy, sigma)
        return x - level * difference.to(x.dtype)

    return denoise
