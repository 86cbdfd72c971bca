"""Solvers: each is one pure step from noise level sigma to sigma_next, made column by column.

A column is one latent frame. x and x0 (the clean latents that the denoiser predicts from x) are [B, C, T, h, w]; sigma
and sigma_next are float64 [T] on the CPU. History and order are kept per column, so columns may be at different levels,
start late or pause. A column with sigma_next == sigma stays as it is, bit for bit, and so does its history. No column
depends on its neighbours.

Coefficients are computed in float64 on the CPU and applied in x's dtype. With lambda = log((1 - sigma) / sigma),
h = lambda_next - lambda and r = sigma_next / sigma, the papers' alpha_next * (1 - exp(-h)) is 1 - r for flow matching,
which is finite at sigma 1 and at sigma 0, where h is infinite.

A `fused_` step is the same step made from velocities by one operation (`ops.solver_step`), to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from fastvid.ops.solver_step import dpmpp_weights, euler_weights, unipc_weights
from fastvid.ops.upload import upload
from fastvid.sampling.guidance import Velocities

# The largest noise level at which UniPC takes lambda. Published UniPC tables never reach 1, where lambda is -inf and
# second-order terms vanish. diffusers moves a given 1.0 to this float32 number, so the same table gives the same video.
# Two levels above it share one lambda, so h0 may be 0; the order of that step is then 1.
UNIPC_LAST_SIGMA = 1 - 1.0132789611816406e-06

Fresh = Callable[[Tensor], Tensor]
"""draws int64 [T] -> noise [B, C, T, h, w], for each column the draw of that number; draw 0 starts the sampling."""


@dataclass(frozen=True)
class SolverState:
    """What the columns remember of their past steps: newest first, zeros where there is none. It holds references, so
    do not write into x and x0 after a step.

    order: [T] int64, the order of the last step, 0 for a column that has made none; with new noise the steps made.
    sigmas: each [T] float64.   x0s: each [B, C, T, h, w].
    x: [B, C, T, h, w], where the last step started from, which UniPC goes back to.
    fresh: where new noise comes from, for solvers that draw some.
    """

    order: Tensor | None = None
    sigmas: tuple[Tensor, ...] = ()
    x0s: tuple[Tensor, ...] = ()
    x: Tensor | None = None
    fresh: Fresh | None = None

    def moved(self, drop: int, add: int) -> SolverState:
        """The state of a window that lost `drop` columns on its left and got `add` new ones on its right."""
        if self.order is None:
            return self
        return replace(
            self,
            order=_moved(self.order, drop, add, 0),
            sigmas=tuple(_moved(one, drop, add, 0) for one in self.sigmas),
            x0s=tuple(_moved(one, drop, add, 2) for one in self.x0s),
            x=None if self.x is None else _moved(self.x, drop, add, 2),
        )


@dataclass(frozen=True)
class Move:
    """One step of all columns, [T] each: levels in float64, which columns move, and the orders of their last steps."""

    sigma: Tensor
    sigma_next: Tensor
    active: Tensor
    past: Tensor | None

    @cached_property
    def order(self) -> Tensor:
        """Of this step: 1 at both ends, else 2."""
        past = torch.zeros(len(self.sigma), dtype=torch.int64) if self.past is None else self.past
        return torch.where(self.sigma_next == 0, 1, (past + 1).clamp(max=2))


Stepped = tuple[Tensor, SolverState]
Step = Callable[[Tensor, Tensor, Move, SolverState], Stepped]
"""(x, x0, move, state) -> x in the columns that move, and the state after it."""
Operation = Callable[..., list[Tensor]]
"""See `fastvid.ops.solver_step.solver_step`."""
FusedStep = Callable[[Operation, Tensor, Velocities, Move, SolverState], Stepped]


@dataclass(frozen=True)
class Solver:
    """A way to step from one noise level to the next.

    depth: how many past steps it remembers. first_sigma: where its own tables start, before the shift.
    integer_timesteps: whether the model is told whole timesteps. fused: the step made from velocities by one operation,
    if it has one; operation: that operation, None to step in eager PyTorch.
    """

    method: Step
    depth: int = 0
    first_sigma: float = 1.0
    integer_timesteps: bool = False
    fused: FusedStep | None = None
    operation: Operation | None = None

    def init(self, fresh: Fresh | None = None) -> SolverState:
        """The state before the first step, for any shape."""
        return SolverState(fresh=fresh)

    @property
    def fuses(self) -> bool:
        """Whether `fused_step` can be used: guidance, clean latents and the step in one pass."""
        return self.fused is not None and self.operation is not None

    def step(self, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, state: SolverState) -> Stepped:
        """x at sigma_next, and the state for the next step."""
        assert x.shape == x0.shape and x.dtype == x0.dtype, (x.shape, x0.shape, x.dtype, x0.dtype)
        move = _move(x, sigma, sigma_next, state)
        if not move.active.any():
            return x, state
        stepped, state = self.method(x, x0, move, _or_blank(state, x, self.depth))
        return _keep(move.active, stepped, x), state

    def fused_step(
        self, x: Tensor, velocities: Velocities, sigma: Tensor, sigma_next: Tensor, state: SolverState
    ) -> Stepped:
        """`step` from velocities, by `operation`."""
        assert self.fused is not None and self.operation is not None
        move = _move(x, sigma, sigma_next, state)
        if not move.active.any():
            return x, state
        return self.fused(self.operation, x, velocities, move, _or_blank(state, x, self.depth))


def euler(x: Tensor, x0: Tensor, move: Move, state: SolverState) -> Stepped:
    """Euler's method on dx/dsigma = (x - x0) / sigma (flow matching, arXiv 2210.02747). Keeps no history."""
    return _blend(x, x0, move.sigma, move.sigma_next), state


