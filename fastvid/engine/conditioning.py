"""What the known frames of a segment give the denoiser.

Four kinds of model take them in four ways: those with more input channels (I2V, FLF2V, I2V-A14B) get a mask and latents
behind the noisy latents, most of them CLIP tokens too; those with a timestep for every token (TI2V-5B, embedded) get
them clean, at timestep 0; those with a control branch (VACE) see a video in which they stay; causal ones have them in
their KV cache; the others get them at the noise level of the rest, put back before every call. See
`fastvid.models.wan.conditioning`.

Shapes: C channels, T columns of a segment or (t) of a window, h/w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.engine import control, pixels
from fastvid.engine.pixels import Known, clip_pixels
from fastvid.engine.source_clip import SourceClip
from fastvid.models.loaded import CACHE, CHANNELS, CONTROL, REIMPOSED, TIMESTEPS, Model, way_of
from fastvid.models.wan import conditioning
from fastvid.models.wan.transformer import WanTransformer
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling.loop import Row

Noise = Callable[[int, int], Tensor]  # (start, stop), columns of the segment -> what their sampling starts from


LEAD_IN = 4
"""Latents of stills in front of a clip that is encoded as body. With one, the embedded model's VAE makes the clip's
first latent 29 % (of its norm) different from what it is in the middle of a stream, with four 12 %, and not less with
more; in its videos the difference was not seen (6 clips extended to the left, 6 blends)."""


def lead_in(segment: Segment) -> int:
    """Frames of them."""
    return 1 + (LEAD_IN - 1) * segment.temporal


@dataclass(frozen=True)
class Conditions:
    """What is known of a segment, as its model takes it.

    way: how the model is told. columns: bool [T], those that are known whole. clean: [1, C, T, h, w], their latents.
    channels: [1, M, T, h, w], behind the noisy latents. embeds: CLIP tokens [1, L, d]. control: what a control branch
    sees [1, V, T, h, w]; scales: how much it counts, in all of its layers or in each.
    """

    way: str
    columns: Tensor
    clean: Tensor | None = None
    channels: Tensor | None = None
    embeds: Tensor | None = None
    control: Tensor | None = None
    scales: float | tuple[float, ...] = 1.0

    def context(self, transformer: WanTransformer, text: Tensor) -> Any:
        """What the transformer makes of a text [1, L, text_dim] and of this, once a segment."""
        if self.control is None:
            return transformer.prepare_context(text, self.embeds)
        return transformer.prepare_context(text, self.embeds, control=self.control, scales=self.scales)

    def input(self, x: Tensor, row: Row, noise: Noise, region: Region | None) -> tuple[Tensor, Tensor]:
        """What the transformer is called with for a window's latents [1, C, t, h, w], and its levels [t] or [N].

        A column at level 0 is clean, hence known. region: places that are known in the other columns.
        """
        sigma, level = row.sigma, row.sigma.max()
        if region is not None:
            x = torch.where(region.places, region.clean.to(x), x)
        if self.way == TIMESTEPS:
            levels = sigma if region is None else region.levels(sigma)
        else:
            levels = sigma if row.write_cache else level.expand(len(sigma))
        if self.way in (REIMPOSED, CACHE) and level > 0 and (region is not None or bool((sigma == 0).any())):
            known = (sigma == 0).view(1, 1, -1, 1, 1).to(x.device)
            known = known if region is None else known | region.places
            noisy = (1 - float(level)) * x + float(level) * noise(row.start, row.stop).to(x)
            x = torch.where(known, noisy, x)
        return x, levels

    def behind(self, row: Row) -> Tensor | None:
        """The channels behind a window's latents [1, M, t, h, w], of models that have them."""
        return None if self.channels is None else self.channels[:, :, row.start : row.stop]


