"""The named recipes of VideoX-Fun's models: Fun-InP, Fun-Control, VACE-Fun.

Sources: aigc-apps/VideoX-Fun `examples/wan2.1_fun/`, `examples/wan2.2_fun/`, `examples/wan2.2_vace_fun/` and
`config/wan2.1/`, `config/wan2.2/`.
"""

from __future__ import annotations

from dataclasses import replace

from fastvid.models import preset as patterns
from fastvid.models.preset import EXPERIMENTAL, NATIVE, REFUSED, Patterns, Preset, Variant
from fastvid.models.wan import presets
from fastvid.models.wan.presets import LARGE, MIDDLE, PICTURE, SIZES_5B, SIZES_14B, SIZES_480P, SMALL, sized
from fastvid.sampling.schedulers import read_scheduler

# Masks over whole frames and over regions were part of the training; the authors show first and last pictures.
INPAINT = Patterns(NATIVE, EXPERIMENTAL, EXPERIMENTAL, NATIVE, EXPERIMENTAL, NATIVE, REFUSED)
# A start picture's latent stands at frame 0, without a mask: nothing else can be told (2.1).
START = Patterns(NATIVE, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED)
# With the mask channels of Fun-InP (2.2).
MASKED = replace(INPAINT, both_ends=EXPERIMENTAL, spatial_mask=EXPERIMENTAL)

FUN = replace(
    presets.WAN_1_3B,
    guidance_scale=6.0,
    flow_shift=5.0,
    solver="euler",
    scheduler=read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}),
    context=1,
    pictures_optional=True,
)
INP_1_3B = replace(FUN, name="wan2.1-fun-inp-1.3b", patterns=INPAINT)
CONTROL_1_3B = replace(FUN, name="wan2.1-fun-control-1.3b", patterns=START)
_A14B = replace(FUN, sizes=(*SIZES_480P, *SIZES_14B[:2]), guidance_scale_2=6.0, boundary_ratio=0.9)
_5B = sized(FUN, SIZES_5B, fps=24.0, num_frames=121, per_token_timesteps=True, spatial_multiple=32, window=31)


def _large(preset: Preset, name: str) -> Preset:
    return replace(preset, name=name, sizes=(*SIZES_480P, *SIZES_14B[:2]))


INP_5B = replace(_5B, name="wan2.2-fun-inp-5b", patterns=INPAINT)
CONTROL_5B = replace(_5B, name="wan2.2-fun-control-5b", patterns=MASKED)
VACE_A14B = replace(
    presets.WAN_VACE_14B,
    name="wan2.2-vace-fun-a14b",
    flow_shift=12.0,
    guidance_scale=5.0,
    guidance_scale_2=5.0,
    boundary_ratio=0.875,
    patterns=patterns.one_level(patterns.CONTROL),
)

_SMALL_PICTURE = PICTURE._replace(dim=SMALL.dim, num_layers=SMALL.num_layers)
_CONTROL, _SMALL_CONTROL = (signature._replace(in_channels=48) for signature in (PICTURE, _SMALL_PICTURE))
_INP, _REFERENCE = ("Fun InP",), "reference"

VARIANTS: tuple[Variant, ...] = (
    Variant(INP_1_3B, _SMALL_PICTURE, _INP, by_name=True),
    Variant(_large(INP_1_3B, "wan2.1-fun-inp-14b"), PICTURE, _INP, by_name=True),
    Variant(
        replace(_A14B, name="wan2.2-fun-inp-a14b", patterns=INPAINT),
        LARGE._replace(in_channels=36, experts=2),
        _INP,
        by_name=True,
    ),
    Variant(INP_5B, MIDDLE._replace(in_channels=100)),
    Variant(CONTROL_1_3B, _SMALL_CONTROL),
    Variant(_large(CONTROL_1_3B, "wan2.1-fun-control-14b"), _CONTROL),
    Variant(
        replace(CONTROL_1_3B, name="wan2.1-fun-v1.1-control-1.3b"),
        _SMALL_CONTROL._replace(extra=_REFERENCE),
    ),
    Variant(_large(CONTROL_1_3B, "wan2.1-fun-v1.1-control-14b"), _CONTROL._replace(extra=_REFERENCE)),
    Variant(
        replace(_A14B, name="wan2.2-fun-control-a14b", patterns=MASKED),
        LARGE._replace(in_channels=52, experts=2, extra=_REFERENCE),
    ),
    Variant(CONTROL_5B, MIDDLE._replace(in_channels=148, extra=_REFERENCE)),
    Variant(VACE_A14B, LARGE._replace(control=True, experts=2)),
)
