"""The plan of a request on a loaded model: what it will cost, or why it does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastvid.device.devices import available_bytes
from fastvid.distributed import cost_model
from fastvid.distributed import layout as parallel
from fastvid.distributed.cost_model import Work
from fastvid.distributed.mesh import Layout
from fastvid.engine import decode
from fastvid.engine.conditioning import lead_in
from fastvid.engine.decode import decode_chunk
from fastvid.engine.events import Plan
from fastvid.engine.windows import count_calls, spans, window_columns
from fastvid.models.loaded import CHANNELS, CONTROL, Model, way_of
from fastvid.planning import layout as planning_layout
from fastvid.planning import memory as plan_memory
from fastvid.planning import plan
from fastvid.planning.estimate import Calls, count_vae, denoise_seconds, vae_seconds
from fastvid.planning.estimate_bands import Shared, count_halos
from fastvid.planning.memory import Cost, Memory
from fastvid.planning.speed import Rates
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline, window_of


def plan_request(
    parts: Model,
    request: Resolved,
    timeline: Timeline,
    sigmas: np.ndarray,
    keep: bool = False,
    free: int | None = None,
    rates: Rates | None = None,
    asked: Layout | None = None,
) -> tuple[Plan, Layout]:
    """What a request takes, and how ranks share it.

    keep: all of its frames stay in memory. free: bytes that can be taken of the device, if not those that can now; of
    ranks, that of the one that has the least. rates: of this machine, for an estimate of time. asked: the layout, if it
    is that of a request that goes on. Raises OutOfMemory if it
    does not fit, InvalidRequest if ranks cannot share it as was asked."""
    free = available_bytes(parts.device) if free is None else free
    free, capacity = (parallel.agree(parts.mesh, bytes) for bytes in (free, free + parts.bytes_held))
    layouts, given = planning_layout.layouts_of(parts, request, timeline, asked)
    needs = Needs(parts, request, timeline, keep)

    def taken(layout: Layout) -> int:
        return replace(needs, sharers=layout.sequence).taken(timeline.num_frames)

    choice = planning_layout.choose(parts, needs.work, layouts, given, taken, capacity)
    layout = choice.layout
    needs = replace(needs, sharers=layout.sequence)
    most = needs.window.made_height // needs.window.spatial if parts.mesh.size == 1 else 1  # ranks have bands instead
    for stripes in (n for n in plan.STRIPES if n <= most):
        needs = replace(needs, stripes=stripes)
        if needs.taken(timeline.num_frames) <= capacity:
            break
    cost = needs.cost(timeline.num_frames)
    memory = needs.memory(cost)
    if (taken := needs.taken(timeline.num_frames)) > capacity:
        hint = plan.nearest(timeline.num_frames, needs.window.temporal, lambda n: needs.taken(n) <= capacity)
        shown = replace(needs.window, num_frames=timeline.num_frames)
        plan_memory.refuse(memory, taken, capacity, shown, hint)
    # Beside each other the two take the most together, so only where that fits.
    both = memory.phases["denoising"] + cost.decoder
    # Ranks decode together, and so not beside what they denoise together: no device is free meanwhile.
    beside = decode.worth_it(parts.device) and both <= capacity and parts.mesh.size == 1
    config, segments, window = parts.transformer.config, timeline.segments, needs.window
    calls = [needs.calls(segment, sigmas) for segment in segments]
    work = [(each.count, (each.tokens, each.rows, config, parts.control_layers, each.keys)) for each in calls]
    seconds = needs.seconds(calls, rates) if rates else {}
    efficiency = needs.efficiency(calls, layout, rates) if rates and layout.size > 1 else None
    if efficiency is not None:
        seconds = {"denoise": seconds["denoise"] / (layout.size * efficiency), **needs.banded(seconds)}
    made = Plan(
        height=window.height,
        width=window.width,
        num_frames=timeline.num_frames,
        model_height=window.made_height,
        model_width=window.made_width,
        model_frames=sum(segment.made_frames - segment.left - segment.right for segment in segments),
        fps=request.fps,
        latent_shape=needs.largest.latent_shape(config.out_channels),
        segments=len(segments),
        windows=sum(len(spans(parts, segment)) for segment in segments),
        tokens=plan.count_tokens(window, config),
        steps=len(sigmas),
        model_calls=sum(each.count for each in calls),
        decode_chunk=decode_chunk(window),
        decode_stripes=needs.stripes,
        flops_denoise=sum(count * plan.denoise_flops(*each) for count, each in work),
        bytes_weights=parts.sizes.total,
        bytes_activations=cost.activations,
        bytes_decoder=cost.decoder,
        bytes_latents=cost.latents,
        bytes_frames=cost.frames,
        bytes_free=free,
        bytes_encoder=cost.encoder,
        bytes_context=cost.context,
        bytes_device=max(memory.device, both) if beside else memory.device,
        bytes_host=memory.host,
        offload=memory.offload,
        choices=(*memory.choices, *(("decoding runs beside denoising, on a stream of its own",) if beside else ())),
        device=str(parts.device),
        dtype=str(parts.dtype).removeprefix("torch."),
        backends=parts.ops.bound,
        decode_beside=beside,
        flops_attention=sum(count * plan.attention_flops(*each) for count, each in work),
        seconds=sum(seconds.values()) if seconds else None,
        seconds_parts=seconds,
        parallel=str(layout) if layout.size > 1 else "",
        bytes_graphs=cost.graphs,
        efficiency=efficiency,
        layouts=choice.seconds,
        parallel_why=choice.why(parts.links.device.name),
        link=str(parts.links) if layout.size > 1 else "",
    )
    return made, layout


@dataclass(frozen=True)
class Needs:
    """The memory that a request takes, as it is or with fewer frames. sharers: ranks that share its tokens."""

    parts: Model
    request: Resolved
    timeline: Timeline
    keep: bool
    stripes: int = 1
    sharers: int = 1

    @property
    def largest(self) -> Segment:
        return max(self.timeline.segments, key=lambda segment: window_columns(self.parts, segment))

    @property
    def window(self) -> Segment:
        """What is with the model at once."""
        return window_of(self.largest, window_columns(self.parts, self.largest))

    @property
    def work(self) -> Work:
        """A step of what is with the model at once."""
        return planning_layout.work_of(self.parts, self.request, self.window)

    @property
    def cached(self) -> int:
        """Tokens in the KV cache of a causal model when it is full."""
        return self._cached(self.largest)

    def _cached(self, segment: Segment) -> int:
        if (rollout := self.parts.preset.rollout) is None:
            return 0
        columns = min(rollout.window or segment.columns, segment.columns)
        return plan.count_tokens(window_of(segment, columns), self.parts.transformer.config)

    def calls(self, segment: Segment, sigmas: np.ndarray) -> Calls:
        """How often the model is called for a segment, and with how many tokens."""
        window = window_of(segment, window_columns(self.parts, segment))
        tokens = plan.count_tokens(window, self.parts.transformer.config)
        count = count_calls(self.parts, segment, sigmas, self.request)
        return Calls(count, tokens, max(tokens, self._cached(segment)), self.parts.tokenizer.text_length)

    def seconds(self, calls: Sequence[Calls], rates: Rates) -> dict[str, float]:
        """How long it takes, by part."""
        parts = self.parts
        config, made = parts.transformer.config, {}
        made["denoise"] = sum(denoise_seconds(each, config, parts.control_layers, rates) for each in calls)
        for name, frames in self._coded().items():
            pixels = self.window.made_height * self.window.made_width
            work = count_vae(parts.vae, decode=name == "decode") if sum(frames) else None
            chunk = self.window.temporal * decode_chunk(self.window) * pixels
            made[name] = vae_seconds(work, sum(frames) * pixels, chunk, rates) if work else 0.0
        return made

    def _coded(self) -> dict[str, list[int]]:
        """Frames of each segment that are encoded, and that are decoded."""
        segments = self.timeline.segments
        seen = [self._seen(segment) for segment in segments]
        return {"encode": seen, "decode": [segment.made_frames for segment in segments]}

    def banded(self, alone: Mapping[str, float]) -> dict[str, float]:
        """Seconds of encoding and decoding where ranks share the rows, of those that one rank would take."""
        parts, window, made = self.parts, self.window, {}
        slowest = parts.links.far if parts.links.per_host else parts.links.near
        height, width = window.made_height // window.spatial, window.made_width // window.spatial
        for name, frames in self._coded().items():
            halos = count_halos(parts.vae, decode=name == "decode") if sum(frames) else None
            made[name] = 0.0
            for count in filter(None, frames):
                latents = -(-count // window.temporal)
                rgb = 3 * count * window.made_height * window.made_width
                given = rgb if name == "decode" else parts.vae.config.z_dim * latents * height * width * 4
                chunks = -(-latents // decode_chunk(window))
                itemsize = parts.vae_dtype.itemsize
                shared = Shared(halos, latents, height, width, chunks, parts.mesh.size, itemsize, given)
                made[name] += shared.seconds(alone[name] * count / sum(frames), slowest)
        return made

    def efficiency(self, calls: Sequence[Calls], layout: Layout, rates: Rates) -> float:
        """The share of so many times one rank's speed that a step keeps in a layout, by this machine's rates and the
        links that join ranks (see `scaling_links`)."""
        links, config, most = self.parts.links, self.parts.transformer.config, max(calls, key=lambda each: each.tokens)
        linear, attention = 2.0 * most.tokens * config.dim**2, 4.0 * most.tokens * most.keys * config.dim
        device = cost_model.Device(
            "this",
            linear / rates.seconds("linear", linear),
            attention / rates.seconds("attention", attention),
        )
        per_host = links.per_host or layout.size
        return cost_model.predict(self.work, layout, device, links.near, links.far, per_host).efficiency

    def _seen(self, segment: Segment) -> int:
        """Frames of a segment that are encoded: for a control branch what stays and what changes, beside a source."""
        if way_of(self.parts) == CONTROL:
            return (2 + (segment.source is not None)) * segment.made_frames + segment.lead
        if segment.source is not None or way_of(self.parts) == CHANNELS:
            return segment.made_frames
        return segment.left + segment.right + len(segment.pictures)

    def cost(self, frames: int) -> Cost:
        """Beside weights, for so many frames."""
        parts, request, window = self.parts, self.request, self.window
        shorter = window if frames >= window.made_frames else window_of(window, frames // window.temporal + 1)
        return plan.cost(
            shorter,
            parts.transformer.config,
            parts.vae.config,
            parts.dtype.itemsize,
            text=parts.text_encoder.config,
            rows=parts.tokenizer.text_length,
            texts=1 + request.guided(len(parts.experts)) + (request.source_prompt is not None),
            experts=len(parts.experts),
            pictures=self._pictures(),
            encoded=self._encoded(),
            control_layers=parts.control_layers,
            frames=frames if self.keep else 0,
            cache=self.cached,
            stripes=self.stripes,
            graphs=parts.graphs is not None,
            sharers=self.sharers,
            bands=parts.mesh.size,
            vae_itemsize=parts.vae_dtype.itemsize,
        )

    def memory(self, cost: Cost) -> Memory:
        return plan_memory.memory(self.parts.sizes, cost, self.parts.offload)

    def taken(self, frames: int) -> int:
        """Of the device; where that is the host, also what is there twice, and the frames."""
        cost = self.cost(frames)
        memory = self.memory(cost)
        return memory.device + (memory.host + cost.frames if self.parts.device.type == "cpu" else 0)

    def _pictures(self) -> int:
        """How many CLIP looks at, or are known at all."""
        shown = max(
            len(segment.pictures) + bool(segment.left) + bool(segment.right) for segment in self.timeline.segments
        )
        return min(shown, 2) if way_of(self.parts) in (CHANNELS, CONTROL) else min(shown, 1)

    def _encoded(self) -> int:
        """The most frames that are encoded together."""
        known = max(
            max(segment.left, segment.right and segment.right + lead_in(segment)) for segment in self.timeline.segments
        )
        return max(known, self.window.temporal if any(s.source is not None for s in self.timeline.segments) else 0)
