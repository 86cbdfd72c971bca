"""solver_step: the reference against the solvers of `fastvid.sampling`, then the kernel against the reference.

The kernel runs in Triton's interpreter in a child process, and on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run_interpreted
from torch import Tensor

from fastvid.ops import solver_step as stepping
from fastvid.ops.solver_step import solver_step, solver_step_triton
from fastvid.sampling.guidance import Velocities, combine, velocity_to_x0
from fastvid.sampling.solvers import SOLVERS, SolverState

DEPTHS = {"euler": 0, "dpm++": 1, "unipc": 3}
NAN = float("nan")
BACKENDS = stepping.BACKENDS["solver_step"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Three columns: one goes all the way, one waits in between, one is known.
TABLE = [column(*row) for row in ((1, 1, 0), (0.9, 1, 0), (0.7, 0.8, 0), (0.7, 0.5, 0), (0.2, 0.1, 0), (0, 0, 0))]


def walk(name: str, run: Callable[..., list[Tensor]], dtype: torch.dtype, guided: bool) -> None:
    """Each step from the same state as the solver's own, whose rounding is that of its type."""
    x, at, outs = random(2, 3, 3, 4, 5, dtype=dtype), SolverState(), []
    tolerance = {torch.float64: 1e-15, torch.float32: 5e-7}[dtype]
    for row, levels in enumerate(zip(TABLE[:-1], TABLE[1:], strict=True)):
        cond, uncond = random(2, 3, 3, 4, 5, seed=2 * row + 1), random(2, 3, 3, 4, 5, seed=2 * row + 2)
        cond, uncond = cond.to(dtype), uncond.to(dtype) if guided else None
        v = combine(cond, uncond, 5.0) if guided else cond
        x0 = velocity_to_x0(x, v, levels[0])
        solver = replace(SOLVERS[name], operation=lambda *given: outs.append(run(*given)) or outs[-1])
        made, later = solver.fused_step(x, Velocities(cond, uncond, 5.0), *levels, at)
        expected, state = SOLVERS[name].step(x, x0, *levels, at)
        moves = levels[0] != levels[1]
        close = {"rtol": 0, "atol": tolerance * x0.abs().max().item()}
        torch.testing.assert_close(made, expected, **close)
        assert len(outs) == row + 1 and torch.equal(made[:, :, ~moves], x[:, :, ~moves])
        torch.testing.assert_close(outs[-1][1][:, :, moves], x0[:, :, moves], **close)
        assert len(later.x0s) == len(state.x0s) and (later.x is None) == (state.x is None)
        for ours, theirs in zip((*later.x0s, later.x), (*state.x0s, state.x), strict=True):
            if ours is not None:
                done = later.order > 0
                torch.testing.assert_close(ours[:, :, done], theirs[:, :, done], equal_nan=True, **close)
        if name != "euler":
            assert torch.equal(later.order, state.order)
            assert all(torch.equal(a, b) for a, b in zip(later.sigmas, state.sigmas, strict=True))
        at, x = later, made


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_is_the_solver(name: str, guided: bool, dtype: torch.dtype) -> None:
    walk(name, solver_step, dtype, guided)


def make_step(name: str, T: int = 3, shape: tuple[int, ...] = (2, 3, 4, 5), dtype: torch.dtype = torch.float32) -> list:
    """Arguments of a step in which the middle column rests and the last one reaches 0."""
    B, C, h, w = shape
    depth = DEPTHS[name]
    tensors = [random(B, C, T, h, w, seed=i, dtype=dtype) for i in range(3 + depth)]
    sigma = 0.3 + 0.7 * torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma_next = sigma * 0.8
    sigma_next[T // 2] = sigma[T // 2] if T > 1 else sigma_next[0]
    sigma_next[-1] = 0
    weights = torch.randn((2 if depth == 3 else 1, 2 + depth, T), dtype=torch.float64)
    weights[0, :, -1] = torch.eye(2 + depth, dtype=torch.float64)[1]
    return [*tensors[:3], 4.0, sigma, sigma_next != sigma, weights, tensors[3:]]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def rests_bit_for_bit(run: object, dtype: torch.dtype) -> None:
    """Columns that rest, whatever is in them and in their weights; a weight of 0 keeps out whatever an input holds."""
    for name, depth in DEPTHS.items():
        args = make_step(name, dtype=dtype)
        x, history, weights = args[0], args[7], args[6]
        odd = torch.tensor([NAN, math.inf, -0.0, 0.0, 1e-7], dtype=dtype)
        for one in (x, *history):
            one[:, :, 1] = odd
        weights[:, :, 1] = NAN
        for one in history:  # those of the last column have a weight of 0
            one[:, :, 2] = NAN
        made = run(*args)
        inputs = (x, made[1], *history)
        kept = stepping.KEPT[depth]
        for o, old in enumerate(kept):
            assert torch.equal(bits(made[o][:, :, 1]), bits(inputs[old][:, :, 1])), (name, o)
        assert torch.equal(bits(made[0][:, :, 2]), bits(made[1][:, :, 2]))  # reaching 0 is x0 itself
        assert bool(made[0][:, :, (0, 2)].isfinite().all() and made[1][:, :, (0, 2)].isfinite().all())


def does_not_depend_on_its_neighbours(run: object) -> None:
    """The bits of a column, in a window and on its own, and in one of another length that lies elsewhere in memory."""
    for name in DEPTHS:
        args = make_step(name, T=5, shape=(2, 2, 3, 7))
        together = run(*args)
        for window in (slice(0, 1), slice(2, 3), slice(1, 4), slice(3, 5)):
            part = [one[:, :, window] for one in args[:3]]
            history = [one[:, :, window].contiguous() for one in args[7]]
            made = run(*part, 4.0, args[4][window], args[5][window], args[6][..., window], history)
            for ours, theirs in zip(made, together, strict=True):
                assert torch.equal(bits(ours), bits(theirs[:, :, window]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reference_leaves_resting_columns_alone(dtype: torch.dtype) -> None:
    rests_bit_for_bit(solver_step, dtype)


def test_reference_goes_column_by_column() -> None:
    does_not_depend_on_its_neighbours(solver_step)


def refuses(run: object) -> None:
    args = make_step("unipc")
    for at, bad, message in (
        (0, args[0][0], "B, C, T, h, w"),
        (1, args[1][:, :, 1:], "B, C, T, h, w"),
        (7, [one.half() for one in args[7]], "of x's type"),
        (7, args[7][:2], "0, 1 or 3 tensors"),
        (4, args[4].float(), "on the CPU"),
        (5, args[5].double(), "on the CPU"),
        (6, args[6][:1], "on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*args[:at], bad, *args[at + 1 :])


@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_is_refused(name: str) -> None:
    refuses(BACKENDS[name])


# The kernel, interpreted


@pytest.mark.interpret
@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("guided", [False, True])
def test_the_kernel_is_the_solver(name: str, guided: bool) -> None:
    walk(name, solver_step_triton, torch.float32, guided)


def check(args: list) -> None:
    """At most twice the error of eager, or a rounding."""
    exact = solver_step(*[one.double() if isinstance(one, Tensor) and one.ndim == 5 else one for one in args[:7]],
                        [one.double() for one in args[7]])  # fmt: skip
    for made, eager, true in zip(solver_step_triton(*args), solver_step(*args), exact, strict=True):
        norm = torch.linalg.vector_norm(true)
        off, theirs = (torch.linalg.vector_norm(one.double() - true) / norm for one in (made, eager))
        assert off <= max(2 * theirs, torch.finfo(made.dtype).eps / 2), (off, theirs)


@pytest.mark.interpret
@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(DEPTHS)),
    T=st.integers(1, 4),
    plane=st.sampled_from(((1, 1), (3, 5), (1, 1024), (5, 205), (32, 65))),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    guided=st.booleans(),
    layout=st.sampled_from(("plain", "slice of frames", "transposed planes", "expanded")),
)
def test_kernel(name: str, T: int, plane: tuple[int, int], dtype: torch.dtype, guided: bool, layout: str) -> None:
    args = make_step(name, T, (1, 2, *plane), dtype)
    if not guided:
        args[2] = None
    for at in (0, 1):
        args[at] = laid_out(args[at], layout)
    args[7] = [laid_out(one, layout) for one in args[7]]
    check(args)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x, or something like it, in other strides."""
    if layout == "slice of frames":
        return torch.cat((x, x), 2)[:, :, 1 : 1 + x.shape[2]]
    if layout == "transposed planes":
        return x.transpose(3, 4).contiguous().transpose(3, 4)
    return x[:, :1].expand_as(x) if layout == "expanded" else x


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_leaves_resting_columns_alone(dtype: torch.dtype) -> None:
    rests_bit_for_bit(solver_step_triton, dtype)


@pytest.mark.interpret
def test_kernel_goes_column_by_column() -> None:
    does_not_depend_on_its_neighbours(solver_step_triton)


@pytest.mark.interpret
@pytest.mark.parametrize("strides", [(64, 2**30), (2**30, 64)])
def test_kernel_has_64_bit_offsets(strides: tuple[int, int]) -> None:
    """Channels or columns 2^31 elements apart; what lies between them is never touched."""
    args = make_step("dpm++", 3, (1, 3, 2, 8), torch.float16)
    expected = solver_step(*args)
    size = 2 * sum(strides) + 16
    for at in (0, 1, 2):
        far = torch.empty(size, dtype=torch.float16).as_strided((1, 3, 3, 2, 8), (1, *strides, 8, 1))
        args[at] = far.copy_(args[at])
    for made, wanted in zip(solver_step_triton(*args), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.interpret
def test_kernel_writes_its_outputs_and_nothing_beside_them() -> None:
    from fastvid.kernels.solver_step import solver_step as run

    x, cond, uncond, scale, sigma, moves, weights, history = make_step("unipc")
    rooms = [torch.full((x.numel() + 32,), NAN) for _ in range(4)]
    outs = [room[16:-16].view(x.shape) for room in rooms]
    table = torch.cat((sigma[None], moves[None].double(), weights.flatten(0, 1))).float()
    run(x, cond, uncond, scale, table, history, outs)
    for room, out, eager in zip(rooms, outs, solver_step(*make_step("unipc")[:6], weights, history), strict=True):
        assert bool(room[:16].isnan().all() and room[-16:].isnan().all())
        torch.testing.assert_close(out, eager)
    with pytest.raises(ValueError, match="fp32, fp16 or bf16"):
        run(x.double(), cond, uncond, scale, table, history, outs)


@pytest.mark.interpret
def test_operator_of_torch() -> None:
    torch.library.opcheck(solver_step_triton, tuple(make_step("unipc")))
    empty = make_step("euler", shape=(1, 2, 0, 4))
    assert [one.shape for one in solver_step_triton(*empty)] == [(1, 2, 3, 0, 4)] * 2


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


# On a GPU


def on_gpu(args: list) -> list:
    return [one.cuda() if isinstance(one, Tensor) and one.ndim == 5 else one for one in args[:7]] + [
        [one.cuda() for one in args[7]]
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
def test_kernel_on_a_gpu(name: str, dtype: torch.dtype, guided: bool) -> None:
    for T, shape in ((1, (1, 1, 1, 1)), (21, (1, 16, 60, 104)), (3, (2, 48, 31, 53))):
        args = on_gpu(make_step(name, T, shape, dtype))
        if not guided:
            args[2] = None
        check(args)
        args[1] = args[1].bfloat16()  # velocities of another type than the latents
        check(args)


@pytest.mark.gpu
def test_columns_on_a_gpu() -> None:
    def run(*args: object) -> list[Tensor]:
        return [one.cpu() for one in solver_step_triton(*on_gpu(list(args)))]

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rests_bit_for_bit(run, dtype)
    does_not_depend_on_its_neighbours(run)
