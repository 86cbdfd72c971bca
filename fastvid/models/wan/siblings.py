"""What siblings of Wan are, from the names and shapes of their tensors (in diffusers' names, for `detect`), and those
that are known and not supported, from their tensors or their name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastvid.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
TASKS = ("fun-inp", "fun-control", "df")
REFERENCE, FRAME_RATE = "ref_conv.weight", "fps_embedding.weight"


class Channels(NamedTuple):
    """What a transformer takes and gives. temporal: mask channels, one for each frame of a latent."""

    given: int
    out: int
    image: bool
    temporal: int = 4

    @property
    def is_picture(self) -> bool:
        """Noise, mask, the picture's latents: I2V, and Fun-InP."""
        return self.given == 2 * self.out + self.temporal

    @property
    def is_inpaint(self) -> bool:
        """Fun-InP 5B: with latents of 48 channels there is no I2V."""
        return self.is_picture and self.out == 48

    @property
    def is_control(self) -> bool:
        """Noise, control, the start picture's latents (2.1); or with the mask before these (2.2)."""
        masked = self.given == 3 * self.out + self.temporal and not self.image
        return masked or (self.given == 3 * self.out and self.image)


def find(shapes: Shapes, channels: Channels) -> tuple[str, str] | None:
    """(family, task) of a sibling's transformer; None if it is none, or has the very tensors of a Wan."""
    if FRAME_RATE in shapes and channels.given == channels.out:
        return "skyreels-v2", "df"
    if channels.is_control:
        return ("wan2.1" if channels.image else "wan2.2"), "fun-control"
    if channels.is_inpaint:
        return "wan2.2", "fun-inp"
    return None


def config(shapes: Shapes) -> dict[str, Any]:
    """What a sibling's config.json says beside Wan's."""
    if REFERENCE in shapes:
        return {"add_ref_conv": True, "in_dim_ref_conv": shapes[REFERENCE][1]}
    if FRAME_RATE in shapes:
        return {"_class_name": "SkyReelsV2Transformer3DModel", "inject_sample_info": True}
    return {}


# ---------------------------------------------------------------- known and not supported

_BY_TENSORS = (
    (r"control_adapter\.conv\.weight", "Fun-Camera (camera paths as an input)"),
    (r"blocks\.\d+\.block\..*", "Wan-Animate 2 (a driving video's keys and values in every block)"),
    (r"casual_audio_encoder\..*", "Wan2.2-S2V (speech to video)"),
    (r"patch_embedding_mask\..*", "SCAIL-2 (a pose by masks)"),
    (r"patch_embedding_pose\..*", "SCAIL (a pose by tokens)"),
)
_BY_NAME = (
    (r"phantom", "Phantom (reference pictures behind the video)"),
    (r"fun.*camera", "Fun-Camera (camera paths as an input)"),
    (r"animate[-_ ]?2(?!\d)", "Wan-Animate 2 (a driving video's keys and values in every block)"),
    (r"(?<![a-z0-9])s2v(?![a-z0-9])", "Wan2.2-S2V (speech to video)"),
    (r"scail", "SCAIL (a pose by masks or tokens)"),
)


def check_tensors(names: Iterable[str]) -> None:
    """Raises CheckpointError for the tensors (in any layout, behind any prefix) of a model that is not supported."""
    names = list(names)
    for pattern, model in _BY_TENSORS:
        regex = re.compile(rf"(.*\.)?{pattern}")
        if found := next((name for name in names if regex.fullmatch(name)), None):
            raise CheckpointError(f"these weights are {model} by {found:.120}; fastvid does not run it")
    if any("vace_blocks.0." in name for name in names) and any("img_emb." in name for name in names):
        raise CheckpointError(
            "these weights are a VACE model with a picture embedding (img_emb); fastvid runs VACE on text-to-video "
            "models alone"
        )


def check_name(name: str) -> None:
    """Raises CheckpointError for the name of a model that has the tensors of another, and is not supported."""
    for pattern, model in _BY_NAME:
        if re.search(pattern, name, re.IGNORECASE):
            raise CheckpointError(
                f"{name.strip():.120} is {model} by its name; fastvid does not run it. If it is not, say what it is by "
                "variant=NAME"
            )
