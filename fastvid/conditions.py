"""What the known frames of a segment give the denoiser.

Four kinds of model take them in four ways: those with more input channels (I2V, FLF2V, I2V-A14B) get a mask and latents
behind the noisy latents, most of them CLIP tokens too; those with a timestep for every token (TI2V-5B, embedded) get
them clean, at timestep 0; causal ones have them in their KV cache; the others get them at the noise level of the rest,
put back before every call. See `fastvid.models.conditioning`.

Shapes: C channels, T columns of a segment or (t) of a window, h/w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.engine import Row
from fastvid.loading import Parts
from fastvid.models import clip, conditioning
from fastvid.timeline import Segment

CHANNELS, TIMESTEPS, CACHE, REIMPOSED = "channels", "timesteps", "cache", "reimposed"
Noise = Callable[[int, int], Tensor]  # (start, stop), columns of the segment -> what their sampling starts from


def way_of(parts: Parts) -> str:
    """How a model is told of known frames."""
    config = parts.transformer.config
    if config.in_channels > config.out_channels:
        return CHANNELS
    if parts.recipe.rollout is not None:
        return CACHE
    return TIMESTEPS if parts.recipe.per_token_timesteps else REIMPOSED


@dataclass(frozen=True)
class Given:
    """The known frames of a segment: uint8 [n, H, W, 3] before and after it, and pictures by the number of their frame."""

    left: np.ndarray | None = None
    right: np.ndarray | None = None
    pictures: dict[int, np.ndarray] | None = None


@dataclass(frozen=True)
class Conditions:
    """What is known of a segment, as its model takes it.

    way: how the model is told. columns: bool [T], those that are known whole. clean: [1, C, T, h, w], their latents.
    channels: [1, M, T, h, w], behind the noisy latents. embeds: CLIP tokens [1, L, d].
    """

    way: str
    columns: Tensor
    clean: Tensor | None = None
    channels: Tensor | None = None
    embeds: Tensor | None = None

    def input(self, x: Tensor, row: Row, noise: Noise, region: Region | None) -> tuple[Tensor, Tensor]:
        """What the transformer is called with for a window's latents [1, C, t, h, w], and the levels [t] or [N] of that.

        A column at level 0 is clean, hence known. region: places that are known in the other columns.
        """
        sigma, level = row.sigma, row.sigma.max()
        if region is not None:
            x = torch.where(region.places, region.clean.to(x), x)
        if self.way == TIMESTEPS:
            levels = sigma if region is None else region.levels(sigma)
        else:
            levels = sigma if row.write_cache else level.expand(len(sigma))
        if self.way == REIMPOSED and (region is not None or bool((sigma == 0).any())):
            known = (sigma == 0).view(1, 1, -1, 1, 1).to(x.device)
            known = known if region is None else known | region.places
            noisy = (1 - float(level)) * x + float(level) * noise(row.start, row.stop).to(x)
            x = torch.where(known, noisy, x)
        if self.channels is not None:
            x = torch.cat((x, self.channels[:, :, row.start : row.stop].to(x)), dim=1)
        return x, levels


@dataclass(frozen=True)
class Region:
    """A region that is known in a window's frames: places bool [1, 1, t, h, w], clean latents [1, C, t, h, w]."""

    places: Tensor
    clean: Tensor

    def levels(self, sigma: Tensor, patch: int = 2) -> Tensor:
        """A level for every token [N]: 0 where it is known."""
        free = ~self.places[0, 0, :, ::patch, ::patch].cpu()
        return (sigma.view(-1, 1, 1) * free).flatten()


def places_of(changed: Tensor, segment: Segment, patch: int = 2) -> Tensor:
    """Where nothing changes: bool [1, 1, T, h, w], of a mask of what shall [F, made_height, made_width] in the stream.

    A token is known if all of its pixels in all of its frames are.
    """
    side = segment.spatial * patch
    cells = F.max_pool2d(changed[:, None].float(), side)[:, 0] > 0
    groups = [cells[:1], *cells[1:].split(segment.temporal)]
    tokens = torch.stack([group.any(0) for group in groups])
    return ~tokens.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[None, None]


@torch.no_grad()
def prepare(parts: Parts, segment: Segment, given: Given) -> Conditions:
    """The known frames of a segment as the model takes them, on its device."""
    way, none = way_of(parts), torch.zeros(segment.columns, dtype=torch.bool)
    pictures = given.pictures or {}
    if given.left is None and given.right is None and not pictures:
        return Conditions(way, none)
    if way == CHANNELS:
        return _channels(parts, segment, given, none)
    clean = torch.zeros(1, *segment.latent_shape(parts.vae.config.z_dim), device=parts.device)
    known = none.clone()
    for start, latents in _known_latents(parts, segment, given, pictures):
        clean[:, :, start : start + latents.shape[2]] = latents
        known[start : start + latents.shape[2]] = True
    return Conditions(way, known, clean)


