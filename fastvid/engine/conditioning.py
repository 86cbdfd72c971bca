"""Conditions a segment on its known frames, and builds its denoiser.

Known frames reach a model in one of six ways (see `fastvid.models.wan.conditioning`):

    CHANNELS    a mask and clean latents in extra input channels, mostly with CLIP tokens (I2V, FLF2V, I2V-A14B)
    TIMESTEPS   clean latents among the noisy ones, at timestep 0 (models with a timestep per token: TI2V-5B, embedded)
    CONTROL     the video that the control branch sees (VACE)
    DRIVEN      as CHANNELS, behind a character that a pose and a face drive (Animate)
    CACHE       the KV cache (causal models)
    REIMPOSED   latents noised to the level of the others, and put back before every call (all other models)

A column is a latent frame: a column of the noise table.

Shapes: C channels, T columns of a segment, t columns of a window, N tokens of a window, h/w latent height and width;
F pixel frames, H/W height and width, V control channels, R reference pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.distributed.mesh import RankView
from fastvid.engine import between, controls, forcing, guidance, tiles, windows
from fastvid.engine import driving as driven
from fastvid.engine.controls import Seen
from fastvid.engine.guidance import GuidanceSteps, KeptDifference, Negative
from fastvid.engine.known_latents import known_latents
from fastvid.engine.levers import SegmentLevers
from fastvid.engine.pixels import KnownFrames
from fastvid.engine.regions import Region, anchored, batched
from fastvid.engine.source_clip import SourceClip
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.layers.kv_cache import KVCache
from fastvid.models.common.contexts import joined
from fastvid.models.loaded import CACHE, CHANNELS, CONTROL, DRIVEN, REIMPOSED, TIMESTEPS, Model, way_of
from fastvid.ops.upload import upload
from fastvid.requests.after import Between
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, window_of
from fastvid.sampling.guidance import Denoise, Denoiser, Guided, Switched, Velocity, flow_edit, keep_known
from fastvid.sampling.noise import StreamNoise
from fastvid.sampling.noise_table import TableRow
from fastvid.sampling.sigmas import timesteps

NEGATIVE, SOURCE = -1, -2
"""Prompt numbers of the negative prompt and of an edit's source_prompt; the request's own prompts count from 0."""


# ---------------------------------------------------------------- known frames


@dataclass(frozen=True)
class Conditions:
    """A segment's known frames in the form that its model takes.

    way: how they reach the model (CHANNELS, TIMESTEPS, ...). columns: bool [T], the fully known columns. clean: their
    latents [1, C, T, h, w]. channels: extra input channels [1, M, T, h, w]. embeds: CLIP tokens [1, L, d]. levels: see
    `Seen`. given: what the transformer's `prepare_context` takes beside: the control branch's input [1, V, T, h, w] and
    weights, a reference's latent [1, C, h, w]. fps: the frame rate, for a model that is told it. driving: of a
    character. per_token: whether a model of CHANNELS is told a noise level for each token; else it is told one.
    """

    way: str
    columns: Tensor
    clean: Tensor | None = None
    channels: Tensor | None = None
    embeds: Tensor | None = None
    levels: Tensor | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    fps: float | None = None
    driving: driven.Driving | None = None
    per_token: bool = False

    def context(self, transformer: Any, text: Tensor, negative: bool = False) -> Any:
        """The transformer's context for a (negative) text [1, L, text_dim] and these conditions, once per segment."""
        more: dict[str, Any] = {} if self.fps is None else {"fps": self.fps}
        more |= {} if self.driving is None else self.driving.arguments(negative)
        return transformer.prepare_context(text, self.embeds, **self.given, **more)

    def input(
        self, x: Tensor, row: TableRow, noise: Callable[[int, int], Tensor], region: Region | None
    ) -> tuple[Tensor, Tensor]:
        """The transformer's input latents for a window [1, C, t, h, w], and their noise levels [t] or [N].

        A column at level 0 is known. noise: returns the noise of columns (start, stop). region: the known region of the
        other columns.
        """
        sigma, level = row.sigma, row.sigma.max()
        if region is not None:
            x = torch.where(region.mask, region.clean.to(x), x)
        if self.levels is not None:
            levels = (sigma.view(-1, 1, 1) * self.levels[row.start : row.stop]).flatten()
        elif self.way == TIMESTEPS or self.per_token:
            levels = sigma if region is None else region.levels(sigma)
        else:
            levels = sigma if row.write_cache else level.expand(len(sigma))
        if self.way in (REIMPOSED, CACHE) and level > 0 and (region is not None or bool((sigma == 0).any())):
            known = upload(sigma == 0, x.device).view(1, 1, -1, 1, 1)
            known = known if region is None else known | region.mask
            noisy = (1 - float(level)) * x + float(level) * noise(row.start, row.stop).to(x)
            x = torch.where(known, noisy, x)
        return x, levels

    def window_channels(self, row: TableRow) -> Tensor | None:
        """A window's extra input channels [1, M, t, h, w]; None for models without them."""
        return None if self.channels is None else self.channels[:, :, row.start : row.stop]


def prepare(
    model: Model, request: Resolved, segment: Segment, known: KnownFrames, clip: SourceClip | None = None
) -> Conditions:
    """The known frames of a segment in the form that the model takes, on its device. clip: the clip being edited."""
    way, no_columns = way_of(model), torch.zeros(segment.columns, dtype=torch.bool)
    if way == CONTROL:
        scale = 1.0 if request.conditioning_scale is None else request.conditioning_scale
        control = controls.control_branch(model, request, segment, known, clip)
        return Conditions(way, no_columns, given={"control": control, "scales": scale})
    if way == DRIVEN:
        driving = driven.prepare(model, request, segment, known)
        embeds = controls.clip_tokens(model, [request.image]) if model.transformer.config.image_dim else None
        return Conditions(way, no_columns, None, driving.channels, embeds, driving=driving)
    if way == CHANNELS and (known or model.preset.pictures_optional):
        seen = controls.channels(model, request, segment, known, clip)
        return replace(_with_channels(segment, seen), per_token=model.preset.per_token_timesteps)
    if not known:
        return Conditions(way, no_columns)
    shape = segment.latent_shape(model.vae.config.z_dim)
    clean = torch.zeros(1, *shape, dtype=torch.float32, device=model.device)
    columns = no_columns.clone()
    for start, latents in known_latents(model, segment, known):
        clean[:, :, start : start + latents.shape[2]] = latents
        columns[start : start + latents.shape[2]] = True
    return Conditions(way, columns, clean)


def _with_channels(segment: Segment, seen: Seen) -> Conditions:
    """What a model of more channels sees; a first column that is imposed is known to the noise table."""
    columns, clean = torch.zeros(segment.columns, dtype=torch.bool), None
    if seen.first is not None:
        columns[0], clean = True, F.pad(seen.first, (0, 0, 0, 0, 0, segment.columns - 1))
    given = {} if seen.reference is None else {"reference": seen.reference}
    return Conditions(CHANNELS, columns, clean, seen.channels, seen.embeds, seen.levels, given)


# ---------------------------------------------------------------- the denoiser


