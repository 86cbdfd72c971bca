"""Compares the cost model (`fastvid.distributed.cost_model`) with real ranks, and plots its prediction for 1 to 64
GPUs.

    python benchmarks/scaling.py [check] [draw]

check: on this machine, over gloo, one thread per rank. First measures the components while all ranks work: matrix
products and attention (at other sizes than the step's), memory bandwidth, and exchanges. From these it predicts a step
of a random transformer in every layout of 1, 2 and 4 ranks, then runs the step and records both. If there are more
ranks than cores, the measured rates include the sharing.

draw: docs/scaling.svg, the parallel efficiency of a step on 1 to 64 H200. It is a prediction from the rates and links
in `cost_model`; nothing of it was measured here.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from ranks import run_ranks  # noqa: E402

from fastvid.benchmarks.harness import save  # noqa: E402
from fastvid.distributed.cost_model import H200, INFINIBAND, NVLINK, PCIE, Device, Link, curve, predict  # noqa: E402
from fastvid.distributed.layout import every  # noqa: E402
from fastvid.distributed.mesh import Mesh, RankView  # noqa: E402
from fastvid.layers.linear import Linear  # noqa: E402
from fastvid.models.wan.config import WanTransformerConfig  # noqa: E402
from fastvid.models.wan.transformer import WanTransformer  # noqa: E402
from fastvid.ops.dispatch import bind  # noqa: E402
from fastvid.planning.layout import work_of  # noqa: E402

CONFIG = WanTransformerConfig(num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=4, text_dim=64)
GRID, ROWS, RUNS = (4, 24, 24), 64, 3
SMALL, LARGE = 64, 1 << 20  # values of an exchange

MODELS = {
    "14B, 720p, 81 frames": work_of(WanTransformerConfig(), (21, 45, 80), guided=True),
    "1.3B, 480p, 81 frames": work_of(
        WanTransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30), (21, 30, 52), guided=True
    ),
    "5B, 1088p, 121 frames": work_of(
        WanTransformerConfig(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
        (31, 34, 60),
        guided=True,
    ),
}


def median(function: Callable[[], object], mesh: Mesh, runs: int = RUNS) -> float:
    """Seconds of a call that all ranks start together: the median of the slowest rank."""
    function()
    taken = []
    for _ in range(runs):
        mesh.gather(torch.zeros(1), (1,) * mesh.size, 0)
        mark = time.perf_counter()
        function()
        taken.append(time.perf_counter() - mark)
    mine = torch.tensor([statistics.median(taken)], dtype=torch.float64)
    return mesh.gather(mine, (1,) * mesh.size, 0).max().item()


def parts(mesh: Mesh) -> dict[str, float]:
    """A rank's speed while all ranks work, and the cost of an exchange with the next rank."""
    d, f, ops = CONFIG.dim, CONFIG.ffn_dim, bind()
    rows, x = 700, torch.randn(1, 700, CONFIG.dim)
    wide, back = Linear(d, f), Linear(f, d)
    linear = 4 * rows * d * f / median(lambda: back(wide(x)), mesh, 9)
    q, kv = torch.randn(1, 500, 4, 64), torch.randn(2, 1, 1900, 4, 64)
    attention = 4 * 500 * 1900 * 4 * 64 / median(lambda: ops.attention(q, *kv), mesh, 9)

    def swap(values: int) -> Callable[[], None]:
        out, into = torch.randn(values), torch.empty(values)
        after, before = (mesh.rank + 1) % mesh.size, (mesh.rank - 1) % mesh.size
        return lambda: mesh.exchange([(after, out)], [(before, into)]).wait()

    a, b = torch.randn(LARGE), torch.randn(LARGE)
    memory = 3 * a.nbytes / median(lambda: torch.add(a, b, out=b), mesh, 15)
    found = {"linear": linear, "attention": attention, "memory": memory, "latency": 0.0, "bandwidth": 1e30}
    if mesh.size == 1:
        return found
    small, large = (median(swap(values), mesh, 15) for values in (SMALL, LARGE))
    return found | {"latency": small, "bandwidth": 4 * LARGE / max(large - small, 1e-9)}


@torch.no_grad()
def rank(mesh: Mesh, to: str) -> None:
    """The work of one rank; rank 0 writes the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WanTransformer(CONFIG, bind()).eval()
    t, h, w = GRID
    x, times, text = torch.randn(1, 16, t, 2 * h, 2 * w), torch.rand(1), torch.randn(1, ROWS, CONFIG.text_dim)
    context, found = model.prepare_context(text), parts(mesh)
    device = Device("this", found["linear"], found["attention"], found["memory"])
    link = Link("gloo", found["bandwidth"], found["latency"])
    work, rows = work_of(CONFIG, GRID, True, ROWS, itemsize=4), []
    for layout in every(mesh.size, CONFIG.num_attention_heads, True):
        predicted = predict(work, layout, device, link)  # before running it
        view = RankView(mesh, layout)

        def step(view: RankView = view) -> None:
            view.both(*[lambda: model(x, times, context, view=view)] * 2, x)

        rows.append({"layout": str(layout), "predicted": predicted.seconds, "measured": median(step, mesh)})
    if mesh.rank == 0:
        Path(to).write_text(json.dumps({"parts": found, "rows": rows}))


def check(folder: Path) -> None:
    """Write predictions and measurements to results/."""
    from fastvid.benchmarks import scaling as own  # by a name that children can import

    made = {}
    for size in (1, 2, 4):
        to = folder / f"{size}.json"
        run_ranks(size, own.rank, str(to), timeout=900)
        made[size] = json.loads(to.read_text())
        for row in made[size]["rows"]:
            row["ratio"] = row["measured"] / row["predicted"]
            print(f"{row['layout']:<32} predicted {row['predicted']:.3f} s, measured {row['measured']:.3f} s")
    facts = {"model": asdict(CONFIG), "grid": GRID, "threads_a_rank": 1, "ranks": made}
    print(save("scaling", [], "cpu", **facts))


def draw() -> None:
    """Write docs/scaling.svg and its numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fastvid"
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    colours = ("#1f6fb2", "#c4581d", "#2d8a4e")
    for (name, work), colour in zip(MODELS.items(), colours, strict=True):
        for link, style in ((NVLINK, "-"), (PCIE, ":")):
            points = list(curve(work, H200, link, INFINIBAND))
            axes.plot(
                [one.layout.size for one in points], [100 * one.efficiency for one in points], style, color=colour,
                marker="o", markersize=3, label=f"{name}, {link.name}",
            )  # fmt: skip
            for one in points:
                print(f"{name:<24} {link.name:<12} {one.layout!s:<32} {one.seconds:8.3f} s {one.efficiency:6.1%}")
    axes.axhline(85, color="#999999", linewidth=0.8)
    axes.set(
        xscale="log", xlabel="GPUs (8 on a host, InfiniBand between hosts)", ylabel="share of ideal, %", ylim=(0, 102)
    )
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axes.set_title("Predicted, not measured: one step on H200s", fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "scaling.svg", metadata={"Date": None})


def main() -> None:
    import tempfile

    wanted = sys.argv[1:] or ["check", "draw"]
    if unknown := set(wanted) - {"check", "draw"}:
        raise SystemExit(f"{unknown.pop()!r} is not known; the parts are check and draw")
    if "check" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
    if "draw" in wanted:
        draw()


if __name__ == "__main__":
    main()
