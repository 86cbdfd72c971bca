"""What a model is asked for when the caller does not say: one named recipe for each variant that was published or that
ships with the package, and a general one for other sizes of the same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.models.wan import WanTransformerConfig
from fastvid.models.wan_vae22 import VAEConfig

# Wan2.1 `wan/configs/shared_config.py`, sample_neg_prompt.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Recipe:
    """A model's defaults. Sizes in pixels, fps in frames a second.

    spatial_multiple: what height and width must divide by. temporal: frames a latent frame, so that the model makes
    temporal * k + 1 frames. per_token_timesteps: it was trained with known tokens at timestep 0.
    """

    name: str
    num_inference_steps: int = 50
    flow_shift: float = 5.0
    guidance_scale: float = 5.0
    fps: float = 16.0
    num_frames: int = 81
    height: int = 480
    width: int = 832
    negative_prompt: str = ""
    solver: str = "unipc"
    per_token_timesteps: bool = False
    spatial_multiple: int = 16
    temporal: int = 4


# Steps, shift, guidance: Wan2.1 `generate.py`. The 1.3B's scheduler file says flow_shift 3; the original code takes 5.
WAN_1_3B = Recipe("wan2.1-t2v-1.3b", negative_prompt=WAN_NEGATIVE_PROMPT)
WAN_14B = Recipe("wan2.1-t2v-14b", height=720, width=1280, negative_prompt=WAN_NEGATIVE_PROMPT)
EMBEDDED = Recipe(
    "embedded",
    num_inference_steps=20,
    flow_shift=3.0,
    guidance_scale=3.0,
    num_frames=17,
    height=64,
    width=64,
    per_token_timesteps=True,
)

# (width, layers, width of the text) -> recipe
VARIANTS: Mapping[tuple[int, int, int], Recipe] = {
    (256, 6, 128): EMBEDDED,
    (1536, 30, 4096): WAN_1_3B,
    (5120, 40, 4096): WAN_14B,
}


def find_recipe(
    transformer: WanTransformerConfig, vae: VAEConfig, scheduler: Mapping[str, Any], expand_timesteps: bool | None
) -> Recipe:
    """The recipe of a model, by its sizes; the general one, with the scheduler file's shift, for sizes unknown here.

    expand_timesteps is what model_index.json says of the weights, None if it says nothing.
    """
    known = VARIANTS.get((transformer.dim, transformer.num_layers, transformer.text_dim))
    recipe = known or Recipe("wan-custom", flow_shift=_file_shift(scheduler))
    multiple = vae.spatial_scale * transformer.patch_size[1]
    return replace(
        recipe,
        per_token_timesteps=recipe.per_token_timesteps if expand_timesteps is None else expand_timesteps,
        height=ceil(recipe.height / multiple) * multiple,
        width=ceil(recipe.width / multiple) * multiple,
        spatial_multiple=multiple,
        temporal=vae.temporal_scale * transformer.patch_size[0],
    )


def _file_shift(scheduler: Mapping[str, Any]) -> float:
    """flow_shift of a multistep scheduler's file, shift of an Euler one's."""
    value = scheduler.get("flow_shift", scheduler.get("shift", Recipe.flow_shift))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"scheduler/scheduler_config.json: flow_shift is {value!r}; a positive number is needed")
    return float(value)
