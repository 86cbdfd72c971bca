"""Block-sparse attention at several densities: windows of 3D tiles, and the best tiles by pooled scores.

python benchmarks/bench_sparse_attention.py [--device cuda] [--rounds 20]

`speed` is relative to dense attention by Triton, the first row; rows of csrc/'s kernel begin with "cuda". A case's name
states its share of the dense work, and its TFLOP/s count only the computed part.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from harness import Case, Row, measure, save, table, why_not
from torch import Tensor

from fastvid.ops import attention, dispatch
from fastvid.ops import sparse as sparsity
from fastvid.ops.sparse import Blocks, Triple

# Grid of tokens, tile, heads: 81 frames at 480p and at 720p.
CASES = {
    "cuda": {
        "480p, 12 heads": ((21, 30, 52), (4, 8, 8), 12),
        "480p, 40 heads": ((21, 30, 52), (4, 8, 8), 40),
        "720p, 12 heads": ((21, 45, 80), (4, 8, 8), 12),
        "720p, 40 heads": ((21, 45, 80), (4, 8, 8), 40),
        "720p, 40 heads, tiles of 64": ((21, 45, 80), (4, 4, 4), 40),
    },
    "cpu": {"240p, 2 heads": ((5, 15, 26), (2, 4, 4), 2)},
}
SHARES = (1.0, 0.5, 0.2, 0.1)
OPERATIONS = True  # what `gpu.sh measure` runs
HEAD_DIM = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    args = parser.parse_args()
    device = torch.device(args.device)
    groups = {}
    for title, case in CASES[device.type].items():
        if args.only in title:
            groups[title] = bench(*case, device, args.rounds)
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("sparse-attention", groups, device, head_dim=HEAD_DIM))


def bench(grid: Triple, tile: Triple, heads: int, device: torch.device, rounds: int) -> list[Row]:
    name = "triton" if dispatch.why_not("triton", device) is None else "reference"
    run = attention.BACKENDS[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    N = math.prod(grid)
    q, k, v = (torch.randn(1, N, heads, HEAD_DIM, device=device, dtype=dtype) for _ in range(3))
    flops = 4 * N * N * heads * HEAD_DIM
    cases = [Case(f"{name}, dense", lambda: run(q, k, v), flops=flops)]
    if name == "triton":
        cases.append(Case("sdpa, dense", lambda: attention.BACKENDS["sdpa"](q, k, v), flops=flops))
    on_cuda = [name for name in ("cuda", *dispatch.EIGHT) if runs(name, device)]
    for name in on_cuda:
        cases.append(Case(f"{name}, dense", partial(attention.BACKENDS[name], q, k, v), flops=flops))
    for size in windows(grid, tile):
        blocks = sparsity.window(grid, tile, size).to(device)
        kept = sparsity.share(blocks)
        title, work = f"window {'x'.join(map(str, size))} {kept:.1%}", int(flops * kept)
        cases.append(Case(title, partial(run, q, k, v, blocks=blocks), flops=work))
        for name in on_cuda:
            kernel = partial(attention.BACKENDS[name], q, k, v, blocks=blocks)
            cases.append(Case(f"{name}, {title}", kernel, flops=work))
    cases += list(chosen(q, k, v, grid, tile, run, flops))
    return measure(cases, device, rounds)


def runs(name: str, device: torch.device) -> bool:
    reason = why_not("attention", name, device)
    if reason:
        print(f"{name} is left out: {reason}")
    return reason is None


def chosen(
    q: Tensor, k: Tensor, v: Tensor, grid: Triple, tile: Triple, run: Callable[..., Tensor], flops: int
) -> Iterator[Case]:
    """The best tiles, timed with and without selecting them."""
    tiles, largest = sparsity.tile_offsets(grid, tile).to(q.device), math.prod(tile)

    def choose(count: int) -> Blocks:
        return sparsity.top_k(q, k, tiles, largest, count)

    for wanted in SHARES[1:]:
        count = max(round(wanted * (len(tiles) - 1)), 1)
        blocks = choose(count)
        kept = sparsity.share(blocks)
        work = int(flops * kept)
        yield Case(f"top {count} {kept:.1%}", partial(run, q, k, v, blocks=blocks), flops=work)
        yield Case(
            f"top {count} {kept:.1%} + choice", lambda count=count: run(q, k, v, blocks=choose(count)), flops=work
        )


def windows(grid: Triple, tile: Triple) -> Iterator[Triple]:
    """For each density the window that comes nearest to it; among equals the most cubic one."""
    counts = sparsity.tile_counts(grid, tile)
    sizes = list(product(*(range(1, n + 1) for n in counts)))
    for wanted in SHARES:
        tiles = wanted * math.prod(counts)
        yield min(sizes, key=lambda size: (abs(math.prod(size) - tiles), max(size) - min(size)))


if __name__ == "__main__":
    main()
