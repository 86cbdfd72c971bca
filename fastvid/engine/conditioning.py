"""What the model is told in each call, and the denoiser that follows.

The known frames of a segment reach models in five ways: models with more input channels (I2V, FLF2V, I2V-A14B) get a mask
and latents behind the noisy latents, most of them CLIP tokens too; models with a timestep for every token (TI2V-5B,
embedded) get them clean, at timestep 0; models with a control branch (VACE) see a video in which they stay; causal models
have them in their KV cache; all others get them at the noise level of the rest, put back before every call. See
`fastvid.models.wan.conditioning`.

Shapes: C channels, T columns of a segment or (t) of a window, N tokens of a window, h/w latent height and width; F pixel
frames, H/W height and width, V control channels, R reference pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.device.precision import ieee_fp32
from fastvid.distributed.mesh import RankView
from fastvid.engine import pixels, windows
from fastvid.engine.pixels import KnownFrames
from fastvid.engine.source_clip import SourceClip
from fastvid.layers.kv_cache import KVCache
from fastvid.models.loaded import CACHE, CHANNELS, CONTROL, REIMPOSED, TIMESTEPS, Model, way_of
from fastvid.models.wan import conditioning
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling.guidance import Denoise, Denoiser, Guided, Switched, Velocity, flow_edit, keep_known
from fastvid.sampling.noise import StreamNoise
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import timesteps

NEGATIVE, SOURCE = -1, -2
"""Numbers of the prompts that are not the request's own: the negative one, and an edit's source_prompt."""

LEAD_IN = 4
"""Latents of stills in front of a clip that is encoded as body. With one, the embedded model's VAE makes the clip's
first latent 29 % (of its norm) different from what it is in the middle of a stream, with four 12 %, and not less with
more; in its videos the difference was not seen (6 clips extended to the left, 6 blends)."""


def lead_in(segment: Segment) -> int:
    """Frames of the LEAD_IN latents."""
    return 1 + (LEAD_IN - 1) * segment.temporal


# ---------------------------------------------------------------- known frames


@dataclass(frozen=True)
class Conditions:
    """What is known of a segment, as its model takes it.

    way: how the model is told. columns: bool [T], those that are known whole. clean: [1, C, T, h, w], their latents.
    channels: [1, M, T, h, w], behind the noisy latents. embeds: CLIP tokens [1, L, d]. control: what a control branch
    sees [1, V, T, h, w]; scales: its weight, one or one for each of its layers.
    """

    way: str
    columns: Tensor
    clean: Tensor | None = None
    channels: Tensor | None = None
    embeds: Tensor | None = None
    control: Tensor | None = None
    scales: float | tuple[float, ...] = 1.0

    def context(self, transformer: Any, text: Tensor) -> Any:
        """The transformer's context of a text [1, L, text_dim] and of this: once a segment."""
        if self.control is None:
            return transformer.prepare_context(text, self.embeds)
        return transformer.prepare_context(text, self.embeds, control=self.control, scales=self.scales)

    def input(
        self, x: Tensor, row: TableRow, noise: Callable[[int, int], Tensor], region: Region | None
    ) -> tuple[Tensor, Tensor]:
        """The transformer's input for a window's latents [1, C, t, h, w], and its levels [t] or [N].

        A column at level 0 is clean, hence known. noise: of columns (start, stop). region: places that are known in the
        other columns.
        """
        sigma, level = row.sigma, row.sigma.max()
        if region is not None:
            x = torch.where(region.places, region.clean.to(x), x)
        if self.way == TIMESTEPS:
            levels = sigma if region is None else region.levels(sigma)
        else:
            levels = sigma if row.write_cache else level.expand(len(sigma))
        if self.way in (REIMPOSED, CACHE) and level > 0 and (region is not None or bool((sigma == 0).any())):
            places = (sigma == 0).view(1, 1, -1, 1, 1).to(x.device)
            places = places if region is None else places | region.places
            noisy = (1 - float(level)) * x + float(level) * noise(row.start, row.stop).to(x)
            x = torch.where(places, noisy, x)
        return x, levels

    def behind(self, row: TableRow) -> Tensor | None:
        """The channels behind a window's latents [1, M, t, h, w], of models that have them."""
        return None if self.channels is None else self.channels[:, :, row.start : row.stop]


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
    model: Model, request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None = None
) -> Conditions:
    """The known frames of a segment as the model takes them, on its device. clip: the one that is edited."""
    way, none = way_of(model), torch.zeros(segment.columns, dtype=torch.bool)
    if way == CONTROL:
        scale = 1.0 if request.conditioning_scale is None else request.conditioning_scale
        return Conditions(way, none, control=_control(model, request, segment, known, clip), scales=scale)
    if not known:
        return Conditions(way, none)
    if way == CHANNELS:
        return _channels(model, segment, known, none)
    clean = torch.zeros(1, *segment.latent_shape(model.vae.config.z_dim), device=model.device)
    columns = none.clone()
    for start, latents in known_latents(model, segment, known):
        clean[:, :, start : start + latents.shape[2]] = latents
        columns[start : start + latents.shape[2]] = True
    return Conditions(way, columns, clean)