class SegmentDenoiser:
    """Builds the denoisers of a segment's table rows: expert selection, guidance, and conditioning on known frames.

    texts: returns the embeddings [1, L, text_dim] of a prompt by number. ranks: how the ranks share a model call.
    caches: a causal model's KV caches: number 0 for all prompts of the request, NEGATIVE and SOURCE for those two.
    first: the latents of the segment's first column, for models that keep it in view. others: those of videos that
    differ in prompts and seed alone; this one then denoises the latents [B, C, t, h, w] of all, its own first.
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
        fps = request.fps if model.transformer.config.inject_sample_info else None
        self.conditions = replace(prepare(model, request, segment, known, self.clip), fps=fps)
        known_noise = windows.known_columns(segment), request.addnoise_condition or 0.0, torch.from_numpy(sigmas)
        self._known_noise = forcing.KnownNoise(*known_noise, self.noise.fresh)
        self.levers = SegmentLevers(model, request, segment, ranks, sigmas)
        self._steps = GuidanceSteps(model, request, sigmas)
        self.kept = KeptDifference(self._steps, self._scales, channels, segment) if self._steps.every > 1 else None
        window = window_of(segment, windows.window_columns(model, segment))
        self._paired = guidance.is_paired(model, request, window, ranks.layout)
        self.caches: dict[int, KVCache] = {}
        self.first: Tensor | None = None
        self._contexts: dict[tuple[int, ...], Any] = {}  # by (expert, prompts)
        self.others: Sequence[SegmentDenoiser] = ()

    @property
    def together(self) -> tuple[SegmentDenoiser, ...]:
        return self, *self.others

    @property
    def takes_latents(self) -> bool:
        """Whether known frames reach the model as latents."""
        return self.conditions.way in (TIMESTEPS, REIMPOSED, CACHE)

    def initial(self, start: int, stop: int) -> Tensor:
        """The latents [B, C, t, h, w] of columns that enter a window: noise (in an edit mixed with the clip), and clean
        latents in known columns."""
        return batched([one._initial(start, stop) for one in self.together])

    def fresh(self, start: int, draws: Tensor) -> Tensor:
        """New noise [B, C, t, h, w], see `StreamNoise.fresh`."""
        return batched([one.noise.fresh(start, draws) for one in self.together])

    def keep_first(self, first: Tensor | None) -> None:
        """Keeps the first columns [B, C, 1, h, w] of all in view."""
        for number, one in enumerate(self.together):
            one.first = None if first is None else first[number : number + 1]

    def _initial(self, start: int, stop: int) -> Tensor:
        latents = self.noise.initial(start, stop)
        if self.clip is not None:
            level = 0.0 if self.request.source_prompt is not None else float(self.sigmas[0])
            latents = (1 - level) * self.clip.latents(start, stop, forget=False) + level * latents
        return self.with_known(start, stop, latents)

    def with_known(self, start: int, stop: int, latents: Tensor) -> Tensor:
        """Latents of columns start to stop - 1, clean in known columns."""
        conditions = self.conditions
        if conditions.clean is None:
            return latents
        known = upload(conditions.columns[start:stop], latents.device).view(1, 1, -1, 1, 1)
        return torch.where(known, conditions.clean[:, :, start:stop], latents)

    def denoiser(self, row: TableRow, prompt: int) -> Denoise:
        """The denoiser of a table row for the prompt of this number."""
        region = self._region(row)
        if self.kept is not None:
            self.kept.begin(row)
        guided = [self._guided(row, region, expert, prompt) for expert in range(len(self.model.experts))]
        velocity = Switched(guided, self._expert_for)
        if self.clip is not None and self.request.source_prompt is not None:
            denoise = self._flow_edit(row, region, velocity)
        else:
            denoise = Denoiser(velocity)
        if self.clip is not None and isinstance(self.segment.source, Between) and not row.write_cache:
            return between.keep_frames(denoise, self.clip, row.start)
        return denoise if region is None else keep_known(denoise, region.clean, region.mask)

    def _guided(self, row: TableRow, region: Region | None, expert: int, prompt: int) -> Guided:
        """One expert's guided velocity."""
        scales = self._scales(row)
        negative, call = self._steps.of_row(row, scales), partial(self._velocity, row, region, expert)
        return Guided(
            partial(call, prompt),
            partial(call, NEGATIVE),
            1.0 if negative is Negative.NONE else scales[expert],
            self._ranks.both,
            pair=partial(self._pair, row, region, expert, prompt) if self._paired and not self.others else None,
            columns=self._steps.columns(row),
            last=None if self.kept is None else self.kept.difference,
            reuse=self._steps.share(row, scales),
        )

    def _scales(self, row: TableRow) -> tuple[float, ...]:
        """Each expert's guidance scale in a row."""
        # A refill needs no guidance: the negative prompt's cache stays valid when the other prompt changes.
        experts, some_known = len(self.model.experts), self.clip is not None or bool((row.sigma == 0).any())
        return (1.0,) * experts if row.refill else self.request.guidance_scales(experts, some_known)

    def share_contexts(self, other: SegmentDenoiser) -> None:
        """Uses another's contexts, of the same texts and conditions."""
        self._contexts = other._contexts

    def caches_of(self, row: TableRow) -> Iterator[int]:
        """The numbers of the caches that a row's model calls use (see `caches`)."""
        yield 0
        if self._steps.of_row(row, self._scales(row)) is Negative.COMPUTED:
            yield NEGATIVE
        if self.clip is not None and self.request.source_prompt is not None:
            yield SOURCE

    def _expert_for(self, sigma: Tensor) -> int:
        level = timesteps(sigma.numpy(), self.request.solver).max()
        return self.model.experts.choose(level, self.request.boundary_ratio)

    def _flow_edit(self, row: TableRow, region: Region | None, target: Velocity) -> Denoise:
        """FlowEdit from the source prompt's velocity to the target's, with new noise at every step."""
        assert self.clip is not None
        experts = range(len(self.model.experts))
        source = Switched([partial(self._velocity, row, region, e, SOURCE) for e in experts], self._expert_for)
        step = 1 + int((self.sigmas > float(row.sigma.max())).sum())
        noise = self.fresh(row.start, torch.full((len(row.sigma),), step))
        return flow_edit(target, source, self.clip.latents(row.start, row.stop), noise)

    def _region(self, row: TableRow) -> Region | None:
        """The known region of an edit's window; None where a control branch or extra channels carry it instead."""
        if self.clip is None or self.request.mask is None or not self.takes_latents:
            return None
        mask = self.clip.known_mask(row.start, row.stop)
        return Region(upload(mask, self.model.device), self.clip.latents(row.start, row.stop), mask)

    def _velocity(
        self, row: TableRow, region: Region | None, expert: int, prompt: int, x: Tensor, sigma: Tensor
    ) -> Tensor:
        """One expert's velocity for a prompt."""
        return self._call(row, region, expert, (prompt,), x)

    def _pair(
        self, row: TableRow, region: Region | None, expert: int, prompt: int, x: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocities for a prompt and the negative prompt, from one call."""
        cond, uncond = self._call(row, region, expert, (prompt, NEGATIVE), x).chunk(2)
        return cond, uncond

    def _call(self, row: TableRow, region: Region | None, expert: int, prompts: tuple[int, ...], x: Tensor) -> Tensor:
        """One expert's velocities for prompts, which see the same latents: [prompts * B, C, t, h, w]. The contexts are
        computed in the first call, which has the expert on the device anyway."""
        prompt, count = prompts[0], len(prompts)
        texts = [[one._texts(prompt) for one in self.together] for prompt in prompts]
        inputs = [one._input(row, region, prompt, x) for one, x in zip(self.together, x.split(1), strict=True)] * count
        latents, times = batched([one for one, _ in inputs]), torch.stack([one for _, one in inputs])
        has_anchor = latents.shape[2] > x.shape[2]
        offset, cache = self._offset(row, has_anchor), self._cache(row, prompt)
        with self.model.use_expert(expert) as transformer:
            context = self._contexts_of(transformer, expert, prompts, texts)
            known = self._channels(row)
            known = known if known is None else batched([known] * count)
            options: dict[str, Any] = {"known": known, "rope_offset": offset, "cache": cache, "view": self._ranks}
            options["levers"] = self.levers.of_call(row, expert, prompt)
            call = transformer if self.segment.tile is None else tiles.Tiled(transformer, self.segment)
            velocity: Tensor = call(latents, times, context, **options)
        return velocity[:, :, 1:] if has_anchor else velocity

    def _input(self, row: TableRow, region: Region | None, prompt: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the model gets of this one's latents [1, C, t, h, w], and their timesteps, [t] or one a token."""
        latents, levels = self.conditions.input(x, row, self.noise.initial, region)
        if (anchor := self._anchor(row, prompt)) is not None:
            latents, levels = anchored(latents, levels, anchor)
        return self._known_noise.add(row, latents, self._times(row, levels))

    def _channels(self, row: TableRow) -> Tensor | None:
        """A window's extra input channels [B, M, t, h, w]; None for models without them."""
        channels = [one.conditions.window_channels(row) for one in self.together]
        given = [one for one in channels if one is not None]
        return batched(given) if given else None

    def _contexts_of(
        self, transformer: Any, expert: int, prompts: tuple[int, ...], texts: Sequence[Sequence[Tensor]]
    ) -> Any:
        """The contexts of prompts as one."""
        if (key := (expert, *prompts)) not in self._contexts:
            each = zip(prompts, texts, strict=True)
            self._contexts[key] = joined([self._context(transformer, expert, *one) for one in each])
        return self._contexts[key]

    def _context(self, transformer: Any, expert: int, prompt: int, texts: Sequence[Tensor]) -> Any:
        """The context of a prompt's texts, [1, L, text_dim] each."""
        if (key := (expert, prompt)) not in self._contexts:
            negative, pairs = prompt == NEGATIVE, zip(self.together, texts, strict=True)
            made = [one.conditions.context(transformer, text, negative) for one, text in pairs]
            self._contexts[key] = joined(made)
        return self._contexts[key]

    def _times(self, row: TableRow, levels: Tensor) -> Tensor:
        """The timesteps that the model gets for these noise levels."""
        times, preset = torch.from_numpy(timesteps(levels.numpy(), self.request.solver)), self.model.preset
        if row.write_cache and preset.rollout is not None:
            return torch.full_like(times, preset.rollout.context_noise, dtype=torch.float64)
        return times.round() if preset.whole_timesteps else times

    def _offset(self, row: TableRow, anchored: bool) -> int | tuple[int, ...]:
        """RoPE positions in time: the window's first, or all of them. Only causal models count from the segment's
        start; other models' windows begin at 0, as in training."""
        preset = self.model.preset
        if anchored:
            assert preset.anchor is not None
            return (-preset.anchor, *range(len(row.sigma)))
        return 0 if preset.rollout is None else row.start

    def _anchor(self, row: TableRow, prompt: int) -> Tensor | None:
        """The segment's first column, which some models see in every later window. Without it each window sees only the
        one before, and the look of things drifts."""
        if self.model.preset.anchor is None or row.start == 0:
            return None
        if prompt != SOURCE:
            return self.first
        assert self.clip is not None
        return self.clip.first

    def _cache(self, row: TableRow, prompt: int) -> KVCache | CausalBlocks | None:
        """A causal model's KV cache for a prompt, positioned at the row's columns; or which of those see which."""
        rollout = self.model.preset.rollout
        if rollout is None:
            return forcing.causal_blocks(self.request, len(row.sigma))
        number = min(prompt, 0)
        if number not in self.caches:
            self.caches[number] = self.new_cache()
        self.caches[number].begin(row.start, len(row.sigma))
        return self.caches[number]

    def new_cache(self) -> KVCache:
        """An empty cache for one prompt of a causal model."""
        assert self.model.preset.rollout is not None
        return windows.new_cache(self.model.preset.rollout, self.segment, self.model.transformer.config.num_layers)

    def keys_like(self) -> Tensor:
        """One frame's keys in a layer's cache, without values: [1, 1, N, H, D]."""
        config, (_, height, width) = self.model.transformer.config, self.noise.shape
        tokens = height * width // (config.patch_size[1] * config.patch_size[2])
        shape = 1, 1, tokens, config.num_attention_heads, config.attention_head_dim
        return torch.empty(shape, dtype=self.model.dtype, device="meta")

    def tokens_like(self, columns: int) -> Tensor:
        """The most tokens that the blocks of one call see of a window [1, N, d]."""
        config, (_, height, width) = self.model.transformer.config, self.noise.shape
        _, ph, pw = config.patch_size
        seen = columns + (self.model.preset.anchor is not None) + self.model.takes_reference
        count = seen * (height // ph) * (width // pw)
        return torch.empty(1, count, config.dim, dtype=self.model.dtype, device="meta")
