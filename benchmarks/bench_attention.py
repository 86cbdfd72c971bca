"""Dense attention of a video's tokens by every back end that can run here, and by eager scores if they fit into memory.

The times of 8-bit back ends include quantization.

python benchmarks/bench_attention.py [--device cuda] [--rounds 20] [--configs]

--configs: also run the Triton kernel with tile sizes that are not in its table, to tune the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from harness import Case, Measured, compared, functions, measure, right, save, table
from torch import Tensor

from fastvid.ops import dispatch, reference

# Tokens of 81 frames at 480p and at 720p, heads of the 1.3B and the 14B model; keys: the tokens themselves, or a text.
CASES = {
    "cuda": {
        "480p, 12 heads": (32760, 32760, 12),
        "480p, 40 heads": (32760, 32760, 40),
        "720p, 12 heads": (75600, 75600, 12),
        "720p, 40 heads": (75600, 75600, 40),
        "720p, 40 heads, text": (75600, 512, 40),
    },
    "cpu": {"1,560 tokens, 2 heads": (1560, 1560, 2), "1,560 tokens, 2 heads, text": (1560, 512, 2)},
}
OPERATIONS = True  # what `gpu.sh measure` runs
HEAD_DIM = 128
EAGER_BYTES = 8 * 2**30  # scores that eager attention may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    parser.add_argument("--configs", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    groups, told = {}, {}
    for title, size in CASES[device.type].items():
        if args.only in title:
            groups[title], told[title] = bench(*size, device, args.rounds, args.configs)
            print(table(groups[title], title), end="\n\n", flush=True)
    if args.configs:
        print(save("attention-configs", groups, device, head_dim=HEAD_DIM))
    else:
        print(save("attention", groups, device, head_dim=HEAD_DIM, compared=told))


def bench(N: int, M: int, heads: int, device: torch.device, rounds: int, configs: bool) -> Measured:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, n, heads, HEAD_DIM, device=device, dtype=dtype) for n in (N, M, M))
    work = {
        "bytes_moved": 2 * (q.numel() + k.numel()) * q.element_size(),
        "flops": 4 * N * M * heads * HEAD_DIM,
    }
    found = dict(configurations(device) if configs else backends(device, heads * N * M))
    allowed = {name: 0.1 if name in dispatch.APPROXIMATE else 0.02 for name in found}
    runs = right({name: lambda f=f: f(q, k, v) for name, f in found.items()}, allowed)
    cases = [Case(name, run, **work) for name, run in runs.items()]
    return measure(cases, device, rounds), compared("attention", (q, k, v))


def backends(device: torch.device, scores: int) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """All that can run here, the reference first."""
    yield from functions("attention", device).items()
    if scores * 4 <= EAGER_BYTES:
        yield "eager", eager
        if device.type == "cuda":
            yield "eager, compiled", torch.compile(eager)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores at once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def configurations(device: torch.device) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The reference, and the Triton kernel by its table and by hand."""
    from fastvid.kernels.attention import Config
    from fastvid.kernels.attention import attention as launch

    specialize = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    cuts = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2)]
    yield "reference", reference.attention
    for config in [None, *(Config(*cut, specialize=warps) for cut in cuts for warps in {False, specialize})]:

        def run(q: Tensor, k: Tensor, v: Tensor, config: Config | None = config) -> Tensor:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            launch(q, k, v, out, config=config)
            return out

        if config is None:
            yield "triton", run
        else:
            cut = f"{config.block_m}x{config.block_n}, {config.warps} warps, {config.stages} stages"
            yield cut + ", specialized" * config.specialize, run


if __name__ == "__main__":
    main()
