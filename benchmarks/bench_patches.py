"""patch_embed and head on all available back ends, compared with a copy of as many bytes.

patch_embed is also compared with PyTorch's convolution (cuDNN).

python benchmarks/bench_patches.py [--device cuda] [--rounds 50]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from bench_rgb import copy_of
from harness import Case, Measured, compared, functions, measure, right, save, table
from torch import Tensor

# name -> (latent frames, height, width), channels of the latents, known channels behind them, width d
SIZES = {
    "cuda": {
        "1.3B 480p": ((21, 60, 104), 16, 0, 1536),
        "14B 720p": ((21, 90, 160), 16, 0, 5120),
        "I2V 14B 720p": ((21, 90, 160), 16, 20, 5120),
        "5B 720p": ((31, 44, 80), 48, 0, 3072),
    },
    "cpu": {"embedded": ((5, 16, 16), 16, 0, 256), "embedded, known": ((5, 16, 16), 16, 20, 256)},
}
OPERATIONS = True  # what `gpu.sh measure` runs
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
PATCH = (1, 2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    groups, told = {}, {}
    for name, (size, channels, behind, d) in SIZES[device.type].items():
        made = {"patch_embed": bench_embed(size, channels, behind, d, dtype, device, args.rounds)}
        if not behind:
            for kind, count in (("one timestep", 1), ("a timestep a frame", size[0])):
                made[f"head, {kind}"] = bench_head(size, channels, d, count, dtype, device, args.rounds)
        for op, rows in made.items():
            title = f"{op} {name} {str(dtype).removeprefix('torch.')}"
            groups[title], told[title] = rows
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("patches", groups, device, compared=told))


def bench_embed(
    size: tuple[int, int, int],
    channels: int,
    behind: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> Measured:
    """Latents in fp32, like in the engine; weights in dtype."""
    latents = torch.randn(1, channels, *size, device=device)
    known = torch.randn(1, behind, *size, device=device) if behind else None
    weight = torch.randn(d, channels + behind, *PATCH, device=device, dtype=dtype) / 8
    bias = torch.randn(d, device=device, dtype=dtype)

    def convolution() -> Tensor:
        x = latents if known is None else torch.cat((latents, known), 1)
        return F.conv3d(x.to(dtype), weight, bias, PATCH).flatten(2).transpose(1, 2)

    tokens = size[0] * size[1] * size[2] // 4
    K = weight[0].numel()
    moved = tokens * (K * latents.element_size() + d * weight.element_size())
    args = (latents, weight, bias, known)
    return compare("patch_embed", args, {"conv3d": convolution}, moved, 2 * tokens * d * K, rounds)


def bench_head(
    size: tuple[int, int, int], channels: int, d: int, count: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> Measured:
    """Output: fp32 latents. count: number of token groups, each with its own timestep."""
    grid = (size[0], size[1] // 2, size[2] // 2)
    tokens, features = grid[0] * grid[1] * grid[2], channels * 4
    x = torch.randn(1, tokens, d, device=device).to(dtype)
    shift, scale = torch.randn(2, count, d, device=device)
    index = torch.arange(count, device=device)[None]
    weight = (torch.randn(features, d, device=device) / d**0.5).to(dtype)
    bias = torch.randn(features, device=device).to(dtype)
    args = (x, shift, scale, index, weight, bias, grid, PATCH, 1e-6, torch.float32)
    moved = x.numel() * x.element_size() + tokens * features * 4
    return compare("head", args, {}, moved, 2 * tokens * d * features, rounds)


def compare(
    op: str, args: tuple, more: Mapping[str, Callable[[], Tensor]], moved: int, flops: int, rounds: int
) -> Measured:
    """Measure all back ends and the other cases, checked against the reference."""
    device, dtype = args[0].device, args[4].dtype if op == "head" else args[1].dtype
    found = functions(op, device)
    runs = right({name: (lambda f=f: f(*args)) for name, f in found.items()} | dict(more), TOLERANCE[dtype])
    cases = [Case(name, run, moved, flops) for name, run in runs.items()]
    rows = measure([*cases, Case("copy of as many bytes", copy_of(moved, device), moved)], device, rounds)
    return rows, compared(op, args)


if __name__ == "__main__":
    main()