def dpmpp(x: Tensor, x0: Tensor, move: Move, state: SolverState) -> Stepped:
    """DPM-Solver++(2M), midpoint, order 1 on a column's first step and on the one that reaches 0 (arXiv 2211.01095,
    algorithm 2; as Wan2.1 wan/utils/fm_solvers.py, which ends on order 1 for any number of steps)."""
    target = _extrapolate(x0, move, state, last_sigma=1.0)
    return _blend(x, target, move.sigma, move.sigma_next), _remember(move, x0, x, state)


def unipc(x: Tensor, x0: Tensor, move: Move, state: SolverState) -> Stepped:
    """UniPC of order 2 with B(h) = exp(h) - 1 (bh2) on x0, order 1 on a column's first step and on the one that
    reaches 0 (arXiv 2302.04867, predicting x0; as Wan2.1 wan/utils/fm_solvers_unipc.py).

    From a column's second step on, x is first corrected: computed again from where the last step started, now that x0
    at its end is known. So a caller's change to x between two steps of a column acts only through x0.
    """
    corrected = _correct(x, x0, move.sigma, state)
    target = _extrapolate(x0, move, state, last_sigma=UNIPC_LAST_SIGMA)
    return _blend(corrected, target, move.sigma, move.sigma_next), _remember(move, x0, corrected, state)


def redraw(x: Tensor, x0: Tensor, move: Move, state: SolverState) -> Stepped:
    """x0 and new noise in the proportions of sigma_next: how consistency and DMD models of few steps are sampled
    (arXiv 2303.01469, algorithm 1; as Self-Forcing `pipeline/causal_inference.py`). Draw n follows a column's nth step.
    """
    assert state.fresh is not None, "redraw needs a source of noise: Solver.init(fresh)"
    made = torch.zeros(x.shape[2], dtype=torch.int64) if state.order is None else state.order
    made = torch.where(move.active, made + 1, made)
    if bool((move.sigma_next[move.active] > 0).any()):
        noise = upload(state.fresh(made), x.device, x.dtype)
        x0 = _per_column(1 - move.sigma_next, x0) * x0 + _per_column(move.sigma_next, x0) * noise
    return x0, replace(state, order=made)