def anchored(x: Tensor, levels: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """What the transformer is called with, behind one more column, clean [1, C, 1, h, w]; levels [t] or [N]."""
    each = 1 if len(levels) == x.shape[2] else len(levels) // x.shape[2]
    return torch.cat((anchor.to(x), x), dim=2), torch.cat((levels.new_zeros(each), levels))


@dataclass(frozen=True)
class Region:
    """A region that is known in a window's frames: places bool [1, 1, t, h, w], clean latents [1, C, t, h, w]."""

    places: Tensor
    clean: Tensor

    def levels(self, sigma: Tensor, patch: int = 2) -> Tensor:
        """A level for every token [N]: 0 where it is known."""
        free = ~self.places[0, 0, :, ::patch, ::patch].cpu()
        return (sigma.view(-1, 1, 1) * free).flatten()


@torch.no_grad()
def prepare(
    parts: Model, request: Resolved, segment: Segment, known: Known, source: SourceClip | None = None
) -> Conditions:
    """The known frames of a segment as the model takes them, on its device. source: the clip that is edited."""
    way, none = way_of(parts), torch.zeros(segment.columns, dtype=torch.bool)
    if way == CONTROL:
        scale = 1.0 if request.conditioning_scale is None else request.conditioning_scale
        seen = control.prepare(parts, request, segment, known, source)
        return Conditions(way, none, control=seen, scales=scale)
    if not known:
        return Conditions(way, none)
    if way == CHANNELS:
        return _channels(parts, segment, known, none)
    clean = torch.zeros(1, *segment.latent_shape(parts.vae.config.z_dim), device=parts.device)
    columns = none.clone()
    for start, latents in _known_latents(parts, segment, known):
        clean[:, :, start : start + latents.shape[2]] = latents
        columns[start : start + latents.shape[2]] = True
    return Conditions(way, columns, clean)


def _known_latents(parts: Model, segment: Segment, known: Known) -> Iterator[tuple[int, Tensor]]:
    """(first column, latents) of everything that is known."""
    if known.left is not None:
        yield segment.lead, pixels.encode_stream(parts, pixels.pad(known.left, segment), segment)
    if known.right is not None:
        # As the body of a stream: a causal VAE treats its first latents differently, so those are made of a lead-in.
        lead = np.repeat(known.right[:1], lead_in(segment), axis=0)
        latents = pixels.encode_stream(parts, pixels.pad(np.concatenate((lead, known.right)), segment), segment)
        yield segment.columns - segment.right_columns, latents[:, :, LEAD_IN:]
    grouped: dict[int, list[tuple[int, np.ndarray]]] = {}
    for frame, picture in sorted(known.pictures.items()):
        grouped.setdefault(segment.column_of(segment.skip + frame), []).append((segment.skip + frame, picture))
    for column, there in grouped.items():
        yield column, _still(parts, segment, column, there)


def _still(parts: Model, segment: Segment, column: int, pictures: list[tuple[int, np.ndarray]]) -> Tensor:
    """The latent of a column of which some frames are known: the others are like the nearest of those."""
    if column == segment.lead:
        return pixels.encode_stream(parts, pixels.fit(pictures[0][1][None], segment), segment)
    first = (column - segment.lead - 1) * segment.temporal + 1
    frames = [min(pictures, key=lambda p, f=f: abs(p[0] - f))[1] for f in range(first, first + segment.temporal)]
    stills = torch.cat([pixels.fit(frame[None], segment) for frame in (frames[0], *frames)])
    return pixels.encode_stream(parts, stills, segment)[:, :, 1:]


def _channels(parts: Model, segment: Segment, known: Known, none: Tensor) -> Conditions:
    """Mask and latents behind the noisy latents, and what CLIP sees: the first known frame, or first and last."""
    config, shown = parts.transformer.config, known.shown()
    both = bool(config.pos_embed_seq_len)
    placed = {
        frame: picture.to(parts.device, parts.vae_dtype)[None]
        for frame, picture in pixels.place(known, segment, last_only=both).items()
    }
    channels = conditioning.image_condition(
        lambda x: pixels.encode(parts, x, segment), placed, segment.made_frames, temporal=segment.temporal
    )
    seen = [shown[0], shown[-1]] if both else shown[:1]
    return Conditions(CHANNELS, none, None, channels, _look(parts, seen) if config.image_dim else None)


def _look(parts: Model, pictures: list[np.ndarray]) -> Tensor:
    """CLIP's tokens of all pictures, one after the other: [1, L, d]."""
    size = parts.image_encoder.config.image_size
    seen = [clip_pixels(torch.from_numpy(picture)[None], size).to(parts.device) for picture in pictures]
    return parts.look(torch.cat(seen)).flatten(0, 1)[None]
