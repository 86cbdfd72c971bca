"""The settings that `fastvid.benchmarks.quality.levers` compares: names and arguments of `pipe.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXACT = "exact"
CALIBRATION = "CALIBRATION"  # in a case's text: the file that `pipe.calibrate` has written
_BATCH: dict[str, Any] = {"guidance_batch": True}
_LATE: dict[str, Any] = {"guidance_interval": (0.7, 1.0)}


def _steps(count: int, solver: str | None = None, **options: Any) -> dict[str, Any]:
    return {"num_inference_steps": count, **({"solver": solver} if solver else {}), **options}


CASES: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    "12 steps": _steps(12),
    "10 steps": _steps(10),
    "8 steps": _steps(8),
    "8 steps, euler": _steps(8, "euler"),
    "first block 0.1": {"cache": "first_block:threshold=0.1"},
    "first block 0.2": {"cache": "first_block:threshold=0.2"},
    "taylorseer 1, every 2": {"cache": "taylorseer:order=1,every=2"},
    "easycache 0.1": {"cache": "easycache:threshold=0.1"},
    "magcache": {"cache": f"magcache:file={CALIBRATION}"},
    "cache 1.5": {"cache": 1.5},
    "interval 0.5-1": {"guidance_interval": (0.5, 1.0)},
    "interval 0.7-1": _LATE,
    "every 2": {"guidance_every": 2},
    "every 3": {"guidance_every": 3},
    "batch": _BATCH,
    "every 2, cache 1.5": {"guidance_every": 2, "cache": 1.5},
    "interval 0.7-1, taylorseer 1, every 2": {**_LATE, "cache": "taylorseer:order=1,every=2"},
    "12 steps, batch": _steps(12, **_BATCH),
    "10 steps, batch": _steps(10, **_BATCH),
    "10 steps, every 3": _steps(10, guidance_every=3),
    "10 steps, interval 0.7-1, batch": _steps(10, **_LATE, **_BATCH),
    "9 steps, interval 0.7-1, batch": _steps(9, **_LATE, **_BATCH),
    "8 steps, euler, batch": _steps(8, "euler", **_BATCH),
    "7 steps, euler, batch": _steps(7, "euler", **_BATCH),
    "6 steps, euler, batch": _steps(6, "euler", **_BATCH),
    "8 steps, euler, interval 0.7-1, batch": _steps(8, "euler", **_LATE, **_BATCH),
    "8 steps, dpm++, interval 0.7-1, batch": _steps(8, "dpm++", **_LATE, **_BATCH),
    "7 steps, euler, interval 0.7-1, batch": _steps(7, "euler", **_LATE, **_BATCH),
    "8 steps, dpm++, batch": _steps(8, "dpm++", **_BATCH),
    "8 steps, shift 5, batch": _steps(8, flow_shift=5.0, **_BATCH),
    "8 steps, euler, shift 5, batch": _steps(8, "euler", flow_shift=5.0, **_BATCH),
    "7 steps, dpm++, shift 5, batch": _steps(7, "dpm++", flow_shift=5.0, **_BATCH),
    "7 steps, euler, shift 5, batch": _steps(7, "euler", flow_shift=5.0, **_BATCH),
    "6 steps, euler, shift 5, batch": _steps(6, "euler", flow_shift=5.0, **_BATCH),
    "7 steps, euler, shift 5, interval 0.4-1, batch": _steps(
        7, "euler", flow_shift=5.0, guidance_interval=(0.4, 1.0), **_BATCH
    ),
    "8 steps, dpm++, interval 0.4-1, batch": _steps(8, "dpm++", guidance_interval=(0.4, 1.0), **_BATCH),
    "8 steps, dpm++, every 2, batch": _steps(8, "dpm++", guidance_every=2, **_BATCH),
    "8 steps, dpm++, every 3, batch": _steps(8, "dpm++", guidance_every=3, **_BATCH),
    "9 steps, dpm++, every 3, batch": _steps(9, "dpm++", guidance_every=3, **_BATCH),
    "7 steps, dpm++, batch": _steps(7, "dpm++", **_BATCH),
}
DRIFT = ("10 steps, batch", "10 steps, interval 0.7-1, batch", "8 steps, euler, interval 0.7-1, batch", "cache 1.5")
"""Cases of which long videos are made too."""
