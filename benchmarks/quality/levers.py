"""What each lever (an option that does less work) gains and costs, on the embedded model.

    python -m fastvid.benchmarks.quality.levers run --prompts 300 --out benchmarks/results/levers.json
    python -m fastvid.benchmarks.quality.levers plot benchmarks/results/levers.json docs/levers.svg

Every prompt is made exactly and by each setting, one after the other in one process with one thread and one seed, so
that all comparisons are paired. A setting is a set of arguments of `pipe.generate`. Of each:

    speedup      the exact request's CPU time by its own, of whole requests; the median over prompts
    psnr, ssim   of its frames against the exact ones; the mean over prompts
    truth        the share of videos that show colour, shape, motion and background of their prompt
    lost         by how much that is below exact's, in points, with the 95 % interval of the paired difference
    drift        truth in the last second of videos of 8 s, over fewer prompts

A preset of `quality` is the fastest setting, over at least LEAST prompts, that loses at most as many points as its
limit (LIMITS). `--part I/N` makes every N-th prompt, so that processes share the work;
finished rows are kept in a file beside --out and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fastvid
from fastvid.benchmarks.host import RESULTS
from fastvid.benchmarks.quality.clips import Scene, random_scene
from fastvid.benchmarks.quality.lever_cases import CALIBRATION, CASES, DRIFT, EXACT
from fastvid.benchmarks.quality.measure import measure, same_motion
from fastvid.benchmarks.quality.score import TRAITS, right

SEED = 90_000
LIMITS = {"balanced": 1.0, "fast": 3.0}  # points of truth that may be lost
LEAST = 300
SECONDS = 8
Row = dict[str, Any]


# ---------------------------------------------------------------- making


def scenes(count: int) -> list[Scene]:
    """The prompts, drawn as those of `score`."""
    generator = torch.Generator().manual_seed(SEED)
    return [random_scene(generator) for _ in range(count)]


def run(pipe: fastvid.Pipeline, numbers: Mapping[int, Sequence[str]], calibration: str) -> Iterator[Row]:
    """Rows of prompts, each with the names of its cases: the exact one first, the others in turns."""
    drawn = scenes(max(numbers, default=0) + 1)
    for number, names in numbers.items():
        exact, row = _one(pipe, EXACT, CASES[EXACT], drawn[number], number)
        yield row
        shift = number % max(1, len(names))
        for name in (*names[shift:], *names[:shift]):
            frames, row = _one(pipe, name, _with_file(CASES[name], calibration), drawn[number], number)
            yield row | {"psnr": psnr(frames, exact), "ssim": ssim(frames, exact)}


def _with_file(options: Mapping[str, Any], file: str) -> dict[str, Any]:
    return {k: v.replace(CALIBRATION, file) if isinstance(v, str) else v for k, v in options.items()}


def _one(pipe: Any, case: str, options: Mapping[str, Any], scene: Scene, number: int) -> tuple[np.ndarray, Row]:
    began = time.process_time()
    video = pipe.generate(scene.caption, seed=SEED + number, **options)
    seconds = time.process_time() - began
    return video.frames, {"case": case, "prompt": number, "seconds": seconds, **right(scene, measure(video.frames))}


def drift(pipe: fastvid.Pipeline, prompts: int, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of long videos: what the last second shows. Things turn at the border, so only kept traits are asked for."""
    for number, scene in enumerate(scenes(prompts)):
        for name, options in cases.items():
            video = pipe.generate(scene.caption, seed=SEED + number, seconds=SECONDS, **options)
            shown = measure(video.frames[-17:])
            kept = {trait: getattr(scene, trait) == getattr(shown, trait) for trait in TRAITS[:3]}
            moves = same_motion(scene.shape, scene.motion, "standing still") or shown.motion != "standing still"
            yield {"case": name, "prompt": number, "drift": all(kept.values()) and moves}


def psnr(made: np.ndarray, exact: np.ndarray) -> float:
    """dB of two clips uint8 [F, H, W, 3]; 99 where they are equal."""
    error = float(np.mean((made.astype(np.float64) - exact) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(made: np.ndarray, exact: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of the luma of two clips uint8 [F, H, W, 3], with windows of 7 x 7."""
    x, y = (
        torch.from_numpy(clip.astype(np.float64) @ np.array((0.299, 0.587, 0.114)))[:, None] for clip in (made, exact)
    )
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(one, 7, 1) for one in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    both, spread = 2 * mean_x * mean_y + c1, 2 * (xy - mean_x * mean_y) + c2
    whole = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float((both * spread / whole).mean())


# ---------------------------------------------------------------- what it says


def summary(rows: Sequence[Row]) -> list[Row]:
    """One line a case, from all of its rows."""
    by_case: dict[str, dict[int, Row]] = {}
    long: dict[str, list[bool]] = {}
    for row in rows:
        if "drift" in row:
            long.setdefault(row["case"], []).append(row["drift"])
        else:
            by_case.setdefault(row["case"], {})[row["prompt"]] = row
            exact = by_case[EXACT][row["prompt"]]  # the one before: of the same minute
            row["ratio"] = exact["seconds"] / row["seconds"]
    lines = [_line(name, made, by_case[EXACT]) for name, made in by_case.items()]
    for line in lines:
        if drifted := long.get(line["case"]):
            line |= {"drift": float(np.mean(drifted)), "drift_prompts": len(drifted)}
    return lines


def _line(name: str, made: Mapping[int, Row], exact: Mapping[int, Row]) -> Row:
    both = sorted(set(made) & set(exact))
    truth, before = (np.array([all(of[n][t] for t in TRAITS) for n in both], float) for of in (made, exact))
    lost, width = _paired(before - truth)
    line: Row = {"case": name, "prompts": len(both)}
    line["speedup"] = statistics.median(made[n]["ratio"] for n in both)
    line |= {trait: float(np.mean([made[n][trait] for n in both])) for trait in TRAITS}
    line |= {"truth": float(truth.mean()), "lost": lost, "interval": [lost - width, lost + width]}
    if name != EXACT:
        line |= {key: float(np.mean([made[n][key] for n in both])) for key in ("psnr", "ssim")}
    return line


def _paired(difference: np.ndarray) -> tuple[float, float]:
    """The mean in points, and half of its 95 % interval."""
    count = len(difference)
    spread = float(difference.std(ddof=1)) if count > 1 else 0.0
    return 100 * float(difference.mean()), 100 * 1.96 * spread / max(1, count) ** 0.5


def choose(lines: Sequence[Row], least: int = LEAST) -> dict[str, str]:
    """The case of each preset: the fastest that keeps to its limit."""
    chosen = {}
    for name, limit in LIMITS.items():
        fitting = [x for x in lines if x["lost"] <= limit and x["prompts"] >= least and x["case"] != EXACT]
        if fitting:
            chosen[name] = max(fitting, key=lambda line: line["speedup"])["case"]
    return chosen


def table(lines: Sequence[Row]) -> str:
    """A Markdown table, the fastest case last."""
    names = ("prompts", "speed-up", "PSNR", "SSIM", "truth", "points lost (95 %)", "after 8 s")
    made = [f"| setting | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for x in sorted(lines, key=lambda line: line["speedup"]):
        low, high = x["interval"]
        drifted = f"{x['drift']:.0%}" if "drift" in x else ""
        likeness = f"{x['psnr']:.1f} dB | {x['ssim']:.3f}" if "psnr" in x else " | "
        lost = f"{x['lost']:+.1f} ({low:+.1f} to {high:+.1f})"
        first = f"{x['case']} | {x['prompts']} | {x['speedup']:.2f}"
        made.append(f"| {first} | {likeness} | {x['truth']:.1%} | {lost} | {drifted} |")
    return "\n".join(made)


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("run")
    make.add_argument("--prompts", type=int, default=300)
    make.add_argument("--drift", type=int, default=8, help="prompts of videos of 8 s")
    make.add_argument("--cases", default="", help="names of cases, separated by ';' (default: all)")
    make.add_argument("--part", default="0/1", help="I/N: every N-th prompt from the I-th on")
    make.add_argument("--model", default="embedded")
    make.add_argument("--out", type=Path, default=RESULTS / "levers.json")
    draw = commands.add_parser("plot")
    draw.add_argument("result", type=Path)
    draw.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "plot":
        from fastvid.benchmarks.quality.plot_levers import plot

        args.out.write_text(plot(json.loads(args.result.read_text())))
        return
    _make(args)
    _write(args.out)


def _make(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    part, parts = map(int, args.part.split("/"))
    wanted = [name for name in CASES if name != EXACT and (not args.cases or name in args.cases.split(";"))]
    known = _rows(args.out)
    pipe, calibration = fastvid.load(args.model, device="cpu"), str(args.out.with_suffix(".magcache.json"))
    pipe.calibrate("cache", output=calibration)
    missing = {n: _missing(known, wanted, n) for n in range(part, args.prompts, parts)}
    drifted = {row["case"] for row in known if "drift" in row}
    long = {name: CASES[name] for name in (EXACT, *DRIFT) if name not in drifted and part == 0 and args.drift}
    with args.out.with_suffix(f".{part}.jsonl").open("a") as out:
        rows = run(pipe, {n: names for n, names in missing.items() if names}, calibration)
        for row in chain(rows, drift(pipe, args.drift, long)):
            out.write(json.dumps(row) + "\n")
            out.flush()


def _rows(out: Path) -> list[Row]:
    files = sorted(out.parent.glob(f"{out.stem}.*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _missing(known: Sequence[Row], wanted: Sequence[str], number: int) -> list[str]:
    made = {row["case"] for row in known if row["prompt"] == number and "drift" not in row}
    return [name for name in wanted if name not in made]


def _write(out: Path) -> None:
    lines = summary(_rows(out))
    settings = {name: CASES[name] for name in (line["case"] for line in lines) if name in CASES}
    made: Row = {"model": "embedded", "torch": torch.__version__, "seed": SEED, "limits": LIMITS, "rows": lines}
    out.write_text(json.dumps(made | {"settings": settings, "chosen": choose(lines)}, indent=1) + "\n")
    print(table(lines), "\n\nchosen:", choose(lines))


if __name__ == "__main__":
    main()
