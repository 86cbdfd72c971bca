"""A sampler's step on all available back ends, compared with the eager solvers and a copy of as many bytes.

python benchmarks/bench_step.py [--device cuda] [--rounds 50]
"""

from __future__ import annotations

import argparse

import torch
from bench_rgb import copy_of
from harness import Case, Measured, compared, functions, measure, right, save, table
from torch import Tensor

from fastvid.sampling.guidance import combine, velocity_to_x0
from fastvid.sampling.solvers import SOLVERS, SolverState

SIZES = {
    "cuda": {"480p": (1, 16, 21, 60, 104), "720p": (1, 16, 21, 90, 160)},
    "cpu": {"embedded": (1, 16, 5, 16, 16), "480p": (1, 16, 21, 60, 104)},
}
OPERATIONS = True  # what `gpu.sh measure` runs
DEPTHS = {"euler": 0, "unipc": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    groups, told = {}, {}
    for name, size in SIZES[device.type].items():
        for solver in DEPTHS:
            title = f"{solver} {name}"
            groups[title], told[title] = bench(solver, size, device, args.rounds)
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("step", groups, device, compared=told))


def bench(solver: str, size: tuple[int, ...], device: torch.device, rounds: int) -> Measured:
    """fp32, with guidance, all columns at the same noise level, in the middle of a run."""
    x, cond, uncond = (torch.randn(size, device=device) for _ in range(3))
    history = [torch.randn(size, device=device) for _ in range(DEPTHS[solver])]
    T = size[2]
    before, sigma, sigma_next = (torch.full((T,), level, dtype=torch.float64) for level in (0.8, 0.7, 0.6))
    older = torch.full((T,), 0.9, dtype=torch.float64)
    two = torch.full((T,), 2)
    state = SolverState(two, (before, older), tuple(history[:2]), history[2]) if history else SolverState()

    def today() -> Tensor:
        x0 = velocity_to_x0(x, combine(cond, uncond, 5.0), sigma)
        return SOLVERS[solver].step(x, x0, sigma, sigma_next, state)[0]

    # The time does not depend on the values of the weights.
    outputs = 2 if history else 1
    weights = torch.randn((outputs, 2 + len(history), T), dtype=torch.float64)
    args = (x, cond, uncond, 5.0, sigma, sigma_next != sigma, weights, history)
    runs = right({name: lambda f=f: f(*args) for name, f in functions("solver_step", device).items()}, 1e-5)
    moved = x.numel() * x.element_size() * (3 + len(history) + outputs)
    cases = [Case("solver of today", today, moved), *(Case(name, run, moved) for name, run in runs.items())]
    rows = measure([*cases, Case("copy of as many bytes", copy_of(moved, device), moved)], device, rounds)
    return rows, compared("solver_step", args)


if __name__ == "__main__":
    main()
