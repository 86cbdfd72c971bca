"""`preset=`: methods of few steps by name, by the LoRA, and beside what the caller says."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import fastvid
from fastvid import FastvidWarning, InvalidRequest
from fastvid.models.registry import FEW_STEPS, method_of
from fastvid.models.wan.presets import SELF_FORCING
from fastvid.requests.request import Request
from fastvid.sampling.sigmas import make_sigmas

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "seed": 3}
PROMPT = "a red circle"
NAMED = {
    "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16": "lightning",
    "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64": "lightning",
    "wan2.1_i2v_lora_rank64_lightx2v_4step": "lightning",
    "Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16": "lightning",
    "Wan2.2_I2V_A14B_HIGH_4steps_lora_rank64_Seko_V1_forKJ": "lightning",
    "Wan2.2-Lightning_T2V-A14B-8steps-lora_LOW": "lightning-8",
    "Wan21_CausVid_14B_T2V_lora_rank32_v2": "causvid",
    "Wan2.1_T2V_14B_FusionX_LoRA": "fusionx",
    "FusioniX": "fusionx",
    "Wan21_AccVid_T2V_14B_lora_rank32_fp16": "fusionx",
    "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16": "fastwan",
    "Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16": "rcm",
    "TurboDiffusion-lora": "rcm",
    "self_forcing_dmd_lora": "self-forcing",
    "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1": "lightning",
    "DetailEnhancerV1": None,
    "Instagirlv2.0_hinoise": None,
    "pytorch_lora_weights": None,
    "arcmotion": None,
    "style_24steps_epoch": None,
}


@pytest.mark.parametrize("name", NAMED)
def test_loras_are_known_by_their_names(name: str) -> None:
    assert method_of(name) == NAMED[name]


def test_the_table_is_as_published() -> None:
    assert make_sigmas(4, 5.0, "euler").tolist() == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])
    assert FEW_STEPS["rcm"].values["sigmas"] == pytest.approx((0.98765, 0.9338, 0.8529, 0.6090), abs=6e-5)
    for name, method in FEW_STEPS.items():
        request = Request.make("generate", prompt="a", **method.values)  # each value passes its check
        assert request.guidance_scale == 1 and method_of(name) in (name, "lightning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny.write_checkpoint(made, vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16})
    return made


@pytest.fixture(scope="module")
def pipe(folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


def written(path: Path, **texts: str) -> str:
    path.parent.mkdir(exist_ok=True)
    stem = "transformer.blocks.0.attn1.to_q"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 48), f"{stem}.lora_B.weight": torch.ones(48, 2)}, path, texts)
    return str(path)


@pytest.fixture(scope="module")
def lightning(folder: Path) -> str:
    return written(folder / "lightx2v_step_distill_rank64.safetensors")


def test_a_preset_is_the_values_that_it_stands_for(pipe: fastvid.Pipeline, lightning: str) -> None:
    asked = {**SMALL, "loras": [lightning]}
    spelled = {"num_inference_steps": 4, "flow_shift": 5.0, "solver": "euler", "guidance_scale": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastvidWarning)
        made = pipe.generate(PROMPT, preset="lightning", **asked)
        same = pipe.generate(PROMPT, **spelled, **asked)
        found = pipe.generate(PROMPT, preset="auto", **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastvidWarning)  # of the negative prompt that it records
        again = pipe.generate(**Request.from_recipe(made.recipe).arguments())
    assert all(np.array_equal(made.frames, other.frames) for other in (same, found, again))
    assert {name: made.recipe[name] for name in spelled} == spelled and made.recipe["preset"] == "lightning"


@pytest.mark.parametrize(
    ("preset", "said", "steps"),
    [
        ("lightning", {"num_inference_steps": 6}, 6),
        ("lightning", {"sigmas": [1.0, 0.5]}, 2),
        ("causvid", {"num_inference_steps": 5}, 5),
        ("causvid", {"flow_shift": 3.0}, 50),
        ("causvid", {}, 9),
        ("fastwan", {"solver": "euler"}, 3),
        ("lightning-8", {"guidance_scale": 2.0}, 8),
    ],
)
@pytest.mark.filterwarnings("ignore:preset=")
def test_what_the_caller_says_counts_more(
    pipe: fastvid.Pipeline, preset: str, said: dict[str, Any], steps: int
) -> None:
    plan = pipe.plan(PROMPT, preset=preset, **said, **SMALL)
    assert (plan.steps, plan.model_calls) == (steps, steps * (2 if "guidance_scale" in said else 1))


def test_a_lora_of_few_steps_is_named_and_nothing_changes(
    pipe: fastvid.Pipeline, lightning: str, tmp_path: Path
) -> None:
    inside = written(tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64" / "model.safetensors")
    titled = written(tmp_path / "one.safetensors", **{"modelspec.title": "CausVid rank 32"})
    for file, method in ((lightning, "lightning"), (inside, "lightning"), (titled, "causvid")):
        with pytest.warns(FastvidWarning, match=f"is a LoRA of few steps.*preset={method}"):
            plan = pipe.plan(PROMPT, loras=[file], num_inference_steps=20, **SMALL)
        assert plan.steps == 20 and plan.model_calls == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastvidWarning)
        pipe.plan(PROMPT, loras=[lightning], num_inference_steps=4, guidance_scale=1.0, **SMALL)
        pipe.plan(PROMPT, loras=[(lightning, 0.0)], **SMALL)


def test_a_preset_without_its_weights_is_named(pipe: fastvid.Pipeline) -> None:
    for name in ("lightning", "auto"):
        with pytest.warns(FastvidWarning, match=f"preset={name}: no LoRA of few steps is loaded"):
            plan = pipe.plan(PROMPT, preset=name, **SMALL)
        assert plan.steps == (4 if name == "lightning" else 50)
    distilled = fastvid.Pipeline(replace(pipe._model, preset=replace(SELF_FORCING, rollout=None)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastvidWarning)
        assert distilled.plan(PROMPT, preset="auto", height=480, width=832, num_frames=5).steps == 4


def test_unknown_names_are_told_the_nearest(pipe: fastvid.Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="the nearest is lightning$"):
        pipe.plan(PROMPT, preset="lightnin", **SMALL)


def test_flow_edit_keeps_its_solver(pipe: fastvid.Pipeline, lightning: str) -> None:
    clip = np.random.default_rng(1).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    given = {"preset": "fastwan", "loras": [lightning], "source_prompt": "a blue square", "strength": 1.0, "seed": 1}
    assert pipe.edit(clip, PROMPT, **given).recipe["solver"] == "euler"
