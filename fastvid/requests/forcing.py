"""How a model that was trained by diffusion forcing goes through a video: the arguments of a request for that, checked
and filled in. Names and meanings are those of diffusers' SkyReelsV2DiffusionForcingPipeline; causal_attention is
SkyReels-V2's own (`generate_video_df.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvid.errors import InvalidRequest

FORCING = (
    "ar_step",
    "causal_block_size",
    "causal_attention",
    "base_num_frames",
    "overlap_history",
    "addnoise_condition",
)


def resolve(given: Mapping[str, Any], preset: Any) -> dict[str, Any]:
    """The arguments (None: not given) with the preset's values filled in; none for a model without them.

    preset: of the model; its `forcing` is a `fastvid.models.preset.Forcing`, or None. Raises InvalidRequest.
    """
    forcing, name = getattr(preset, "forcing", None), getattr(preset, "name", "this model")
    asked = {key: value for key, value in given.items() if value is not None}
    if forcing is None:
        if asked:
            key, value = next(iter(asked.items()))
            raise InvalidRequest(
                f"{key}={value}: {name} was not trained by diffusion forcing, as SkyReels V2 DF was; leave it out"
            )
        return {}
    values = {key: asked.get(key, getattr(forcing, key, None)) for key in given}
    if values["causal_attention"] is None:
        values["causal_attention"] = (values["causal_block_size"] or 1) > 1
    _check_overlap(values, preset.temporal)
    return values


def _check_overlap(values: Mapping[str, Any], temporal: int) -> None:
    """Raises InvalidRequest if a part would see nothing but known frames."""
    base, overlap = int(values["base_num_frames"]), int(values["overlap_history"])
    if columns(overlap, temporal) >= columns(base, temporal):
        most = (columns(base, temporal) - 2) * temporal + 1
        raise InvalidRequest(
            f"overlap_history={overlap} leaves no new frames of base_num_frames={base}; the nearest is {most}"
        )


def columns(frames: int, temporal: int) -> int:
    """Latent frames of so many frames; a rest is left out, as in diffusers."""
    return (frames - 1) // temporal + 1
