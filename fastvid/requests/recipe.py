"""Recipes: JSON that records how a video was made, stored in its file, and the arguments that reproduce it.

Pictures, clips and tensors are recorded as fingerprints (shape and sha256); to reproduce the video they must be passed
again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

from fastvid.checks import guarded, shown
from fastvid.errors import InvalidRequest
from fastvid.requests.arguments import VERBS

CONTEXT = ("fastvid", "verb", "model", "settings", "full_size")
"""Entries of a recipe that are not arguments: version, verb, model, load settings, and a draft's full size."""

MAX_ENTRIES = 1000
SAMPLED = 5
"""How many frames of a clip are hashed for its fingerprint."""

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
"""The recipe entries that an override drops, since they contradict it."""


def arguments_of(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verb and the arguments of a recipe, with overrides applied; see `Request.from_recipe`."""
    recipe = _plain("recipe", recipe)
    if "fastvid" not in recipe:
        raise InvalidRequest("this is not a fastvid recipe: it has no 'fastvid' entry")
    verb = recipe.get("verb", "generate")
    if not isinstance(verb, str) or verb not in VERBS:
        raise InvalidRequest(f"this recipe is of verb {shown(verb)}; this version knows {', '.join(VERBS)}")
    if recipe.get("changed_prompts"):
        raise InvalidRequest(
            "this video's prompt was changed while it was made, which a recipe cannot repeat; make a storyboard"
        )
    overrides = {name: value for name, value in overrides.items() if value is not None}
    left_out = {*CONTEXT, *overrides, *(name for override in overrides for name in DISPLACED.get(override, ()))}
    kept = {name: value for name, value in {**recipe, **_draft_arguments(recipe)}.items() if name not in left_out}
    for name, value in kept.items():
        if prints := prints_of(value):
            what = " and ".join(f"of shape {one.get('shape')} (sha256 {one['sha256']})" for one in prints)
            raise InvalidRequest(
                f"this recipe was made with {name}= {what:.160}, which a file does not hold; give {name}= again"
            )
    return verb, kept | overrides


@guarded("a recipe: what video.recipe holds, and fastvid inspect shows of a file")
def _plain(name: str, recipe: Any) -> dict[str, Any]:
    """A recipe's entries. Raises InvalidRequest for values that JSON does not have."""
    if not isinstance(recipe, Mapping) or len(recipe) > MAX_ENTRIES:
        raise InvalidRequest("this is not a fastvid recipe: it has no 'fastvid' entry")
    entries = dict(itertools.islice(recipe.items(), MAX_ENTRIES))
    if not all(isinstance(key, str) for key in entries):
        raise InvalidRequest("this is not a fastvid recipe: the names of its entries are text")
    return entries


def _draft_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A draft's size arguments: its full size, and draft=True. Empty for other recipes."""
    full = recipe.get("full_size")
    if not isinstance(full, list | tuple) or len(full) != 2:
        return {}
    return {"width": full[0], "height": full[1], "draft": True}


def prints_of(value: Any) -> list[dict[str, Any]]:
    """The fingerprints in a recipe entry: of a tensor, a clip, or several of them."""
    entries = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and "sha256" not in value:
        entries = list(value.values())  # keyframes
    return [entry for entry in entries if isinstance(entry, dict) and "sha256" in entry]


def recordable(value: Any) -> Any:
    """A value as a recipe records it: JSON types, and fingerprints of arrays and clips."""
    if isinstance(value, dict):
        return {str(frame): recordable(one) for frame, one in sorted(value.items())}
    if hasattr(value, "num_frames"):
        return _clip_fingerprint(value)
    if isinstance(value, tuple):
        return [recordable(one) for one in value]
    return fingerprint(value) if hasattr(value, "shape") else value


def _clip_fingerprint(clip: Any) -> dict[str, Any]:
    """A clip's size and the sha256 of SAMPLED of its frames, since it may be long."""
    digest, count = hashlib.sha256(), clip.num_frames
    for frame in sorted({round(i * (count - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}):
        digest.update(clip.read(frame, frame + 1).tobytes())
    shape = [count, clip.height, clip.width, 3]
    return {"shape": shape, "fps": clip.fps, "sha256": digest.hexdigest(), "sampled": SAMPLED}


def fingerprint(value: Any) -> dict[str, Any]:
    """Shape, dtype and sha256 of a tensor's values as little-endian float64 in C order (exact for every float type)."""
    digest = hashlib.sha256()
    for part in value if len(value.shape) > 1 else [value]:  # in parts, since float64 copies are large
        host = part.detach().cpu().double().contiguous().numpy() if hasattr(part, "detach") else part
        digest.update(host.astype("<f8").tobytes())
    return {
        "shape": [int(n) for n in value.shape],
        "dtype": str(value.dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }
