"""A sampler's step in one pass: guidance, denoised latents and the solver's update, for each latent frame.

    v     = uncond + guidance_scale * (cond - uncond), or cond if uncond is None
    x0    = x - sigma * v
    out_o = sum_j weights[o, j] * in_j,   in = (x, x0, *history)

Shapes: B batch, C channels, T columns (latent frames), h/w latent height and width; O outputs that have weights. A
column that does not move, and its history, are returned bit-identical.

History and outputs of each solver; the weights follow from the formulas in `fastvid.sampling.solvers`:

    euler   ()                          [x, x0]                       weights [1, 2, T]: `euler_weights`
    dpm++   (previous x0,)              [x, x0]                       weights [1, 3, T]: `dpmpp_weights`
    unipc   (previous x0, the one       [x, x0, previous x0, start]   weights [2, 5, T]: `unipc_weights`
            before, start of last step)

The inputs are velocities, not x0. Fully known columns have noise level 0 and do not move. If only parts of a column are
known (`guidance.known`), x0 is computed eagerly instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastvid.ops.upload import upload

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Number of history tensors -> for each output, the input that it copies in columns that do not move. Euler has no
# history and copies x0 there too.
KEPT: Mapping[int, tuple[int, ...]] = {0: (0, 1), 1: (0, 2), 3: (0, 2, 3, 4)}


def solver_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: Tensor,
    moves: Tensor,
    weights: Tensor,
    history: Sequence[Tensor],
) -> list[Tensor]:
    """The outputs of a step, each [B, C, T, h, w] of x's type; see above.

    x and history have the same dtype; cond and uncond are velocities of any dtype; all [B, C, T, h, w]. sigma float64
    [T], moves bool [T] and weights float64 [O, 2 + len(history), T] are on the CPU. Weights of columns that do not move
    are ignored, and so are inputs with weight 0, even if they are not finite.
    """
    check(x, cond, uncond, sigma, moves, weights, history)
    exact = x.dtype if x.dtype == torch.float64 else torch.float32
    v = cond.to(exact)
    if uncond is not None:
        v = uncond.to(exact) + guidance_scale * (v - uncond.to(exact))
    x0 = (x.to(exact) - _per_column(sigma, x, exact) * v).to(x.dtype)
    inputs = (x, x0, *history)
    sums = iter(_sum(inputs, rows).to(x.dtype) for rows in weights)
    active = upload(moves, x.device).view(1, 1, -1, 1, 1)
    # Outputs without weights: x0 and, for unipc, the previous x0.
    outputs = [next(sums), x0, *((history[0], next(sums)) if len(history) == 3 else ())]
    kept = KEPT[len(history)]
    return [torch.where(active, new, inputs[old]) for new, old in zip(outputs, kept, strict=True)]


@torch.library.custom_op("fastvid::solver_step_triton", mutates_args=())
def solver_step_triton(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: Tensor,
    moves: Tensor,
    weights: Tensor,
    history: Sequence[Tensor],
) -> list[Tensor]:
    """The Triton kernel. Copies tensors whose planes [h, w] are not contiguous."""
    from fastvid.kernels.solver_step import solver_step as run

    outs = _empty(x, cond, uncond, guidance_scale, sigma, moves, weights, history)
    rows = torch.cat((sigma[None], moves[None].to(sigma), weights.flatten(0, 1))).float()
    x, cond, *history = (_planes(one) for one in (x, cond, *history))
    uncond = None if uncond is None else _planes(uncond)
    run(x, cond, uncond, guidance_scale, upload(rows, x.device), history, outs)
    return outs


BACKENDS: Mapping[str, Mapping[str, Callable[..., list[Tensor]]]] = {
    "solver_step": {"reference": solver_step, "triton": solver_step_triton}
}


def euler_weights(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Weights of next x = r x + (1 - r) x0, r = sigma_next / sigma. sigma, sigma_next float64 [T] -> [1, 2, T]."""
    ratio = sigma_next / sigma
    return torch.stack((ratio, 1 - ratio))[None]


