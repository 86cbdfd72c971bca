"""The quality loss of attention with 8-bit products.

Compares the embedded model's videos with it (eager reference) to those with exact attention and the same seeds. Needs
no GPU and does not measure speed.

python benchmarks/eight_bits.py [--frames 33] [--size 160x96]
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

PROMPTS = (
    "a red circle moving right on a white background",
    "a blue star growing on a black background",
    "a green square spinning on a gray background",
    "a yellow triangle moving up on a navy background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", default="160x96")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    exact = [make(prompt, seed, width, height, args.frames) for seed, prompt in enumerate(PROMPTS)]
    found = {}
    for kind in ("int8", "fp8"):
        attention = partial(attention_eight_reference.attention, kind=kind)
        videos = [make(prompt, seed, width, height, args.frames, attention) for seed, prompt in enumerate(PROMPTS)]
        found[kind] = [psnr(one, other) for one, other in zip(videos, exact, strict=True)]
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
