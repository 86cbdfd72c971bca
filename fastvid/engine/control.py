"""What a request gives the control branch of a VACE model: a control video, a mask, reference pictures, known frames.

A control video is depth, pose, lines, or frames to keep; its mask is white where the model makes pixels and black where
those of the video stay. image= and last_image= are frames that stay. Of a clip that is edited with a mask, or put on a
larger frame, it is what stays, with grey where something shall change. Reference pictures stand in front in time: the
model makes a latent frame more for each (`Segment.lead`), which is dropped. As diffusers' WanVACEPipeline does it.

Shapes: F pixel frames, H/W height and width, V control channels, R references, T latent frames, h/w of latents.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastvid.engine import pixels
from fastvid.engine.pixels import Known, fit_reference
from fastvid.engine.source_clip import SourceClip
from fastvid.models.loaded import Model
from fastvid.models.wan import conditioning
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment


@torch.no_grad()
def prepare(
    parts: Model, request: Resolved, segment: Segment, known: Known, source: SourceClip | None = None
) -> Tensor:
    """What the control branch sees of a checked request's segment: [1, V, R + T, h, w] on the model's device. source:
    the clip that is edited."""
    frames, mask = lay_out(request, segment, known, source)
    size = segment.made_height, segment.made_width
    references = [
        fit_reference(torch.from_numpy(picture), *size, spatial=segment.spatial)[None]
        for picture in request.reference_images or ()
    ]
    return conditioning.vace_condition(
        lambda x: pixels.encode(parts, x, segment),
        frames.movedim(0, 1)[None].to(parts.device),
        mask.movedim(0, 1)[None].to(parts.device),
        references,
        spatial=segment.spatial,
        temporal=segment.temporal,
    )


def lay_out(
    request: Resolved, segment: Segment, known: Known, source: SourceClip | None = None
) -> tuple[Tensor, Tensor]:
    """The control video and its mask on all frames of the stream: [F, 3, H, W] in [-1, 1], [F, 1, H, W] in 0..1.

    Grey, and all to be made, where nothing is given. Frames behind the end of the video, which the model makes to have
    4k + 1 and which are cropped, are as the last one.
    """
    count, size = segment.made_frames, (segment.made_height, segment.made_width)
    frames, mask = torch.zeros(count, 3, *size), torch.ones(count, 1, *size)
    # The video's frame for each of the stream's: those before its first, which a segment is shown, are as that.
    begin = segment.source_start - segment.skip
    if request.video is not None and request.verb == "generate":
        picks = (np.arange(count) + begin).clip(0, len(request.video) - 1)
        frames = pixels.fit(request.video[picks], segment)
        if request.mask is not None:
            # Where edges are soft, to the last bit as the pipeline has it, which treats a mask like a picture first.
            picks = picks.clip(0, len(request.mask) - 1)
            mask = _shares(pixels.fit(request.mask[picks][..., None], segment))
    elif source is not None and source.mask is not None:
        mask = _shares(pixels.pad(source.masks(0, count)[..., None], segment))
        frames = pixels.pad(source.frames(0, count), segment).masked_fill(mask > 0.5, 0)
    for frame, picture in pixels.place(known, segment).items():
        frames[frame], mask[frame] = picture, 0
    return frames, mask


def _shares(masks: Tensor) -> Tensor:
    """Masks in [-1, 1], as pictures are, in 0..1."""
    return ((masks + 1) / 2).clamp(0, 1)
