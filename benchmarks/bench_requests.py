"""What requests cost beside their work, on the CPU with the embedded model: batches together, prompts that come again.

python benchmarks/bench_requests.py [--videos 8] [--rounds 3]

batch N: as many videos, N together, with 20 steps. text: a request's two prompts with and without the cache. checks: a
request read, checked and planned. Processor time of one thread, so that other load changes little; both sides of a
comparison are interleaved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from harness import Row, save, table

import fastvid

PROMPT, NEGATIVE = "a red circle moving right on a white background", "a blue square growing on a black background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, plain = (fastvid.load("embedded", device="cpu", text_cache=size) for size in (64 << 20, 0))
    pipe.warmup()
    sizes = [size for size in (1, 2, 4, 8) if size <= args.videos]
    seeds = list(range(args.videos))
    made = {f"batch {n}": lambda n=n: pipe.generate(PROMPT, seed=seeds, batch_size=n) for n in sizes}
    groups: dict[str, list[Row]] = {}
    texts = {
        name: lambda one=one: [one.embed(text) for text in (PROMPT, NEGATIVE)]
        for name, one in (("text", plain), ("text, kept", pipe))
    }
    groups["two prompts"] = rows(texts, 50 * args.rounds)
    groups["a request"] = rows({"checks": lambda: pipe.stream(PROMPT, seed=1).close()}, 20 * args.rounds)
    groups[f"{args.videos} videos of 64x64"] = rows(made, args.rounds)
    for title, found in groups.items():
        print(table(found, title), end="\n\n", flush=True)
    print(save("requests", groups, torch.device("cpu")))


def rows(runs: dict[str, Callable[[], object]], rounds: int) -> list[Row]:
    """Processor time of each, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent[name].append(1e6 * (time.process_time() - began))
    middle = {name: sorted(times)[len(times) // 2] for name, times in spent.items()}
    first = next(iter(middle.values()))
    return [
        Row(name, middle[name], min(t), max(t), len(t), 0.0, 0.0, first / middle[name]) for name, t in spent.items()
    ]


if __name__ == "__main__":
    main()
