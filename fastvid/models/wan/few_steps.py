"""Methods of few steps for Wan: what a request needs of steps, noise levels, solver and guidance, and by which words
the files of their LoRAs are known.

Sources: LightX2V `configs/distill/` and `configs/causvid/`, FastVideo `stages/denoising.py` (DmdDenoisingStage),
TurboDiffusion `turbodiffusion/inference/`, Self-Forcing `configs/self_forcing_dmd.yaml`; of FusionX the profile of
Wan2GP (`profiles/wan/FusioniX t2v - 10 Steps.json`), of CausVid's LoRAs its `models/wan/any2video.py` too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import atan, cos, sin
from typing import Any

from fastvid.models.wan.presets import DMD, SELF_FORCING_SIGMAS


@dataclass(frozen=True)
class FewSteps:
    """A method. values: arguments of a request. words: a pattern that the name of a LoRA of it has."""

    values: Mapping[str, Any]
    words: str


def _levels(sigmas: Iterable[float], solver: str) -> dict[str, Any]:
    return {"sigmas": tuple(sigmas), "solver": solver, "guidance_scale": 1.0}


def _steps(count: int, shift: float, solver: str) -> dict[str, Any]:
    return {"num_inference_steps": count, "flow_shift": shift, "solver": solver, "guidance_scale": 1.0}


# rCM counts noise by an angle: the first is that of sigma 80 against 1.
RCM_SIGMAS = tuple(sin(angle) / (sin(angle) + cos(angle)) for angle in (atan(80), 1.5, 1.4, 1.0))
CAUSVID_SIGMAS = (1.0, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074)

FEW_STEPS: Mapping[str, FewSteps] = {
    "fastwan": FewSteps(_levels(DMD["sigmas"], "redraw"), r"fast_?wan|wan_?dmd"),
    "causvid": FewSteps(_levels(CAUSVID_SIGMAS, "euler"), r"causvid"),
    "fusionx": FewSteps(_steps(10, 2.0, "unipc"), r"fusioni?x|accvid"),
    "rcm": FewSteps(_levels(RCM_SIGMAS, "redraw"), r"(^|_)rcm(_|$)|turbo_?(wan|diffusion)"),
    "self-forcing": FewSteps(_levels(SELF_FORCING_SIGMAS, "redraw"), r"self_?forcing"),
    "lightning-8": FewSteps(_steps(8, 5.0, "euler"), r"(lightning|lightx2v|distill).*_8_?steps?|_8_?steps?.*lightning"),
    "lightning": FewSteps(_steps(4, 5.0, "euler"), r"lightning|lightx2v|step_?distill|(^|[^0-9])4_?steps?(_|$)"),
}
"""In the order in which a name is looked up: some LoRAs were made with others, and say so."""


def method_of(name: str) -> str | None:
    """The method of a LoRA, by what it is called; None if the name says nothing of one."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower())
    return next((method for method, one in FEW_STEPS.items() if re.search(one.words, words)), None)
