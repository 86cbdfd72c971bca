"""What is known of a model beside its weights: its defaults, and what it can do with known frames.

Patterns: how known frames reach a model, and whether it was trained for that.
native: through what it was trained with (timestep 0 for known tokens, mask and latent channels, a KV cache, a control
branch). reimposed: the model knows nothing of them; the known latents are put back at the current noise level before
every call. experimental: through the model's own way, but outside of what it was trained on. refused: not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastvid.sampling.schedulers import Scheduler

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
    """How a causal model goes through a video. Counts are in latent frames."""

    frames_per_block: int = 3
    window: int | None = None  # frames that attention sees; None: all so far
    sink: int = 0  # first frames of the video that stay in the window
    context_noise: float = 0.0  # timestep of the pass that writes a finished block to the KV cache
    recache: bool = False  # a new prompt passes the cached frames through the model again
    picture_in_block: bool = False  # a first picture is in the first block, at timestep 0; else only in the cache


@dataclass(frozen=True)
class Forcing:
    """How a model that was trained by diffusion forcing goes through a video, unless a request says otherwise. Counts
    are in frames of the video, but for blocks, which are in latent frames.

    See the arguments of the same names (`fastvid.requests.arguments`).
    """

    ar_step: int = 0
    causal_block_size: int = 1
    base_num_frames: int = 97
    overlap_history: int = 17
    addnoise_condition: float = 20.0


@dataclass(frozen=True)
class Preset:
    """A model's defaults, and what the engine has to know of its training."""

    name: str
    num_inference_steps: int = 50
    flow_shift: float = 5.0
    sigmas: tuple[float, ...] | None = None  # of a model of few steps: used as they are, instead of steps and shift
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None  # of the expert for low noise
    known_guidance_scale: float | None = None  # in edits and windows with known latents; None: guidance_scale
    edit_strength: float | None = None  # of edits without strength and source_prompt; None: 0.6
    boundary_ratio: float | None = None  # the noise level at which the second expert takes over
    fps: float = 16.0
    num_frames: int = 81
    height: int = 480
    width: int = 832
    sizes: tuple[str, ...] = ()  # width x height that it was trained at
    negative_prompt: str = ""
    solver: str = "unipc"  # "redraw": from one level to the next by x0 and new noise
    scheduler: Scheduler | None = None  # the folder's, where its levels are not the solver's own or it cannot be run
    per_token_timesteps: bool = False  # it was trained with known tokens at timestep 0
    whole_timesteps: bool = False  # it is told rounded timesteps
    spatial_multiple: int = 16  # height and width are multiples of it
    temporal: int = 4  # frames a latent frame: the model makes temporal * k + 1 frames
    rollout: Rollout | None = None  # of a causal model
    forcing: Forcing | None = None  # of a model that was trained by diffusion forcing
    window: int = 21  # latent frames that are made at once
    overlap: int = 2  # latent frames that a window has in common with the one before
    context: int = 2  # latent frames of a clip that its continuation sees
    pictures_optional: bool = False  # of models with more channels: any frames may be known, or none
    carries: bool = False  # long videos are made in windows, whose latents go on to the next as they are
    # Trained with the video's first latent frame known in every window, as if it stood so many before its first.
    anchor: int | None = None
    patterns: Patterns = TEXT_ONLY
    prompt: str | None = None  # of models that need none
    # Of models that are driven by a pose: what they do, frames of a segment, and those that it sees of the one before.
    mode: str | None = None
    segment_frame_length: int | None = None
    qualities: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what `quality=` stands for, if measured
    prev_segment_conditioning_frames: int | None = None


class Signature(NamedTuple):
    """What tells variants apart, from configurations alone."""

    dim: int
    num_layers: int
    text_dim: int = 4096
    in_channels: int = 16
    out_channels: int = 16
    image: bool = False  # it attends to CLIP tokens
    positions: bool = False  # CLIP tokens of two pictures
    control: bool = False  # it has a control branch
    experts: int = 1
    extra: str = ""  # layers that only some siblings have, by a word of `wan.variants.EXTRAS`


@dataclass(frozen=True)
class Variant:
    """A named model. Of those with one signature the first is taken, unless the folder's name or the pipeline's class
    has a hint of another: all words of one of its hints. by_name: it is never taken without that. pipeline: diffusers'
    class, where it tells."""

    preset: Preset
    signature: Signature
    hints: tuple[str, ...] = ()
    by_name: bool = False
    pipeline: str = ""