def known_latents(model: Model, segment: Segment, known: KnownFrames) -> Iterator[tuple[int, Tensor]]:
    """(first column, latents) of everything that is known."""
    if known.left is not None:
        yield segment.lead, pixels.encode_stream(model, pixels.pad(known.left, segment), segment)
    if known.right is not None:
        # As the body of a stream: a causal VAE encodes a stream's first latents differently, so stills stand there.
        lead = np.repeat(known.right[:1], lead_in(segment), axis=0)
        latents = pixels.encode_stream(model, pixels.pad(np.concatenate((lead, known.right)), segment), segment)
        yield segment.columns - segment.right_columns, latents[:, :, LEAD_IN:]
    by_column: dict[int, list[tuple[int, np.ndarray]]] = {}
    for frame, picture in sorted(known.pictures.items()):
        by_column.setdefault(segment.column_of(segment.skip + frame), []).append((segment.skip + frame, picture))
    for column, pictures in by_column.items():
        yield column, _still(model, segment, column, pictures)


def _still(model: Model, segment: Segment, column: int, pictures: list[tuple[int, np.ndarray]]) -> Tensor:
    """The latent of a column of which some frames are known: the others are like the nearest of those."""
    if column == segment.lead:
        return pixels.encode_stream(model, pixels.fit(pictures[0][1][None], segment), segment)
    first = (column - segment.lead - 1) * segment.temporal + 1
    frames = [_nearest(pictures, frame) for frame in range(first, first + segment.temporal)]
    stills = torch.cat([pixels.fit(frame[None], segment) for frame in (frames[0], *frames)])
    return pixels.encode_stream(model, stills, segment)[:, :, 1:]


def _nearest(pictures: list[tuple[int, np.ndarray]], frame: int) -> np.ndarray:
    return min(pictures, key=lambda one: abs(one[0] - frame))[1]


def _channels(model: Model, segment: Segment, known: KnownFrames, none: Tensor) -> Conditions:
    """Mask and latents behind the noisy latents; and CLIP's tokens of the first known frame, or of first and last."""
    config, shown = model.transformer.config, known.shown()
    both = bool(config.pos_embed_seq_len)
    placed = {
        frame: picture.to(model.device, model.vae_dtype)[None]
        for frame, picture in pixels.place(known, segment, last_only=both).items()
    }
    channels = conditioning.image_condition(
        partial(pixels.encode, model, segment=segment), placed, segment.made_frames, temporal=segment.temporal
    )
    seen = [shown[0], shown[-1]] if both else shown[:1]
    return Conditions(CHANNELS, none, None, channels, _clip_tokens(model, seen) if config.image_dim else None)


def _clip_tokens(model: Model, pictures: list[np.ndarray]) -> Tensor:
    """CLIP's tokens of all pictures, one after the other: [1, L, d]."""
    assert model.image_encoder is not None
    size = model.image_encoder.config.image_size
    seen = [pixels.clip_pixels(torch.from_numpy(picture)[None], size).to(model.device) for picture in pictures]
    return model.look(torch.cat(seen)).flatten(0, 1)[None]


# ---------------------------------------------------------------- the control branch