def dpmpp_weights(sigma: Tensor, sigma_next: Tensor, carry: Tensor) -> Tensor:
    """Weights of next x = r x + (1 - r) (x0 + carry (x0 - previous x0)), r = sigma_next / sigma. All float64 [T] ->
    [1, 3, T].

    carry: factor of the extrapolation of x0, h / (2 h0) in columns of order 2, else 0.
    """
    ratio = sigma_next / sigma
    return torch.stack((ratio, (1 - ratio) * (1 + carry), -(1 - ratio) * carry))[None]


def unipc_weights(
    sigma: Tensor,
    sigma_next: Tensor,
    carry: Tensor,
    before: Tensor,
    to_older: Tensor,
    to_newer: Tensor,
    stepped: Tensor,
) -> Tensor:
    """Weights of the next x and of `start`, the point where the step starts: float64 [T] each -> [2, 5, T].

        start  = q start_before + (1 - q) (newest + to_older (older - newest) + to_newer (x0 - newest))
        next x = r start + (1 - r) (x0 + carry (x0 - newest))

    q = sigma / before, r = sigma_next / sigma. newest, older: x0 of the last two steps. before: noise level of a
    column's last step. stepped: bool [T]; start is x in columns that have not made a step.
    """
    ratio, none = sigma_next / sigma, torch.zeros_like(sigma)
    back = sigma / before
    corrected = (none, (1 - back) * to_newer, (1 - back) * (1 - to_older - to_newer), (1 - back) * to_older, back)
    as_given = torch.stack((none + 1, none, none, none, none))
    start = torch.where(stepped, torch.stack(corrected), as_given)
    target = torch.stack((none, 1 + carry, -carry, none, none))
    return torch.stack((ratio * start + (1 - ratio) * target, start))


def _sum(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_j weights[j, t] * inputs[j], skipping inputs with weight 0."""
    exact = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    total: Tensor | None = None
    for one, row in zip(inputs, weights, strict=True):
        weight = _per_column(row, one, exact)
        term = torch.where(weight == 0, -0.0, weight * one.to(exact))  # adding -0 never changes a number
        total = term if total is None else total + term
    assert total is not None
    return total


def _per_column(values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[T] float64 on the CPU -> [1, 1, T, 1, 1] on `like`'s device."""
    return upload(values, like.device, dtype).view(1, 1, -1, 1, 1)


def _planes(x: Tensor) -> Tensor:
    """x if its planes [h, w] are contiguous, else a copy."""
    h, w = x.shape[3:]
    return x if (w == 1 or x.stride(4) == 1) and (h == 1 or x.stride(3) == w) else x.contiguous()


@solver_step_triton.register_fake
def _empty(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: Tensor,
    moves: Tensor,
    weights: Tensor,
    history: Sequence[Tensor],
) -> list[Tensor]:
    """The uninitialized results."""
    check(x, cond, uncond, sigma, moves, weights, history)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in KEPT[len(history)]]


def check(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    sigma: Tensor,
    moves: Tensor,
    weights: Tensor,
    history: Sequence[Tensor],
) -> None:
    """Raises ValueError for inputs that do not fit together."""
    latents = [one for one in (x, cond, uncond, *history) if one is not None]
    if x.ndim != 5 or any(one.shape != x.shape for one in latents) or any(one.dtype != x.dtype for one in history):
        raise ValueError(
            "solver_step takes latents and velocities [B, C, T, h, w], history of x's type, not "
            + ", ".join(f"{one.dtype} {tuple(one.shape)}" for one in latents)
        )
    if len(history) not in KEPT:
        raise ValueError(f"history is 0, 1 or 3 tensors (euler, dpm++, unipc), not {len(history)}")
    T, rows = x.shape[2], 2 if len(history) == 3 else 1
    shapes = ((T,), (T,), (rows, 2 + len(history), T))
    controls = (sigma, moves, weights)
    types = (torch.float64, torch.bool, torch.float64)
    if any(
        (tuple(one.shape), one.dtype, one.device.type) != (shape, dtype, "cpu")
        for one, shape, dtype in zip(controls, shapes, types, strict=True)
    ):
        raise ValueError(
            f"sigma float64 {shapes[0]}, moves bool {shapes[1]} and weights float64 {shapes[2]} on the CPU are needed, "
            "not " + ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in controls)
        )