def fused_euler(op: Operation, x: Tensor, velocities: Velocities, move: Move, state: SolverState) -> Stepped:
    """`euler` from velocities."""
    stepped, _ = op(x, *velocities, move.sigma, move.active, euler_weights(move.sigma, move.sigma_next), ())
    return stepped, state


def fused_dpmpp(op: Operation, x: Tensor, velocities: Velocities, move: Move, state: SolverState) -> Stepped:
    """`dpmpp` from velocities."""
    weights = dpmpp_weights(move.sigma, move.sigma_next, _carry(move, state, last_sigma=1.0))
    stepped, *x0s = op(x, *velocities, move.sigma, move.active, weights, state.x0s)
    return stepped, _after(move, tuple(x0s), None, state)


def fused_unipc(op: Operation, x: Tensor, velocities: Velocities, move: Move, state: SolverState) -> Stepped:
    """`unipc` from velocities."""
    sigma, correction = move.sigma, _correction(move.sigma, state)
    carry = _carry(move, state, last_sigma=UNIPC_LAST_SIGMA)
    weights = unipc_weights(sigma, move.sigma_next, carry, state.sigmas[0], *correction, _order(state) > 0)
    stepped, *x0s, start = op(x, *velocities, sigma, move.active, weights, (*state.x0s, state.x))
    return stepped, _after(move, tuple(x0s), start, state)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        # Wan's tables start from 0.999 as float32 has it, which decides some timesteps once they are cut to integers.
        "unipc": Solver(unipc, 2, 0.9990000128746033, integer_timesteps=True, fused=fused_unipc),
        "euler": Solver(euler, fused=fused_euler),
        "dpm++": Solver(dpmpp, 1, integer_timesteps=True, fused=fused_dpmpp),
        "redraw": Solver(redraw),
    }
)


def _extrapolate(x0: Tensor, move: Move, state: SolverState, last_sigma: float) -> Tensor:
    """x0 carried half a step on along its last change: x0 + h / (2 h0) * (x0 - previous x0) in columns of order 2. The
    second-order predictors of DPM++ 2M and of UniPC (UniP-2) are this one formula."""
    if not (move.order == 2).any():
        return x0
    return x0 + _per_column(_carry(move, state, last_sigma), x0) * (x0 - state.x0s[0])


def _carry(move: Move, state: SolverState, last_sigma: float) -> Tensor:
    """h / (2 h0) in columns of order 2, else 0: [T]."""
    here = _log_snr(move.sigma, last_sigma)
    h, h0 = _log_snr(move.sigma_next, last_sigma) - here, here - _log_snr(state.sigmas[0], last_sigma)
    return torch.where((move.order == 2) & (h0 > 0), 0.5 * h / h0, 0.0)


def _correct(x: Tensor, x0: Tensor, sigma: Tensor, state: SolverState) -> Tensor:
    """UniC: the last step again, with x0 at its end known; x in columns without a last step."""
    stepped = _order(state) > 0
    if state.x is None or not stepped.any():
        return x
    to_older, to_newer = _correction(sigma, state)
    newest, older = state.x0s
    target = newest + _per_column(to_older, x0) * (older - newest) + _per_column(to_newer, x0) * (x0 - newest)
    return _keep(stepped, _blend(state.x, target, state.sigmas[0], sigma), x)


def _correction(sigma: Tensor, state: SolverState) -> tuple[Tensor, Tensor]:
    """How far UniC's target is from the last x0 towards the one before it, and towards the one just predicted: [T]
    each. With bh2 the solution of the paper's 2x2 system R rho = b is below, in the Langevin function of h / 2."""
    before, two_before = state.sigmas
    here, start = _log_snr(sigma, UNIPC_LAST_SIGMA), _log_snr(before, UNIPC_LAST_SIGMA)
    h, h0 = here - start, start - _log_snr(two_before, UNIPC_LAST_SIGMA)
    curve = _langevin(h / 2)
    rho, second = curve / (h + h0), (_order(state) == 2) & (h0 > 0)
    return torch.where(second, -rho * h / h0, 0.0), torch.where(second, (1 + curve) / 2 - rho, 0.5)


