"""Compiled operations: against float64, with at most the error of eager PyTorch, and compiled once for all sizes.

Most tests let torch.compile trace alone (its back end "eager"), without a compiler; in slow ones Inductor compiles.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_cases import EPS, error, floor, formula, head_arguments, randn, results, row_arguments, turned
from torch import Tensor

from fastvid import errors
from fastvid.device import precision
from fastvid.ops import compiled, compiling, dispatch, libraries, reference, rgb, vae
from fastvid.ops import solver_step as stepping

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# samples, tokens, groups, distinct timesteps: one for all, one a frame, one a token
CASES = {
    "one": [(1, 48, 1, 1), (2, 30, 1, 1), (3, 7, 1, 1)],
    "of groups": [(1, 48, 4, 2), (2, 60, 12, 4), (3, 14, 2, 3)],
    "of tokens": [(1, 48, 48, 2), (3, 7, 7, 3)],
}
DEPTHS = {"euler": 0, "dpm++": 1, "unipc": 3}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, and nothing has been warned of."""
    compiling._compiled.clear()
    compiling._warned.clear()
    yield
    compiling._compiled.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile traces, but runs the traced graph in eager PyTorch; the graphs."""
    graphs: list[Any] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def trace(function: Callable[..., Any], **options: Any) -> Any:
        return real(function, backend=backend, dynamic=options["dynamic"], fullgraph=options["fullgraph"])

    monkeypatch.setattr(torch, "compile", trace)
    return graphs


def near(found: float, allowed: float, dtype: torch.dtype) -> None:
    assert found <= max(1.25 * allowed, floor(dtype) / 4), (found, allowed, dtype)


def check_rows(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for name, args in row_arguments(*case, 64, dtype).items():
        outs = {run: results(getattr(run, name)(*args)) for run in (compiled, reference)}
        for i, (ours, eager) in enumerate(zip(*outs.values(), strict=True)):
            assert ours.dtype == eager.dtype and ours.shape == eager.shape
            off, theirs = (error(out[i], formula(name, args, out[0])[i]) for out in outs.values())
            near(off, theirs, dtype)


def check_heads(samples: int, tokens: int, dtype: torch.dtype) -> None:
    args = head_arguments(samples, tokens, 2, 16, dtype)
    qkv, weight_q, weight_k, cos, sin = args
    ours, eager = (run.qkv_norm_rope(*args, EPS) for run in (compiled, reference))
    alone = compiled.rms_norm_rope(qkv.chunk(3, -1)[0], weight_q, cos, sin, EPS)
    truths = [turned(x, w, cos, sin) for x, w in zip(qkv.chunk(3, -1), (weight_q, weight_k), strict=False)]
    for made, other, true in (
        (ours[0], eager[0], truths[0]),
        (ours[1], eager[1], truths[1]),
        (alone, eager[0], truths[0]),
    ):
        assert made.shape == other.shape and made.dtype == other.dtype
        near(error(made, true), error(other, true), dtype)
    assert torch.equal(ours[2], eager[2])
    order = torch.randperm(tokens)
    for made, other in zip(compiled.qkv_norm_rope(*args, EPS, order), ours, strict=True):
        assert torch.equal(made, other[:, order])


def check_gelu(samples: int, tokens: int, dtype: torch.dtype) -> None:
    args = (
        randn(samples, tokens, 64, dtype=dtype),
        randn(96, 64, seed=1, dtype=dtype) / 8,
        randn(96, seed=2, dtype=dtype),
    )
    exact = reference.linear_gelu_tanh(*(x.double() for x in args))
    ours, eager = (run.linear_gelu_tanh(*args) for run in (compiled, reference))
    assert ours.shape == eager.shape and ours.dtype == eager.dtype
    near(error(ours, exact), error(eager, exact), dtype)


def check_head(samples: int, dtype: torch.dtype) -> None:
    x, shift, scale = randn(samples, 24, 32, dtype=dtype), randn(1, 32, seed=1), randn(1, 32, seed=2)
    index = torch.zeros(samples, 1, dtype=torch.int64)
    weight, bias = randn(16, 32, seed=3, dtype=dtype), randn(16, seed=4, dtype=dtype)
    args = x, shift, scale, index, weight, bias, (2, 3, 4), (1, 2, 2), EPS
    ours, eager = compiled.head(*args), reference.head(*args)
    assert ours.shape == eager.shape == (samples, 4, 2, 6, 8)
    torch.testing.assert_close(ours, eager, rtol=0, atol=4 * torch.finfo(dtype).eps * float(eager.abs().max()))


def step(depth: int, T: int, shape: tuple[int, ...], dtype: torch.dtype, guided: bool) -> list[Any]:
    """Arguments of a step in which the middle column rests, and an input has a weight of 0 and no number."""
    B, C, h, w = shape
    tensors = [randn(B, C, T, h, w, seed=i, dtype=dtype) for i in range(3 + depth)]
    sigma = 0.3 + 0.7 * torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moves = torch.arange(T) != T // 2 if T > 1 else torch.ones(1, dtype=torch.bool)
    weights = torch.randn((2 if depth == 3 else 1, 2 + depth, T), dtype=torch.float64)
    if depth:
        weights[:, 2, -1] = 0
        tensors[3][:, :, -1] = float("nan")
    return [*tensors[:2], tensors[2] if guided else None, 4.0, sigma, moves, weights, tensors[3:]]


def check_step(T: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for depth in DEPTHS.values():
        for guided in (False, True):
            args = step(depth, T, shape, dtype, guided)
            wide = [one.double() if isinstance(one, Tensor) and one.ndim == 5 else one for one in args[:7]]
            exact = stepping.solver_step(*wide, [one.double() for one in args[7]])
            ours, eager = compiled.solver_step(*args), stepping.solver_step(*args)
            for made, other, true in zip(ours, eager, exact, strict=True):
                assert made.shape == other.shape and made.dtype == other.dtype
                assert torch.equal(made.isnan(), other.isnan())
                assert T == 1 or torch.equal(made[:, :, T // 2], other[:, :, T // 2])
                near(*(error(one.nan_to_num(), true.nan_to_num()) for one in (made, other)), dtype)


def check_bytes(T: int, H: int, W: int, dtype: torch.dtype) -> None:
    frames = randn(3, T, H, W, dtype=dtype) * 1.5
    frames[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    last = frames.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for one in (frames, last, frames.transpose(2, 3), frames[:, :, :, 1:]):
        made = compiled.to_rgb(one)
        assert made.is_contiguous() and torch.equal(made, rgb.reference(one))


def check_vae(samples: int, dtype: torch.dtype) -> None:
    x, gamma = randn(samples, 12, 2, 5, 6, dtype=dtype), randn(12, 1, 1, 1, seed=1, dtype=dtype)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    exact = vae.rms_norm(x.double(), gamma.double())
    for one in (x, last):
        made = compiled.norm_silu(one, gamma), compiled.vae_rms_norm(one, gamma)
        eager = F.silu(vae.rms_norm(one, gamma)), vae.rms_norm(one, gamma)
        for ours, other, true in zip(made, eager, (F.silu(exact), exact), strict=True):
            assert ours.shape == other.shape and ours.stride() == one.stride()
            near(error(ours, true), error(other, true), dtype)
    flat = x[:, :, 0].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled.vae_rms_norm(flat, gamma[..., 0]), vae.rms_norm(flat, gamma[..., 0]))


CHECKS: dict[str, list[Callable[[torch.dtype], None]]] = {
    **{f"rows {kind}": [partial(check_rows, case) for case in cases] for kind, cases in CASES.items()},
    "heads": [partial(check_heads, B, N) for B, N in ((1, 48), (2, 30), (1, 7))],
    "gelu": [partial(check_gelu, B, N) for B, N in ((1, 48), (2, 30))],
    "head": [partial(check_head, B) for B in (1, 2)],
    "step": [partial(check_step, T, shape) for T, shape in ((3, (1, 4, 6, 5)), (5, (2, 3, 4, 7)))],
    "step of one frame": [partial(check_step, 1, (1, 4, 6, 5))],
    "bytes": [partial(check_bytes, *size) for size in ((2, 5, 6), (1, 8, 3))],
    "vae": [partial(check_vae, B) for B in (1,)],
}
# How many functions each compiles: of `rows`, seven operations of which two have no modulation; of steps, three solvers
# with and without guidance; of bytes and the VAE, two memory formats.
COMPILATIONS = {"rows one": 7, "rows of groups": 7, "rows of tokens": 7, "heads": 2, "gelu": 1, "head": 1}
COMPILATIONS |= {"step": 6, "step of one frame": 6, "bytes": 2, "vae": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHECKS)
@torch.no_grad()
def test_results_and_compilations(name: str, dtype: torch.dtype, traced: list[Any]) -> None:
    """No number of tokens, samples or frames compiles anything again."""
    for run in CHECKS[name]:
        run(dtype)
    assert len(traced) == len(compiling._compiled) == COMPILATIONS[name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHECKS)
@torch.no_grad()
def test_inductor(name: str, dtype: torch.dtype) -> None:
    """As above, as it will run; torch counts its graphs."""
    if reason := compiling.why_not(CPU):
        pytest.skip(reason)
    from torch._dynamo.utils import counters

    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.FastvidWarning)
        for run in CHECKS[name]:
            run(dtype)
    assert counters["stats"]["unique_graphs"] == COMPILATIONS[name]


def test_a_call_in_the_pipelines_mode_is_compiled(traced: list[Any]) -> None:
    """`eager` keeps the caller's torch.compile out, not our own."""
    args = randn(5, 8), randn(8, seed=1), EPS

    @precision.eager
    def step() -> Tensor:
        with precision.computing(CPU):
            return compiled.rms_norm(*args)

    torch.testing.assert_close(step(), reference.rms_norm(*args))
    step()
    assert len(traced) == len(compiling._compiled) == 1


def test_parameters_modes_and_gradients(traced: list[Any]) -> None:
    """A parameter in place of a tensor, and grad mode in place of none, compile nothing again; gradients go by the
    reference."""
    x, weight = randn(5, 8), torch.nn.Parameter(randn(8, seed=1), requires_grad=False)
    for run in (torch.no_grad(), torch.enable_grad()):
        with run:
            compiled.rms_norm(x, weight, EPS)
            compiled.rms_norm(x, weight.data, EPS)
    assert len(traced) == 1
    weight.requires_grad_()
    compiled.rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None and len(traced) == 1


def test_one_row_a_meta_tensor_and_fp64_run_eagerly(traced: list[Any]) -> None:
    for x in (randn(1, 8), torch.empty(5, 8, device="meta"), randn(5, 8).double()):
        made = compiled.rms_norm(x, torch.ones(8, dtype=x.dtype, device=x.device), EPS)
        assert made.shape == x.shape and made.dtype == x.dtype and made.device == x.device
    assert not traced and not compiling._compiled


def test_what_does_not_fit_is_refused(traced: list[Any]) -> None:
    x, table, index = randn(2, 6, 8), randn(3, 8), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="G a divisor of N"):
        compiled.gated_residual(x, x, table, index)
    with pytest.raises(ValueError, match=r"to_rgb takes frames \[3, T, H, W\]"):
        compiled.to_rgb(x)
    with pytest.raises(ValueError, match="history is 0, 1 or 3 tensors"):
        compiled.solver_step(*step(0, 3, (1, 2, 3, 4), torch.float32, False)[:7], [randn(1, 2, 3, 3, 4)] * 2)


def test_a_failed_compilation_is_told_once_and_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **options: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", broken)
    x, weight = randn(5, 8), randn(8, seed=1)
    told = r"rms_norm was not compiled and runs in eager PyTorch, slower: InvalidCxxCompiler: no compiler\. "
    with pytest.warns(errors.FastvidWarning, match=told):
        assert torch.equal(compiled.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled.rms_norm(x, weight, EPS)
        compiled.rms_norm(randn(5, 16), randn(16), EPS)


def test_a_failure_later_on_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_once(function: Callable[..., Any], **options: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(args)
            if len(calls) > 1:
                raise RuntimeError("recompile limit")
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", compile_once)
    x, weight = randn(5, 8), randn(8, seed=1)
    with pytest.warns(errors.FastvidWarning, match="recompile limit"):
        assert torch.equal(compiled.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    compiled.rms_norm(x, weight, EPS)
    assert len(calls) == 2


def test_memory_that_runs_out_is_no_failed_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **options: full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.rms_norm(randn(5, 8), randn(8), EPS)
    assert not compiling._compiled


def test_threads_compile_once_and_agree(traced: list[Any]) -> None:
    x, weight = randn(64, 8), randn(8, seed=1)
    with torch.no_grad():
        expected = reference.rms_norm(x, weight, EPS)
    made: list[Tensor] = []

    def work() -> None:
        for width in (8, 16, 24):
            compiled.layer_norm(randn(5, width), randn(width), randn(width), EPS)
            made.append(compiled.rms_norm(x, weight, EPS))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(traced) == 4 and len(made) == 12
    for one in made:
        torch.testing.assert_close(one, expected)


def test_the_trace_of_another_thread_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to run compiled functions while some thread traces."""
    tries = []

    def busy(*args: Any) -> Any:
        tries.append(args)
        if len(tries) < 3:
            raise RuntimeError("Detected that you are using FX to symbolically trace a dynamo-optimized function.")
        return args[0]

    monkeypatch.setattr(torch, "compile", lambda function, **options: busy)
    compiled.rms_norm(randn(5, 8), randn(8), EPS)
    assert len(tries) == 4


def test_by_name_and_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = dispatch.bind("rms_norm=compiled")
    assert bound.rms_norm is compiled.rms_norm and bound.bound["layer_norm"] == "reference"
    assert libraries.default("rms_norm", CPU) == ("reference", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert {
        op for op in compiled.BACKENDS if libraries.default(op, CUDA)[0] not in ("compiled", "channels_last")
    } == set()
    assert libraries.default("linear", CUDA) == ("reference", "PyTorch's libraries")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    assert libraries.default("rms_norm", CUDA) == ("reference", "torch.compile needs sm_70 or newer")
    monkeypatch.setattr(compiling, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(errors.BackendUnavailable, match="torch.compile needs a C\\+\\+ compiler"):
        dispatch.bind("rms_norm=compiled")


def test_every_compiled_operation_has_a_reference() -> None:
    assert set(compiled.BACKENDS) <= set(dispatch.implementations())
    assert all(hasattr(reference, name) for name in compiled.BACKENDS)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check with its tensors on the GPU: against float64, and no compilation for other sizes."""
    from torch._dynamo.utils import counters

    def moved(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return to_cpu(function(*(one.cuda() if isinstance(one, Tensor) and one.ndim else one for one in args)))

        return call

    def to_cpu(made: Any) -> Any:
        return made.cpu() if isinstance(made, Tensor) else type(made)(to_cpu(one) for one in made)

    names = ("rows one", "rows of groups", "rows of tokens", "heads", "gelu")
    for module in (compiled, reference):
        for op in (*row_arguments(1, 2, 1, 1, 8, dtype), "qkv_norm_rope", "rms_norm_rope", "linear_gelu_tanh"):
            monkeypatch.setattr(module, op, moved(getattr(module, op)))
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.FastvidWarning)
        for name in names:
            compiling._compiled.clear()  # two operations are in every kind of rows
            for run in CHECKS[name]:
                run(dtype)
    assert counters["stats"]["unique_graphs"] == sum(COMPILATIONS[name] for name in names)
