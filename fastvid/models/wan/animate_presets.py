"""Wan2.2-Animate-14B: what it is asked for when the caller does not say. Source: Wan2.2
`wan/configs/wan_animate_14B.py`, `generate.py` and `wan/animate.py`."""

from __future__ import annotations

from fastvid.models.preset import NATIVE, REFUSED, Patterns, Preset, Variant
from fastvid.models.wan import presets

EXTRA = "animate"
# A segment goes on from the last frames of the one before, and knows nothing else of the video.
AFTER_A_SEGMENT = Patterns(NATIVE, NATIVE, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED)

WAN_ANIMATE_14B = presets.sized(
    Preset("wan2.2-animate-14b"),
    presets.SIZES_14B,
    num_inference_steps=20,
    flow_shift=5.0,
    guidance_scale=1.0,
    fps=30.0,
    num_frames=77,
    negative_prompt=presets.WAN_NEGATIVE_PROMPT,
    prompt="视频中的人在做动作",
    mode="animate",
    segment_frame_length=77,
    prev_segment_conditioning_frames=1,
    context=1,
    patterns=AFTER_A_SEGMENT,
)
VARIANTS = (Variant(WAN_ANIMATE_14B, presets.PICTURE._replace(extra=EXTRA)),)
