"""Denoisers from a model's velocity. Each function wraps another and knows no model.

Legend: x, v, x0 [B, C, T, h, w]; sigma float64 [T], one noise level a latent frame.
Velocity: (x, sigma) -> v = noise - x0.   Denoise: (x, sigma) -> x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


def combine(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def velocity_to_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that the velocity v points to from x at noise level sigma, in x's dtype: x - sigma * v."""
    return x - sigma.to(x.device, x.dtype).view(1, 1, -1, 1, 1) * v.to(x.dtype)


def guided(cond: Velocity, uncond: Velocity, scale: float) -> Velocity:
    """Guidance over two velocities; `uncond` is never called at scale 1, where it has no say."""
    if scale == 1:
        return cond
    return lambda x, sigma: combine(cond(x, sigma), uncond(x, sigma), scale)


def switched(velocities: Sequence[Velocity], choose: Callable[[Tensor], int]) -> Velocity:
    """For each call that one of the velocities which `choose` names for its noise level, by number."""
    return lambda x, sigma: velocities[choose(sigma)](x, sigma)


def denoiser(velocity: Velocity) -> Denoise:
    """The denoiser that a velocity makes."""
    return lambda x, sigma: velocity_to_x0(x, velocity(x, sigma), sigma)


def known(denoise: Denoise, latents: Tensor, mask: Tensor) -> Denoise:
    """`denoise`, except that where mask is true x0 is the known latents.

    latents: [B, C, T, h, w]; mask: bool, [T] for whole latent frames, or any shape that broadcasts to the latents.
    """
    where = mask.view(1, 1, -1, 1, 1) if mask.ndim == 1 else mask

    def denoise_unknown(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(where.to(x.device), latents.to(x.device, x.dtype), denoise(x, sigma))

    return denoise_unknown


def flow_edit(target: Velocity, source: Velocity, clean: Tensor, noise: Tensor) -> Denoise:
    """FlowEdit (arXiv 2412.08629): follows the difference of two velocities, from the clean source at its full level.

    x goes from the source to the edit without ever being noised; both models see it beside the source with the same
    noise. clean, noise: [B, C, T, h, w]. Columns at level 0 are known, and stay. For Euler's method.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x.device, x.dtype).view(1, 1, -1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        difference = target(x + noisy - clean, sigma) - source(noisy, sigma)
        return x - level * difference.to(x.dtype)

    return denoise