def _known_latents(parts: Parts, segment: Segment, given: Given, pictures: dict[int, np.ndarray]) -> Any:
    """(first column, latents) of everything that is known."""
    if given.left is not None:
        yield segment.lead, encode(parts, pad(given.left, segment))
    if given.right is not None:
        # As the body of a stream: a causal VAE treats its first latent differently, so that is made of a lead-in.
        body = np.concatenate((given.right[:1], given.right))
        yield segment.columns - segment.right_columns, encode(parts, pad(body, segment))[:, :, 1:]
    grouped: dict[int, list[tuple[int, np.ndarray]]] = {}
    for frame, picture in sorted(pictures.items()):
        grouped.setdefault(segment.column_of(segment.skip + frame), []).append((segment.skip + frame, picture))
    for column, there in grouped.items():
        yield column, _still(parts, segment, column, there)


def _still(parts: Parts, segment: Segment, column: int, pictures: list[tuple[int, np.ndarray]]) -> Tensor:
    """The latent of a column of which some frames are known: the others are like the nearest of those."""
    if column == segment.lead:
        return encode(parts, fit(pictures[0][1], segment))
    first = (column - segment.lead - 1) * segment.temporal + 1
    frames = [min(pictures, key=lambda p, f=f: abs(p[0] - f))[1] for f in range(first, first + segment.temporal)]
    stills = [fit(frame, segment) for frame in (frames[0], *frames)]
    return encode(parts, torch.cat(stills, dim=2))[:, :, 1:]


def _channels(parts: Parts, segment: Segment, given: Given, none: Tensor) -> Conditions:
    """Mask and latents behind the noisy latents, and what CLIP sees: the first known frame, or first and last."""
    placed: dict[int, Tensor] = {}
    shown: list[np.ndarray] = []
    both = bool(parts.transformer.config.pos_embed_seq_len)
    if given.left is not None:
        placed |= dict(enumerate(pad(given.left, segment).unbind(2)))
        shown.append(given.left[0])
    for frame, picture in sorted((given.pictures or {}).items()):
        placed[segment.skip + frame] = fit(picture, segment)[:, :, 0]
        shown.append(picture)
    if given.right is not None:
        frames = pad(given.right, segment).unbind(2)
        first = segment.made_frames - len(frames)
        # Two-picture models know a last frame alone.
        placed |= {segment.made_frames - 1: frames[-1]} if both else dict(enumerate(frames, first))
        shown.append(given.right[-1])
    placed = {frame: picture.to(parts.device, parts.vae_dtype) for frame, picture in placed.items()}
    channels = conditioning.image_condition(
        lambda x: parts.vae.encode(x)[0], placed, segment.made_frames, temporal=segment.temporal
    )
    seen = [shown[0], shown[-1]] if both else shown[:1]
    return Conditions(
        CHANNELS, none, None, channels, _look(parts, seen) if parts.transformer.config.image_dim else None
    )


def _look(parts: Parts, pictures: list[np.ndarray]) -> Tensor:
    """CLIP's tokens of all pictures, one after the other: [1, L, d]."""
    size = parts.image_encoder.config.image_size
    seen = [clip.preprocess(torch.from_numpy(picture)[None], size).to(parts.device) for picture in pictures]
    return parts.image_encoder(torch.cat(seen)).flatten(0, 1)[None]


# ---------------------------------------------------------------- frames for the VAE


def encode(parts: Parts, frames: Tensor) -> Tensor:
    """Latents [1, C, T, h, w] of a stream of frames [1, 3, F, H, W]."""
    return parts.vae.encode(frames.to(parts.device, parts.vae_dtype))[0]


def fit(picture: np.ndarray, segment: Segment) -> Tensor:
    """uint8 [H, W, 3] -> fp32 [1, 3, 1, made_height, made_width]: stretched to the size that was asked for."""
    fitted = conditioning.fit_pictures(torch.from_numpy(picture)[None], segment.height, segment.width)
    return _widen(fitted, segment)[:, :, None]


def pad(frames: np.ndarray, segment: Segment) -> Tensor:
    """uint8 [F, height, width, 3] -> fp32 [1, 3, F, made_height, made_width]."""
    signed = conditioning.to_signed(torch.from_numpy(np.ascontiguousarray(frames)))
    return _widen(signed, segment).transpose(0, 1)[None]


def _widen(frames: Tensor, segment: Segment) -> Tensor:
    """The edge repeated on the right and below, where the model makes more than was asked for."""
    right, bottom = segment.made_width - segment.width, segment.made_height - segment.height
    return F.pad(frames, (0, right, 0, bottom), mode="replicate") if right or bottom else frames
