"""A request's known pictures: read, checked against the model, and made into what its transformer takes.

Three kinds of model take one: those with more input channels (I2V, FLF2V, I2V-A14B) get a mask and latents behind the
noisy latents, most of them CLIP tokens too; those with a timestep for every token (TI2V-5B, embedded) get the first
latent clean at timestep 0; those with a control branch (VACE) see a video in which those frames stay, see
`fastvid.control`. The others take none. See `fastvid.models.conditioning`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid import control, given
from fastvid.errors import InvalidRequest
from fastvid.loading import Parts
from fastvid.models import WanTransformer, clip, conditioning
from fastvid.precision import ieee_fp32
from fastvid.requests import Request, Resolved
from fastvid.timeline import Timeline

NAMES = ("image", "last_image")


@dataclass(frozen=True)
class Conditions:
    """What a request's pictures give the denoiser; all None without pictures.

    channels: [1, M, T, h, w], behind the noisy latents. embeds: CLIP tokens [1, L, d]. first: the clean first latent
    [1, C, 1, h, w]. control: of a model with a control branch, what that sees [1, V, R + T, h, w]; scales: how much it
    counts, in all of its layers or in each.
    """

    channels: Tensor | None = None
    embeds: Tensor | None = None
    first: Tensor | None = None
    control: Tensor | None = None
    scales: float | tuple[float, ...] = 1.0

    def context(self, transformer: WanTransformer, text: Tensor) -> Any:
        """What the transformer makes of a text [1, L, text_dim] and of this, once a request."""
        if self.control is None:
            return transformer.prepare_context(text, self.embeds)
        return transformer.prepare_context(text, self.embeds, control=self.control, scales=self.scales)

    def input(self, x: Tensor) -> Tensor:
        """What the transformer is called with: latents [1, C, T, h, w], known ones in place, more channels behind."""
        if self.first is not None:
            x = torch.cat((self.first.to(x), x[:, :, 1:]), dim=2)
        return x if self.channels is None else torch.cat((x, self.channels.to(x)), dim=1)

    def levels(self, sigma: Tensor) -> Tensor:
        """The noise levels [T] of that input: 0 where it is known."""
        return sigma if self.first is None else torch.cat((sigma.new_zeros(1), sigma[1:]))

    def known(self, columns: int) -> Tensor:
        """Which latent frames are known: bool [T]."""
        return torch.arange(columns) < (self.first is not None)


def read(request: Request) -> Request:
    """The request with its pictures as uint8 arrays [H, W, 3]; without a size of its own, in the shape of its control
    video or of its first picture.

    Raises MediaError for a file that can't be read, InvalidRequest for something that is no picture.
    """
    found: dict[str, Any] = control.read(request)
    for name in NAMES:
        if (value := getattr(request, name)) is not None:
            found[name] = given.picture(name, value)
    shapes = [found[name].shape[-3:-1] for name in ("video", *NAMES) if name in found]
    if shapes and (request.height or request.width or request.aspect or request.budget) is None:
        height, width = shapes[0]
        found["aspect"] = Fraction(width, height)
    return replace(request, **found)


def check(parts: Parts, request: Resolved) -> None:
    """Raises InvalidRequest if the model can't take these pictures, or needs others."""
    control.check(parts, request)
    asked = [name for name in NAMES if getattr(request, name) is not None]
    config, name = parts.transformer.config, parts.recipe.name
    if parts.control_layers:
        pass  # any frame may stay
    elif config.in_channels > config.out_channels:
        wanted = NAMES if config.pos_embed_seq_len else NAMES[:1]
        if missing := [n for n in wanted if n not in asked]:
            raise InvalidRequest(f"{name} makes videos from pictures: give {missing[0]}=")
        if "last_image" in asked and config.image_dim and not config.pos_embed_seq_len:
            raise InvalidRequest(f"{name} takes image= alone; leave last_image out (FLF2V models take both)")
    elif asked and not parts.recipe.per_token_timesteps:
        raise InvalidRequest(f"{name} makes videos from text alone; leave {asked[0]} out")
    elif "last_image" in asked:
        raise InvalidRequest(f"last_image is not supported with {name} yet; leave it out, image= is the first frame")
    if "last_image" in asked and request.num_frames != request.model_frames:
        raise InvalidRequest(
            f"num_frames={request.num_frames}: with last_image it must be one that the model makes as it is; the "
            f"nearest is {request.model_frames}"
        )


@torch.no_grad()
def prepare(parts: Parts, request: Resolved, timeline: Timeline) -> Conditions:
    """The pictures of a checked request as the model takes them, on its device."""
    if parts.control_layers:
        scale = 1.0 if request.conditioning_scale is None else request.conditioning_scale
        with ieee_fp32():
            return Conditions(control=control.prepare(parts, request, timeline), scales=scale)
    pictures = [getattr(request, name) for name in NAMES if getattr(request, name) is not None]
    if not pictures:
        return Conditions()
    config = parts.transformer.config
    frames = [given.fit(picture[None], timeline).to(parts.device, parts.vae_dtype) for picture in pictures]
    with ieee_fp32():
        if config.in_channels == config.out_channels:
            return Conditions(first=given.encode(parts, frames[0][:, :, None], timeline))
        placed = dict(zip((0, timeline.made_frames - 1), frames, strict=False))
        channels = conditioning.image_condition(
            lambda x: given.encode(parts, x, timeline), placed, timeline.made_frames, temporal=timeline.temporal
        )
        return Conditions(channels, _look(parts, pictures) if config.image_dim else None)


def _look(parts: Parts, pictures: list[np.ndarray]) -> Tensor:
    """CLIP's tokens of all pictures, one after the other: [1, L, d]."""
    size = parts.image_encoder.config.image_size
    seen = [clip.preprocess(torch.from_numpy(picture)[None], size).to(parts.device) for picture in pictures]
    return parts.image_encoder(torch.cat(seen)).flatten(0, 1)[None]
