"""to_rgb on all available back ends, compared with a copy of as many bytes (the achievable bandwidth).

python benchmarks/bench_rgb.py [--device cuda] [--rounds 50]
"""

from __future__ import annotations

import argparse

import torch
from harness import Case, Measured, compared, functions, measure, right, save, table
from torch import Tensor

from fastvid.ops import rgb

OPERATIONS = True  # what `gpu.sh measure` runs
SIZES = {"cuda": {"480p": (81, 480, 832), "1080p": (33, 1080, 1920)}, "cpu": {"240p": (17, 240, 416)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    groups, told = {}, {}
    for name, size in SIZES[device.type].items():
        for dtype in rgb.DTYPES:
            title = f"{name} {str(dtype).removeprefix('torch.')}"
            groups[title], told[title] = bench(size, dtype, device, args.rounds)
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("rgb", groups, device, compared=told))


def bench(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int) -> Measured:
    frames = torch.rand((3, *size), device=device).mul_(2.2).sub_(1.1).to(dtype)
    moved = frames.numel() * (frames.element_size() + 1)
    runs = right({name: lambda f=f: f(frames) for name, f in functions("to_rgb", device).items()}, 0.0)
    cases = [Case(name, run, moved) for name, run in runs.items()]
    rows = measure([*cases, Case("copy of as many bytes", copy_of(moved, device), moved)], device, rounds)
    return rows, compared("to_rgb", (frames,))


def copy_of(moved: int, device: torch.device):
    """A copy that reads half the bytes and writes the other half."""
    source = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device)

    def copy() -> Tensor:
        return source.clone()

    return copy


if __name__ == "__main__":
    main()
