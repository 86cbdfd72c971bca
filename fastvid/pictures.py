"""A request's known pictures: read, checked against the model, and made into what its transformer takes.

Three kinds of model take one: those with more input channels (I2V, FLF2V, I2V-A14B) get a mask and latents behind the
noisy latents, most of them CLIP tokens too; those with a timestep for every token (TI2V-5B, embedded) get the first
latent clean at timestep 0; the others take none. See `fastvid.models.conditioning`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.clips import open_clip
from fastvid.errors import InvalidRequest
from fastvid.loading import Parts
from fastvid.models import clip, conditioning
from fastvid.precision import ieee_fp32
from fastvid.requests import Request, Resolved
from fastvid.timeline import Timeline

NAMES = ("image", "last_image")


@dataclass(frozen=True)
class Conditions:
    """What a request's pictures give the denoiser; all None without pictures.

    channels: [1, M, T, h, w], behind the noisy latents. embeds: CLIP tokens [1, L, d]. first: the clean first latent
    [1, C, 1, h, w].
    """

    channels: Tensor | None = None
    embeds: Tensor | None = None
    first: Tensor | None = None

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
    """The request with its pictures as uint8 arrays [H, W, 3]; without a size of its own, in the first one's shape.

    Raises MediaError for a file that can't be read, InvalidRequest for something that is no picture.
    """
    given = {name: getattr(request, name) for name in NAMES if getattr(request, name) is not None}
    pictures: dict[str, Any] = {name: _picture(name, value) for name, value in given.items()}
    if not pictures:
        return request
    if (request.height or request.width or request.aspect or request.budget) is None:
        height, width = next(iter(pictures.values())).shape[:2]
        pictures["aspect"] = Fraction(width, height)
    return replace(request, **pictures)


def _picture(name: str, value: Any) -> np.ndarray:
    """A picture of its own, uint8 RGB [H, W, 3]: what the caller does to an array later is not seen."""
    if len(getattr(value, "shape", (0, 0, 0))) != 3:
        raise InvalidRequest(f"{name} is {value.dtype} {list(value.shape)}; it must be uint8 RGB [H, W, 3]")
    with open_clip(value, name=name) as clip:
        return clip.read(0, 1)[0]


def check(parts: Parts, request: Resolved) -> None:
    """Raises InvalidRequest if the model can't take these pictures, or needs others."""
    given = [name for name in NAMES if getattr(request, name) is not None]
    config, name = parts.transformer.config, parts.recipe.name
    if config.in_channels > config.out_channels:
        wanted = NAMES if config.pos_embed_seq_len else NAMES[:1]
        if missing := [n for n in wanted if n not in given]:
            raise InvalidRequest(f"{name} makes videos from pictures: give {missing[0]}=")
        if "last_image" in given and config.image_dim and not config.pos_embed_seq_len:
            raise InvalidRequest(f"{name} takes image= alone; leave last_image out (FLF2V models take both)")
    elif given and not parts.recipe.per_token_timesteps:
        raise InvalidRequest(f"{name} makes videos from text alone; leave {given[0]} out")
    elif "last_image" in given:
        raise InvalidRequest(f"last_image is not supported with {name} yet; leave it out, image= is the first frame")
    if "last_image" in given and request.num_frames != request.model_frames:
        raise InvalidRequest(
            f"num_frames={request.num_frames}: with last_image it must be one that the model makes as it is; the "
            f"nearest is {request.model_frames}"
        )


@torch.no_grad()
def prepare(parts: Parts, request: Resolved, timeline: Timeline) -> Conditions:
    """The pictures of a checked request as the model takes them, on its device."""
    given = [getattr(request, name) for name in NAMES if getattr(request, name) is not None]
    if not given:
        return Conditions()
    config = parts.transformer.config
    frames = [_fit(torch.from_numpy(picture), timeline).to(parts.device, parts.vae_dtype) for picture in given]
    with ieee_fp32():
        if config.in_channels == config.out_channels:
            return Conditions(first=_encode(parts, frames[0][:, :, None]))
        placed = dict(zip((0, timeline.made_frames - 1), frames, strict=False))
        channels = conditioning.image_condition(
            lambda x: _encode(parts, x), placed, timeline.made_frames, temporal=timeline.temporal
        )
        return Conditions(channels, _look(parts, given) if config.image_dim else None)


def _encode(parts: Parts, frames: Tensor) -> Tensor:
    return parts.vae.encode(frames)[0]


def _look(parts: Parts, pictures: list[np.ndarray]) -> Tensor:
    """CLIP's tokens of all pictures, one after the other: [1, L, d]."""
    size = parts.image_encoder.config.image_size
    seen = [clip.preprocess(torch.from_numpy(picture)[None], size).to(parts.device) for picture in pictures]
    return parts.image_encoder(torch.cat(seen)).flatten(0, 1)[None]


def _fit(picture: Tensor, timeline: Timeline) -> Tensor:
    """uint8 [H, W, 3] -> fp32 [1, 3, made_height, made_width]: stretched to the size that was asked for, and its edge
    repeated where the model makes more."""
    fitted = conditioning.fit_pictures(picture[None], timeline.height, timeline.width)
    right, bottom = timeline.made_width - timeline.width, timeline.made_height - timeline.height
    return F.pad(fitted, (0, right, 0, bottom), mode="replicate")
