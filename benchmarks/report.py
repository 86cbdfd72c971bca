"""Writes tables and plots of the results: docs/benchmarks.md and docs/benchmarks-*.svg.

    pip install "fastvid[bench]" && python benchmarks/report.py

One row per case: median, rates, utilization (of matrix units or memory bandwidth, whichever is higher; only for GPUs
whose limits were measured), and speedup over eager PyTorch, torch.compile and the best library in the same run. Plots:
roofline (TFLOP/s over operations per byte), attention's TFLOP/s by number of tokens, the VAE's time by number of
pixels.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMITS = {"NVIDIA H200": (790.0, 4300.0)}  # TFLOP/s in bf16, GB/s; both measured
EAGER, COMPILED = ("reference", "eager"), ("torch.compile", "compiled")
LIBRARIES = ("sdpa", "library", "cudnn", "aten", "flash", "channels_last", "cublaslt", "conv3d", "diffusers", "torch")
OURS = ("triton", "cuda", "fastvid")
HEAD = "| case | us | TFLOP/s | GB/s | of the limit | x eager | x torch.compile | x best library |"


@dataclass(frozen=True)
class Line:
    """One measured case. group: the title under which it was measured."""

    benchmark: str
    device: str
    group: str
    name: str
    median: float
    tflop_per_s: float
    gb_per_s: float
    others: dict[str, float]

    @property
    def of_limit(self) -> float | None:
        """Utilization of the matrix units or of the memory bandwidth, whichever is higher."""
        if self.device not in LIMITS or not (self.tflop_per_s or self.gb_per_s):
            return None
        flops, bandwidth = LIMITS[self.device]
        return max(self.tflop_per_s / flops, self.gb_per_s / bandwidth)

    def speed(self, words: tuple[str, ...]) -> float | None:
        """Speedup over the fastest other case of the group whose name begins with one of these words."""
        times = [time for name, time in self.others.items() if name != self.name and name.lower().startswith(words)]
        return min(times) / self.median if times else None


def read(folder: Path) -> Iterator[Line]:
    """Every case of every result."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for group, rows in record.get("results", {}).items():
            others = {row["name"]: row["median"] for row in rows}
            for row in rows:
                rates = row["median"], row["tflop_per_s"], row["gb_per_s"]
                yield Line(record["benchmark"], record["machine"]["device"], group, row["name"], *rates, others)


def table(lines: list[Line]) -> str:
    """Markdown with a section per benchmark and device, and a table per group."""
    out = []
    for place in dict.fromkeys((line.benchmark, line.device) for line in lines):
        out.append(f"## {place[0]}, {place[1]}\n\n{HEAD}\n|{' --- |' * 8}")
        for line in lines:
            if (line.benchmark, line.device) == place:
                cells = [f"{line.group}: {line.name}", f"{line.median:,.0f}"]
                cells += [f"{rate:,.1f}" if rate else "" for rate in (line.tflop_per_s, line.gb_per_s)]
                cells.append(f"{line.of_limit:.0%}" if line.of_limit else "")
                speeds = [line.speed(words) for words in (EAGER, COMPILED, LIBRARIES)]
                cells += [f"{speed:.2f}" if speed else "" for speed in speeds]
                out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def roofline(lines: list[Line], axes: Any) -> bool:
    """Every case of a GPU whose limits are known, over its operations a byte. Returns whether there was one."""
    found = [x for x in lines if x.device in LIMITS and x.tflop_per_s and x.gb_per_s and x.name.startswith(OURS)]
    for device in dict.fromkeys(line.device for line in found):
        flops, bandwidth = LIMITS[device]
        places = [2.0**i for i in range(-3, 14)]
        axes.plot(places, [min(flops, x * bandwidth / 1e3) for x in places], label=f"limit of {device}")
    for benchmark in dict.fromkeys(line.benchmark for line in found):
        own = [line for line in found if line.benchmark == benchmark]
        intensity = [1e3 * line.tflop_per_s / line.gb_per_s for line in own]
        axes.plot(intensity, [line.tflop_per_s for line in own], "o", label=benchmark)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    return bool(found)


def over_size(lines: list[Line], axes: Any, unit: str, value: str) -> bool:
    """A line a case over the number that stands before `unit` in the group's title ("75,600 tokens")."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if size := re.search(rf"([\d,]+) {unit}", line.group):
            y = line.tflop_per_s if value == "TFLOP/s" else line.median / 1e3
            curves.setdefault(f"{line.name}, {line.device}", []).append((float(size[1].replace(",", "")), y))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set(xlabel=unit, ylabel=value)
    return any(len(points) > 1 for points in curves.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    lines = list(read(args.results))
    plots = {
        "roofline": lambda axes: roofline(lines, axes),
        "attention": lambda axes: over_size(
            [x for x in lines if "attention" in x.benchmark], axes, "tokens", "TFLOP/s"
        ),
        "vae": lambda axes: over_size([x for x in lines if "vae" in x.benchmark], axes, "pixels", "ms"),
    }
    drawn = []
    for name, draw in plots.items():
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        if draw(axes):
            axes.legend(fontsize="small")
            figure.savefig(args.out / f"benchmarks-{name}.svg", metadata={"Date": None})
            drawn.append(f"![{name}](benchmarks-{name}.svg)\n\n")
        pyplot.close(figure)
    text = "# Measured\n\nMade by `benchmarks/report.py` from `benchmarks/results/`.\n\n"
    (args.out / "benchmarks.md").write_text(text + "".join(drawn) + table(lines))
    print(f"{args.out / 'benchmarks.md'}: {len(lines)} cases, {len(drawn)} plots")


if __name__ == "__main__":
    main()
