"""The ways in which a finished clip is interpolated and upscaled.

"diffusion" starts from a simple guess (frames faded into each other, or resized), noises it to a strength and lets the
model finish it, as `finalize` does. To add a way: a name here, and a branch where clips are read
(`fastvid.requests.inputs`) and frames made (`fastvid.engine.session`).
"""

from __future__ import annotations

from collections.abc import Mapping

METHODS: Mapping[str, tuple[str, ...]] = {"interpolate": ("diffusion",), "upscale": ("diffusion",)}
"""verb -> the names of its methods, the default first."""

FACTOR, MOST_FACTOR, SCALE = 2, 16, 2.0
