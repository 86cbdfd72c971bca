"""The options of every verb with their types, for editors and type checkers (PEP 692).

`fastvid.requests.arguments` has their checks, help texts and flags. None is the same as leaving an option out. A
picture is a file, an array or a Pillow image; a clip may also be a Video or a sequence of pictures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from fastvid.media.clip import Clip as OpenClip
    from fastvid.media.video import Video

Array: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
Path: TypeAlias = "str | os.PathLike[str]"
Picture: TypeAlias = "Path | Array | Image"
Clip: TypeAlias = "Picture | Video | OpenClip | Sequence[Picture]"
Shots: TypeAlias = "Sequence[tuple[str, float]]"
Loras: TypeAlias = "Sequence[Path | tuple[Path, float] | tuple[Path, float, str]]"
Solver = Literal["unipc", "euler", "dpm++", "redraw"]
Schedule = Literal["windows", "staggered"]
Direction = Literal["after", "before", "both"]
Quality = Literal["exact", "balanced", "fast"]
Mode = Literal["animate", "replace"]
Method = Literal["diffusion"]


class SamplingOptions(TypedDict, total=False):
    """Options of every verb."""

    negative_prompt: str | None
    seed: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    known_guidance_scale: float | None
    boundary_ratio: float | None
    flow_shift: float | None
    sigmas: Sequence[float] | Array | None
    solver: Solver | None
    schedule: Schedule | None
    conditioning_scale: float | Sequence[float] | None
    ar_step: int | None
    causal_block_size: int | None
    causal_attention: bool | None
    base_num_frames: int | None
    overlap_history: int | None
    addnoise_condition: float | None
    latents: Array | None
    prompt_embeds: Array | None
    negative_prompt_embeds: Array | None
    original_prompt: str | None
    loras: Loras | None
    quality: Quality | None
    cache: float | str | Mapping[str, Any] | None
    guidance_interval: Sequence[float] | None
    guidance_every: int | None
    guidance_batch: bool | None
    progressive: float | None
    attention: str | Mapping[str, Any] | None
    preset: str | None
    batch_size: int | None
    checkpoint: Path | None
    checkpoint_every: float | None
    keep_checkpoint: bool | None


class PromptOptions(TypedDict, total=False):
    """Prompt expansion."""

    expand_prompt: bool | None
    prompt_endpoint: str | None
    prompt_model: str | None
    prompt_key: str | None


class SizeOptions(TypedDict, total=False):
    """The size of a frame."""

    width: int | None
    height: int | None
    size: str | None
    aspect: str | float | Fraction | None
    budget: str | int | None


class LengthOptions(TypedDict, total=False):
    """The number of new frames."""

    num_frames: int | None
    seconds: float | None


class AnimateOptions(TypedDict, total=False):
    """Of `generate`, for models that are driven by a pose and a face."""

    pose_video: Clip | None
    face_video: Clip | None
    mode: Mode | None
    background_video: Clip | None
    mask_video: Clip | None
    segment_frame_length: int | None
    prev_segment_conditioning_frames: int | None


class GenerateOptions(SamplingOptions, PromptOptions, SizeOptions, LengthOptions, AnimateOptions, total=False):
    """Of `generate`."""

    fps: float | None
    draft: bool | None
    image: Picture | None
    last_image: Picture | None
    keyframes: Mapping[int, Picture] | None
    video: Clip | None
    mask: Clip | None
    reference_images: Picture | Sequence[Picture] | None


class ImageOptions(SamplingOptions, PromptOptions, SizeOptions, total=False):
    """Of `image`."""

    draft: bool | None
    reference_images: Picture | Sequence[Picture] | None


class SoundOptions(TypedDict, total=False):
    """The sound of clips."""

    audio: bool | None


class BridgeOptions(SamplingOptions, PromptOptions, LengthOptions, SoundOptions, total=False):
    """Of `loop` and `blend`."""


class ExtendOptions(BridgeOptions, total=False):
    """Of `extend`."""

    direction: Direction | None


class FinalizeOptions(SamplingOptions, PromptOptions, SizeOptions, SoundOptions, total=False):
    """Of `finalize`."""

    strength: float | None


class EditOptions(FinalizeOptions, total=False):
    """Of `edit`."""

    mask: Clip | None
    source_prompt: str | None


class InterpolateOptions(SamplingOptions, PromptOptions, SoundOptions, total=False):
    """Of `interpolate`."""

    factor: int | None
    fps: float | None
    strength: float | None
    method: Method | None


class UpscaleOptions(FinalizeOptions, total=False):
    """Of `upscale`."""

    scale: float | None
    tile: str | None
    method: Method | None


class StoryboardOptions(SamplingOptions, SizeOptions, total=False):
    """Of `storyboard`."""

    fps: float | None
    draft: bool | None
    image: Picture | None


class AnyOptions(GenerateOptions, ExtendOptions, EditOptions, total=False):
    """Options of any verb, for `stream` and `plan`, where clips and shots are options too."""

    video_2: Clip | None
    shots: Shots | None
    factor: int | None
    scale: float | None
    tile: str | None
    method: Method | None


class GivenAgain(TypedDict, total=False):
    """Inputs that a checkpoint does not hold, for `resume`."""

    image: Picture | None
    last_image: Picture | None
    keyframes: Mapping[int, Picture] | None
    video: Clip | None
    video_2: Clip | None
    mask: Clip | None
    reference_images: Picture | Sequence[Picture] | None
    pose_video: Clip | None
    face_video: Clip | None
    background_video: Clip | None
    mask_video: Clip | None
    latents: Array | None
    prompt_embeds: Array | None
    negative_prompt_embeds: Array | None
