"""What a model is asked for when the caller does not say: one named recipe for each variant that was published or that
ships with the package. Siblings have theirs in files of their own; `variants.py` finds the one of a model.

Sources: Wan2.1 `generate.py` and `wan/configs/`, Wan2.2 `wan/configs/`, and for the distilled models the configurations
of FastVideo, Self-Forcing, CausVid and LongLive.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastvid.models import preset as patterns
from fastvid.models.preset import Preset, Rollout, Signature, Variant

# Wan2.1 `wan/configs/shared_config.py`, sample_neg_prompt; the models that take pictures put more in front.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
I2V_NEGATIVE_PROMPT = "镜头晃动，" + WAN_NEGATIVE_PROMPT
FLF2V_NEGATIVE_PROMPT = "镜头切换，" + I2V_NEGATIVE_PROMPT

SIZES_480P, SIZES_720P, SIZES_5B = ("832x480", "480x832"), ("1280x720", "720x1280"), ("1280x704", "704x1280")
SIZES_14B = (*SIZES_720P, *SIZES_480P)


def sized(preset: Preset, sizes: tuple[str, ...], **changes: Any) -> Preset:
    """The preset at other sizes, the first of which it takes unless told otherwise."""
    width, height = map(int, sizes[0].split("x"))
    return replace(preset, width=width, height=height, sizes=sizes, **changes)


# ---------------------------------------------------------------- the published models

SMALL, LARGE, MIDDLE = Signature(1536, 30), Signature(5120, 40), Signature(3072, 30, in_channels=48, out_channels=48)
PICTURE = LARGE._replace(in_channels=36, image=True)

EMBEDDED = sized(
    Preset("embedded"),
    ("64x64", "160x96", "96x160"),
    num_inference_steps=20,
    flow_shift=3.0,
    guidance_scale=3.0,
    known_guidance_scale=1.5,
    edit_strength=0.4,  # most edits show what they shall from 0.2 on, and things leave their path from 0.6 on
    num_frames=17,
    per_token_timesteps=True,
    window=9,
    overlap=3,
    context=3,
    carries=True,
    anchor=16,
    patterns=patterns.EVERYTHING,
    qualities={  # as benchmarks/results/levers.json has chosen
        "balanced": {"num_inference_steps": 12, "guidance_batch": True},
        "fast": {"num_inference_steps": 8, "solver": "dpm++", "guidance_batch": True},
    },
)
# Shifts are the original code's. Most published diffusers folders say 3 instead, which is what they run with.
WAN_1_3B = Preset("wan2.1-t2v-1.3b", sizes=SIZES_480P, negative_prompt=WAN_NEGATIVE_PROMPT)
WAN_14B = sized(WAN_1_3B, SIZES_14B, name="wan2.1-t2v-14b")
WAN_I2V_480P = replace(
    WAN_1_3B,
    name="wan2.1-i2v-14b-480p",
    num_inference_steps=40,
    flow_shift=3.0,
    negative_prompt=I2V_NEGATIVE_PROMPT,
    context=1,
    patterns=patterns.PICTURE,
)
WAN_I2V_720P = sized(WAN_I2V_480P, SIZES_720P, name="wan2.1-i2v-14b-720p", flow_shift=5.0)
WAN_FLF2V = replace(
    WAN_I2V_720P,
    name="wan2.1-flf2v-14b",
    num_inference_steps=50,
    flow_shift=16.0,
    negative_prompt=FLF2V_NEGATIVE_PROMPT,
    patterns=patterns.TWO_PICTURES,
)
WAN_VACE_1_3B = replace(WAN_1_3B, name="wan2.1-vace-1.3b", flow_shift=16.0, context=4, patterns=patterns.CONTROL)
WAN_VACE_14B = sized(WAN_VACE_1_3B, SIZES_14B, name="wan2.1-vace-14b")
WAN_T2V_A14B = replace(
    WAN_14B,
    name="wan2.2-t2v-a14b",
    num_inference_steps=40,
    flow_shift=12.0,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    boundary_ratio=0.875,
    patterns=patterns.one_level(patterns.TEXT_ONLY),
)
WAN_I2V_A14B = replace(
    WAN_T2V_A14B,
    name="wan2.2-i2v-a14b",
    flow_shift=5.0,
    guidance_scale=3.5,
    guidance_scale_2=3.5,
    boundary_ratio=0.9,
    context=1,
    patterns=patterns.one_level(patterns.PICTURE),
)
WAN_TI2V_5B = sized(
    WAN_1_3B,
    SIZES_5B,
    name="wan2.2-ti2v-5b",
    fps=24.0,
    num_frames=121,
    per_token_timesteps=True,
    spatial_multiple=32,
    window=31,
    context=1,
    patterns=patterns.FIRST_FRAME,
)

# ---------------------------------------------------------------- distilled from them

# The model is told 1000, 757, 522; x0 and new noise are reckoned with the nearest levels of a table of 1000 steps that
# is shifted by 8, which are its steps 1000, 280 and 120: FastVideo `fastvideo/pipelines/stages/denoising.py`,
# DmdDenoisingStage (by 8 for the 5B too), and CausVid `causvid/models/wan/wan_wrapper.py` with `flow_match.py`.
DMD: dict[str, Any] = {
    **{"num_inference_steps": 3, "sigmas": (1.0, 28 / 37, 12 / 23), "whole_timesteps": True},
    **{"guidance_scale": 1.0, "solver": "redraw"},
}
# 1000, 750, 500, 250 on the table that is shifted by 5, which the model is told as they are: Self-Forcing
# `configs/self_forcing_dmd.yaml` (warp_denoising_step), `pipeline/causal_inference.py`.
SELF_FORCING_SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)

FASTWAN_1_3B = sized(
    WAN_1_3B,
    ("832x448",),
    name="fastwan2.1-t2v-1.3b",
    flow_shift=8.0,
    num_frames=61,
    patterns=patterns.FEW_STEPS,
    **DMD,
)
FASTWAN_14B = replace(FASTWAN_1_3B, name="fastwan2.1-t2v-14b")
FASTWAN_5B = replace(
    WAN_TI2V_5B,
    name="fastwan2.2-ti2v-5b",
    patterns=replace(patterns.FIRST_FRAME, first=patterns.EXPERIMENTAL, staggered=patterns.REFUSED),
    **DMD,
)
# The KV cache of `pipeline/causal_inference.py` holds 32760 tokens, which are 21 latent frames, all that it makes at
# once; longer videos go on with the latest 21. Its first picture needs independent_first_frame, which its released
# configuration has not.
SELF_FORCING = sized(
    FASTWAN_1_3B,
    SIZES_480P[:1],
    name="self-forcing-1.3b",
    num_inference_steps=4,
    flow_shift=5.0,
    sigmas=SELF_FORCING_SIGMAS,
    whole_timesteps=False,
    num_frames=81,
    rollout=Rollout(window=21),
    context=3,
    carries=True,
    patterns=patterns.CAUSAL,
)
# thu-ml/Causal-Forcing `configs/causal_forcing_dmd_chunkwise.yaml` and `_framewise.yaml`.
CAUSAL_FORCING = replace(SELF_FORCING, name="causal-forcing-1.3b")
CAUSAL_FORCING_FRAMEWISE = replace(
    CAUSAL_FORCING,
    name="causal-forcing-framewise-1.3b",
    rollout=Rollout(frames_per_block=1, window=21),
    patterns=replace(patterns.CAUSAL, first=patterns.NATIVE),
)
# `configs/wan_causal_dmd.yaml` (no warp), `causvid/models/wan/causal_inference.py` (32760 tokens).
CAUSVID = replace(SELF_FORCING, name="causvid-1.3b", flow_shift=8.0, **DMD)
# Branch v1.0: `configs/longlive_inference.yaml` (120 latent frames), `pipeline/interactive_causal_inference.py`.
LONGLIVE = replace(SELF_FORCING, name="longlive-1.3b", num_frames=477, rollout=Rollout(window=12, sink=3, recache=True))
# Branch main: `configs/inference.yaml` (128 latent frames), `pipeline/causal_diffusion_inference.py`,
# `utils/i2v_conditioning.py`. A new prompt leaves its cache as it is. What it does beside that at a cut between shots,
# a second sink and a leap of the positions by 8, is not done here.
LONGLIVE_2 = replace(
    FASTWAN_5B,
    name="longlive2-5b",
    num_inference_steps=4,
    sigmas=None,
    whole_timesteps=False,
    solver="unipc",
    num_frames=509,
    rollout=Rollout(frames_per_block=8, window=32, sink=8, picture_in_block=True),
    context=8,
    carries=True,
    patterns=replace(patterns.CAUSAL, first=patterns.NATIVE),
)

VARIANTS: tuple[Variant, ...] = (
    Variant(EMBEDDED, Signature(256, 6, text_dim=128)),
    Variant(WAN_1_3B, SMALL),
    Variant(WAN_14B, LARGE),
    Variant(WAN_I2V_480P, PICTURE, ("I2V-14B-480P", "I2V-480P-14B")),
    Variant(WAN_I2V_720P, PICTURE, ("I2V-14B-720P", "I2V-720P-14B")),
    Variant(WAN_FLF2V, PICTURE._replace(positions=True)),
    Variant(WAN_VACE_1_3B, SMALL._replace(control=True)),
    Variant(WAN_VACE_14B, LARGE._replace(control=True)),
    Variant(WAN_T2V_A14B, LARGE._replace(experts=2)),
    Variant(WAN_I2V_A14B, LARGE._replace(in_channels=36, experts=2)),
    Variant(WAN_TI2V_5B, MIDDLE),
    Variant(FASTWAN_1_3B, SMALL, ("FastWan", "WanDMDPipeline")),
    Variant(FASTWAN_14B, LARGE, ("FastWan", "WanDMDPipeline")),
    Variant(FASTWAN_5B, MIDDLE, ("FastWan", "WanDMDPipeline")),
    Variant(SELF_FORCING, SMALL, ("Self-Forcing", "SFWan", "WanCausalDMDPipeline")),
    Variant(CAUSAL_FORCING_FRAMEWISE, SMALL, ("Causal-Forcing-framewise",)),
    Variant(CAUSAL_FORCING, SMALL, ("Causal-Forcing",)),
    Variant(CAUSVID, SMALL, ("CausVid",)),
    Variant(LONGLIVE, SMALL, ("LongLive",)),
    Variant(LONGLIVE_2, MIDDLE, ("LongLive",)),
)