def _langevin(u: Tensor) -> Tensor:
    """coth(u) - 1/u, by its series where the two terms would cancel."""
    return torch.where(u.abs() < 0.02, u / 3 - u**3 / 45 + 2 * u**5 / 945, 1 / torch.tanh(u) - 1 / u)


def _log_snr(sigma: Tensor, last_sigma: float) -> Tensor:
    """lambda = log(1 - sigma) - log(sigma), -inf at 1 and +inf at 0."""
    sigma = sigma.clamp(max=last_sigma)
    return torch.log1p(-sigma) - torch.log(sigma)


def _blend(x: Tensor, target: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The straight line from x at sigma to target at 0, at sigma_next: r * x + (1 - r) * target, target itself at 0."""
    ratio = sigma_next / sigma
    return _per_column(ratio, x) * x + _per_column(1 - ratio, x) * target


def _move(x: Tensor, sigma: Tensor, sigma_next: Tensor, state: SolverState) -> Move:
    assert x.ndim == 5 and sigma.shape == sigma_next.shape == x.shape[2:3], (x.shape, sigma.shape, sigma_next.shape)
    assert sigma.dtype == sigma_next.dtype == torch.float64, (sigma.dtype, sigma_next.dtype)
    assert sigma.device.type == sigma_next.device.type == "cpu", (sigma.device, sigma_next.device)
    assert bool(((sigma_next >= 0) & (sigma_next <= sigma) & (sigma <= 1)).all()), (sigma, sigma_next)
    return Move(sigma, sigma_next, sigma_next != sigma, state.order)


def _order(state: SolverState) -> Tensor:
    assert state.order is not None, "see _or_blank"
    return state.order


def _or_blank(state: SolverState, x: Tensor, depth: int) -> SolverState:
    """`state`, or before the first step one of zeros: their weight is 0."""
    if state.order is not None or depth == 0:
        return state
    columns = x.shape[2]
    return SolverState(
        torch.zeros(columns, dtype=torch.int64),
        (torch.zeros(columns, dtype=torch.float64),) * depth,
        (torch.zeros_like(x),) * depth,
        torch.zeros_like(x) if depth == 2 else None,
        state.fresh,
    )


def _remember(move: Move, x0: Tensor, x: Tensor, state: SolverState) -> SolverState:
    """The state after a step: in active columns the history moves on by one."""
    newer = zip((x0, *state.x0s), state.x0s, strict=False)
    x0s = tuple(_keep(move.active, new, old) for new, old in newer)
    return _after(move, x0s, None if state.x is None else _keep(move.active, x, state.x), state)


def _after(move: Move, x0s: tuple[Tensor, ...], x: Tensor | None, state: SolverState) -> SolverState:
    """`_remember` for a step that has moved x0s and x on already."""
    order = torch.where(move.active, move.order, _order(state))
    newer = zip((move.sigma, *state.sigmas), state.sigmas, strict=False)
    return SolverState(order, tuple(torch.where(move.active, new, old) for new, old in newer), x0s, x, state.fresh)


def _moved(tensor: Tensor, drop: int, add: int, dim: int) -> Tensor:
    rest = tensor.narrow(dim, drop, tensor.shape[dim] - drop)
    shape = list(rest.shape)
    shape[dim] = add
    return torch.cat((rest, rest.new_zeros(shape)), dim)


def _keep(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in active columns, `old` in the others."""
    if active.all():
        return new
    return torch.where(upload(active, new.device).view(1, 1, -1, 1, 1), new, old)


def _per_column(weight: Tensor, like: Tensor) -> Tensor:
    """[T] float64 on the CPU -> [1, 1, T, 1, 1] in `like`'s dtype, on its device."""
    return upload(weight, like.device, like.dtype).view(1, 1, -1, 1, 1)
