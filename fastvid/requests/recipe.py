"""Recipes: what a video was made with, as JSON that a file can hold, and the arguments that make it again.

Pictures, clips and tensors are recorded by their shape and sha256 (a print): whoever makes the video again gives them
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastvid.checks import shown
from fastvid.errors import InvalidRequest
from fastvid.requests.arguments import VERBS

CONTEXT = ("fastvid", "verb", "model", "settings", "full_size")
"""Entries of a recipe that are not arguments: version, verb, model as loaded, dtype and back ends, and for a draft the
size that finalize brings it to."""

SAMPLED = 5
"""Frames of a clip that a recipe knows it by."""

DISPLACED = {
    "seconds": ("num_frames",),
    "num_frames": ("seconds",),
    "size": ("width", "height"),
    "aspect": ("width", "height"),
    "budget": ("width", "height"),
    "sigmas": ("num_inference_steps", "flow_shift"),
    "num_inference_steps": ("sigmas",),
    "flow_shift": ("sigmas",),
    "prompt": ("prompt_embeds", "original_prompt"),
    "prompt_embeds": ("prompt", "original_prompt"),
    "negative_prompt": ("negative_prompt_embeds",),
    "negative_prompt_embeds": ("negative_prompt",),
}
"""What an argument that is given beside a recipe replaces in it."""


def arguments_of(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verb and the arguments of a recipe, with what is given beside it changed; see `Request.from_recipe`."""
    if not isinstance(recipe, Mapping) or "fastvid" not in recipe:
        raise InvalidRequest("this is not a fastvid recipe: it has no 'fastvid' entry")
    verb = recipe.get("verb", "generate")
    if verb not in VERBS:
        raise InvalidRequest(f"this recipe is of {shown(verb)}; this version knows {', '.join(VERBS)}")
    if recipe.get("changed_prompts"):
        raise InvalidRequest(
            "this video's prompt was changed while it was made, which a recipe cannot repeat; make a storyboard"
        )
    given = {name: value for name, value in overrides.items() if value is not None}
    left_out = {*CONTEXT, *given, *(name for one in given for name in DISPLACED.get(one, ()))}
    kept = {name: value for name, value in {**recipe, **_full_size(recipe)}.items() if name not in left_out}
    for name, value in kept.items():
        if prints := prints_of(value):
            what = " and ".join(f"of shape {one.get('shape')} (sha256 {one['sha256']})" for one in prints)
            raise InvalidRequest(
                f"this recipe was made with {name}= {what}, which a file does not hold; give {name}= again"
            )
    return verb, kept | given


def _full_size(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A draft is asked for by what it is a draft of."""
    full = recipe.get("full_size")
    if not isinstance(full, list | tuple) or len(full) != 2:
        return {}
    return {"width": full[0], "height": full[1], "draft": True}


def prints_of(value: Any) -> list[dict[str, Any]]:
    """The prints that a recipe has in place of a tensor, a clip, or several of them."""
    ones = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and "sha256" not in value:
        ones = list(value.values())  # keyframes
    return [one for one in ones if isinstance(one, dict) and "sha256" in one]


def recordable(value: Any) -> Any:
    """A value as a recipe holds it: JSON types, and of arrays and clips a print."""
    if isinstance(value, dict):
        return {str(frame): recordable(one) for frame, one in sorted(value.items())}
    if hasattr(value, "num_frames"):
        return _print_of_clip(value)
    if isinstance(value, tuple):
        return [recordable(one) for one in value]
    return fingerprint(value) if hasattr(value, "shape") else value


def _print_of_clip(clip: Any) -> dict[str, Any]:
    """What a clip is known by: its size, and the sha256 of a few of its frames, since it may be long."""
    digest, count = hashlib.sha256(), clip.num_frames
    for frame in sorted({round(i * (count - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}):
        digest.update(clip.read(frame, frame + 1).tobytes())
    shape = [count, clip.height, clip.width, 3]
    return {"shape": shape, "fps": clip.fps, "sha256": digest.hexdigest(), "sampled": SAMPLED}


def fingerprint(value: Any) -> dict[str, Any]:
    """Shape, type and sha256 of a tensor's values as little-endian float64 in C order (exact for every float type)."""
    digest = hashlib.sha256()
    for part in value if len(value.shape) > 1 else [value]:  # a clip in float64 is large, a frame is not
        host = part.detach().cpu().double().contiguous().numpy() if hasattr(part, "detach") else part
        digest.update(host.astype("<f8").tobytes())
    return {
        "shape": [int(n) for n in value.shape],
        "dtype": str(value.dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }
