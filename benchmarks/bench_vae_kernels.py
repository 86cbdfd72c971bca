"""The VAEs' operations on decoder layers, on all available back ends, compared with eager PyTorch (cuDNN).

cuDNN's convolutions are also timed channels-last.

`norm, then conv` runs the Triton convolution on a normalized copy. Otherwise it normalizes each value 27 times while
loading it: one memory pass less, but more arithmetic outside the matrix units.

python benchmarks/bench_vae_kernels.py [--device cuda] [--dtype bfloat16] [--rounds 50]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Measured, compared, functions, measure, right, save, table
from torch import Tensor

from fastvid.device.precision import computing
from fastvid.ops import vae_gpu, vae_kernels

OPERATIONS = True  # what `gpu.sh measure` runs
# name -> operation, channels in and out, (frames, height, width) of the input: Wan 2.1 at 832x480, one latent frame
SIZES: dict[str, dict[str, tuple[str, int, int, tuple[int, int, int]]]] = {
    "cuda": {
        "block 96": ("vae_norm_silu_conv3d", 96, 96, (4, 480, 832)),
        "block 192": ("vae_norm_silu_conv3d", 192, 192, (4, 240, 416)),
        "block 384": ("vae_norm_silu_conv3d", 384, 384, (2, 120, 208)),
        "last": ("vae_norm_silu_conv3d_rgb", 96, 3, (4, 480, 832)),
        "first": ("vae_causal_conv3d", 16, 384, (1, 60, 104)),
        "shortcut": ("vae_conv3d", 192, 384, (2, 120, 208)),
        "upsample": ("vae_upsample_conv2d", 192, 96, (4, 240, 416)),
        "downsample": ("vae_downsample_conv2d", 96, 96, (4, 480, 832)),
        "double frames": ("vae_double_frames", 384, 768, (2, 120, 208)),
        "halve frames": ("vae_halve_frames", 192, 192, (4, 120, 208)),
        "norm": ("vae_rms_norm", 384, 384, (1, 60, 104)),
    },
    "cpu": {
        "block": ("vae_norm_silu_conv3d", 16, 16, (2, 24, 40)),
        "last": ("vae_norm_silu_conv3d_rgb", 16, 3, (2, 24, 40)),
        "upsample": ("vae_upsample_conv2d", 16, 8, (2, 24, 40)),
    },
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAST = torch.channels_last_3d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    groups, told = {}, {}
    for kind in args.dtype or (["bfloat16", "float32"] if device.type == "cuda" else ["float32"]):
        for name, (op, C, N, size) in SIZES[device.type].items():
            title = f"{op} {name} {kind}"
            with computing():
                groups[title], told[title] = bench(op, C, N, size, getattr(torch, kind), device, args.rounds)
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("vae-kernels", groups, device, compared=told))


def arguments(
    op: str, C: int, N: int, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Any, ...], int]:
    """The arguments of an operation, all channels-last, and its number of products per input pixel."""

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, device=device).to(dtype)
        return made.contiguous(memory_format=LAST) if len(shape) == 5 else made

    x, past, gamma, bias = random(1, C, *size), random(1, C, 2, *size[1:]), random(C, 1, 1, 1), random(N)
    if op == "vae_rms_norm":
        return (x, gamma), 0
    flat = op in ("vae_upsample_conv2d", "vae_downsample_conv2d")
    kernel = (
        (3, 3, 3) if op in ("vae_causal_conv3d",) or "silu" in op else (1, 1, 1) if op == "vae_conv3d" else (3, 1, 1)
    )
    weight = random(N, C, 3, 3) if flat else random(N, C, *kernel)
    weight = weight / weight[0].numel() ** 0.5
    # Upsampling: 9 products for each of 4 pixels. Downsampling: 9 for one of 4. Halving: 3 for every other frame.
    share = {"vae_upsample_conv2d": 4, "vae_downsample_conv2d": 0.25, "vae_halve_frames": 0.5}.get(op, 1)
    products = int(share * weight.numel())
    if "silu" in op:
        return (x, past, gamma, weight, bias), products
    if op in ("vae_causal_conv3d", "vae_double_frames"):
        return (x, past, weight, bias, *(((1, 1),) if op == "vae_causal_conv3d" else ())), products
    return (x, past[:, :, 1:], weight, bias) if op == "vae_halve_frames" else (x, weight, bias), products


def bench(
    op: str, C: int, N: int, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> Measured:
    """Measure all back ends, checked against the reference."""
    given, products = arguments(op, C, N, size, dtype, device)
    plain = tuple(one.contiguous() if isinstance(one, Tensor) else one for one in given)
    found = {n: f for n, f in functions(op, device).items() if dtype in getattr(f, "dtypes", TOLERANCE)}
    reference = found.pop("reference")
    runs: dict[str, Callable[[], Any]] = {
        "reference": lambda: reference(*plain),
        "reference, channels-last": lambda: reference(*given),
    }
    runs |= {name: lambda f=f: f(*given) for name, f in found.items()}
    if "triton" in found and op == "vae_norm_silu_conv3d":
        runs["norm, then conv"] = lambda: norm_then_conv(*given)
    runs = right(runs, TOLERANCE[dtype])
    pixels, made = size[0] * size[1] * size[2], first(reference(*plain))
    moved = given[0].nbytes + made.nbytes
    rows = measure([Case(name, run, moved, 2 * products * pixels) for name, run in runs.items()], device, rounds)
    return rows, compared(op, given)


def norm_then_conv(x: Tensor, past: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """vae_norm_silu_conv3d with a normalised copy of x."""
    copy = torch.empty_like(x)
    vae_kernels.norm_triton(x, gamma.view(-1), None, copy, True)
    return vae_gpu.causal_conv3d(copy, past, weight, bias, (1, 1))[0]


def first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


if __name__ == "__main__":
    main()
