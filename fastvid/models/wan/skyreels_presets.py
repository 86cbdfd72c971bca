"""The presets of SkyReels V2's models.

Sources: SkyReels-V2 README (its tables of recommended values), `generate_video_df.py` and `generate_video.py`. Their
scripts run 30 steps unless told otherwise; the README recommends 50. A model of 14B has exactly the tensors of Wan's.
"""

from __future__ import annotations

from dataclasses import replace

from fastvid.models import preset as patterns
from fastvid.models.preset import Forcing, Preset, Signature, Variant
from fastvid.models.wan.presets import LARGE, PICTURE, SMALL, WAN_1_3B, sized

SIZES_540P, SIZES_720P = ("960x544", "544x960"), ("1280x720", "720x1280")

# `generate_video.py`; `generate_video_df.py` has Wan's.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)

# ---------------------------------------------------------------- diffusion forcing

DF_1_3B = sized(
    WAN_1_3B,
    SIZES_540P,
    name="skyreels-v2-df-1.3b-540p",
    flow_shift=8.0,
    guidance_scale=6.0,
    fps=24.0,
    num_frames=97,
    per_token_timesteps=True,
    window=25,
    context=5,
    forcing=Forcing(),
    # Levels rise from left to right in its training. A last picture follows the video.
    patterns=replace(patterns.FIRST_FRAME, **dict.fromkeys(("prefix", "both_ends", "staggered"), patterns.NATIVE)),
)
DF_14B_540P = replace(DF_1_3B, name="skyreels-v2-df-14b-540p")
DF_14B_720P = sized(
    DF_1_3B,
    SIZES_720P,
    name="skyreels-v2-df-14b-720p",
    num_frames=121,
    window=31,
    forcing=Forcing(base_num_frames=121),
)

# ---------------------------------------------------------------- from text, and from a picture

T2V_14B_540P = replace(
    DF_1_3B,
    name="skyreels-v2-t2v-14b-540p",
    negative_prompt=NEGATIVE_PROMPT,
    per_token_timesteps=False,
    context=WAN_1_3B.context,
    forcing=None,
    patterns=WAN_1_3B.patterns,
)
T2V_14B_720P = sized(T2V_14B_540P, SIZES_720P, name="skyreels-v2-t2v-14b-720p", num_frames=121, window=31)
I2V_1_3B = replace(
    T2V_14B_540P,
    name="skyreels-v2-i2v-1.3b-540p",
    flow_shift=5.0,
    guidance_scale=5.0,
    context=1,
    patterns=patterns.PICTURE,
)
I2V_14B_540P = replace(I2V_1_3B, name="skyreels-v2-i2v-14b-540p")
I2V_14B_720P = sized(I2V_1_3B, SIZES_720P, name="skyreels-v2-i2v-14b-720p", num_frames=121, window=31)

_PIPELINES = {"df": "DiffusionForcing", "t2v": "", "i2v": "ImageToVideo"}


def _named(preset: Preset, signature: Signature, *hints: str) -> Variant:
    """A variant with the tensors of another model."""
    kind = _PIPELINES[preset.name.split("-")[2]]
    return Variant(preset, signature, hints, by_name=True, pipeline=f"SkyReelsV2{kind}Pipeline")


VARIANTS: tuple[Variant, ...] = (
    Variant(DF_1_3B, SMALL._replace(extra="fps")),
    _named(DF_14B_720P, LARGE, "SkyReels V2 DF 720P", "SkyReelsV2DiffusionForcing 720P"),
    _named(DF_14B_540P, LARGE, "SkyReels V2 DF", "SkyReelsV2DiffusionForcing"),
    _named(T2V_14B_720P, LARGE, "SkyReels V2 T2V 720P", "SkyReelsV2Pipeline 720P"),
    _named(T2V_14B_540P, LARGE, "SkyReels V2 T2V", "SkyReelsV2Pipeline"),
    _named(I2V_1_3B, SMALL._replace(in_channels=36, image=True), "SkyReels V2"),
    _named(I2V_14B_720P, PICTURE, "SkyReels V2 720P"),
    _named(I2V_14B_540P, PICTURE, "SkyReels V2"),
)
