"""linear and linear_gelu_tanh on all available back ends, at the sizes of the models' feed-forward layers.

`reference` is eager PyTorch (cuBLAS, then a separate GELU). Compared with the matrix product alone, which is what the
fused layer should cost.

python benchmarks/bench_linears.py [--device cuda] [--rounds 50]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from harness import Case, Measured, compared, functions, measure, right, save, table

# (rows, inputs, outputs): first and second layer of 1.3B at 480p and of 14B at 720p, a text of 512 tokens
SIZES = {
    "cuda": {
        "1.3B ffn in": (32760, 1536, 8960),
        "1.3B ffn out": (32760, 8960, 1536),
        "14B ffn in": (75600, 5120, 13824),
        "14B ffn out": (75600, 13824, 5120),
        "14B text": (512, 4096, 5120),
    },
    "cpu": {"embedded ffn in": (1280, 256, 1024)},
}
OPERATIONS = True  # what `gpu.sh measure` runs
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    groups, told = {}, {}
    for name, size in SIZES[device.type].items():
        for op in ("linear_gelu_tanh", "linear"):
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            title = f"{op} {name} {str(dtype).removeprefix('torch.')}"
            groups[title], told[title] = bench(op, size, dtype, device, args.rounds)
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("linears", groups, device, compared=told))


def bench(op: str, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int) -> Measured:
    M, K, N = size
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight, bias = torch.randn(N, K, device=device, dtype=dtype) / K**0.5, torch.randn(N, device=device, dtype=dtype)
    found = functions(op, device)
    runs = right({name: lambda f=f: f(x, weight, bias) for name, f in found.items()}, TOLERANCE[dtype])
    runs["product alone"] = lambda: F.linear(x, weight, bias)
    moved = (x.numel() + weight.numel() + M * N) * x.element_size()
    cases = [Case(name, run, moved, 2 * M * N * K) for name, run in runs.items()]
    return measure(cases, device, rounds), compared(op, (x, weight, bias))


if __name__ == "__main__":
    main()
