"""What is known of a model beside its weights: its defaults, and what it can do with known frames.

Patterns: how known frames reach a model, and whether it was trained for that.
native: through what it was trained with (timestep 0 for known tokens, mask and latent channels, a KV cache, a control
branch). reimposed: the model knows nothing of them; the known latents are put back at the current noise level before
every call. experimental: through the model's own way, but outside of what it was trained on. refused: not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

NATIVE, REIMPOSED, EXPERIMENTAL, REFUSED = "native", "reimposed", "experimental", "refused"


@dataclass(frozen=True)
class Patterns:
    """One of the four words for each way in which a video may be known in part.

    first: its first frame. prefix, suffix: frames at its start or end. both_ends. keyframe: a frame in between.
    spatial_mask: a region of every frame. staggered: noise levels that differ between frames that are still free.
    """

    first: str
    prefix: str
    suffix: str
    both_ends: str
    keyframe: str
    spatial_mask: str
    staggered: str


def _all(word: str) -> Patterns:
    return Patterns(word, word, word, word, word, word, word)


# Known frames, known regions and rising levels are all part of its training.
EVERYTHING = _all(NATIVE)
TEXT_ONLY = replace(_all(REIMPOSED), staggered=EXPERIMENTAL)
# The input is made for any frame, the training was on these alone.
FIRST_FRAME = replace(_all(EXPERIMENTAL), first=NATIVE)
# The same by mask channels, which say of whole frames whether they are known.
PICTURE = replace(FIRST_FRAME, spatial_mask=REFUSED, staggered=REFUSED)
TWO_PICTURES = replace(_all(EXPERIMENTAL), both_ends=NATIVE, spatial_mask=REFUSED, staggered=REFUSED)
CONTROL = replace(_all(NATIVE), staggered=EXPERIMENTAL)
# What comes later is not seen, and a model of few steps knows no levels but its own. A picture is a block of one frame,
# and training began with whole blocks.
CAUSAL = replace(_all(REFUSED), first=EXPERIMENTAL, prefix=NATIVE, spatial_mask=REIMPOSED)
FEW_STEPS = replace(_all(REIMPOSED), staggered=REFUSED)


def one_level(patterns: Patterns) -> Patterns:
    """The same for a model of two experts: which of them runs follows from the one level of all free frames."""
    return replace(patterns, staggered=REFUSED)


@dataclass(frozen=True)
class Rollout:
    """How a causal model goes through a video, in latent frames: blocks of frames_per_block; attention to `window` of
    them (None: to all so far), the first `sink` of the video and the latest. context_noise: the timestep of the pass
    that fills the KV cache with a finished block. recache: before a block with another prompt, what is in the cache is
    passed once more with that. picture_in_block: a first picture is the first frame of the first block, at timestep 0;
    else it only fills the cache."""

    frames_per_block: int = 3
    window: int | None = None
    sink: int = 0
    context_noise: float = 0.0
    recache: bool = False
    picture_in_block: bool = False


@dataclass(frozen=True)
class Preset:
    """A model's defaults. Sizes in pixels, fps in frames a second.

    sigmas: the levels of a model of few steps, used as they are in place of steps and shift. solver "redraw" goes from
    one to the next by x0 and new noise. guidance_scale_2, boundary_ratio: of models with two experts.
    known_guidance_scale: in edits, and windows in which some latents are known, which say much of what the text does;
    None: as elsewhere. edit_strength: of an edit that is given none and no source_prompt; None: 0.6. sizes: what it was
    trained at, width x height. spatial_multiple: what height and width must divide by. temporal: frames a latent frame,
    so that the model makes temporal * k + 1 frames. per_token_timesteps: it was trained with known tokens at timestep
    0. whole_timesteps: what it is told of the levels is rounded. anchor: it was trained with the first latent frame of
    a video in view of every window, known, as if it stood so many before the window's first; None: it was not.
    """

    name: str
    num_inference_steps: int = 50
    flow_shift: float = 5.0
    sigmas: tuple[float, ...] | None = None
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    known_guidance_scale: float | None = None
    edit_strength: float | None = None
    boundary_ratio: float | None = None
    fps: float = 16.0
    num_frames: int = 81
    height: int = 480
    width: int = 832
    sizes: tuple[str, ...] = ()
    negative_prompt: str = ""
    solver: str = "unipc"
    per_token_timesteps: bool = False
    whole_timesteps: bool = False
    spatial_multiple: int = 16
    temporal: int = 4
    rollout: Rollout | None = None
    window: int = 21
    overlap: int = 2
    context: int = 2
    carries: bool = False
    anchor: int | None = None
    patterns: Patterns = TEXT_ONLY


class Signature(NamedTuple):
    """What tells the variants apart, from configurations alone. image: it attends to CLIP tokens; positions: of two
    pictures; control: it has a control branch."""

    dim: int
    num_layers: int
    text_dim: int = 4096
    in_channels: int = 16
    out_channels: int = 16
    image: bool = False
    positions: bool = False
    control: bool = False
    experts: int = 1


@dataclass(frozen=True)
class Variant:
    """A named model. Of those with one signature the first is meant, unless a hint of another stands in the folder's
    name or in the pipeline's class."""

    preset: Preset
    signature: Signature
    hints: tuple[str, ...] = ()
