"""Draws the trade-off of an edit by strength, from the result of
`fastvid.benchmarks.quality.score_verbs --verb edit_strength`.

    python -m fastvid.benchmarks.quality.plot_strength benchmarks/results/embedded-verbs.json docs/edit_strength.svg

Two lines over the strength: the share of edits that show what the prompt says, and the share in which the thing stays
on its path (centroid within 10 % of the frame).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 520, 300, 60, 30, 50
LINES = {"changed": ("#c0392b", "shows what the prompt says"), "path": ("#2c5aa0", "stays on its path")}


def plot(row: Mapping[str, Any]) -> str:
    """The drawing as SVG. row: `edit_strength` of a result, which holds changed_S and path_S for strengths S."""
    strengths = sorted(float(name.removeprefix("changed_")) for name in row if name.startswith("changed_"))
    if len(strengths) < 2:
        raise ValueError("the row has no curve: changed_S for two strengths or more")
    low, high = strengths[0], strengths[-1]
    right, bottom = WIDTH - 20, HEIGHT - BOTTOM

    def at(strength: float, share: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * (strength - low) / (high - low), bottom - (bottom - TOP) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = at(low, share)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for strength in strengths:
        x = at(strength, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{strength:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">strength</text>')
    for number, (name, (colour, words)) in enumerate(LINES.items()):
        points = [at(s, row[f"{name}_{s:g}"]) for s in strengths]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{LEFT + 200 * number}" y="18" fill="{colour}">{words}</text>')
    parts.append(f'<text x="{right}" y="18" text-anchor="end" fill="#666">{row["cases"]} edits</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(plot(json.loads(args.result.read_text())["edit_strength"]))


if __name__ == "__main__":
    main()
