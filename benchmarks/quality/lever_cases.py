"""The settings that `fastvid.benchmarks.quality.levers` compares: names and arguments of `pipe.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXACT = "exact"
CASES: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    "14 steps": {"num_inference_steps": 14},
    "10 steps": {"num_inference_steps": 10},
    "8 steps": {"num_inference_steps": 8},
    "6 steps": {"num_inference_steps": 6},
}
DRIFT = ("10 steps", "6 steps")
"""Cases of which long videos are made too."""
