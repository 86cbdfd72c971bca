"""`fastvid models`: the models that are known by name."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from fastvid.loaders import hub
from fastvid.models.wan.published import PLACES
from fastvid.models.wan.variants import PUBLISHED, published_configs
from fastvid.planning import memory
from fastvid.requests.request import default_request

GB = 1e9  # as disks and hubs count
GIB = 2**30  # as GPUs do


def show(flags: argparse.Namespace) -> None:
    rows = [describe(name) for name in PUBLISHED]
    print(json.dumps(rows, indent=2) if flags.json else "\n".join(_lines(rows)))


def describe(name: str) -> dict[str, Any]:
    """What is known of a model without its files.

    parameters: of a transformer; transformers: how many it has. bytes: of all its weights as they are loaded on a GPU
    (bf16, CLIP in fp32). memory: bytes on the GPU for its default video, with all weights there ("none") and with
    most in host memory ("blocks"). local: it is whole in the local cache.
    """
    preset, configs = published_configs(name)
    request, place = default_request(preset), PLACES.get(name)
    facts = memory.ModelFacts.of_configs(configs, torch.bfloat16, torch.bfloat16)
    needs = memory.whole_needs(facts, request)
    return {
        "name": name,
        "transformers": len(facts.sizes.experts),
        "parameters": facts.sizes.experts[0].total // torch.bfloat16.itemsize,
        "bytes": facts.sizes.total,
        "video": {"width": request.width, "height": request.height, "num_frames": request.num_frames},
        "memory": {mode: needs.memory(mode).device for mode in ("none", "blocks")},
        "licence": place.licence if place else None,
        "hub": place.hub if place else None,
        "checkpoint": place.checkpoint if place else "",
        "pickled": place is not None and place.pickled,
        "local": place is not None and not place.converted and hub.find(place.hub) is not None,
    }


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    head = ("name", "parameters", "weights", "default video", "GPU memory", "offloaded", "licence", "hub")
    table = [head, *map(_cells, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    lines = ["  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[-1]]) for row in table]
    return [
        *lines,
        "",
        "weights: in bf16, all parts. GPU memory: for the default video; offloaded: with --offload blocks.",
        "*: has pickles, to be converted once; loading it by its name shows the commands. +: in the local cache.",
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    video, count = row["video"], f"{row['parameters'] / 1e9:.1f}B"
    return (
        row["name"],
        count if row["transformers"] == 1 else f"{row['transformers']} x {count}",
        f"{row['bytes'] / GB:.1f} GB",
        f"{video['width']}x{video['height']}, {video['num_frames']}",
        f"{row['memory']['none'] / GIB:.1f} GiB",
        f"{row['memory']['blocks'] / GIB:.1f} GiB",
        row["licence"] or "",
        f"{row['hub'] or ''}{' *' if row['checkpoint'] or row['pickled'] else ''}{' +' if row['local'] else ''}",
    )
