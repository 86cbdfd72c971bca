"""Scores a checkpoint by what its videos show.

    python -m fastvid.benchmarks.quality.score --captions 200 --out benchmarks/results/embedded-scores.json

Generates clips for random captions and measures background, colour, shape and motion on the decoded frames; also
encodes and decodes drawn clips, to score the VAE alone. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvid
from fastvid.benchmarks.quality.clips import Scene, draw, random_scene
from fastvid.benchmarks.quality.measure import Measured, measure, same_motion
from fastvid.models.loaded import LoadOptions
from fastvid.pipeline.load import load_model

TRAITS = ("background", "colour", "shape", "motion")


def right(scene: Scene, shown: Measured) -> dict[str, bool]:
    """Which traits of a caption a clip shows."""
    found = {t: getattr(scene, t) == getattr(shown, t) for t in TRAITS[:3]}
    return found | {"motion": same_motion(scene.shape, scene.motion, shown.motion)}


def score_captions(
    pipe: fastvid.Pipeline, captions: int, seed: int, verbose: bool = False, **options: Any
) -> dict[str, Any]:
    """Shares of clips that show each trait, over random captions; caption i is made with seed `seed + i`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(captions):
        scene = random_scene(generator)
        video = pipe.generate(scene.caption, seed=seed + i, **options)
        shown = measure(video.frames, video.fps)
        rows.append(right(scene, shown))
        if verbose and not all(rows[-1].values()):
            print(f"  {scene.caption}: {shown.colour} {shown.shape} {shown.motion} on {shown.background}", flush=True)
    return {"captions": captions, **{t: float(np.mean([r[t] for r in rows])) for t in TRAITS}}


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of two clips in [-1, 1]."""
    return float(-10 * torch.log10(((a - b) / 2).square().mean().clamp_min(1e-12)))


@torch.no_grad()
def score_vae(model: str, clips: int, seed: int, frames: int = 17, size: int = 64) -> dict[str, float]:
    """Reconstruction of drawn clips, half of them from mid-stream, in dB."""
    vae = load_model(model, LoadOptions("cpu")).vae
    generator = torch.Generator().manual_seed(seed)
    values = []
    for i in range(clips):
        clip = draw(random_scene(generator, mid_stream=i % 2 == 1), frames, size, size).movedim(0, 1)[None]
        values.append(psnr(vae.decode(vae.encode(clip)[0])[0], clip))
    return {"clips": clips, "mean_db": float(np.mean(values)), "worst_db": float(np.min(values))}


def score(model: str, captions: int, fewer: int, seed: int, verbose: bool) -> dict[str, Any]:
    """All rows of the model card."""
    pipe, start = fastvid.load(model, device="cpu"), time.time()
    rows: dict[str, Any] = {"vae": score_vae(model, 100, seed)}
    settings = {
        "64x64, 17 frames": (captions, {}),
        "160x96, 17 frames": (fewer, {"width": 160, "height": 96}),
        "64x64, 33 frames": (fewer, {"num_frames": 33}),
    }
    for i, (name, (count, options)) in enumerate(settings.items()):
        rows[name] = score_captions(pipe, count, seed + 10_000 * (i + 1), verbose, **options)
        print(name, {t: round(rows[name][t], 3) for t in TRAITS}, flush=True)
    return rows | {"seed": seed, "seconds": round(time.time() - start), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--captions", type=int, default=200, help="at the default size and length")
    parser.add_argument("--fewer", type=int, default=60, help="at the other size and length")
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--verbose", action="store_true", help="print every caption that went wrong")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = score(args.model, args.captions, args.fewer, args.seed, args.verbose)
    print(json.dumps(rows, indent=2))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