def _control(model: Model, request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None) -> Tensor:
    """What a control branch sees of a segment: [1, V, R + T, h, w] on the model's device, as in diffusers'
    WanVACEPipeline. Reference pictures stand in front in time: the model makes a latent frame more for each
    (`Segment.lead`), which is dropped."""
    frames, mask = control_video(request, segment, known, clip)
    size = segment.made_height, segment.made_width
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
    """The control video and its mask on all frames of the stream: [F, 3, H, W] in [-1, 1], [F, 1, H, W] in 0..1.

    It is what the request gives (depth, pose, lines, or frames to keep), or the part of an edited clip that stays. The
    mask is 1 where the model makes pixels: everywhere, with grey frames, where nothing is given. Known frames stay.
    Frames past the video's end, which are made to have 4k + 1 and cropped, are like its last one.
    """
    count, size = segment.made_frames, (segment.made_height, segment.made_width)
    frames, mask = torch.zeros(count, 3, *size), torch.ones(count, 1, *size)
    if request.video is not None and request.verb == "generate":
        # The video's frame for each of the stream's; those that a segment is shown before it are like its first.
        picks = (np.arange(count) + segment.source_start - segment.skip).clip(0, len(request.video) - 1)
        frames = pixels.fit(request.video[picks], segment)
        if request.mask is not None:
            # Resized as a picture, as the pipeline does: soft edges are the same to the last bit.
            picks = picks.clip(0, len(request.mask) - 1)
            mask = _unsigned(pixels.fit(request.mask[picks][..., None], segment))
    elif clip is not None and clip.mask is not None:
        mask = _unsigned(pixels.pad(clip.masks(0, count)[..., None], segment))
        frames = pixels.pad(clip.frames(0, count), segment).masked_fill(mask > 0.5, 0)
    for frame, picture in pixels.place(known, segment).items():
        frames[frame], mask[frame] = picture, 0
    return frames, mask


def _unsigned(masks: Tensor) -> Tensor:
    """Masks in [-1, 1], as pictures are, in 0..1."""
    return ((masks + 1) / 2).clamp(0, 1)


# ---------------------------------------------------------------- the denoiser


