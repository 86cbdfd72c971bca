"""Draws speed-up against truth of every setting that `fastvid.benchmarks.quality.levers` has measured, as SVG. Settings
that no other beats in both are joined by a line; those of the presets are filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 440, 60, 40, 50
WORST = 15.0  # points; what loses more stands at the lower edge


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that no other beats in both speed-up and points lost, by speed-up."""
    kept: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda one: (-one["speedup"], one["lost"])):
        if not kept or row["lost"] < kept[-1]["lost"]:
            kept.append(row)
    return kept[::-1]


def plot(result: Mapping[str, Any]) -> str:
    """The drawing as SVG. result: what `levers run` has written."""
    rows, chosen = result["rows"], {case: name for name, case in result["chosen"].items()}
    right, bottom = WIDTH - 20, HEIGHT - BOTTOM
    most = max(row["speedup"] for row in rows) + 0.3
    best = min(-1.0, *(row["lost"] for row in rows))

    def at(row: Mapping[str, Any]) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * (row["speedup"] - 0.8) / (most - 0.8)
        return x, TOP + (bottom - TOP) * (min(row["lost"], WORST) - best) / (WORST - best)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20">points of truth lost, {result["rows"][0]["prompts"]} prompts, embedded model</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">speed-up of the whole request</text>',
    ]
    for points in (0, 3, 6, 9, 12, 15):
        y = at({"speedup": 1, "lost": points})[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{points}</text>')
    for tenth in range(10, int(most * 10), 5):
        x = at({"speedup": tenth / 10, "lost": 0})[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tenth / 10:g}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, front(rows)))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2c5aa0" stroke-width="1.5"/>')
    for row in rows:
        x, y = at(row)
        preset = chosen.get(row["case"])
        fill, words = ("#c0392b", f"{preset}: {row['case']}") if preset else ("white", row["case"])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="#c0392b"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" fill="#333">{words}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
