"""What models see of known frames, control videos and reference pictures beside the noisy latents: more input channels,
CLIP tokens, the input of a control branch, or a reference in front of the video.

Shapes: C channels, T columns (latent frames) of a segment, h/w latent height and width; F pixel frames, H/W height and
width, V control channels, R reference pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastvid.engine import pixels
from fastvid.engine.pixels import KnownFrames
from fastvid.engine.source_clip import SourceClip
from fastvid.models.loaded import Model
from fastvid.models.wan import conditioning
from fastvid.models.wan.siblings import Channels
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment


@dataclass(frozen=True)
class Seen:
    """What a model of more channels sees. channels: [1, M, T, h, w]. embeds: CLIP tokens [1, L, d]. first: the latent
    [1, C, 1, h, w] of a known first column, where it is imposed. levels: the share [T, h/2, w/2] of a column's noise
    level that each of its tokens is told, on the CPU; None: all of it. reference: a picture's latent [1, C, h, w]."""

    channels: Tensor
    embeds: Tensor | None = None
    first: Tensor | None = None
    levels: Tensor | None = None
    reference: Tensor | None = None


def channels(
    model: Model, request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None = None
) -> Seen:
    """What a model of more channels sees of a segment. clip: the clip being edited."""
    if model.preset.pictures_optional:
        return _fun(model, request, segment, known, clip)
    return _pictures(model, segment, known)


# ---------------------------------------------------------------- I2V and FLF2V: pictures


def _pictures(model: Model, segment: Segment, known: KnownFrames) -> Seen:
    """Mask and latents as extra channels, and the CLIP tokens of the first known frame, or of the first and the
    last."""
    config, ends = model.transformer.config, known.clip_candidates()
    first_and_last = bool(config.pos_embed_seq_len)
    frames = {
        frame: picture.to(model.device, model.vae_dtype)[None]
        for frame, picture in pixels.place(known, segment, last_only=first_and_last).items()
    }
    channels = conditioning.image_condition(
        partial(pixels.encode, model, segment=segment), frames, segment.model_frames, temporal=segment.temporal
    )
    pictures = [ends[0], ends[-1]] if first_and_last else ends[:1]
    return Seen(channels, clip_tokens(model, pictures) if config.image_dim else None)


def clip_tokens(model: Model, pictures: list[np.ndarray]) -> Tensor:
    """The CLIP tokens of all pictures, concatenated: [1, L, d]."""
    assert model.image_encoder is not None
    size = model.image_encoder.config.image_size
    inputs = [pixels.clip_pixels(torch.from_numpy(picture)[None], size).to(model.device) for picture in pictures]
    return model.look(torch.cat(inputs)).flatten(0, 1)[None]


# ---------------------------------------------------------------- VideoX-Fun: any frames, regions, a control


def _fun(model: Model, request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None) -> Seen:
    """Of VideoX-Fun's models: a control video's latents, what is known with its mask, and a reference picture."""
    config = model.transformer.config
    kind = Channels(config.in_channels, config.out_channels, bool(config.image_dim), segment.temporal)
    parts, first, levels = [], None, None
    if kind.is_control:
        parts.append(_control_latents(model, request, segment))
    if kind.is_control and kind.image:
        parts.append(_start_latents(model, segment, known))
    else:
        frames, mask = _masked(request, segment, known, clip, kind.is_control)
        seen = conditioning.inpaint_condition(
            partial(pixels.encode, model, segment=segment),
            frames,
            mask,
            _latent_shape(model, segment),
            device=model.device,
            temporal=segment.temporal,
        )
        parts.append(seen)
        if model.preset.per_token_timesteps:
            first, levels = _imposed(model, segment, seen, mask)
    reference = _reference(model, request, segment) if model.takes_reference else None
    embeds = _clip_or_zeros(model, request, known) if config.image_dim else None
    return Seen(torch.cat(parts, dim=1), embeds, first, levels, reference)


