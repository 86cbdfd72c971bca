"""The quality loss of attention with 8-bit products.

Compares the embedded model's videos with it (eager reference) to those with exact attention and the same seeds, and one
head's results to double precision, from few keys to more than the longest videos have. Needs no GPU and does not
measure speed.

python benchmarks/eight_bits.py videos [--frames 33] [--size 160x96]
python benchmarks/eight_bits.py lengths [--longest 131072]

lengths: keys and queries are normal, with a common part as a transformer's keys have; "even" scores have a standard
deviation of 1, "sharp" ones of 4.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import attention_eight_reference
import numpy as np
import torch
from harness import save

import fastvid
from fastvid.ops import reference

QUERIES = 64
PROMPTS = (
    "a red circle moving right on a white background",
    "a blue star growing on a black background",
    "a green square spinning on a gray background",
    "a yellow triangle moving up on a navy background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("videos", "lengths"))
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", default="160x96")
    parser.add_argument("--longest", type=int, default=2**17)
    args = parser.parse_args()
    {"videos": videos, "lengths": lengths}[args.what](args)


@torch.no_grad()
def lengths(args: argparse.Namespace) -> None:
    """Relative errors by the number of keys."""
    found: dict[str, dict[str, float]] = {}
    for power in range(10, args.longest.bit_length()):
        for head_dim in (64, 128):
            for name, spread in (("even", 1.0), ("sharp", 4.0)):
                row = found.setdefault(f"{name}, head {head_dim}", {})
                for kind, error in errors(2**power, head_dim, spread).items():
                    row[f"{kind} {2**power}"] = error
        print(2**power, {name: list(row.items())[-3:] for name, row in found.items()}, flush=True)
    print(save("eight-bits-lengths", {}, torch.device("cpu"), queries=QUERIES, relative_error=found))


def errors(keys: int, head_dim: int, spread: float) -> dict[str, float]:
    """Of both kinds and of bf16, all relative to double precision on bf16 inputs."""
    generator = torch.Generator().manual_seed(keys + head_dim)
    q, k, v = (torch.randn(1, n, 1, head_dim, generator=generator) for n in (QUERIES, keys, keys))
    common = 4 * torch.randn(head_dim, generator=generator)
    q, k, v = (q * spread).bfloat16(), (k + common).bfloat16(), v.bfloat16()
    exact = reference.attention(q.double(), k.double(), v.double())
    made = {kind: attention_eight_reference.attention(q, k, v, kind=kind) for kind in ("int8", "fp8")}
    made["bf16"] = reference.attention(q, k, v)
    size = torch.linalg.vector_norm(exact)
    return {kind: float(torch.linalg.vector_norm(one.double() - exact) / size) for kind, one in made.items()}


def videos(args: argparse.Namespace) -> None:
    width, height = map(int, args.size.split("x"))
    exact = [make(prompt, seed, width, height, args.frames) for seed, prompt in enumerate(PROMPTS)]
    found = {}
    for kind in ("int8", "fp8"):
        attention = partial(attention_eight_reference.attention, kind=kind)
        made = [make(prompt, seed, width, height, args.frames, attention) for seed, prompt in enumerate(PROMPTS)]
        found[kind] = [psnr(one, other) for one, other in zip(made, exact, strict=True)]
        print(f"{kind}: {', '.join(f'{value:.1f}' for value in found[kind])} dB")
    print(save("eight-bits", {}, torch.device("cpu"), size=args.size, frames=args.frames, psnr_db=found))


def make(
    prompt: str, seed: int, width: int, height: int, frames: int, attention: Callable[..., Any] | None = None
) -> np.ndarray:
    pipe = fastvid.load("embedded", device="cpu")
    if attention:
        for module in pipe._model.experts.modules[0].modules():
            if hasattr(module, "ops"):
                module.ops = replace(module.ops, functions={**module.ops.functions, "attention": attention})
    return pipe.generate(prompt, seed=seed, width=width, height=height, num_frames=frames).frames


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """PSNR of uint8 frames in dB."""
    off = ((one.astype(np.float64) - other) ** 2).mean()
    return round(10 * math.log10(255**2 / off), 2) if off else math.inf


if __name__ == "__main__":
    main()
