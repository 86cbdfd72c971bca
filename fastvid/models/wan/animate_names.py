"""Names of the layers that Wan-Animate has beside a picture-to-video transformer's: original -> diffusers, as in
`weight_names`; and those of its tensors that are more than renamed.
"""

from __future__ import annotations

import re

from fastvid.models.wan.weight_origin import DIFFUSERS, ORIGINAL, Origin

_ENCODER, _BLOCKS = "motion_encoder.enc.net_app.convs", "face_adapter.fuser_blocks"
MOST_LEVELS = 9  # of the motion encoder; the published one has 7, for pictures of 512 x 512
_BLOCK = {"conv1.0": "conv1", "conv2.1": "conv2", "skip.1": "conv_skip"}  # 0 of the other two is the blur
_FACE = {"linear1_q": "to_q", "linear2": "to_out", "q_norm": "norm_q", "k_norm": "norm_k"}

TRANSFORMER = {
    "pose_patch_embedding": "pose_patch_embedding",
    f"{_ENCODER}.0.0": "motion_encoder.conv_in",
    **{
        f"{_ENCODER}.{i + 1}.{a}": f"motion_encoder.res_blocks.{i}.{b}"
        for i in range(MOST_LEVELS)
        for a, b in _BLOCK.items()
    },
    # The last convolution; the published number comes last, so that it is the one that is written.
    **{f"{_ENCODER}.{i}": "motion_encoder.conv_out" for i in (*range(1, 8), 9, 8)},
    "motion_encoder.enc.fc.#": "motion_encoder.motion_network.#",
    **{f"face_encoder.{conv}.conv": f"face_encoder.{conv}" for conv in ("conv1_local", "conv2", "conv3")},
    "face_encoder.out_proj": "face_encoder.out_proj",
    "face_encoder.padding_tokens": "face_encoder.padding_tokens",
    **{f"{_BLOCKS}.#.{a}": f"face_adapter.#.{b}" for a, b in _FACE.items()},
}
DIRECTIONS = ("motion_encoder.dec.direction.weight", "motion_encoder.motion_synthesis_weight")
# Biases [1, C, 1, 1] in original files, [C] in diffusers': each stands behind its convolution.
BIASES = {f"{_ENCODER}.0.1.bias": "motion_encoder.conv_in.act_fn.bias"} | {
    f"{_ENCODER}.{i + 1}.{a}.bias": f"motion_encoder.res_blocks.{i}.{b}.act_fn.bias"
    for i in range(MOST_LEVELS)
    for a, b in (("conv1.1", "conv1"), ("conv2.2", "conv2"))
}
# Keys and values are one tensor in original files.
KEYS_VALUES = re.compile(r"face_adapter\.fuser_blocks\.(\d+)\.linear1_kv\.(weight|bias)")
KEYS_OR_VALUES = re.compile(r"face_adapter\.(\d+)\.to_([kv])\.(weight|bias)")
IGNORED = r"motion_encoder\..*\.kernel"  # of the blur, always the same


def originate(name: str, stored: str, layout: str, to: str) -> dict[str, Origin] | None:
    """The tensors in layout `to` of one in `layout` that is more than renamed, as `stored` in its file; None for the
    others."""
    here, there = (0, 1) if layout == ORIGINAL else (1, 0)
    biases = {pair[here]: pair[there] for pair in BIASES.items()}
    match = (KEYS_VALUES if layout == ORIGINAL else KEYS_OR_VALUES).fullmatch(name)
    if to == layout:
        return {name: Origin((stored,))} if match or name in biases or name == DIRECTIONS[here] else None
    if name == DIRECTIONS[here]:
        return {DIRECTIONS[there]: Origin((stored,))}
    if name in biases:
        ones = 1 if to == ORIGINAL else -1
        return {biases[name]: Origin((stored,), lead=ones, trail=2 * ones)}
    if match is None:
        return None
    if to == DIFFUSERS:
        return {f"face_adapter.{match[1]}.to_{x}.{match[2]}": Origin((stored,), i, 2) for i, x in enumerate("kv")}
    joined = ("", stored) if match[2] == "v" else (stored, "")
    return {f"{_BLOCKS}.{match[1]}.linear1_kv.{match[3]}": Origin(joined)}