def _imposed(model: Model, segment: Segment, seen: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(the first column's latent, None) if all of it is known, else (None, the tokens' shares of the noise level)."""
    levels, (_, height, width) = (
        conditioning.latent_levels(mask, tuple(seen.shape[2:]), segment.temporal),
        model.transformer.config.patch_size,
    )
    if levels is not None and not levels[0].any():
        return seen[:, segment.temporal :, :1], None
    return None, None if levels is None else levels[:, ::height, ::width]


def _latent_shape(model: Model, segment: Segment) -> tuple[int, int, int, int]:
    return segment.latent_shape(model.transformer.config.out_channels)


def _zeros(model: Model, segment: Segment) -> Tensor:
    return torch.zeros(1, *_latent_shape(model, segment), dtype=torch.float32, device=model.device)


def _control_latents(model: Model, request: Resolved, segment: Segment) -> Tensor:
    """The control video's latents [1, C, T, h, w]; zeros without one."""
    if request.video is None or request.verb != "generate":
        return _zeros(model, segment)
    return pixels.encode_stream(model, _video_frames(request, segment), segment)


def _start_latents(model: Model, segment: Segment, known: KnownFrames) -> Tensor:
    """The first picture's latent in the first column, zeros behind it; no pixels are encoded for those."""
    latents, placed = _zeros(model, segment), pixels.place(known, segment)
    if 0 in placed and segment.columns > 1:  # a video of one frame has no start, as in VideoX-Fun
        latents[:, :, :1] = pixels.encode_stream(model, placed[0][None], segment)
    return latents


def _masked(
    request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None, has_control: bool
) -> tuple[Tensor, Tensor]:
    """The known frames and their mask, as `control_video`; a control is none of them."""
    if has_control and request.verb == "generate":
        request = replace(request, video=None, mask=None)
    return control_video(request, segment, known, clip)


def _reference(model: Model, request: Resolved, segment: Segment) -> Tensor:
    """The reference picture's latent [1, C, h, w]; zeros without one."""
    if not request.reference_images:
        return _zeros(model, segment)[:, :, 0]
    return pixels.encode_stream(model, pixels.fit(request.reference_images[0][None], segment), segment)[:, :, 0]


def _clip_or_zeros(model: Model, request: Resolved, known: KnownFrames) -> Tensor:
    """CLIP's tokens of the reference picture, else of the first frame's picture, else zeros."""
    start = known.pictures.get(0) if known.left is None else known.left[-1]
    picture = request.reference_images[0] if request.reference_images else start
    if picture is not None:
        return clip_tokens(model, [picture])
    assert model.image_encoder is not None
    config = model.image_encoder.config
    rows = (config.image_size // config.patch_size) ** 2 + 1
    return torch.zeros(1, rows, config.hidden_size, dtype=torch.float32, device=model.device)


# ---------------------------------------------------------------- the control branch


def control_branch(
    model: Model, request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None
) -> Tensor:
    """The control branch's input for a segment: [1, V, R + T, h, w] on the model's device, as in diffusers'
    WanVACEPipeline. Reference pictures come first in time: the model generates one extra latent frame for each
    (`Segment.lead`), which is dropped."""
    frames, mask = control_video(request, segment, known, clip)
    size = segment.model_height, segment.model_width
    references = [
        pixels.fit_reference(torch.from_numpy(picture), *size, spatial=segment.spatial)[None]
        for picture in request.reference_images or ()
    ]
    return conditioning.vace_condition(
        partial(pixels.encode, model, segment=segment),
        frames.movedim(0, 1)[None].to(model.device),
        mask.movedim(0, 1)[None].to(model.device),
        references,
        spatial=segment.spatial,
        temporal=segment.temporal,
    )


def control_video(
    request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None = None
) -> tuple[Tensor, Tensor]:
    """The control video [F, 3, H, W] in [-1, 1] of all frames of the stream, and its mask [F, 1, H, W] in 0..1.

    The video is the request's (depth, pose, lines, or frames to keep), or the unmasked part of an edited clip. The mask
    is 1 where the model generates pixels: everywhere without a video, whose frames are then gray. Known frames stay.
    The last frame is repeated up to the stream's 4k + 1 frames; those are cropped from the result.
    """
    count, size = segment.model_frames, (segment.model_height, segment.model_width)
    kind = torch.float32
    frames, mask = torch.zeros(count, 3, *size, dtype=kind), torch.ones(count, 1, *size, dtype=kind)
    if request.video is not None and request.verb == "generate":
        frames, indices = _video_frames(request, segment), _video_indices(request, segment)
        if request.mask is not None:
            # Resized like a picture, as diffusers' pipeline does, so that soft edges match it bit for bit.
            indices = indices.clip(0, len(request.mask) - 1)
            mask = _unsigned(pixels.fit(request.mask[indices][..., None], segment))
    elif clip is not None and clip.mask is not None:
        mask = _unsigned(pixels.pad(clip.masks(0, count)[..., None], segment))
        frames = pixels.pad(clip.frames(0, count), segment).masked_fill(mask > 0.5, 0)
    for frame, picture in pixels.place(known, segment).items():
        frames[frame], mask[frame] = picture, 0
    return frames, mask


def _video_indices(request: Resolved, segment: Segment) -> np.ndarray:
    """Maps each frame of the stream to one of the video; context frames before the video take its first."""
    frames = np.arange(segment.model_frames) + segment.source_start - segment.skip
    return frames.clip(0, len(request.video) - 1)


def _video_frames(request: Resolved, segment: Segment) -> Tensor:
    """The request's video as the frames of the stream: [F, 3, H, W] in [-1, 1]."""
    return pixels.fit(request.video[_video_indices(request, segment)], segment)


def _unsigned(masks: Tensor) -> Tensor:
    """Maps masks from [-1, 1] to 0..1."""
    return ((masks + 1) / 2).clamp(0, 1)