class SegmentDenoiser:
    """The denoiser of a segment's rows: guidance over the velocities of the expert for the row's level, with what is
    known of the video.

    texts: embeddings [1, L, text_dim] of a prompt by number. ranks: how they share a call. caches: KV caches of a causal
    model, by prompt: 0 for all of the request's own. first: the segment's first column, for models that keep it in view.
    """

    def __init__(
        self,
        model: Model,
        request: Resolved,
        sigmas: np.ndarray,
        segment: Segment,
        known: KnownFrames,
        texts: Callable[[int], Tensor],
        ranks: RankView,
    ) -> None:
        self.model, self.request, self.sigmas, self.segment = model, request, sigmas, segment
        self._texts, self._ranks = texts, ranks
        channels, _, height, width = segment.latent_shape(model.transformer.config.out_channels)
        shape = channels, height, width
        self.noise = StreamNoise(request.seed, shape, segment.origin, model.device, request.latents)
        self.clip = None if segment.source is None else SourceClip(model, segment, known, request.mask)
        with ieee_fp32():
            self.conditions = prepare(model, request, segment, known, self.clip)
        self.caches: dict[int, KVCache] = {}
        self.first: Tensor | None = None
        self._contexts: dict[tuple[int, int], Any] = {}  # by expert and prompt

    @property
    def takes_latents(self) -> bool:
        """Whether known frames reach the model as latents."""
        return self.conditions.way in (TIMESTEPS, REIMPOSED, CACHE)

    def initial(self, start: int, stop: int) -> Tensor:
        """The columns that enter a window [1, C, t, h, w]: noise, of an edit mixed with the clip; clean latents where
        they are known."""
        latents, at = self.noise.initial(start, stop), self.conditions
        if self.clip is not None:
            level = 0.0 if self.request.source_prompt is not None else float(self.sigmas[0])
            latents = (1 - level) * self.clip.latents(start, stop, forget=False) + level * latents
        if at.clean is None:
            return latents
        columns = at.columns[start:stop].view(1, 1, -1, 1, 1).to(latents.device)
        return torch.where(columns, at.clean[:, :, start:stop], latents)

    def denoiser(self, row: TableRow, prompt: int) -> Denoise:
        """The denoiser of a table row for a prompt by number."""
        # A refill has no guidance: the cache of the negative prompt stays true when the other prompt changes.
        experts = self.model.experts
        some_known = self.clip is not None or bool((row.sigma == 0).any())
        scales = (1.0,) * len(experts) if row.refill else self.request.guidance_scales(len(experts), some_known)
        region = self._region(row)
        guided = [
            Guided(
                partial(self._velocity, row, region, expert, prompt),
                partial(self._velocity, row, region, expert, NEGATIVE),
                scale,
                self._ranks.both,
            )
            for expert, scale in enumerate(scales)
        ]
        velocity = Switched(guided, self._expert_for)
        if self.clip is not None and self.request.source_prompt is not None:
            denoise = self._flow_edit(row, region, velocity)
        else:
            denoise = Denoiser(velocity)
        return denoise if region is None else keep_known(denoise, region.clean, region.places)

    def _expert_for(self, sigma: Tensor) -> int:
        return self.model.experts.choose(timesteps(sigma.numpy(), self.request.solver).max())

    def _flow_edit(self, row: TableRow, region: Region | None, target: Velocity) -> Denoise:
        """FlowEdit from the velocity for the source's own prompt, with new noise at every level."""
        assert self.clip is not None
        experts = range(len(self.model.experts))
        source = Switched([partial(self._velocity, row, region, e, SOURCE) for e in experts], self._expert_for)
        draw = 1 + int((self.sigmas > float(row.sigma.max())).sum())
        noise = self.noise.fresh(row.start, torch.full((len(row.sigma),), draw))
        return flow_edit(target, source, self.clip.latents(row.start, row.stop), noise)

    def _region(self, row: TableRow) -> Region | None:
        """The places that are known in the window's frames; a control branch is shown them instead."""
        if self.clip is None or self.request.mask is None or not self.takes_latents:
            return None
        return Region(self.clip.known_places(row.start, row.stop), self.clip.latents(row.start, row.stop))

    def _velocity(
        self, row: TableRow, region: Region | None, expert: int, prompt: int, x: Tensor, sigma: Tensor
    ) -> Tensor:
        """One expert's velocity for a prompt. Its context is made in its first call, when it is on the device anyway."""
        model, key = self.model, (expert, prompt)
        text = self._texts(prompt)
        latents, levels = self.conditions.input(x, row, self.noise.initial, region)
        if (anchor := self._anchor(row, prompt)) is not None:
            latents, levels = anchored(latents, levels, anchor)
        times, offset, cache = self._times(row, levels), self._offset(row, anchor is not None), self._cache(row, prompt)
        with model.experts.use(expert) as transformer, ieee_fp32():
            if key not in self._contexts:
                self._contexts[key] = self.conditions.context(transformer, text)
            more = {"known": self.conditions.behind(row), "rope_offset": offset, "cache": cache, "view": self._ranks}
            velocity = transformer(latents, times[None], self._contexts[key], **more)
        return velocity if anchor is None else velocity[:, :, 1:]

    def _times(self, row: TableRow, levels: Tensor) -> Tensor:
        """The timesteps that the model is told for these levels."""
        times, preset = torch.from_numpy(timesteps(levels.numpy(), self.request.solver)), self.model.preset
        if row.write_cache and preset.rollout is not None:
            return torch.full_like(times, preset.rollout.context_noise, dtype=torch.float64)
        return times.round() if preset.whole_timesteps else times

    def _offset(self, row: TableRow, anchored: bool) -> int | tuple[int, ...]:
        """The window's first position, or all of its positions. Only a causal model counts along the segment; windows of
        other models begin at 0, wherever they are, as in training."""
        preset = self.model.preset
        if anchored:
            assert preset.anchor is not None
            return (-preset.anchor, *range(len(row.sigma)))
        return 0 if preset.rollout is None else row.start

    def _anchor(self, row: TableRow, prompt: int) -> Tensor | None:
        """The first column, which some models keep in view of later windows: each is shown only the one before, and over
        many windows the look of things gets lost."""
        if self.model.preset.anchor is None or row.start == 0:
            return None
        if prompt != SOURCE:
            return self.first
        assert self.clip is not None
        return self.clip.first

    def _cache(self, row: TableRow, prompt: int) -> KVCache | None:
        """A causal model's KV cache for a prompt, ready for the row's columns."""
        rollout = self.model.preset.rollout
        if rollout is None:
            return None
        kind = min(prompt, 0)
        if kind not in self.caches:
            layers = self.model.transformer.config.num_layers
            self.caches[kind] = windows.new_cache(rollout, self.segment, layers)
        self.caches[kind].begin(row.start, len(row.sigma))
        return self.caches[kind]


def anchored(x: Tensor, levels: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and levels ([t] or [N]) with one more clean column [1, C, 1, h, w] in front."""
    each = 1 if len(levels) == x.shape[2] else len(levels) // x.shape[2]
    return torch.cat((anchor.to(x), x), dim=2), torch.cat((levels.new_zeros(each), levels))
