"""What shapes of weights say of Wan-Animate's configuration: see `detect`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.models.wan.animate_config import CHANNELS_KEY, CLASS_NAME, LATENTS_KEY, SIZE_KEY, SMALLEST

MARK = "pose_patch_embedding.weight"
_LEVEL = re.compile(r"motion_encoder\.res_blocks\.(\d+)\.conv1\.weight")
_FACE = re.compile(r"face_adapter\.(\d+)\.to_q\.weight")
_BLOCK = re.compile(r"blocks\.(\d+)\.attn1\.to_q\.weight")
Shapes = Mapping[str, tuple[int, ...]]


def config_of(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that a picture-to-video transformer's has not. shapes: in diffusers' names."""
    levels, hidden = _count(shapes, _LEVEL), _shape(shapes, "face_encoder.conv2.weight", 3)[0]
    widths = [_shape(shapes, f"motion_encoder.res_blocks.{i}.conv1.weight", 4)[0] for i in range(levels)]
    last = _shape(shapes, "motion_encoder.conv_out.weight", 4)
    side, every = SMALLEST << levels, _count(shapes, _BLOCK) // max(1, _count(shapes, _FACE))
    sizes = {str(side >> i): width for i, width in enumerate((*widths, last[1]))}
    published = given.get(CHANNELS_KEY)
    return {
        "_class_name": CLASS_NAME,
        LATENTS_KEY: _shape(shapes, MARK, 5)[1],
        SIZE_KEY: side,
        CHANNELS_KEY: published if isinstance(published, dict) and sizes.items() <= published.items() else sizes,
        "motion_style_dim": last[0],
        "motion_dim": _shape(shapes, "motion_encoder.motion_synthesis_weight", 2)[1],
        "motion_encoder_dim": _shape(shapes, "motion_encoder.motion_synthesis_weight", 2)[0],
        "face_encoder_hidden_dim": hidden,
        "face_encoder_num_heads": _shape(shapes, "face_encoder.conv1_local.weight", 3)[0] // hidden,
        "inject_face_latents_blocks": given.get("inject_face_latents_blocks", every),
    }


def _count(shapes: Shapes, pattern: re.Pattern[str]) -> int:
    return max((int(found[1]) for name in shapes if (found := pattern.fullmatch(name))), default=-1) + 1


def _shape(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    found = shapes.get(name, ())
    if len(found) != dims or 0 in found:
        raise CheckpointError(
            f"{name} (in diffusers' names) has shape {list(found)}, or is missing; Wan-Animate has it with {dims} "
            "dimensions"
        )
    return found
