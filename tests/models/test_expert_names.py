"""Which expert a file's name means: names as publishers and trainers write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvid.models.common.expert_names import Mark, expert_of, is_pair, read_mark

HIGH = [
    *(
        "wan2.2_t2v_high_noise_14B_fp16",
        "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled",
        "HighNoise",
        "highnoise",
        "style-hinoise",
        "noise_high_v1",
    ),
    *(
        "Wan22-A14B-T2V-4steps-lora-rank64-HIGH-V2_fp16",
        "wan22HighV2",
        "mix22_t2vHighV10",
        "WAN22I2VHIGH",
        "style_high",
        "high",
        "styleHigh",
    ),
    *(
        "Wan2.2-Fun-A14B-InP-HIGH-MPS_resized",
        "wan22_high_rank64",
        "HIGH/motion",
        "high_noise_model/diffusion_pytorch_model",
        "mixHigh/t2v",
    ),
    *(
        "high_kick_high_noise",
        "low_light_HighNoise",
        "HIGH/motion_high",
        "high_noise_low_quality",
        "noise_high_quality",
        "models--org--style-high-noise/snapshots/0123/style",
    ),
]
NONE = [
    *(
        "highlights",
        "slow_motion",
        "high_res_details",
        "low_vram",
        "t2v-high-quality",
        "t2vLowVram",
        "SlowMotion",
        "yellow_pillow",
        "below",
        "thigh",
    ),
    *(
        "low_angle",
        "HIGH_HEELS",
        "high-speed/style",
        "low_rank_lora",
        "hello",
        "style",
        "style_l",
        "vitL14",
        "styleXL",
        "lowlands",
        "flowers",
        "Shallow",
    ),
]
DOUBTFUL = [
    "style_H",
    "wan22-L-e8",
    "high_motion",
    "jump_high",
    "style_HN",
    "high_to_low",
    "wan22-high-low",
    "HIGH/motion_low_noise",
    "low_noise/styleHigh",
    "test_files_named_high_and_low_g0/HIGH-low",
]


def turned(name: str) -> str:
    for a, b in (("high", "low"), ("High", "Low"), ("HIGH", "LOW"), ("hinoise", "lonoise")):
        name = name.replace(a, "\0").replace(b, a).replace("\0", b)
    return name


@pytest.mark.parametrize("name", HIGH)
def test_names_of_an_expert(name: str) -> None:
    assert expert_of(f"/models/{name}.safetensors") == Mark("high")
    if "light" not in name:
        assert expert_of(f"/models/{turned(name)}.safetensors") == Mark("low")


@pytest.mark.parametrize("name", NONE)
def test_names_of_no_expert(name: str) -> None:
    assert expert_of(Path("loras", name + ".safetensors")) == Mark()


@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubtful_names(name: str) -> None:
    assert not expert_of(Path("loras", name + ".safetensors")).sure


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan22-H-e8", "wan22-L-e8"),
        ("style_HN", "style_LN"),
        ("stylehigh", "stylelow"),
        ("high_motion", "low_motion"),
        ("style_high_noise", "style-LowNoise"),
        ("mixHigh/t2vHigh", "../mixLow/t2vLow"),
        ("HIGH/x", "LOW/x"),
    ],
)
def test_pairs_decide_for_each_other(high: str, low: str) -> None:
    assert is_pair(high, low) and is_pair(low, high) and not is_pair(high, high)
    assert expert_of(high, ["other", low]) == Mark("high") and expert_of(low, [high, low]) == Mark("low")


@pytest.mark.parametrize(
    ("one", "other"), [("high_angle", "low_angle"), ("highlights", "lowlights"), ("a_high", "b_low"), ("a", "b")]
)
def test_no_pairs(one: str, other: str) -> None:
    assert not is_pair(one, other)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text(name: str, other: str) -> None:
    assert read_mark(name).expert in ("high", "low", "")
    assert is_pair(name, other) == is_pair(other, name)
