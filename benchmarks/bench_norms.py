"""Norms, gated residuals and rotary embedding at the sizes of a Wan block, compared with PyTorch.

PyTorch: eager, compiled, and its own layer norm. A copy of as many bytes shows the achievable bandwidth.

python benchmarks/bench_norms.py [--device cuda] [--rounds 50] [--sweep]

Bytes count each token tensor once per read and write; small tables, which stay in the cache, are not counted.
--sweep: only the kernels, with numbers of warps that are not in their CONFIGS.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from bench_rgb import copy_of
from harness import Case, compared, functions, measure, right, save, table
from torch import Tensor

from fastvid.ops import sparse, transformer

# (tokens along t, h, w; heads of 128), groups of tokens that share a timestep
SIZES = {
    "cuda": {"1.3B 480p": ((21, 30, 52), 12, 21), "14B 720p": ((21, 45, 80), 40, 1)},
    "cpu": {"small": ((3, 15, 26), 12, 3)},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
OPERATIONS = True  # what `gpu.sh measure` runs
WARPS = (1, 2, 4, 8)
TILE = (4, 8, 8)
EPS = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    device, groups, told = torch.device(args.device), {}, {}
    dtype = DTYPES[device.type]
    for size, (grid, heads, shared) in SIZES[device.type].items():
        for name, (function, given, moved) in calls(grid, heads, shared, dtype, device).items():
            title = f"{name} {size} {str(dtype).removeprefix('torch.')}"
            with torch.inference_mode():
                cases = sweep(function, given, moved) if args.sweep else beside(function, given, moved, device)
                cases.append(Case("copy of as many bytes", copy_of(moved, device), moved))
                groups[title] = measure(cases, device, args.rounds)
            told[title] = compared(function, given)
            print(table(groups[title], title), end="\n\n", flush=True)
    if args.sweep:
        print(save("norms-sweep", groups, device, sizes=SIZES[device.type]))
    else:
        print(save("norms", groups, device, sizes=SIZES[device.type], compared=told))


def calls(
    grid: tuple[int, int, int], heads: int, groups: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[str, tuple[Any, ...], int]]:
    """Case name -> (operation, arguments, bytes moved)."""
    N, d = grid[0] * grid[1] * grid[2], heads * 128
    qkv = torch.randn((1, N, 3 * d), device=device, dtype=dtype)
    x, y = torch.randn((2, 1, N, d), device=device, dtype=dtype).unbind(0)
    gate, shift, scale = torch.randn((groups, 6, d), device=device)[:, :3].unbind(1)
    index = torch.arange(groups, device=device)[None]
    weight, bias = torch.randn((2, d), device=device, dtype=dtype).unbind(0)
    angles = torch.rand((N, 64), device=device) * 6
    rotary, order = (angles.cos(), angles.sin()), sparse.tile_order(grid, TILE).to(device, torch.int32)
    row, angle = x.numel() * x.element_size(), 2 * angles.numel() * angles.element_size()
    return {
        "modulated_layer_norm": ("modulated_layer_norm", (x, shift, scale, index, EPS), 2 * row),
        "gated_residual": ("gated_residual", (x, y, gate, index), 3 * row),
        "gated_residual_norm": ("gated_residual_norm", (x, y, gate, shift, scale, index, EPS), 4 * row),
        "gated_residual_layer_norm": ("gated_residual_layer_norm", (x, y, gate, index, weight, bias, EPS), 4 * row),
        "residual_norm": ("residual_norm", (x, y, shift, scale, index, EPS), 4 * row),
        "layer_norm": ("layer_norm", (x, weight, bias, EPS), 2 * row),
        "rms_norm": ("rms_norm", (x, weight, EPS), 2 * row),
        "rms_norm_rope": ("rms_norm_rope", (x, weight, *rotary, EPS), 2 * row + angle),
        "qkv_norm_rope": ("qkv_norm_rope", (qkv, weight, bias, *rotary, EPS), 6 * row + angle),
        "qkv_norm_rope in tiles": (
            "qkv_norm_rope",
            (qkv, weight, bias, *rotary, EPS, order),
            6 * row + angle + order.numel() * order.element_size(),
        ),
    }


def beside(name: str, given: tuple[Any, ...], moved: int, device: torch.device) -> list[Case]:
    """All implementations of an operation, each checked against the reference."""
    found = functions(name, device)
    if name == "layer_norm":
        found["PyTorch's own"] = layer_norm
    runs = right({other: lambda f=f: f(*given) for other, f in found.items()}, 2e-2)
    return [Case(other, run, moved) for other, run in runs.items()]


def sweep(name: str, given: tuple[Any, ...], moved: int) -> list[Case]:
    """The kernel with its CONFIGS, then with other numbers of warps and no register limit."""
    from fastvid.kernels import row_norms

    configured = row_norms.CONFIGS
    before, function = dict(configured), transformer.BACKENDS[name]["triton"]

    def run(configs: dict[tuple[int, int], dict[str, int]]) -> None:
        configured.update(configs)
        function(*given)
        configured.update(before)

    cases = [Case("as configured", lambda: run(before), moved)]
    for warps in WARPS:
        configs = {key: {"num_warps": warps} for key in before}
        cases.append(Case(f"{warps} warps", lambda configs=configs: run(configs), moved))
    return cases


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Without the reference's fp32 copy: the CUDA kernel computes statistics in fp32 anyway."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


if __name__ == "__main__":
    main()
